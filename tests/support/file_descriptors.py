"""Exhaustion of file descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def exhaust_descriptors(pid: int | None = None) -> Iterator[None]:
    """Let a process, by default this one, run out of file descriptors within the block."""
    process = os.getpid() if pid is None else pid
    soft, hard = resource.prlimit(process, resource.RLIMIT_NOFILE)
    resource.prlimit(process, resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(process, resource.RLIMIT_NOFILE, (soft, hard))
