"""Idempotency keys: how callers write them, and what makes two submissions the same.

The header is a string of RFC 8941 in the draft of the standard, `"like this"`; most clients leave the quotes out, which
is understood too, and means the same key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence

import msgspec

from service.domain.errors import IdempotencyKeyInvalid
from service.domain.reservation import Idempotency
from service.domain.task import Options

MAX_KEY = 255
_DIGEST_CHARACTERS = 32
_QUOTED = re.compile(r'"((?:[ !#-\[\]-~]|\\["\\])*)"')
_BARE = re.compile(r"[!#-+\--:<-\[\]-~]+")
"""Visible ASCII, but for what would make it more than one plain string: quotes, backslashes, commas and semicolons."""


def parse_key(values: Sequence[str]) -> str | None:
    """The key that the header was given with; None without one. Raises IdempotencyKeyInvalid."""
    if not values:
        return None
    if len(values) > 1:
        raise IdempotencyKeyInvalid("Send one Idempotency-Key only.")
    text = values[0].strip(" \t")
    quoted = _QUOTED.fullmatch(text)
    key = re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else text
    if not key or not (quoted or _BARE.fullmatch(text)):
        raise IdempotencyKeyInvalid(
            'An Idempotency-Key is one string of visible ASCII, best in quotes: "a-uuid-or-so". Nothing may follow it; '
            "without quotes it can't hold spaces, commas, semicolons or backslashes."
        )
    if len(key) > MAX_KEY:
        raise IdempotencyKeyInvalid(f"An Idempotency-Key has at most {MAX_KEY} characters.")
    return key


def identify(
    key: str, options: Options, metadata: Mapping[str, str], image_sha256: bytes, webhook: str | None = None
) -> Idempotency:
    """The digests under which a submission is known: its content is its kind, every field, and the image's bytes.

    A field that is left out is the same as one with its default. Keys are kept across upgrades, so the digests must not
    change with one: an option that is added leaves those of all who do not use it as they were. So does `webhook`, the
    address that was given for this task.
    """
    content: tuple[object, ...] = (options.kind, _chosen(options), sorted(metadata.items()), image_sha256)
    if webhook is not None:
        content += (webhook,)
    return Idempotency(_digest(key.encode()), _digest(msgspec.msgpack.encode(content)))


def _chosen(options: Options) -> Sequence[tuple[str, object]]:
    """The options that are not at their defaults, by name."""
    chosen = []
    for field in msgspec.structs.fields(options):
        value = getattr(options, field.name)
        if value != field.default:
            chosen.append((field.name, value or 0))  # -0.0 is the number 0.0, but is written differently
    return sorted(chosen)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:_DIGEST_CHARACTERS]
