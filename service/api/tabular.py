"""CSV (RFC 4180), and who wants it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MEDIA_TYPE = "text/csv; header=present"

_JSON, _CSV = "application/json", "text/csv"
_QUALITY = re.compile(r"(?:^|;)\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII)
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def wants_csv(accept: str) -> bool:
    """Whether an `Accept` header (RFC 9110) puts CSV before JSON: by its qualities, and else by naming it."""
    return _rank(accept, _CSV) > _rank(accept, _JSON)


def _rank(accept: str, media_type: str) -> tuple[float, int]:
    """The quality that the most special range for a media type gives it, and how special that is."""
    qualities = {}
    for each in accept.lower().split(","):
        name, _, parameters = each.partition(";")
        quality = _QUALITY.search(parameters)
        qualities[name.strip()] = float(quality[1]) if quality else 1.0
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next(((qualities[each], -place) for place, each in enumerate(ranges) if each in qualities), (0.0, 0))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows under their names. No text becomes a formula in a spreadsheet; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([map(_cell, row) for row in (head, *rows)])
    return text.getvalue().encode()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their paths, such as `spent_observed_count`."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= flat(each, f"{prefix}{name}_") if isinstance(each, Mapping) else {prefix + name: each}
    return found


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
