"""The log: its configuration, and redaction of secrets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import unicodedata
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any
from unittest.mock import AsyncMock
from urllib.parse import quote

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from service.api.asgi import RequestMiddleware
from service.api.registry_schemas import AccountEntry, SecretEntry
from service.domain.tasks import Kind
from service.domain.tenants import generate_token
from service.domain.webhooks import generate_secret
from service.telemetry.logging import configure_logging
from service.telemetry.metrics import Metrics, Port
from service.telemetry.redaction import Redactor, replace_secret
from tests.unit.asgi_client import call_app

SECRET = "hunter2-hunter2"
ODD_SECRET = "p@ss w/rd&='\"\\é\n???>>>"


class LogSetup:
    def __init__(self, *, json_lines: bool = True, level: str = "INFO") -> None:
        self._stream = io.BytesIO()
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


async def test_console_lines_include_the_traceback() -> None:
    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    log = LogSetup(json_lines=False)
    try:
        raise ValueError(f"no {SECRET}")
    except ValueError:
        log.logger.exception("failed", tenant="demo", user_key="abcdef")
    assert "ValueError: no [redacted]" in log.output
    assert not [secret for secret in (SECRET, "abcdef", "\x1b[") if secret in log.output]
    await call_app(RequestMiddleware(app, Metrics(CollectorRegistry()), log.logger, Port.TENANTS), "GET", "/somewhere")
    assert "GET /somewhere 204" in log.output


async def test_a_long_path_is_cut_once_it_is_redacted() -> None:
    log = LogSetup()
    app = RequestMiddleware(AsyncMock(), Metrics(CollectorRegistry()), log.logger, Port.TENANTS)
    await call_app(app, "GET", "/" + "x" * 490 + SECRET)
    assert len(log.event["path"]) == 500
    assert SECRET[:6] not in log.output


async def test_a_request_is_logged_without_secrets() -> None:
    log = LogSetup()
    app = RequestMiddleware(AsyncMock(), Metrics(CollectorRegistry()), log.logger, Port.TENANTS)
    await call_app(app, "GET", f"/{SECRET}/igw_{'x' * 38}", headers={"X-Request-Id": SECRET})
    fields = ["time", "level", "event", "method", "path", "status", "seconds", "client", "outcome", "route", "port"]
    assert list(log.event) == [*fields, "request_id"]
    assert (log.event["path"], log.event["request_id"]) == ("/[redacted]/[redacted]", "[redacted]")
    log.redactor.register_secrets("127.0.0.1")
    await call_app(app)
    assert log.output.count("127.0.0.1") == 1


class CountingStream(io.BytesIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


async def test_the_requests_of_an_iteration_are_written_at_once_before_any_other_line() -> None:
    stream = CountingStream()
    logger = configure_logging(json=True, level="INFO", stream=stream, redactor=Redactor())
    app = RequestMiddleware(AsyncMock(), Metrics(CollectorRegistry()), logger, Port.TENANTS)
    for _ in range(3):
        await call_app(app)
    assert stream.flushes == 0
    await asyncio.sleep(0)
    assert stream.flushes == 1
    await call_app(app)
    logger.info("other")
    assert stream.flushes == 2
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["request.ended"] * 4 + ["other"]


class BrokenStream(io.BytesIO):
    def flush(self) -> None:
        raise BrokenPipeError


async def test_lines_that_cannot_be_written_are_no_error_of_the_event_loop() -> None:
    reported: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    logger = configure_logging(json=True, level="INFO", stream=BrokenStream(), redactor=Redactor())
    await call_app(RequestMiddleware(AsyncMock(), Metrics(CollectorRegistry()), logger, Port.TENANTS))
    await asyncio.sleep(0)
    assert reported == []


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize("hostile", ["a\nb", "\x1b[2J\x9b\x7f\b\0\x85", 'x\n{"event": "token.created"}\r"\'}'])
def test_a_value_forges_no_line_and_controls_no_terminal(hostile: str, *, json_lines: bool) -> None:
    """Each event is one line without control characters, whatever clients and the upstream put into its values."""
    log = LogSetup(json_lines=json_lines)
    with structlog.contextvars.bound_contextvars(request_id=hostile):
        log.logger.info("submission.rejected", reason=hostile, options={hostile: [hostile]}, error=ValueError(hostile))
    logging.getLogger("httpx2").warning("%s", hostile)
    first, second, rest = log.output.split("\n")
    assert rest == ""
    assert not [letter for letter in first + second if unicodedata.category(letter) == "Cc"]
    if json_lines:
        assert [json.loads(line)["event"] for line in (first, second)] == ["submission.rejected", "library.logged"]


def test_invalid_trace_headers_are_not_logged() -> None:
    log, valid = LogSetup(), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    for headers in ({"traceparent": "x" * 600}, {"traceparent": valid, "tracestate": "a client's text"}):
        TraceContextTextMapPropagator().extract(headers)
    assert log.output == ""


@pytest.mark.parametrize("library", ["uvicorn", "httpx2", "asyncio"])
def test_library_warnings_are_logged(library: str) -> None:
    own = io.StringIO()
    logging.getLogger("uvicorn.error").addHandler(logging.StreamHandler(own))
    log = LogSetup()
    chatter = logging.getLogger(library)
    log.logger.debug("quiet")
    chatter.info("GET http://upstream/?user_key=abcdef")
    assert log.output == ""
    try:
        raise OSError(f"token={SECRET}")
    except OSError:
        chatter.exception("lost %s", f"user_key={SECRET}")
    assert (log.event["event"], log.event["logger"], log.event["level"]) == ("library.logged", library, "error")
    assert "OSError" in log.event["exception"]
    assert SECRET not in log.output
    assert own.getvalue() == ""
    chatter.warning("lost %d", "x")  # wrong arguments must not lose the event
    assert "lost %d" in log.output


class Opaque:
    def __repr__(self) -> str:
        return f"<Opaque {SECRET}>"


VALUE = "Zq9vKx7Lm3Tp"


@pytest.mark.parametrize(
    "data",
    [
        {"Authorization": f"Bearer {VALUE}"},
        [{"deep": ({"webhook_secret": VALUE},)}],
        {"headers": [("prompt", VALUE), [b"cookie", VALUE], {"name": "user_key", "value": VALUE}]},
        AccountEntry(user_key=SecretEntry(value=VALUE)),
        f"authorization: Bearer {VALUE}",
        f"POST http://upstream/api?user_key={VALUE}&x=1",
        f"redis://user:{VALUE}@host:6379/0",
        f"b'...' user_key=b'{VALUE}'",
        f"prompt: a cat, {VALUE}",
    ],
)
def test_values_under_secret_names_are_redacted(data: Any) -> None:
    log = LogSetup()
    log.logger.info("leak", data=data)
    assert VALUE not in log.output
    assert "[redacted]" in log.output


@given(st.sampled_from(["prompt", "metadata", "user_key", "Authorization"]), st.text(min_size=1), st.integers(0, 3))
def test_values_under_secret_names_are_redacted_in_nested_texts(name: str, value: str, depth: int) -> None:
    value = f"{value}canary{value}canary"
    about: Any = {"a": 1, name: value, "b": 2}
    for _ in range(depth):
        about = {"inner": json.dumps(about)}
    for text in (json.dumps(about), repr(about), repr(json.dumps(about)), json.dumps(repr(about))):
        assert "canary" not in Redactor().redact_text(text)


def test_generated_secrets_are_redacted_everywhere() -> None:
    log = LogSetup()
    for secret in (generate_token(), generate_secret()):
        text = f"x{secret}x '{secret}', which"
        try:
            raise KeyError(text) from ValueError(text)
        except KeyError as error:
            log.logger.exception(text, value=text, nested=[{"x": (text, {text})}], names={text: 1}, error=error)
        assert secret.partition("_")[2] not in log.output


def test_other_values_are_logged() -> None:
    log = LogSetup()
    log.redactor.register_secrets("a", "")  # too short to be searched
    endless: dict[str, Any] = {}
    endless["again"] = endless
    values = {"token_id": "t-1", "about": {"token": None}, "key": "k", "text": "what? no=1 https://host/a@2x.png"}
    odd = {"kind": Kind.UPSCALE, "many": {1}, "big": 2**70, "data": b"12", "thing": Opaque(), "endless": endless}
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        log.logger.info("revoked", **values, **odd, error=None)
    event = log.event
    assert event.keys() == {"time", "level", "event", "request_id", *values, *odd}  # without `error`
    assert {name: event[name] for name in values} == values
    assert [event["kind"], event["many"], event["big"], event["data"]] == ["upscale", [1], str(2**70), "<2 bytes>"]
    assert event["thing"] == "<Opaque [redacted]>"
    assert "..." in log.output


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://u:p@ss@host:8/ended?key=x#y is away", "https://[redacted]@host:8/ended?[redacted] is away"),
        ("GET /ended?key=x HTTP/1.1", "GET /ended?[redacted] HTTP/1.1"),
        ("prompt: a cat, sitting\nnext", "prompt: [redacted]\nnext"),
        ("\x1b[31mred\r", "\\x1b[31mred\\x0d"),
    ],
)
def test_texts_stay_readable(text: str, expected: str) -> None:
    assert Redactor().redact_text(text) == expected


def list_encodings(secret: str) -> list[str]:
    """Return encodings of a secret; all but four characters at each end must disappear."""
    plain = secret.encode()
    return [
        *(secret, repr(secret), ascii(secret), json.dumps(json.dumps(secret)), quote(secret, safe="")),
        *(repr(plain), plain.hex(), base64.urlsafe_b64encode(b"###" + plain).decode()),
        *(base64.b64encode(b"#" * before + plain).decode() for before in range(3)),
        *(secret.swapcase(), secret.lower().encode().hex().upper(), base64.b64encode(secret.upper().encode()).decode()),
        quote(base64.b64encode(plain).decode(), safe=""),
    ]


@pytest.mark.parametrize("secret", [SECRET, ODD_SECRET, generate_token()], ids=["plain", "odd", "token"])
def test_secrets_are_redacted_in_every_encoding(secret: str) -> None:
    redactor = Redactor([*(f"{number:04}-another-secret" for number in range(20)), secret])
    for item in list_encodings(secret):
        value = [{item: (f"a<{item}>b", ValueError(item))}, json.dumps({"inner": repr([item])})]
        event = redactor(None, "info", {"event": "x", "value": value})
        for written in (redactor.redact_text(f"a<{item}>b"), json.dumps(event, ensure_ascii=False), str(event)):
            assert item[4:-4] not in written


SPELLINGS: list[Callable[[str], str]] = [
    *(str, str.swapcase),
    lambda character: f"%{ord(character):02X}",
    lambda character: f"%2525{ord(character.swapcase()):02x}",
    lambda character: f"\\\\u{ord(character):04x}",
    lambda character: f"\\x{ord(character):02X}",
    lambda character: f"&#{ord(character)};",
    lambda character: f"&#x{ord(character):X};",
]


@given(
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"), min_size=8),
    st.lists(st.sampled_from(SPELLINGS), min_size=1),
    st.sampled_from(["", "x", "%", "%2", "密"]),
)
def test_secrets_are_found_whatever_the_spelling_of_each_character(
    secret: str, spellings: list[Callable[[str], str]], around: str
) -> None:
    text = "".join(spell(character) for spell, character in zip(cycle(spellings), secret, strict=False))
    assert replace_secret(secret, "", f"{around}{text}{around}") == 2 * around
    assert Redactor([secret, SECRET, ODD_SECRET]).redact_text(f"{around} {text}") == f"{around} [redacted]"


@given(st.recursive(st.text() | st.floats() | st.binary() | st.integers(), lambda it: st.lists(it) | st.tuples(it)))
def test_any_value_can_be_logged(value: Any) -> None:
    event = Redactor([SECRET])(None, "info", {"event": "x", "value": value, "odd": "\ud800"})
    assert json.loads(msgspec.json.encode(event))["event"] == "x"


@pytest.mark.parametrize("piece", ["token", "igw_", 'secret"', "://", "?", "bearer ", "token\\", "token "])
def test_redaction_of_hostile_texts_is_linear(piece: str) -> None:
    # Anything quadratic would take very long.
    for text in (piece * 20_000, piece + piece[-1] * 50_000):
        assert len(Redactor([SECRET]).redact_text(text)) <= 2 * len(text)
