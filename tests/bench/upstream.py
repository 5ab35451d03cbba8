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


@contextmanager
def run_upstream(latency: float, state: str) -> Iterator[str]:
    """Run an upstream with this latency in seconds and this state of all tasks; yield its URL."""
    command = [sys.executable, "-m", __name__, str(latency), state]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        try:
            yield process.stdout.readline().decode().strip()
        finally:
            process.kill()


class _Upstream:
    def __init__(self, latency: float, state: str) -> None:
        self._latency = latency
        self._state = state
        self._last_checked_at: dict[bytes, float] = {}
        self._intervals_ms: list[float] = []

    async def serve_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = _LENGTH.search(head)
            body = await reader.readexactly(int(length[1])) if length else b""
            await asyncio.sleep(self._latency)
            answer = json.dumps(self._answer(head.split(b" ")[1].decode(), body)).encode()
            start = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer)
            writer.write(start + answer)
        writer.close()

    def _answer(self, path: str, body: bytes) -> object:
        if path.startswith("/lateness/"):
            intervals, self._intervals_ms = self._intervals_ms, []
            return [item - float(path.rpartition("/")[2]) for item in intervals]
        if not path.endswith("check_task_status"):
            return {"err_code": 0, "task_id": str(uuid.uuid4()), "remaining_count": 1_000_000, "remaining_money": 0}
        match, now = _TASK.search(body), time.monotonic()
        task = match[1] if match else b""
        if task in self._last_checked_at:
            self._intervals_ms.append((now - self._last_checked_at[task]) * 1000)
        self._last_checked_at[task] = now
        return {"err_code": 0, "status": self._state}


async def _serve(latency: float, state: str) -> None:
    upstream = _Upstream(latency, state)
    server = await asyncio.start_server(upstream.serve_connection, "127.0.0.1", 0, backlog=1_024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)  # noqa: T201 - its parent reads it
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(float(sys.argv[1]), sys.argv[2]))
