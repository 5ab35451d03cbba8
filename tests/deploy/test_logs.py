"""LOGS.md documents exactly the events that the code logs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from msgspec import Struct

_ROOT = Path(__file__).parents[2]
_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
_STYLE = re.compile(r"[a-z]+(_[a-z]+)*\.[a-z]+(_[a-z0-9]+)*")
_FILES = (".toml", ".yaml")
_ROW = re.compile(r"\| `(?P<event>[^`]+)` \| (?P<levels>[a-z, ]+) \| (?P<fields>[^|]*) \| (?P<means>[^|]+) \|")


class Event(Struct, frozen=True):
    """An event: its levels, and its fields beyond the common ones."""

    levels: frozenset[str]
    """Empty if not constant."""
    fields: frozenset[str]
    open: bool = False
    """Whether it may have more fields."""

    def __or__(self, other: Event) -> Event:
        return Event(self.levels | other.levels, self.fields | other.fields, open=self.open or other.open)


@cache
def logged_events() -> dict[str, Event]:
    """Return all events that the code logs."""
    results: dict[str, Event] = {}
    for path in (_ROOT / "service").rglob("*.py"):
        if path.is_relative_to(_ROOT / "service" / "sandbox"):  # it logs as a library does
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for name, event in _call_events(call, call.func):
                    results[name] = results.get(name, event) | event
    return results


def _call_events(call: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, Event]]:
    """Yield the event of a logging call. Registry changes are logged where they are written."""
    logger = ast.unparse(function.value).rpartition(".")[2]
    words = {keyword.arg for keyword in call.keywords if keyword.arg}
    keys = frozenset("exception" if word == "exc_info" else word for word in words)
    more = any(keyword.arg is None for keyword in call.keywords)
    if function.attr == "write_change":
        more = more or len(call.args) > 2  # fields of the result
        yield _literal_text(call.args[0]), Event(frozenset({"info"}), keys | {"version"}, open=more)
    elif logger in {"_log", "logger", "_logger"} and function.attr == "log":
        levels = frozenset(level.lower() for level in re.findall(r"logging\.([A-Z]+)", ast.unparse(call.args[0])))
        yield _literal_text(call.args[1]), Event(levels, keys, open=more)
    elif logger in {"_log", "logger", "_logger"} and function.attr in _LEVELS and ast.unparse(call.args[0]) != "event":
        traceback = frozenset({"exception"} if function.attr == "exception" else ())
        yield _literal_text(call.args[0]), Event(frozenset({_LEVELS[function.attr]}), keys | traceback, open=more)


def _literal_text(node: ast.expr) -> str:
    """Return a literal text: an event name that is put together could not be searched for."""
    assert isinstance(node, ast.Constant), ast.unparse(node)
    assert isinstance(node.value, str)
    return node.value


def documented_events() -> dict[str, Event]:
    """Return all events of the document, in its order."""
    rows = list(_ROW.finditer((_ROOT / "deploy" / "LOGS.md").read_text()))
    events = {row["event"]: _parse_row(row) for row in rows}
    assert len(events) == len(rows), "an event is documented twice"
    return events


def _parse_row(row: re.Match[str]) -> Event:
    return Event(frozenset(row["levels"].split(", ")), frozenset(re.findall(r"`([a-z_]+)`", row["fields"])))


def test_every_event_is_documented() -> None:
    assert sorted(documented_events()) == sorted(logged_events())


def test_levels_and_fields_are_documented() -> None:
    known = documented_events()
    for name, event in logged_events().items():
        assert known[name].levels == (event.levels or known[name].levels), name
        assert known[name].fields >= event.fields, name
        assert event.open or known[name].fields == event.fields, name


def test_runbook_events_exist() -> None:
    text = (_ROOT / "deploy" / "RUNBOOK.md").read_text()
    named = set(re.findall(r'event="([^"]+)"', text))
    named |= {item for item in re.findall(r"`([a-z0-9_.-]+)`", text) if _STYLE.fullmatch(item)}
    named = {item for item in named if not item.endswith(_FILES)}
    assert {"request.error", "settlement.retrying"} <= named
    assert named <= set(logged_events())


def test_event_names() -> None:
    """Event names have the form `subject.what-happened`."""
    assert [name for name in logged_events() if not _STYLE.fullmatch(name)] == []
