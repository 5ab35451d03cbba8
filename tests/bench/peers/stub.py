"""The vendor's stub as a process: see `stub.c`."""

from __future__ import annotations

import atexit
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import httpx2

from tests.bench.peers.processes import Server, serving
from tests.support.network import reserve_port

SUBMIT_PATHS = {
    "upscale": "/api/submit_task",
    "vectorize": "/api/submit_vector_task",
    "face-enhance": "/api/submit_face_enhance_task",
    "seamless": "/api/submit_seamless_task",
}
CHECK_PATH = "/api/check_task_status"
USER_KEY = "bench-user-key"

_COMPILER = "cc"
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")


@contextmanager
def vendor_stub(
    cpu: int, *, tasks: Literal["finished", "running"] = "running", delay_seconds: float = 0
) -> Iterator[Server]:
    """Run a stub of the vendor on one CPU; its checks find all tasks finished, or running for ever.

    Submits and checks are answered after the delay. It accepts any `user_key`.
    """
    port = reserve_port()
    command = [str(_program()), str(port), tasks, str(round(delay_seconds * 1000))]
    with serving("stub", command, cpu=cpu, url=f"http://127.0.0.1:{port}", ready_path="/stats") as server:
        yield server


def stub_stats(stub: Server, *, reset: bool = False) -> dict[str, Any]:
    """Return the stub's counters since its start, and its peak and intervals since the last reset.

    `submits`, `checks`, `files`, `bytes` received, current `connections`, `in_flight` and `peak_in_flight` (submits and
    checks within the delay), `check_intervals` and `check_interval_ms` (p50, p99, max of the time between two checks of
    one task; to 10 ms).
    """
    path = "/stats?reset" if reset else "/stats"
    stats: dict[str, Any] = httpx2.get(stub.url + path, timeout=10, trust_env=False).json()
    return stats


@cache
def _program() -> Path:
    """Compile the stub, once per process."""
    folder = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "stub"
    source = Path(__file__).with_name("stub.c")
    compiler = shutil.which(_COMPILER) or _COMPILER
    subprocess.run([compiler, *_FLAGS, "-o", str(program), str(source)], check=True)
    return program
