"""LOGS.md documents exactly the events that the code logs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[2]
_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
_STYLE = re.compile(r"[a-z]+(_[a-z]+)*\.[a-z]+(_[a-z0-9]+)*")
_FILES = (".toml", ".yaml")
_ROW = re.compile(r"\| `([^`]+)` \| ([a-z, ]+) \| ([^|]*) \| [^|]+ \|")


class Event(NamedTuple):
    """The levels of an event, its fields beyond the common ones, and whether it may have more."""

    levels: frozenset[str]
    fields: frozenset[str]
    is_open: bool = False


@cache
def logged_events() -> dict[str, Event]:
    """Return all events that the code logs."""
    results: dict[str, Event] = {}
    for path in (_ROOT / "service").rglob("*.py"):
        if path.is_relative_to(_ROOT / "service" / "sandbox"):  # it logs as a library does
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for name, (levels, fields, is_open) in _call_events(call, call.func):
                    before = results.get(name, Event(frozenset(), frozenset()))
                    results[name] = Event(before.levels | levels, before.fields | fields, before.is_open or is_open)
    return results


def _call_events(call: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, Event]]:
    """Yield the event of a logging call. Registry changes are logged where they are written."""
    logger = ast.unparse(function.value).rpartition(".")[2]
    words = {keyword.arg for keyword in call.keywords if keyword.arg}
    fields = frozenset("exception" if word == "exc_info" else word for word in words)
    is_open = any(keyword.arg is None for keyword in call.keywords)
    if function.attr == "write_change":
        is_open = is_open or len(call.args) > 2  # fields of the result
        yield _literal_text(call.args[0]), Event(frozenset({"info"}), fields | {"version"}, is_open)
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


def documented_events() -> dict[str, Event]:
    rows = list(_ROW.finditer((_ROOT / "deploy" / "LOGS.md").read_text()))
    events = {row[1]: Event(frozenset(row[2].split(", ")), frozenset(re.findall(r"`(\w+)`", row[3]))) for row in rows}
    assert len(events) == len(rows), "an event is documented twice"
    return events


def test_every_event_is_documented() -> None:
    """LOGS.md has each event with its levels and fields."""
    known, logged = documented_events(), logged_events()
    assert sorted(known) == sorted(logged)
    assert [name for name in logged if not _STYLE.fullmatch(name)] == []
    for name, event in logged.items():
        assert known[name].levels == (event.levels or known[name].levels), name
        assert known[name].fields >= event.fields, name
        assert event.is_open or known[name].fields == event.fields, name


def test_runbook_events_exist() -> None:
    text = (_ROOT / "deploy" / "RUNBOOK.md").read_text()
    named = set(re.findall(r'event="([^"]+)"', text))
    named |= {item for item in re.findall(r"`([a-z0-9_.-]+)`", text) if _STYLE.fullmatch(item)}
    named = {item for item in named if not item.endswith(_FILES)}
    assert {"request.error", "settlement.retrying"} <= named
    assert named <= set(logged_events())
