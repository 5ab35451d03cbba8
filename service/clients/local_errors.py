"""Errors of this machine on outgoing calls: no descriptor, no memory, no port. They are no fault of the other side."""

from __future__ import annotations

import errno
import os
import socket

_ERRNOS = frozenset(
    {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM},
)


def local_error(error: BaseException | None) -> str | None:
    """The reason, where a call failed for want of something on this machine alone; None for any other failure.

    Of an error with causes the outermost one with an error number counts. Of several attempts all must have failed so:
    a machine without IPv6 has no address to call one from, while IPv4 shows whether the other side answers.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [local_error(each) for each in error.exceptions]
        return reasons[0] if all(reasons) else None
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, socket.gaierror):
        return os.strerror(errno.ENOMEM) if error.errno == socket.EAI_MEMORY else _lacking()
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _ERRNOS else None
    return None if error is None else local_error(error.__cause__ or error.__context__)


def _lacking() -> str | None:
    """Why no socket can be opened just now. A resolver that lacks one may report an unknown name."""
    try:
        socket.socket().close()
    except OSError as error:
        return local_error(error)
    return None
