"""What the head of an answer tells of a file, and whether it can be passed on."""

from __future__ import annotations

import re

from httpx2 import Headers
from msgspec import Struct

from service.domain.errors import RangeNotSatisfiable, UpstreamInvalidResponse, UpstreamUnavailable
from service.usecases.ports import Asked, Portion

TRY_AGAIN_AFTER = 5.0

_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_NO_RANGE = re.compile(r"bytes \*/[0-9]{1,18}")
_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,200}"')
_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")


class Head(Struct, frozen=True, kw_only=True):
    """A file that can be passed on, as far as its head tells.

    `length` is of what is given, `exact` says the same where no Content-Length does. `from_start` says that the first
    byte given is the first of the file.
    """

    portion: Portion
    length: int | None
    exact: int | None
    from_start: bool
    content_range: str | None
    etag: str | None
    last_modified: str | None
    accept_ranges: str | None


def read(status: int, headers: Headers, asked: Asked, *, most: int, recent: bool = False) -> Head:
    """What an answer that is no redirect gives of a file, of at most so many bytes.

    Labels are ignored: a Content-Encoding too, which stores replay though the bytes are plain. A `recent` file may not
    have arrived in its store yet.

    Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable.
    """
    portion = _portion(status, headers, asked, recent=recent)
    # Beside a Transfer-Encoding, a Content-Length means nothing.
    length = None if "transfer-encoding" in headers else _number(headers.get("content-length"))
    exact, size, first, content_range = length, length, 0, None
    if portion is Portion.PART:
        content_range = headers.get("content-range", "")
        first, exact, size = _range(content_range)
        if length not in {None, exact}:
            raise UpstreamInvalidResponse("The upstream gives out another range of this result than it says.")
    if max(size or 0, exact or 0) > most:
        raise UpstreamInvalidResponse(f"This result is larger than the {most} bytes that are passed on.")
    return Head(
        portion=portion,
        length=length,
        exact=exact,
        from_start=first == 0,
        content_range=content_range,
        etag=_matching(_ETAG, headers.get("etag")),
        last_modified=_matching(_DATE, headers.get("last-modified")),
        accept_ranges="bytes" if headers.get("accept-ranges", "").lower() == "bytes" else None,
    )


def _portion(status: int, headers: Headers, asked: Asked, *, recent: bool) -> Portion:
    match status:
        case 200:
            return Portion.WHOLE
        case 206 if asked.range:
            return Portion.PART
        case 304 if asked.if_none_match or asked.if_modified_since:
            return Portion.NOTHING
        case 416 if asked.range:
            raise RangeNotSatisfiable(
                "This result has no bytes in that range.",
                content_range=_matching(_NO_RANGE, headers.get("content-range")),
            )
        case 403 | 404 if recent:
            raise UpstreamUnavailable(
                f"The upstream does not give out this result yet (HTTP {status}): its task has just ended. Try again.",
                retry_after=TRY_AGAIN_AFTER,
            )
        case 401 | 403 | 404 | 410:
            raise UpstreamInvalidResponse(
                f"The upstream no longer gives out this result (HTTP {status}): it keeps results for a while only."
            )
        case 408 | 425 | 429 | 500 | 502 | 503 | 504:
            raise UpstreamUnavailable(
                f"The upstream can't give out this result just now (HTTP {status}). Try again.",
                retry_after=TRY_AGAIN_AFTER,
            )
        case _:
            raise UpstreamInvalidResponse(f"The upstream answered with HTTP {status} in place of this result.")


def _range(content_range: str) -> tuple[int, int, int | None]:
    """The first byte of a range, how many it has, and how many the whole has if that is known."""
    found = _RANGE.fullmatch(content_range)
    if found is None or int(found[1]) > int(found[2]):
        raise UpstreamInvalidResponse("The upstream gives out a part of this result without saying which.")
    first, last, size = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    return first, last - first + 1, size


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _matching(pattern: re.Pattern[str], text: str | None) -> str | None:
    """What is passed on to others has the form it must have, or is left out."""
    return text if text and pattern.fullmatch(text) else None
