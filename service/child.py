"""Processes that a gateway starts for itself, and that never outlive it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

_STOP_SECONDS = 10.0

_TIED_TO_PARENT = """
import ctypes, os, signal, sys
os.umask(0o077)
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes a command that is told to end when its parent ends, however that happens (PR_SET_PDEATHSIG of Linux).

What it writes is private; uvloop does not pass a umask on, so that it is set here.

It is a program because Python code that runs between fork and exec may deadlock where there are threads.
"""


def tied(command: Sequence[str]) -> list[str]:
    """The command line that runs `command` as a child which ends with this process, even if that is killed."""
    return [sys.executable, "-I", "-S", "-c", _TIED_TO_PARENT, str(os.getpid()), *command]


async def stop(process: asyncio.subprocess.Process) -> None:
    """End a process, by force if it does not by itself."""
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_STOP_SECONDS):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
