"""The page at `/docs`: the API's document, made readable.

Written here rather than taken from a viewer: those that pip can install bring several megabytes of script, fetch it
from elsewhere, or do not know OpenAPI 3.1. This page is plain HTML, needs nothing but itself, and runs under a content
security policy that lets it load and send nothing.
"""

from __future__ import annotations

from service.api.docs.page import HEADERS, docs_page

__all__ = ["HEADERS", "docs_page"]
