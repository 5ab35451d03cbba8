"""What callers prefer (RFC 7240): so far, to wait for the end of a task."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 60
_WAIT = re.compile(r"wait[ \t]*=[ \t]*(?:([0-9]{1,9})|\"([0-9]{1,9})\")[ \t]*(?:;.*)?", re.IGNORECASE)


def wait_seconds(headers: Sequence[str]) -> int:
    """The seconds of the first `wait` in the `Prefer` headers of a request, from 1 to 60; 0 if there is none.

    Preferences that are not known, or make no sense, are passed over, as the standard wants it.
    """
    for preference in ",".join(headers).split(","):
        if found := _WAIT.fullmatch(preference.strip(" \t")):
            return min(int(found[1] or found[2]), LONGEST)
    return 0


def applied(seconds: int) -> dict[str, str]:
    """The header that says so, if it was gone by."""
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}
