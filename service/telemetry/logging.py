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

_FEN = 100


def yuan(fen: int) -> float:
    """Fen as yuan."""
    return fen / _FEN


def account_policy(policy: AccountPolicy) -> dict[str, Any]:
    """What must stay in an account, and what its tasks cost at most."""
    return {
        "floor_count": policy.floor_count,
        "floor_money": yuan(policy.floor_money),
        "max_price": {kind.value: yuan(price) for kind, price in policy.max_price.items()},
    }


def tenant_policy(policy: TenantPolicy) -> dict[str, Any]:
    """What a tenant may spend."""
    limits = [
        {
            "window": each.window.value,
            "tasks": each.tasks,
            "money": None if each.money is None else yuan(each.money),
        }
        for each in policy.limits
    ]
    told: dict[str, Any] = msgspec.to_builtins(policy)
    return told | {"limits": limits}


class Spent:
    """Adds up the time in which at least one wait was under way: what waits at once counts once."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way = 0
        self._since = 0.0
        self._before: float | None = None

    @property
    def seconds(self) -> float | None:
        """How much it is by now; None if there was no wait."""
        if not self._under_way:
            return self._before
        return (self._before or 0.0) + self._clock() - self._since

    def begin(self) -> None:
        """A wait begins."""
        if not self._under_way:
            self._since = self._clock()
        self._under_way += 1

    def end(self) -> None:
        """A wait ends."""
        if self._under_way == 1:
            self._before = self.seconds
        self._under_way -= 1


_SPENT: ContextVar[Spent | None] = ContextVar("spent", default=None)


@contextmanager
def counted() -> Iterator[Spent]:
    """Count what is waited within the block, and in the tasks that are begun in it."""
    spent = Spent()
    reset = _SPENT.set(spent)
    try:
        yield spent
    finally:
        _SPENT.reset(reset)


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block the upstream is waited for; nothing is counted where no request is."""
    spent = _SPENT.get()
    if spent is None:
        yield
        return
    spent.begin()
    try:
        yield
    finally:
        spent.end()


_LIBRARIES = ("asyncio", "httpcore2", "httpx2", "litestar", "redis", "uvicorn", "uvicorn.access", "uvicorn.error")


_LEVELS = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO)


REQUEST_ENDED = "request.ended"


ANSWERED = "answered"
"""The outcome of most requests."""


Event = MutableMapping[str, Any]


def configure(*, json: bool, level: str, stream: BinaryIO, redactor: Redactor) -> FilteringBoundLogger:
    """Send all logging of this process through one chain, and return its logger.

    `json` chooses JSON lines over lines to read, which are coloured on a terminal. Libraries that use the standard
    library's logging are heard from WARNING on, since below it some of them print addresses with their queries.
    Redaction comes after the traceback was made text and before anything is rendered: earlier it would miss the
    exception, later it would have to take rendered lines apart.
    """
    processors: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        _arranged,
        redactor,
        *([_stamped, _to_json] if json else [_shortened, _console(colours=stream.isatty()), _to_bytes]),
    ]
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.BytesLoggerFactory(stream),
        # Modules make their loggers when they are imported, which may be before this.
        cache_logger_on_first_use=False,
    )
    logger: FilteringBoundLogger = structlog.get_logger()
    logging.basicConfig(handlers=[_Bridge(logger)], level=logging.WARNING, force=True)
    for name in _LIBRARIES:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(logging.WARNING)
    return logger


class _Bridge(logging.Handler):
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


def _arranged(_logger: object, _method: str, event: Event) -> Event:
    """How grave and what first, then what belongs to it, then whose request it is; what is None is not there."""
    first = {"level": event.pop("level"), "event": event.pop("event")}
    told = {name: value for name, value in event.items() if value is not None}
    request = structlog.contextvars.get_contextvars()
    return first | told | {name: value for name, value in request.items() if name not in told}


def _stamped(_logger: object, _method: str, event: Event) -> Event:
    return {"time": datetime.now(UTC).isoformat().replace("+00:00", "Z"), **event}


def _shortened(_logger: object, _method: str, event: Event) -> Event:
    """An event with the time of the clock on the wall; a request is told in the usual words, and not what is usual."""
    event["time"] = datetime.now().astimezone().strftime("%H:%M:%S.%f")[:-3]
    if event["event"] == REQUEST_ENDED:
        event["event"] = f"{event.pop('method')} {event.pop('path')} {event.pop('status')}"
        del event["port"], event["route"]
        if event["outcome"] == ANSWERED:
            del event["outcome"]
    return event


def _console(*, colours: bool) -> Processor:
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
