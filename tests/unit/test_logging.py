"""Configuration and redaction of the log."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec
import pytest
import structlog
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from structlog.typing import FilteringBoundLogger

from service.domain.tenants import generate_token
from service.telemetry.logging import configure_logging
from service.telemetry.redaction import Redactor

SECRET = "hunter2-hunter2"


class Terminal(io.BytesIO):
    def isatty(self) -> bool:
        return True


class LogSetup:
    def __init__(self, *, json_lines: bool = True, level: str = "INFO", terminal: bool = False) -> None:
        self._stream = Terminal() if terminal else io.BytesIO()
        self.redactor = Redactor([SECRET])
        self.logger: FilteringBoundLogger = configure_logging(
            json=json_lines, level=level, stream=self._stream, redactor=self.redactor
        )

    @property
    def output(self) -> str:
        return self._stream.getvalue().decode()

    @property
    def event(self) -> dict[str, Any]:
        (line,) = self.output.splitlines()
        event = json.loads(line)
        assert isinstance(event, dict)
        return event


@pytest.fixture(autouse=True)
def restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    root.handlers.clear()
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_event_is_one_json_object() -> None:
    log = LogSetup()
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.logger.info("a.logged", tenant="demo", cost={"count": 1}, ratio=0.5, done=True, error=None)
    event = log.event
    assert event.pop("time").endswith("Z")
    assert event == {
        "event": "a.logged",
        "level": "info",
        "request_id": "r1",
        "tenant": "demo",
        "cost": {"count": 1},
        "ratio": 0.5,
        "done": True,
    }


def test_earlier_loggers_are_configured_too() -> None:
    early = structlog.get_logger("early")
    early.debug("before")
    first, second = LogSetup(), LogSetup()
    early.info("after")
    assert (first.output, second.event["event"]) == ("", "after")


@pytest.mark.parametrize("terminal", [True, False])
def test_console_lines_include_the_traceback(terminal: bool) -> None:
    log = LogSetup(json_lines=False, terminal=terminal)
    try:
        raise ValueError(f"no {SECRET}")
    except ValueError:
        log.logger.exception("failed", tenant="demo", user_key="abcdef")
    assert ("\x1b[" in log.output) is terminal
    assert "failed" in log.output
    assert "ValueError: no [redacted]" in log.output
    assert SECRET not in log.output
    assert "abcdef" not in log.output


def test_invalid_trace_headers_are_not_logged() -> None:
    log, valid = LogSetup(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for headers in ({"traceparent": "x" * 600}, {"traceparent": valid, "tracestate": "a client's text"}):
        TraceContextTextMapPropagator().extract(headers)
    assert log.output == ""


def test_level_is_a_threshold() -> None:
    log = LogSetup(level="WARNING")
    log.logger.info("quiet")
    log.logger.warning("loud")
    assert log.event["event"] == "loud"


class Secretive(msgspec.Struct):
    user_key: bytes
    name: str


@dataclass
class Settings:
    admin_token: str
    port: int


class Opaque:
    def __repr__(self) -> str:
        return f"<Opaque {SECRET}>"


class Name(StrEnum):
    VALUE = "value"


def spell_secret(value: str) -> list[Any]:
    """Return texts that contain a value next to a name that marks it as secret."""
    return [
        {"user_key": value},
        {"Authorization": f"Bearer {value}"},
        [{"deep": ({"webhook_secret": value},)}],
        {"prompt": [value], "negative_prompt": {"text": value}},
        {"X-Api-Key": value.encode()},
        Secretive(value.encode(), "x"),
        Settings(value, 1),
        f"authorization: Bearer {value}",
        f"sent bearer\t{value}",
        f"POST http://upstream/api?user_key={value}&x=1",
        f"redis://user:{value}@host:6379/0",
        f"b'...' user_key=b'{value}'",
        f"admin_token = {value}",
    ]


@pytest.mark.parametrize("number", range(len(spell_secret(""))))
def test_values_under_secret_names_are_redacted(number: int) -> None:
    value = "Zq9vKx7Lm3Tp"
    log = LogSetup()
    log.logger.info("leak", data=spell_secret(value)[number])
    assert value not in log.output
    assert "[redacted]" in log.output


@pytest.mark.parametrize("spelling", ["{}", "x{}x", "'{}'", "igw_ {}"])
def test_tokens_are_redacted_everywhere(spelling: str) -> None:
    token = generate_token()
    log = LogSetup()
    text = spelling.format(token)
    try:
        raise KeyError(text) from ValueError(text)
    except KeyError as error:
        log.logger.exception(text, value=text, nested=[{"x": (text, {text})}], names={text: 1}, error=error)
    assert token not in log.output
    assert token[4:] not in log.output


def test_short_secrets_are_not_searched() -> None:
    log = LogSetup()
    log.redactor.register_secrets("a", "")
    log.logger.info("a cat")
    assert log.event["event"] == "a cat"


def test_other_values_are_logged() -> None:
    log = LogSetup()
    log.logger.info(
        "revoked", token_id="t-1", about={"token": None}, kind=Name.VALUE, many={1}, big=2**70, key="k", data=b"12"
    )
    event = log.event
    assert {name: event[name] for name in ("token_id", "about", "kind", "many", "big", "key", "data")} == {
        "token_id": "t-1",
        "about": {"token": None},
        "kind": "value",
        "many": [1],
        "big": str(2**70),
        "key": "k",
        "data": "<2 bytes>",
    }


def test_objects_are_logged_by_repr() -> None:
    log = LogSetup()
    log.logger.info("seen", thing=Opaque())
    assert log.event["thing"] == "<Opaque [redacted]>"


def test_recursive_structure_is_truncated() -> None:
    log = LogSetup()
    endless: dict[str, Any] = {}
    endless["again"] = endless
    log.logger.info("seen", thing=endless)
    assert '"..."' in log.output


@pytest.mark.parametrize("library", ["uvicorn.error", "httpx2", "litestar", "redis", "asyncio", "some.other"])
def test_library_warnings_are_logged(library: str) -> None:
    log = LogSetup()
    chatter = logging.getLogger(library)
    chatter.info("GET http://upstream/?user_key=abcdef")
    assert log.output == ""
    try:
        raise OSError(f"token={SECRET}")
    except OSError:
        chatter.exception("lost %s", f"user_key={SECRET}")
    assert (log.event["event"], log.event["logger"], log.event["level"]) == ("library.logged", library, "error")
    assert "OSError" in log.event["exception"]
    assert SECRET not in log.output


def test_library_handlers_are_removed() -> None:
    own = io.StringIO()
    logging.getLogger("uvicorn.access").addHandler(logging.StreamHandler(own))
    log = LogSetup()
    logging.getLogger("uvicorn.access").warning("once")
    assert (own.getvalue(), log.event["detail"]) == ("", "once")


def test_malformed_library_records_are_logged() -> None:
    log = LogSetup()
    logging.getLogger("redis").log(35, "lost %d", "x")
    assert (log.event["detail"], log.event["level"]) == ("lost %d", "warning")
