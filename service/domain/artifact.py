"""The types that a result may have, by its first bytes alone: the label that its server gives it counts for nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.domain.image import JPEG, PNG, WEBP
from service.domain.task import ArtifactName

SVG = "image/svg+xml"
OPAQUE = "application/octet-stream"

BEGINNING = 65_536
"""So many bytes are enough to tell what a result is; of an SVG, comments and declarations may fill most of them."""
BITMAP_BEGINNING = 12
"""So many bytes are enough to tell a bitmap."""

EXTENSIONS: Mapping[str, str] = {PNG: "png", JPEG: "jpg", WEBP: "webp", SVG: "svg", OPAQUE: "bin"}
"""How a file of each media type is called."""

_BITMAPS = frozenset({PNG, JPEG, WEBP})
_FITTING: Mapping[ArtifactName, frozenset[str]] = {
    ArtifactName.IMAGE: _BITMAPS,
    ArtifactName.GRID: _BITMAPS,
    ArtifactName.VECTOR: frozenset({SVG}),
}

# Blanks, declarations and comments in any number, then the root. Nothing is tried twice: that would take for ever.
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?"
    rb"(?>\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(?:\w+:)?svg\b[^<>\[]*(?:\[.*?\]\s*)?>)*+"
    rb"<(?:\w+:)?svg[\s>/]",
    re.DOTALL,
)


def seen_type(beginning: bytes) -> str:
    """The media type of a result that begins so; OPAQUE for any that no result may have."""
    if beginning.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if beginning.startswith(b"\xff\xd8\xff"):
        return JPEG
    if beginning.startswith(b"RIFF") and beginning[8:12] == b"WEBP":
        return WEBP
    return SVG if _SVG.match(beginning) else OPAQUE


def fits(name: ArtifactName, media_type: str) -> bool:
    """Whether a result of this name may be of this type."""
    return media_type in _FITTING[name]
