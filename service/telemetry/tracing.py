"""Which trace a request belongs to: the context of the W3C, as it comes with requests."""

from __future__ import annotations

import re
from collections.abc import Iterable

Headers = Iterable[tuple[bytes, bytes]]
"""The headers of a request as ASGI gives them: their names in lower case."""

_TRACEPARENT = re.compile(
    rb"(?P<version>(?!ff)[0-9a-f]{2})"
    rb"-(?P<trace>(?!0{32})[0-9a-f]{32})"
    rb"-(?P<span>(?!0{16})[0-9a-f]{16})"
    rb"-(?P<flags>[0-9a-f]{2})"
    rb"(?P<more>-.*)?"
)


def trace_id(headers: Headers) -> str | None:
    """The trace a request says it belongs to, as 32 hexadecimal digits; None if it does not say so as it should.

    Of a later version than ours that part is read which every version has.
    """
    given = [value for name, value in headers if name == b"traceparent"]
    if len(given) != 1:  # of several nobody knows which is meant
        return None
    read = _TRACEPARENT.fullmatch(given[0].strip(b" \t"))
    if read is None or (read["more"] is not None and read["version"] == b"00"):
        return None
    return read["trace"].decode()
