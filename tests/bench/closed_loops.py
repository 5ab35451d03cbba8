"""Closed loops: each connection sends its next request after the response to the previous one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tests.bench.candidates import ALL, API, API_AND_WORKER, FASTAPI, LUA, PROXY, Candidate, Target, upscale_request
from tests.bench.comparison import Comparison, run_candidate
from tests.bench.images import LARGE, SMALL, random_png
from tests.bench.load import Request, closed_loop
from tests.bench.peers.stub import SUBMIT_PATHS
from tests.support.images import make_png

CONNECTIONS = (1, 16, 64)
QUICK_CONNECTIONS = (1, 16)
DIRECT = "vendor, direct"
READ, SMALL_SUBMIT, LARGE_SUBMIT, SLOW_VENDOR = "read", "submit 300 KB", "submit 10 MB", "slow vendor"
_WARM_UP_SECONDS = 1
_SLOW_SECONDS = 2.0


def read(comparison: Comparison) -> None:
    """One running task is read again and again."""
    _load(comparison, READ, _candidates(comparison), lambda target: target.read_request(target.submit(make_png())))


def submit_small(comparison: Comparison) -> None:
    """Images of 300 KB are submitted."""
    _submit(comparison, SMALL_SUBMIT, random_png(SMALL), comparison.seconds)


def submit_large(comparison: Comparison) -> None:
    """Images of 10 MB are submitted."""
    _submit(comparison, LARGE_SUBMIT, random_png(LARGE), comparison.seconds + (0 if comparison.quick else 1))


def slow_vendor(comparison: Comparison) -> None:
    """Images of 300 KB are submitted to a vendor that takes 2 s for each answer."""
    image = random_png(SMALL)
    for candidate in comparison.gateways(API, ALL) + comparison.references(LUA, FASTAPI):
        with run_candidate(comparison, candidate, delay_seconds=_SLOW_SECONDS) as (_, target):
            seconds = max(comparison.seconds * 3, 5)
            request = target.submit_request(image)
            comparison.measure(SLOW_VENDOR, candidate, target, request, connections=64, seconds=seconds)


def _candidates(comparison: Comparison) -> list[Candidate]:
    if comparison.quick:
        return comparison.gateways(API) + comparison.references(LUA, FASTAPI)
    return comparison.gateways(API, ALL, API_AND_WORKER) + comparison.references(PROXY, LUA, FASTAPI)


def _submit(comparison: Comparison, row: str, image: bytes, seconds: int) -> None:
    for _ in range(comparison.rounds):
        with comparison.environment() as env:
            request = upscale_request(SUBMIT_PATHS["upscale"], image)
            load = closed_loop(env.stub.url, request, connections=1, seconds=_WARM_UP_SECONDS)
        figures = {"per_second": load.per_second, "p50_ms": load.p50_ms, "p99_ms": load.p99_ms}
        comparison.add(row, DIRECT, figures, load.errors, connections=1)
    _load(comparison, row, _candidates(comparison), lambda target: target.submit_request(image), seconds)


def _load(
    comparison: Comparison,
    row: str,
    candidates: Sequence[Candidate],
    prepare: Callable[[Target], Request],
    seconds: int = 0,
) -> None:
    """Load each server with more and more connections; it is restarted for each round."""
    seconds = seconds or comparison.seconds
    for candidate in comparison.alternate(candidates):
        with run_candidate(comparison, candidate) as (_, target):
            request = prepare(target)
            closed_loop(target.url, request, connections=16, seconds=_WARM_UP_SECONDS)
            for connections in QUICK_CONNECTIONS if comparison.quick else CONNECTIONS:
                shorter = max(seconds - 1, 1) if connections == 1 else seconds  # it varies least
                comparison.measure(row, candidate, target, request, connections=connections, seconds=shorter)
