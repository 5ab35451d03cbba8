"""Structured logs."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger, Processor

from service.domain.tenants import AccountPolicy, TenantPolicy
from service.telemetry.redaction import Redactor

_FEN_PER_YUAN = 100


def fen_to_yuan(fen: int) -> float:
    """Fen as yuan."""
    return fen / _FEN_PER_YUAN


def log_account_policy(policy: AccountPolicy) -> dict[str, Any]:
    """What must stay in an account, and what its tasks cost at most."""
    return {
        "floor_count": policy.floor_count,
        "floor_money": fen_to_yuan(policy.floor_money_fen),
        "max_price": {kind.value: fen_to_yuan(price) for kind, price in policy.max_price.items()},
    }


def log_tenant_policy(policy: TenantPolicy) -> dict[str, Any]:
    """What a tenant may spend."""
    limits = [
        {
            "window": each.window.value,
            "tasks": each.tasks,
            "money": None if each.money_fen is None else fen_to_yuan(each.money_fen),
        }
        for each in policy.limits
    ]
    told: dict[str, Any] = msgspec.to_builtins(policy)
    return told | {"limits": limits}


class WaitTimer:
    """Adds up the time in which at least one wait was under way: what waits at once counts once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._active_waits = 0
        self._started_at = 0.0
        self._total_seconds: float | None = None

    @property
    def seconds(self) -> float | None:
        """How much it is by now; None if there was no wait."""
        if not self._active_waits:
            return self._total_seconds
        return (self._total_seconds or 0.0) + self._clock() - self._started_at

    def start(self) -> None:
        """A wait begins."""
        if not self._active_waits:
            self._started_at = self._clock()
        self._active_waits += 1

    def stop(self) -> None:
        """A wait ends."""
        if self._active_waits == 1:
            self._total_seconds = self.seconds
        self._active_waits -= 1


_CURRENT_TIMER: ContextVar[WaitTimer | None] = ContextVar("spent", default=None)


@contextmanager
def measure_upstream_wait() -> Iterator[WaitTimer]:
    """Count what is waited within the block, and in the tasks that are begun in it."""
    spent = WaitTimer()
    reset = _CURRENT_TIMER.set(spent)
    try:
        yield spent
    finally:
        _CURRENT_TIMER.reset(reset)


@contextmanager
def upstream_wait() -> Iterator[None]:
    """Within the block the upstream is waited for; nothing is counted where no request is."""
    spent = _CURRENT_TIMER.get()
    if spent is None:
        yield
        return
    spent.start()
    try:
        yield
    finally:
        spent.stop()


_LIBRARIES = ("asyncio", "httpcore2", "httpx2", "litestar", "redis", "uvicorn", "uvicorn.access", "uvicorn.error")


_LEVELS = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO)


REQUEST_EVENT = "request.ended"


OUTCOME_ANSWERED = "answered"
"""The outcome of most requests."""


Event = MutableMapping[str, Any]


def configure_logging(*, json: bool, level: str, stream: BinaryIO, redactor: Redactor) -> FilteringBoundLogger:
    """Send all logging of this process through one chain, and return its logger.

    `json` chooses JSON lines over lines to read, which are coloured on a terminal. Libraries that use the standard
    library's logging are heard from WARNING on, since below it some of them print addresses with their queries.
    Redaction comes after the traceback was made text and before anything is rendered: earlier it would miss the
    exception, later it would have to take rendered lines apart.
    """
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        _order_fields,
        redactor,
        *(
            [_add_timestamp, _to_json]
            if json
            else [_format_for_console, _create_console_renderer(colours=stream.isatty()), _to_bytes]
        ),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(stream),
        # Modules make their loggers when they are imported, which may be before this.
        cache_logger_on_first_use=False,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    logging.basicConfig(handlers=[_StructlogHandler(logger)], level=logging.WARNING, force=True)
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)
    return logger


class _StructlogHandler(logging.Handler):
    """Passes the records of the standard library on to structlog."""

    def __init__(self, logger: FilteringBoundLogger) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit must not lose the event
            message = str(record.msg)
        level = next((each for each in _LEVELS if record.levelno >= each), logging.DEBUG)
        self._logger.log(level, "library.logged", logger=record.name, detail=message, exc_info=record.exc_info)


def _order_fields(_logger: object, _method: str, event: Event) -> Event:
    """How grave and what first, then what belongs to it, then whose request it is; what is None is not there."""
    first = {"level": event.pop("level"), "event": event.pop("event")}
    told = {name: value for name, value in event.items() if value is not None}
    request = structlog.contextvars.get_contextvars()
    return first | told | {name: value for name, value in request.items() if name not in told}


def _add_timestamp(_logger: object, _method: str, event: Event) -> Event:
    return {"time": datetime.now(UTC).isoformat().replace("+00:00", "Z"), **event}


def _format_for_console(_logger: object, _method: str, event: Event) -> Event:
    """An event with the time of the clock on the wall; a request is told in the usual words, and not what is usual."""
    event["time"] = datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3]
    if event["event"] == REQUEST_EVENT:
        event["event"] = f"{event.pop('method')} {event.pop('path')} {event.pop('status')}"
        del event["port"], event["route"]
        if event["outcome"] == OUTCOME_ANSWERED:
            del event["outcome"]
    return event


def _create_console_renderer(*, colours: bool) -> Processor:
    # The traceback is text already, which the plain formatter expects.
    return structlog.dev.ConsoleRenderer(
        colors=colours,
        timestamp_key="time",
        exception_formatter=structlog.dev.plain_traceback,
        sort_keys=False,
        pad_event_to=20,
    )


def _to_json(_logger: object, _method: str, event: Any) -> bytes:
    return msgspec.json.encode(event)


def _to_bytes(_logger: object, _method: str, line: Any) -> bytes:
    return str(line).encode()
