"""What is logged is what the document of the log says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

_ROOT = Path(__file__).parents[2]
_LEVELS = {"debug": "debug", "info": "info", "warning": "warning", "error": "error", "exception": "error"}
_STYLE = re.compile(r"[a-z]+(_[a-z]+)*\.[a-z]+(_[a-z0-9]+)*")
_FILES = (".toml", ".yaml")
_ROW = re.compile(r"\| `(?P<event>[^`]+)` \| (?P<levels>[a-z, ]+) \| (?P<fields>[^|]*) \| (?P<means>[^|]+) \|")


class Event(Struct, frozen=True):
    """What can be said of an event: its levels, and the fields beside those that every event can have."""

    levels: frozenset[str]
    """Empty where the code does not say."""
    fields: frozenset[str]
    open: bool = False
    """It may have more fields."""

    def __or__(self, other: Event) -> Event:
        return Event(self.levels | other.levels, self.fields | other.fields, open=self.open or other.open)


def logged_events() -> dict[str, Event]:
    """All events that the code logs."""
    found: dict[str, Event] = {}
    for path in (_ROOT / "service").rglob("*.py"):
        if path.is_relative_to(_ROOT / "service" / "sandbox"):  # it logs as a library does
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
                for name, event in _call_events(call, call.func):
                    found[name] = found.get(name, event) | event
    return found


def _call_events(call: ast.Call, function: ast.Attribute) -> Iterator[tuple[str, Event]]:
    """The event of a call that logs one; each of a change of the registry is logged where that is written."""
    logger = ast.unparse(function.value).rpartition(".")[2]
    words = {each.arg for each in call.keywords if each.arg}
    told = frozenset("exception" if each == "exc_info" else each for each in words)
    more = any(each.arg is None for each in call.keywords)
    if function.attr == "_change":
        yield _literal_text(call.args[0]), Event(frozenset({"info"}), told | {"version"}, open=more)
    elif logger in {"_log", "logger", "_logger"} and function.attr == "log":
        levels = frozenset(each.lower() for each in re.findall(r"logging\.([A-Z]+)", ast.unparse(call.args[0])))
        yield _literal_text(call.args[1]), Event(levels, told, open=more)
    elif logger in {"_log", "logger", "_logger"} and function.attr in _LEVELS and ast.unparse(call.args[0]) != "what":
        traceback = frozenset({"exception"} if function.attr == "exception" else ())
        yield _literal_text(call.args[0]), Event(frozenset({_LEVELS[function.attr]}), told | traceback, open=more)


def _literal_text(node: ast.expr) -> str:
    """What is written as it is: an event that is put together can't be looked up."""
    assert isinstance(node, ast.Constant), ast.unparse(node)
    assert isinstance(node.value, str)
    return node.value


def documented_events() -> dict[str, Event]:
    """All events of the document, in its order."""
    rows = list(_ROW.finditer((_ROOT / "deploy" / "LOGS.md").read_text()))
    events = {row["event"]: _parse_row(row) for row in rows}
    assert len(events) == len(rows), "an event is told of twice"
    return events


def _parse_row(row: re.Match[str]) -> Event:
    return Event(frozenset(row["levels"].split(", ")), frozenset(re.findall(r"`([a-z_]+)`", row["fields"])))


def test_every_event_is_documented() -> None:
    """The document tells of each event that is logged, and of no other."""
    assert sorted(documented_events()) == sorted(logged_events())


def test_levels_and_fields_are_documented() -> None:
    """The document tells the levels and the fields of each event."""
    known = documented_events()
    for name, event in logged_events().items():
        assert known[name].levels == (event.levels or known[name].levels), name
        assert known[name].fields >= event.fields, name
        assert event.open or known[name].fields == event.fields, name


def test_the_runbook_names_events_that_there_are() -> None:
    """Whoever looks for an event that the runbook names can find it."""
    text = (_ROOT / "deploy" / "RUNBOOK.md").read_text()
    named = set(re.findall(r'event="([^"]+)"', text))
    named |= {each for each in re.findall(r"`([a-z0-9_.-]+)`", text) if _STYLE.fullmatch(each)}
    named = {each for each in named if not each.endswith(_FILES)}
    assert {"request.error", "settlement.retrying"} <= named
    assert named <= set(logged_events())


def test_one_vocabulary() -> None:
    """Each event is named for what it is about and what happened to it."""
    assert [name for name in logged_events() if not _STYLE.fullmatch(name)] == []
