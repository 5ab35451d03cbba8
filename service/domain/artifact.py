"""What a result may be: told from the type its server gives, or from its first bytes where that type says nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping

from service.domain.image import JPEG, PNG, WEBP
from service.domain.task import ArtifactName

SVG = "image/svg+xml"
OPAQUE = "application/octet-stream"

BEGINNING = 4_096
"""So many bytes are enough to tell what a result is."""

EXTENSIONS: Mapping[str, str] = {PNG: "png", JPEG: "jpg", WEBP: "webp", SVG: "svg", OPAQUE: "bin"}
"""How a file of each media type is called."""

_BITMAPS = frozenset({PNG, JPEG, WEBP})
_FITTING: Mapping[ArtifactName, frozenset[str]] = {
    ArtifactName.IMAGE: _BITMAPS,
    ArtifactName.GRID: _BITMAPS,
    ArtifactName.VECTOR: frozenset({SVG}),
}
_SAYS_NOTHING = frozenset({"", OPAQUE, "binary/octet-stream"})
_OTHER_NAMES = {"image/jpg": JPEG}

# Blanks, declarations and comments in any number, then the root. Nothing is tried twice: that would take for ever.
_SVG = re.compile(
    rb"(?:\xef\xbb\xbf)?"
    rb"(?>\s+|<\?.*?\?>|<!--.*?-->|<!DOCTYPE\s+(?:\w+:)?svg\b[^<>\[]*(?:\[.*?\]\s*)?>)*+"
    rb"<(?:\w+:)?svg[\s>/]",
    re.DOTALL,
)


def said_type(content_type: str) -> str:
    """The media type of a Content-Type, in its usual spelling; OPAQUE where it says nothing."""
    said = content_type.partition(";")[0].strip().lower()
    return OPAQUE if said in _SAYS_NOTHING else _OTHER_NAMES.get(said, said)


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
