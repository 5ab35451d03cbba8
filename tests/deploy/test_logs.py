"""LOGS.md documents exactly the events that the code logs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[2]
_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
_ROW = re.compile(r"\| `([^`]+)` \| ([a-z, ]+) \| ([^|]*) \| [^|]+ \|")


class Event(NamedTuple):
    """The levels of an event, its fields beyond the common ones, and whether it may have more."""

    levels: frozenset[str]
    fields: frozenset[str]
    is_open: bool = False


def logged_events() -> Mapping[str, Event]:
    """Return all events that the code logs. The sandbox logs as a library does."""
    results: dict[str, Event] = {}
    for path in (_ROOT / "service").rglob("*.py"):
        if "sandbox" in path.parts:
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for name, event in _call_events(call, call.func):
                    levels, fields, is_open = results.get(name, Event(frozenset(), frozenset()))
                    results[name] = Event(levels | event.levels, fields | event.fields, is_open or event.is_open)
    return results


def _call_events(call: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, Event]]:
    """Yield the event of a logging call. Registry changes are logged where they are written."""
    logger = ast.unparse(function.value).rpartition(".")[2]
    words = {"exception" if keyword.arg == "exc_info" else keyword.arg for keyword in call.keywords}
    fields, is_open = frozenset(filter(None, words)), None in words
    if function.attr == "write_change":
        yield (
            _literal_text(call.args[0]),
            Event(frozenset({"info"}), fields | {"version"}, is_open or len(call.args) > 2),
        )
    elif logger not in {"_log", "logger", "_logger"}:
        return
    elif function.attr == "log":
        levels = frozenset(level.lower() for level in re.findall(r"logging\.([A-Z]+)", ast.unparse(call.args[0])))
        yield _literal_text(call.args[1]), Event(levels, fields, is_open)
    elif function.attr in _LEVELS and ast.unparse(call.args[0]) != "event":
        fields |= {"exception"} if function.attr == "exception" else set()
        yield _literal_text(call.args[0]), Event(frozenset({_LEVELS[function.attr]}), fields, is_open)


def _literal_text(node: ast.expr) -> str:
    """Return a literal text: an event name that is put together could not be searched for."""
    assert isinstance(node, ast.Constant), ast.unparse(node)
    return str(node.value)


def test_every_event_is_documented() -> None:
    """LOGS.md has each event with its levels and fields, and RUNBOOK.md names no other."""
    logged = logged_events()
    rows = _ROW.findall((_ROOT / "deploy" / "LOGS.md").read_text())
    assert sorted(row[0] for row in rows) == sorted(logged)
    for name, levels, fields in rows:
        assert frozenset(levels.split(", ")) == (logged[name].levels or frozenset(levels.split(", "))), name
        documented = frozenset(re.findall(r"`(\w+)`", fields))
        assert documented >= logged[name].fields, name
        assert logged[name].is_open or documented == logged[name].fields, name
    runbook = (_ROOT / "deploy" / "RUNBOOK.md").read_text()
    named = set(re.findall(r'(?:event="|`)([a-z_]+\.(?!toml|yaml)[a-z_]+)["`]', runbook))
    assert {"request.error", "settlement.retrying"} <= named <= logged.keys()
