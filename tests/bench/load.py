"""Requests with PNGs of random pixels, and two load generators: `wrk` in a closed loop, and asyncio for the rest."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
from PIL import Image

SMALL = 300_000
LARGE = 10_000_000
_SCRIPT = Path(__file__).with_name("wrk.lua")
_OPTIONS = {"scale": "2", "prompt": "a lighthouse at dusk, film grain", "metadata": '{"order": "2026-004217"}'}


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


def upscale_request(path: str, image: bytes, *headers: tuple[str, str]) -> Request:
    """Return a submission of a PNG with typical options to any server."""
    files = {"image": ("image.png", image, "image/png")}
    form = httpx2.Request("POST", "http://gateway/", data=_OPTIONS, files=files)
    return Request("POST", (path,), (*headers, ("Content-Type", form.headers["content-type"])), form.read())


@dataclass(frozen=True)
class Load:
    """The result of a closed loop: successful requests, latencies in milliseconds, errors."""

    succeeded: int
    per_second: float
    p50_ms: float
    p99_ms: float
    errors: Counter[str]


def closed_loop(url: str, request: Request, *, connections: int = 16, seconds: int = 1) -> Load:
    """Let each connection send its next request as soon as it has the response to the previous one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "paths").write_text("".join(f"{path}\n" for path in request.paths))
        (folder / "body").write_bytes(request.body)
        command = ["wrk", "--threads", "1", "--connections", str(connections), "--duration", f"{seconds}s"]
        command += ["--timeout", "60s", "--script", str(_SCRIPT), url, "--", request.method]
        command += [str(folder / "paths"), str(folder / "body") if request.body else ""]
        command += [f"{name}: {value}" for name, value in request.headers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    result = json.loads(line.removeprefix("RESULT "))
    succeeded = result["requests"] - result["refused"]
    p50, p99 = (result[name] / 1000 if result["requests"] else float("nan") for name in ("p50", "p99"))
    errors = +Counter({"4xx or 5xx": result["refused"], "broken connection": result["broken"]})
    return Load(succeeded, succeeded / result["microseconds"] * 1e6, p50, p99, errors)


@dataclass
class Answers:
    """The responses to single requests: durations in seconds by status, or by the name of an error."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)
    sending_seconds: float = 0

    def counts(self) -> Counter[str]:
        """Return the number of responses by status."""
        return Counter({status: len(times) for status, times in self.seconds.items()})

    def succeeded(self) -> Sequence[float]:
        """Return the durations of successful responses in seconds."""
        return [item for status, times in self.seconds.items() if status.startswith("2") for item in times]

    def errors(self) -> Counter[str]:
        """Return the number of other responses by status."""
        return Counter({status: count for status, count in self.counts().items() if not status.startswith("2")})


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which this percentage lies; NaN if empty."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)] if ordered else float("nan")


async def send_request(url: str, request: Request, number: int, answers: Answers, *, timeout: float) -> None:
    """Send one request on a connection of its own; an error counts as a status of that name."""
    path, parts, writer = request.paths[number % len(request.paths)], urlsplit(url), None
    headers = (("Host", "gateway"), ("Connection", "close"), ("Content-Length", len(request.body)), *request.headers)
    head = f"{request.method} {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers) + "\r\n"
    started_at = time.perf_counter()
    status = "broken connection"
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
            writer.writelines((head.encode(), request.body))
            status = (await reader.readuntil(b"\r\n")).split(b" ")[1].decode()
            answers.bodies.append(await reader.read())
    except TimeoutError:
        status = "timeout"
    except (OSError, asyncio.IncompleteReadError, IndexError):
        status = "broken connection"
    finally:
        answers.seconds.setdefault(status, []).append(time.perf_counter() - started_at)
        if writer:
            writer.transport.abort()


async def send_all(url: str, request: Request, number: int, *, connections: int) -> Answers:
    """Send so many requests with bounded concurrency."""
    answers, gate = Answers(), asyncio.Semaphore(connections)

    async def send_one(index: int) -> None:
        async with gate:
            await send_request(url, request, index, answers, timeout=120)

    async with asyncio.TaskGroup() as group:
        for index in range(number):
            group.create_task(send_one(index))
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


async def probe(
    url: str, request: Request, answers: Answers, done: asyncio.Event, *, interval: float, timeout: float
) -> None:
    """Send a request every `interval` seconds, one after the other, until the end of a load."""
    while not done.is_set():
        started_at = time.perf_counter()
        await send_request(url, request, 0, answers, timeout=timeout)
        await asyncio.sleep(max(interval - (time.perf_counter() - started_at), 0))
