"""The log: one JSON object or one line to read per event, everything redacted, on a stream of its own."""

from __future__ import annotations

import logging
from typing import Any, BinaryIO

import msgspec
import structlog
from structlog.typing import FilteringBoundLogger, Processor

from service.telemetry.redaction import Redactor

_LIBRARIES = ("asyncio", "httpcore2", "httpx2", "litestar", "redis", "uvicorn", "uvicorn.access", "uvicorn.error")


def configure(*, json: bool, level: str, stream: BinaryIO, redactor: Redactor) -> FilteringBoundLogger:
    """Send all logging of this process through one chain, and return its logger.

    `json` chooses JSON lines over lines to read, which are coloured on a terminal. Libraries that use the standard
    library's logging are heard from WARNING on, since below it some of them print addresses with their queries.
    Redaction comes after the traceback was made text and before anything is rendered: earlier it would miss the
    exception, later it would have to take rendered lines apart.
    """
    processors: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        structlog.processors.format_exc_info,
        redactor,
        *([_to_json] if json else [_console(colours=stream.isatty()), _to_bytes]),
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
        level = next(each for each in (logging.CRITICAL, logging.ERROR, logging.WARNING) if record.levelno >= each)
        self._logger.log(level, message, logger=record.name, exc_info=record.exc_info)


def _console(*, colours: bool) -> Processor:
    # The traceback is text already, which the plain formatter expects.
    return structlog.dev.ConsoleRenderer(
        colors=colours, timestamp_key="time", exception_formatter=structlog.dev.plain_traceback
    )


def _to_json(_logger: object, _method: str, event: Any) -> bytes:
    return msgspec.json.encode(event)


def _to_bytes(_logger: object, _method: str, line: Any) -> bytes:
    return str(line).encode()
