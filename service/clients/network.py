"""What all clients share: TLS, deadlines, and the errors that are those of this machine."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from functools import cache
from types import TracebackType
from typing import Self

import httpx2

from service import __version__

USER_AGENT = f"imaging-gateway/{__version__}"

OnCall = Callable[[StrEnum, StrEnum, float], None]
"""Called after every call with its operation, outcome and duration in seconds."""


_LOCAL_ERRNOS = frozenset(
    {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM},
)


@cache
def default_tls() -> ssl.SSLContext:
    """TLS settings of all clients of this process: reading the trusted authorities takes 25 ms."""
    return httpx2.create_ssl_context()


def local_error_reason(error: BaseException | None) -> str | None:
    """Return why a call failed if only this machine is at fault, else None.

    Of chained errors the outermost with an error number counts. An exception group counts only if all its errors are
    local: a machine without IPv6 has no address to call from, while IPv4 shows whether the server responds.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [local_error_reason(inner) for inner in error.exceptions]
        return reasons[0] if all(reasons) else None
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, socket.gaierror):
        return os.strerror(errno.ENOMEM) if error.errno == socket.EAI_MEMORY else _socket_error_reason()
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _LOCAL_ERRNOS else None
    return None if error is None else local_error_reason(error.__cause__ or error.__context__)


def _socket_error_reason() -> str | None:
    # A resolver without a free descriptor may report an unknown name.
    try:
        socket.socket().close()
    except OSError as error:
        return local_error_reason(error)
    return None


GRACE_SECONDS = 0.1
"""Time for the event loop to read what has arrived by the deadline; repeated if the loop was late again."""
MAX_GRACES = 10


class Deadline:
    """A timeout like `asyncio.timeout` for a process that may be suspended or short of CPU.

    After a suspension all timers are due at once and run before any socket is read: a response that had arrived would
    be discarded unread. The end is therefore postponed until the event loop has had time to read.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + seconds
        self._timeout = asyncio.timeout(None)
        self._grace_count = 0
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._schedule_check(self._ends_at)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    @property
    def remaining_seconds(self) -> float:
        return max(self._ends_at - self._loop.time(), 0)

    def reset_idle_timeout(self, seconds: float) -> None:
        """End after `seconds` from now at the latest, until this is called again."""
        now = self._loop.time()
        if now < self._ends_at:
            self._grace_count = 0
            self._schedule_check(min(self._ends_at, now + seconds))

    def limit(self, seconds: float) -> None:
        """End after `seconds` from now at the latest."""
        self._ends_at = min(self._ends_at, self._loop.time() + seconds)

    def _schedule_check(self, due: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._check_expiry, due)

    def _check_expiry(self, due: float) -> None:
        now = self._loop.time()
        is_late = now - due > GRACE_SECONDS
        if self._grace_count == 0 or (is_late and self._grace_count < MAX_GRACES):
            self._grace_count += 1
            self._schedule_check(now + GRACE_SECONDS)
        else:
            self._timeout.reschedule(now)


def parse_retry_after(retry_after: str | None) -> float | None:
    """Return the seconds of a `Retry-After` header (number or HTTP date); None if it is neither."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        date = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max((date - datetime.now(UTC)).total_seconds(), 0) if date.tzinfo else None
