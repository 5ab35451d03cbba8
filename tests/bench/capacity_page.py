"""The figures of deploy/CAPACITY.md: measured ones in tables, and calculations such as `1,000 × submit ÷ 1,000 = 2.0`.

A row of a table begins with the name of a figure: bytes, or milliseconds of a gateway's CPU and of the store's, whose
name ends in `_redis`. A calculation uses these names and constants of the gateway. Its result keeps its decimals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path

from service.clients.http import MAX_REQUESTS
from service.settings import SETTINGS
from service.storage.redis import DAY_MS, KEEP_USAGE_MS
from service.usecases.loop_share import MAX_BUSY
from tests.bench.scaling_report import Scaling
from tests.bench.targets import format_number

PAGE = Path(__file__).parents[2] / "deploy" / "CAPACITY.md"
_OPERATIONS = {
    "submit": "submit, 300 KB",
    "submit_small": "submit, 1 KB",
    "task_small": "task until its end, 1 KB",
    "check": "check of a running task",
    "change": "change published by another process",
    "read": "read a task, cached",
    "read_stored": "read a task, not cached",
    "list": "list of 20",
    "list_filtered": "list, filter without match",
    "usage": "usage of a month",
    "scrape": "scrape",
    "reload": "reload of the registry",
}
_PARTS = {
    "task_bytes": "finished task",
    "reservation_bytes": "reservation of a finished task",
    "entry_bytes": "entry in the tenant's list",
    "key_bytes": "idempotency key",
    "registered_bytes": "tenant in the registry",
    "counter_bytes": "tenant's counters",
    "usage_bytes": "usage of a tenant's day",
}
_ROW = re.compile(r"^\| `(\w+)` \|(?: [\d.,]+ \|)+", re.MULTILINE)
_CALCULATION = re.compile(r"`([^`=]+) = ([\d.,]+)`")
_OPERATORS = str.maketrans({"×": "*", "÷": "/", "−": "-", ",": None, "⌈": "ceil(", "⌉": ")"})


def update_page(page: str, scaling: Scaling) -> str:
    """Return the page with the figures of a run, those with most tenants and tasks."""
    figures = {name: (scaling.bytes[part],) for name, part in _PARTS.items()} | {
        name: (costs[-1].gateway_ms, costs[-1].store_ms)
        for name, operation in _OPERATIONS.items()
        for costs in [scaling.rows()[operation]]
    }
    cells = {name: list(map(format_number, values)) for name, values in figures.items()}
    page = _ROW.sub(lambda row: f"| `{row[1]}` | {' | '.join(cells[row[1]])} |", page)
    names = _constants()
    for name, shown in cells.items():  # what the page shows, so that readers get the same results
        names |= zip((name, f"{name}_redis"), (float(text.replace(",", "")) for text in shown), strict=False)
    return _CALCULATION.sub(lambda match: _calculate(match[1], match[2], names), page)


def _constants() -> dict[str, float]:
    defaults = {setting.field: setting.default or "" for setting in SETTINGS}
    return {
        "slots": MAX_REQUESTS,
        "poll_share": MAX_BUSY,
        "poll_seconds": float(defaults["poll_seconds"]),
        "retention_days": int(defaults["task_retention_days"]),
        "usage_days": KEEP_USAGE_MS // DAY_MS,
    }


def _calculate(text: str, former: str, names: Mapping[str, float]) -> str:
    code = text.translate(_OPERATORS)
    value = eval(code, {"__builtins__": {}, "ceil": ceil}, dict(names))  # noqa: S307 - the text is the project's own
    return f"`{text} = {value:,.{len(former.partition('.')[2])}f}`"
