"""Capture of the log of the test process."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from service.telemetry.logging import configure_logging
from service.telemetry.redaction import Redactor


class CapturedLog:
    def __init__(self) -> None:
        self.stream = io.BytesIO()
        self.redactor = Redactor()

    @property
    def text(self) -> str:
        return self.stream.getvalue().decode()


@contextmanager
def capture_log() -> Iterator[CapturedLog]:
    """Log everything within the block at debug level, including libraries."""
    captured, root = CapturedLog(), logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in ("root", *logging.Logger.manager.loggerDict)}
    root.handlers.clear()  # they would be closed
    try:
        configure_logging(json=True, level="DEBUG", stream=captured.stream, redactor=captured.redactor)
        for name in levels:
            logging.getLogger(name).setLevel(logging.DEBUG)
        yield captured
    finally:
        root.handlers[:] = handlers
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        structlog.reset_defaults()
