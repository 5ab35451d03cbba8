"""More submissions than the gateway can take."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import uvloop

from tests.bench.comparison import API, Comparison
from tests.bench.load import (
    LARGE,
    SMALL,
    Answers,
    Request,
    closed_loop,
    open_loop,
    percentile,
    probe,
    random_png,
    send_request,
)
from tests.bench.peers.servers import Server
from tests.support.images import make_png

OVERLOADS = {"overload, 300 KB": SMALL, "overload, 10 MB": LARGE}
"""The sizes of images by row."""
CAPACITY = "capacity"
"""The rate of submissions in a closed loop."""
PROBED = ("health", "read", "ops_health", "metrics")
_OVERLOAD_FACTOR = 3
_MAX_PER_SECOND = 6_000
_OVERLOAD_SECONDS = 30
_QUICK_SECONDS = 1.0
"""A submission that takes less shows that the overload is over."""
_PAUSE_SECONDS = 0.05
_NICENESS = 10
_LONGEST_RECOVERY_SECONDS = 60
_TIMEOUT_SECONDS = 30
"""The timeout of a client in the overload."""


def overload(comparison: Comparison) -> None:
    """Images of 300 KB, and then of 10 MB, come three times as fast as the gateway can take them."""
    for row, size in OVERLOADS.items():
        for candidate in comparison.candidates(API):
            with comparison.run(candidate) as server:
                comparison.add(row, candidate.name, *_measure_overload(comparison, server, random_png(size)))


def _measure_overload(comparison: Comparison, server: Server, image: bytes) -> tuple[dict[str, float], Counter[str]]:
    request, seconds = server.submit_request(image), 8 if comparison.quick else _OVERLOAD_SECONDS
    read = server.read_request(server.submit(make_png()))
    closed_loop(server.url, request)  # warms it up
    capacity = closed_loop(server.url, request, seconds=3).per_second
    server.reset_peak()
    used = server.cpu_seconds()
    rate = min(_OVERLOAD_FACTOR * capacity, _MAX_PER_SECOND)
    health, metrics = Request("GET", ("/healthz",)), Request("GET", ("/metrics",))
    places = (
        (server.url, health, 0.1),
        (server.url, read, 0.1),
        (server.ops_url, health, 0.1),
        (server.ops_url, metrics, 5),
    )
    probes = dict(zip(PROBED, places, strict=True))
    # The load comes from a process of its own that gives way to the probes, the store and the vendor on their CPU.
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=os.nice, initargs=(_NICENESS,)) as pool:
        sending = pool.submit(_send_overload, server, request, rate, seconds)
        probed = uvloop.run(_probe_all(probes, seconds))
        answers, recovery = sending.result()
    times, counts = answers.succeeded(), answers.counts()
    per_second = len(times) / (answers.sending_seconds + recovery)
    figures = {
        "capacity_per_second": capacity,
        "offered_per_second": counts.total() / answers.sending_seconds,
        "per_second": per_second,
        f"x {CAPACITY}": per_second / capacity,
        "p50_ms": percentile(times, 50) * 1000,
        "max_ms": max(times, default=math.nan) * 1000,
        "recovery_ms": recovery * 1000,
        "cpu_percent": (server.cpu_seconds() - used) / (answers.sending_seconds + recovery) * 100,
        "peak_mb": server.peak_mb(),
    }
    for name, found in probed.items():
        values = [item for times in found.seconds.values() for item in times]
        figures |= {f"{name}_p99_ms": percentile(values, 99) * 1000, f"{name}_max_ms": max(values) * 1000}
    # Rejections are expected here.
    figures |= {f"answers {status}": float(count) for status, count in sorted(counts.items()) if status.isdigit()}
    errors = Counter({status: count for status, count in counts.items() if not status.isdigit()})
    return figures, sum((found.errors() for found in probed.values()), errors)


async def _probe_all(probes: Mapping[str, tuple[str, Request, float]], seconds: float) -> Mapping[str, Answers]:
    """Send each request at its interval; return the responses."""
    found, done = {name: Answers() for name in probes}, asyncio.Event()
    async with asyncio.TaskGroup() as group:
        for name, (url, request, interval) in probes.items():
            group.create_task(probe(url, request, found[name], done, interval=interval, timeout=_TIMEOUT_SECONDS))
        await asyncio.sleep(seconds)
        done.set()
    return found


def _send_overload(server: Server, request: Request, rate: float, seconds: float) -> tuple[Answers, float]:
    """Offer more than the server can take; return the responses, and the seconds from then to a quick acceptance."""
    return uvloop.run(_send_and_recover(server, request, rate, seconds))


async def _send_and_recover(server: Server, request: Request, rate: float, seconds: float) -> tuple[Answers, float]:
    async with asyncio.TaskGroup() as group:
        sending = group.create_task(
            open_loop(server.url, request, rate=rate, seconds=seconds, timeout=_TIMEOUT_SECONDS)
        )
        await asyncio.sleep(seconds)
        ended_at, recovery, after = time.perf_counter(), 0.0, Answers()
        while recovery < _LONGEST_RECOVERY_SECONDS and not any(taken < _QUICK_SECONDS for taken in after.succeeded()):
            await asyncio.sleep(_PAUSE_SECONDS)
            await send_request(server.url, request, 0, after, timeout=_TIMEOUT_SECONDS)
            recovery = time.perf_counter() - ended_at
    return sending.result(), recovery
