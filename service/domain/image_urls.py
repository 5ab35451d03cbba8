"""Rules of `image_url`: the addresses that a tenant may name, and images within the URL itself (RFC 2397)."""

from __future__ import annotations

import binascii
import re
from collections.abc import Iterator

from service.domain.errors import FieldError, InvalidOptions
from service.domain.hosts import allows_url
from service.domain.tenants import Tenant
from service.domain.webhooks import parse_url

IMAGE_URL_FIELD = "image_url"
MAX_IMAGE_URL_CHARS = 8_192
"""Of an address: signed ones with a session token have up to some 4,000."""
_DATA_SCHEME = "data:"
_DATA_HEAD = re.compile(r"data:[!-+\--~]{0,200};base64,", re.IGNORECASE)
"""Its media type does not matter: images are judged by their bytes."""
_BASE64_SLICE_CHARS = 256 * 1024
"""Decoded in under 1 ms."""


def is_data_url(text: str) -> bool:
    return text[: len(_DATA_SCHEME)].lower() == _DATA_SCHEME


def decode_data_url(text: str) -> Iterator[bytes]:
    """Yield the content of a data URL in pieces. Raises InvalidOptions."""
    head = _DATA_HEAD.match(text)
    if head is None:
        raise _invalid("must begin as in data:image/png;base64, if it holds the image itself")
    for start in range(head.end(), len(text), _BASE64_SLICE_CHARS):
        piece = text[start : start + _BASE64_SLICE_CHARS]
        try:
            content = binascii.a2b_base64(piece, strict_mode=True)
        except ValueError:  # also of characters that are not ASCII
            raise _invalid("must hold the image in base64, with its padding and without line breaks") from None
        if piece.endswith("=") and start + len(piece) < len(text):
            raise _invalid("must hold the image in base64, whose padding ends it")
        yield content


def parse_image_url(text: str) -> str:
    """Validate and normalise the URL of an image. Raises InvalidOptions."""
    return parse_url(IMAGE_URL_FIELD, text, MAX_IMAGE_URL_CHARS)


def check_image_url(tenant: Tenant, url: str) -> None:
    """Raise InvalidOptions if the tenant may not name a URL, which depends on the list of its hosts alone."""
    if not allows_url(tenant.image_destinations(), url):
        raise _invalid("must be at a host and port that the operators of the gateway have allowed you")


def _invalid(detail: str) -> InvalidOptions:
    return InvalidOptions([FieldError(IMAGE_URL_FIELD, detail)])
