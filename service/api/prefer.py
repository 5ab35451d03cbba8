"""What callers prefer (RFC 7240): so far, to wait for the end of a task."""

from __future__ import annotations

import re
from collections.abc import Sequence

LONGEST = 60
"""No longer than that, in seconds, since what stands between closes connections on which nothing happens."""
_MOST_CHARACTERS = 1_000
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*(?:"|$))+')
_WAIT = re.compile(r'wait[ \t]*(?:=[ \t]*(?:([0-9]+)|"([0-9]*)")?)?[ \t]*(?:;.*)?', re.IGNORECASE)
_NAMES_WAIT = re.compile(r"wait[ \t]*(?:[=;]|$)", re.IGNORECASE)


def wait_seconds(headers: Sequence[str]) -> int:
    """For how many seconds the `Prefer` headers of a request want to wait, 60 at the most; 0 if they do not.

    `wait` without a number wants as long as there is; an empty value is the same as none.
    As the standard wants it, only the first of several counts, and what is not known or makes no sense is passed over.
    """
    given = ",".join(headers)
    if len(given) > _MOST_CHARACTERS:  # nobody prefers so much, and taking it apart costs time
        return 0
    for preference in _PREFERENCE.findall(given):
        stripped = preference.strip(" \t")
        if _NAMES_WAIT.match(stripped):
            found = _WAIT.fullmatch(stripped)
            return min(int(found[1] or found[2] or LONGEST), LONGEST) if found else 0
    return 0


def applied(seconds: int) -> dict[str, str]:
    """The header that says so, if it was gone by."""
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}
