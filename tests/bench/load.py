"""Requests with PNGs of random pixels, and two load generators: `wrk` in a closed loop, and asyncio for the rest."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from PIL import Image

SMALL = 300_000
LARGE = 10_000_000
_SCRIPT = Path(__file__).with_name("wrk.lua")
_TIMEOUT_SECONDS = 60


@cache
def random_png(size: int) -> bytes:
    """Return an incompressible PNG of about this size, the same each time."""
    side = int((size / 3) ** 0.5)
    image, buffer = Image.frombytes("RGB", (side, side), random.Random(size).randbytes(side * side * 3)), BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


@dataclass(frozen=True)
class Request:
    """A request; several paths are used in turn."""

    method: str
    paths: tuple[str, ...]
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""

    def with_headers(self, **headers: str) -> Request:
        """Return a copy with more headers."""
        return replace(self, headers=(*self.headers, *headers.items()))

    def encode(self, number: int = 0) -> tuple[bytes, bytes]:
        """Return head and body for a connection of its own."""
        lines = [f"{self.method} {self.paths[number % len(self.paths)]} HTTP/1.1", "Host: gateway", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body:
            lines.append(f"Content-Length: {len(self.body)}")
        return "\r\n".join((*lines, "", "")).encode(), self.body


def encode_form(fields: Mapping[str, str], image: bytes) -> tuple[str, bytes]:
    """Return the content type and the bytes of a multipart form with a PNG as `image`."""
    files = {"image": ("image.png", image, "image/png")}
    request = httpx2.Request("POST", "http://gateway/", data=dict(fields), files=files)
    return request.headers["content-type"], request.read()


@dataclass(frozen=True)
class Load:
    """The result of a closed loop: successful requests, latencies in milliseconds, errors."""

    seconds: float
    succeeded: int
    p50_ms: float
    p99_ms: float
    errors: Counter[str]

    @property
    def per_second(self) -> float:
        return self.succeeded / self.seconds


def closed_loop(url: str, request: Request, *, connections: int, seconds: int) -> Load:
    """Let each connection send its next request as soon as it has the response to the previous one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "paths").write_text("".join(f"{path}\n" for path in request.paths))
        (folder / "body").write_bytes(request.body)
        command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
        command += ["--timeout", f"{_TIMEOUT_SECONDS}s", "--script", str(_SCRIPT), url, "--", request.method]
        command += [str(folder / "paths"), str(folder / "body") if request.body else ""]
        command += [f"{name}: {value}" for name, value in request.headers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    errors = Counter({"4xx or 5xx": result["refused"], "broken connection": result["broken"]})
    return Load(
        result["microseconds"] / 1e6,
        result["requests"] - result["refused"],
        result["p50"] / 1000 if result["requests"] else float("nan"),
        result["p99"] / 1000 if result["requests"] else float("nan"),
        +errors,
    )


@dataclass
class Answers:
    """The responses to single requests: durations in seconds by status."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    sending_seconds: float = 0
    """The duration of sending in an open loop."""

    def add(self, status: str, seconds: float) -> None:
        self.seconds.setdefault(status, []).append(seconds)

    def counts(self) -> Counter[str]:
        """Return the number of responses by status."""
        return Counter({status: len(second) for status, second in self.seconds.items()})

    def succeeded(self) -> Sequence[float]:
        """Return the durations of successful responses in seconds, sorted."""
        return sorted(item for status, times in self.seconds.items() if status.startswith("2") for item in times)

    def errors(self) -> Counter[str]:
        """Return the number of other responses by status."""
        return Counter({status: count for status, count in self.counts().items() if not status.startswith("2")})


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which this percentage lies; NaN if empty."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else float("nan")


async def send_request(url: str, request: Request, number: int, answers: Answers, *, timeout: float) -> None:
    """Send one request on a connection of its own; an error counts as a status of that name."""
    started_at = time.perf_counter()
    writer = None
    status = "timeout"
    try:
        async with asyncio.timeout(timeout):
            parts = urlsplit(url)
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            head, body = request.encode(number)
            writer.write(head)
            if body:
                writer.write(body)
            status = (await reader.readuntil(b"\r\n")).split(b" ")[1].decode()
            answers.bodies.append(await reader.read())
    except TimeoutError:
        status = "timeout"
    except (OSError, asyncio.IncompleteReadError, IndexError):
        status = "broken connection"
    finally:
        answers.add(status, time.perf_counter() - started_at)
        if writer:
            writer.transport.abort()


async def send_all(url: str, request: Request, number: int, *, connections: int, timeout: float = 120) -> Answers:
    """Send so many requests with bounded concurrency."""
    answers, gate = Answers(), asyncio.Semaphore(connections)

    async def one(index: int) -> None:
        async with gate:
            await send_request(url, request, index, answers, timeout=timeout)

    async with asyncio.TaskGroup() as group:
        for index in range(number):
            group.create_task(one(index))
    return answers


async def open_loop(url: str, request: Request, *, rate: float, seconds: float, timeout: float) -> Answers:
    """Send requests at a rate, whatever the responses; then wait for all of them."""
    answers = Answers()
    started_at = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index in range(int(rate * seconds)):
            await asyncio.sleep(max(started_at + index / rate - time.perf_counter(), 0))
            group.create_task(send_request(url, request, index, answers, timeout=timeout))
        answers.sending_seconds = time.perf_counter() - started_at
    return answers


async def probe(url: str, path: str, answers: Answers, done: Callable[[], bool], *, timeout: float) -> None:
    """Send a GET ten times a second, one after the other, until `done`."""
    request = Request("GET", (path,))
    while not done():
        started_at = time.perf_counter()
        await send_request(url, request, 0, answers, timeout=timeout)
        await asyncio.sleep(max(0.1 - (time.perf_counter() - started_at), 0))
