"""Structured logs: one redacted JSON object or console line per event; see `deploy/LOGS.md`."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import partial
from typing import Any, BinaryIO, Self

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger, Processor

from service.telemetry.redaction import Redactor


def fen_to_yuan(fen: int) -> float:
    return fen / 100


class WaitTimer:
    """A timer of the periods in which at least one wait was in progress.

    It times the waits within a block, and in the tasks created in it. A request waits also in tasks that it shares with
    other requests. Each of these marks its waits with `upstream_wait`, which finds the timer of its request through the
    context that tasks inherit.
    """

    __slots__ = ("_active_waits", "_clock", "_started_at", "_token", "_total_seconds")

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._active_waits = 0
        self._started_at = 0.0
        self._total_seconds: float | None = None

    def __enter__(self) -> Self:
        self._token = _CURRENT_TIMER.set(self)
        return self

    def __exit__(self, *_: object) -> None:
        _CURRENT_TIMER.reset(self._token)

    @property
    def seconds(self) -> float | None:
        """Return the total so far; None if there was no wait."""
        if not self._active_waits:
            return self._total_seconds
        return (self._total_seconds or 0.0) + self._clock() - self._started_at

    def start(self) -> None:
        if not self._active_waits:
            self._started_at = self._clock()
        self._active_waits += 1

    def stop(self) -> None:
        if self._active_waits == 1:
            self._total_seconds = self.seconds
        self._active_waits -= 1


_CURRENT_TIMER: ContextVar[WaitTimer | None] = ContextVar("upstream_wait", default=None)


@contextmanager
def upstream_wait() -> Iterator[None]:
    """Mark a wait for the upstream; it is not measured outside of a request."""
    timer = _CURRENT_TIMER.get()
    if timer is None:
        yield
        return
    timer.start()
    try:
        yield
    finally:
        timer.stop()


_LIBRARIES = ("asyncio", "httpcore2", "httpx2", "litestar", "redis", "uvicorn", "uvicorn.access", "uvicorn.error")
_LEVELS = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO)
REQUEST_EVENT = "request.ended"
OUTCOME_ANSWERED = "answered"
MAX_PATH_CHARS = 500
Event = MutableMapping[str, Any]


def configure_logging(*, json: bool, level: str, stream: BinaryIO, redactor: Redactor) -> FilteringBoundLogger:
    """Send all logging of this process through one chain, and return its logger.

    Libraries that use the standard library's logging are limited to WARNING, since some print URLs with their queries
    below it. Redaction comes after the traceback became text, which it would miss otherwise, and before rendering.
    """
    # The traceback is text already, as the plain formatter expects.
    console = structlog.dev.ConsoleRenderer(
        colors=stream.isatty(),
        timestamp_key="time",
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
        pad_event_to=20,
    )
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        _order_fields,
        redactor,
        _cut_path,
        *([_add_timestamp, _to_json] if json else [_format_for_console, console, _to_bytes]),
    ]
    structlog.configure(
        processors=[_RequestLineEncoder(redactor, processors)] if json else processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=partial(_LineWriter, stream),
        # Modules create their loggers on import, possibly before this.
        cache_logger_on_first_use=False,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    logging.basicConfig(handlers=[_StructlogHandler(logger)], level=logging.WARNING, force=True)
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)
    # The access log has each error and each unfinished response, with the id of its request.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    # Its warnings repeat invalid trace headers of clients.
    logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
    return logger


class _LineWriter(structlog.BytesLogger):
    """Writes lines at once, except those of requests: once for all of an iteration of the event loop."""

    __slots__ = ("_is_flush_due",)

    def __init__(self, stream: BinaryIO, *_: object) -> None:
        super().__init__(stream)
        self._is_flush_due = False

    def msg(self, message: bytes, *, is_urgent: bool = True) -> None:
        if is_urgent:
            super().msg(message)
            return
        with self._lock:
            self._write(message + b"\n")
        if not self._is_flush_due:
            self._is_flush_due = True
            asyncio.get_running_loop().call_soon(self._flush_due_lines)

    def _flush_due_lines(self) -> None:
        self._is_flush_due = False
        # The event loop reports errors of callbacks to this log, and would end. The lines stay in the buffer.
        with self._lock, suppress(OSError):
            self._flush()

    info = msg


class _RequestLine(msgspec.Struct, frozen=True, omit_defaults=True):
    """The fields of a REQUEST_EVENT in their order; one without a value is left out."""

    time: datetime
    level: str
    event: str
    method: str | None
    path: str
    status: int
    seconds: float
    upstream_seconds: float | None = None
    client: str | None = None
    tenant: str | None = None
    token_id: str | None = None
    outcome: str | None = None
    route: str | None = None
    port: str | None = None
    request_id: str | None = None
    trace_id: str | None = None
    operator: str | None = None


class _RequestLineEncoder:
    """A structlog processor that encodes requests at once, and leaves all other events to a chain of processors.

    A request costs a tenth of the chain that way.
    """

    def __init__(self, redactor: Redactor, processors: Sequence[Processor]) -> None:
        self._redactor = redactor
        self._processors = processors
        self._encode = msgspec.json.Encoder().encode

    def __call__(self, logger: Any, method: str, event: Event) -> Any:
        if event["event"] == REQUEST_EVENT:
            return (self._encode_request(method, event),), {"is_urgent": False}
        result: Any = event
        for processor in self._processors:
            result = processor(logger, method, result)
        return result

    def _encode_request(self, level: str, event: Event) -> bytes:
        redact_word, redact_text = self._redactor.redact_word, self._redactor.redact_text
        return self._encode(
            _RequestLine(
                time=datetime.now(UTC),
                level=level,
                event=REQUEST_EVENT,
                method=redact_word(event["method"]),
                path=redact_text(event["path"])[:MAX_PATH_CHARS],
                status=event["status"],
                seconds=event["seconds"],
                upstream_seconds=event["upstream_seconds"],
                client=redact_word(event["client"]),
                tenant=redact_word(event["tenant"]),
                token_id=redact_word(event["token_id"]),
                outcome=redact_word(event["outcome"]),
                route=redact_word(event["route"]),
                port=redact_word(event["port"]),
                request_id=redact_text(event["request_id"]),
                trace_id=None if event["trace_id"] is None else redact_text(event["trace_id"]),
                operator=redact_word(event["operator"]),
            )
        )


class _StructlogHandler(logging.Handler):
    def __init__(self, logger: FilteringBoundLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # wrong arguments must not lose the event
            message = str(record.msg)
        level = next((known for known in _LEVELS if record.levelno >= known), logging.DEBUG)
        self._logger.log(level, "library.logged", logger=record.name, detail=message, exc_info=record.exc_info)


def _order_fields(_logger: object, _method: str, event: Event) -> Event:
    """Order the fields: level and event, own fields, fields of the request_fields; None is dropped."""
    first = {"level": event.pop("level"), "event": event.pop("event")}
    fields = {name: value for name, value in event.items() if value is not None}
    request_fields = structlog.contextvars.get_contextvars()
    return first | fields | {name: value for name, value in request_fields.items() if name not in fields}


def _cut_path(_logger: object, _method: str, event: Event) -> Event:
    """Cut the path of a request once it is redacted: a part of a secret is not recognised."""
    if event["event"] == REQUEST_EVENT:
        event["path"] = event["path"][:MAX_PATH_CHARS]
    return event


def _add_timestamp(_logger: object, _method: str, event: Event) -> Event:
    return {"time": datetime.now(UTC).isoformat().replace("+00:00", "Z"), **event}


def _format_for_console(_logger: object, _method: str, event: Event) -> Event:
    """Shorten an event for people: local time, a request as one phrase, no usual outcome."""
    event["time"] = datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3]
    if event["event"] == REQUEST_EVENT:
        event["event"] = f"{event.pop('method')} {event.pop('path')} {event.pop('status')}"
        del event["port"], event["route"]
        if event["outcome"] == OUTCOME_ANSWERED:
            del event["outcome"]
    return event


def _to_json(_logger: object, _method: str, event: Any) -> bytes:
    return msgspec.json.encode(event)


def _to_bytes(_logger: object, _method: str, line: Any) -> bytes:
    return str(line).encode()
