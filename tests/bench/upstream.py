"""A minimal upstream in a process of its own that measures the lateness of checks.

Every task stays in the same state. Only the HTTP that the gateway sends is understood. `GET /lateness/INTERVAL` returns
the lateness of all checks since the previous call: the time between two checks of a task less INTERVAL, in
milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_TASK = re.compile(rb"task_id=([^&]*)")


class _CheckTimes:
    """The time of the last check of each task, and the intervals."""

    def __init__(self) -> None:
        self._last_checked_at: dict[bytes, float] = {}
        self._intervals_ms: list[float] = []

    def record(self, task: bytes) -> None:
        now = time.monotonic()
        if task in self._last_checked_at:
            self._intervals_ms.append((now - self._last_checked_at[task]) * 1000)
        self._last_checked_at[task] = now

    def take_lateness(self, interval: float) -> list[float]:
        """Return and clear the recorded lateness in milliseconds."""
        between, self._intervals_ms = self._intervals_ms, []
        return [item - interval for item in between]


class _Connection(asyncio.Protocol):
    """Responds to requests in order, after a latency in seconds."""

    def __init__(self, checks: _CheckTimes, latency: float, state: str) -> None:
        self._checks = checks
        self._state = state
        self._latency = latency
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, result, body = self._received.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if not result or len(body) < (int(length[1]) if length else 0):
            return
        self._received = b""
        asyncio.get_running_loop().call_later(self._latency, self._send_answer, head.split(b" ")[1].decode(), body)

    def _send_answer(self, path: str, body: bytes) -> None:
        answer = json.dumps(self._build_answer(path, body)).encode()
        if self._transport:
            length = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            self._transport.write(length + answer)

    def _build_answer(self, path: str, body: bytes) -> object:
        if path.startswith("/lateness/"):
            return self._checks.take_lateness(float(path.rpartition("/")[2]))
        if not path.endswith("check_task_status"):
            return {"err_code": 0, "task_id": str(uuid.uuid4()), "remaining_count": 1_000_000, "remaining_money": 0}
        task = _TASK.search(body)
        self._checks.record(task[1] if task else b"")
        return {"err_code": 0, "status": self._state}


@contextmanager
def run_upstream(latency: float, state: str) -> Iterator[str]:
    """Run an upstream with this latency and this state of all tasks; yields its URL."""
    command = [sys.executable, "-m", __name__, str(latency), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.kill()


async def _serve(latency: float, state: str) -> None:
    checks = _CheckTimes()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(checks, latency, state), "127.0.0.1", 0, backlog=1_024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201 - its parent reads it
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1]), sys.argv[2]))
