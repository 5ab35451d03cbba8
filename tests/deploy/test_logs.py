"""LOGS.md documents the events that the code logs, and RUNBOOK.md names no other."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_LOGGERS = {"_log", "_logger", "logger"}
_METHODS = {"debug", "info", "warning", "error", "exception", "log"}


def logged_fields() -> Mapping[str, set[str]]:
    """Return the fields of all events that the code logs. Registry changes are logged where they are written.

    The sandbox logs as a library does.
    """
    results: dict[str, set[str]] = defaultdict(set)
    for path in (_ROOT / "service").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())) if "sandbox" not in path.parts else ():
            match call:
                case ast.Call(func=ast.Attribute(value=logger, attr=method)):
                    is_log = ast.unparse(logger).rpartition(".")[2] in _LOGGERS and method in _METHODS
                    name = call.args[method == "log"] if is_log or method == "write_change" else None
                    if isinstance(name, ast.Constant):
                        results[str(name.value)] |= {keyword.arg for keyword in call.keywords if keyword.arg}
                    else:  # it could not be searched for; one function passes on the name
                        assert name is None or ast.unparse(name) == "event"
    return results


def test_every_event_is_documented() -> None:
    """LOGS.md has exactly the logged events, with all of their fields."""
    logged = logged_fields()
    rows = re.findall(r"\| `([^`]+)` \| [a-z, ]+ \| ([^|]*) \| [^|]+ \|", (_ROOT / "deploy" / "LOGS.md").read_text())
    assert sorted(name for name, _ in rows) == sorted(logged)
    for name, fields in rows:
        assert logged[name] - {"exc_info"} <= set(re.findall(r"`(\w+)`", fields)), name
    runbook = (_ROOT / "deploy" / "RUNBOOK.md").read_text()
    named = set(re.findall(r'(?:event="|`)([a-z_]+\.(?!toml|yaml)[a-z_]+)["`]', runbook))
    assert {"request.error", "settlement.retrying"} <= named <= logged.keys()
