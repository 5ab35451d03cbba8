"""Capture of the log of the test process."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from structlog.typing import FilteringBoundLogger

from service.telemetry.logging import configure_logging
from service.telemetry.redaction import Redactor


class CapturedLog:
    def __init__(self) -> None:
        self.stream = io.BytesIO()
        self.redactor = Redactor()
        self.logger: FilteringBoundLogger = structlog.get_logger()

    @property
    def text(self) -> str:
        return self.stream.getvalue().decode()


@contextmanager
def capture_log(*, json: bool = True) -> Iterator[CapturedLog]:
    """Log everything within the block at debug level, including libraries."""
    written, manager = CapturedLog(), logging.getLogger()
    handlers, level = list(manager.handlers), manager.level
    levels = {name: logging.getLogger(name).level for name in logging.Logger.manager.loggerDict}
    manager.handlers.clear()  # they would be closed
    try:
        written.logger = configure_logging(json=json, level="DEBUG", stream=written.stream, redactor=written.redactor)
        for item in (manager, *map(logging.getLogger, levels)):
            item.setLevel(logging.DEBUG)
        yield written
    finally:
        manager.handlers[:] = handlers
        manager.setLevel(level)
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        structlog.reset_defaults()
