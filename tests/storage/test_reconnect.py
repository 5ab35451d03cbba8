"""Subscriptions reconnect for as long as Redis is unavailable, and an outage is logged once."""

from __future__ import annotations

import asyncio
import time

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from service.domain.errors import LedgerUnavailable
from service.storage import redis
from service.storage.connections import connect
from service.storage.redis import RedisMonitor, RedisScripts, Subscriber
from service.telemetry.metrics import Metrics, RedisErrorKind, RedisOutcome
from tests.support.valkey import reserve_port, run_valkey
from tests.unit.metric_samples import read_sample

TIMEOUT_SECONDS = 20.0
_FAILURES = 5


class ReportingMonitor(RedisMonitor):
    """A monitor that also reports each error."""

    def __init__(self) -> None:
        super().__init__(Metrics(CollectorRegistry()))
        self.failures = asyncio.Queue[RedisErrorKind]()

    def record_error(self, error: RedisErrorKind) -> None:
        self.failures.put_nowait(error)


async def test_an_outage_is_followed_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often it is tried while the store is away, it is heard again when it is back, and logs nothing itself."""
    monkeypatch.setattr(redis, "RECONNECT_SECONDS", 0.01)
    port, monitor, received = reserve_port(), ReportingMonitor(), asyncio.Event()
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)

    async def handle(message: bytes | None) -> None:
        if message == b"message":
            received.set()

    with capture_logs() as logs:
        following = asyncio.create_task(Subscriber(connections.open_pubsub, "channel", handle, monitor).run())
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await _wait_for_failures(monitor.failures)
                assert logs == []
                with run_valkey(port=port):
                    while not received.is_set():
                        await connections.commands.publish("channel", b"message")
                        await asyncio.sleep(0.01)
                await _wait_for_failures(monitor.failures)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
            await connections.aclose()


async def test_outage_is_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line at the start and one at the end, whatever fails in between."""
    monkeypatch.setattr(redis, "QUIET_SECONDS", 0)
    port, metrics = reserve_port(), Metrics(CollectorRegistry())
    connections = connect(f"redis://127.0.0.1:{port}", timeout=5)
    monitor = RedisMonitor(metrics)
    reader = RedisScripts(connections.commands, monitor=monitor)
    with capture_logs() as logs:
        for _ in range(2):
            failed = await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)), return_exceptions=True)
            assert all(isinstance(item, LedgerUnavailable) for item in failed)
            monitor.record_error(RedisErrorKind.CONNECTION)
            with run_valkey(port=port):
                await asyncio.gather(*(reader.read(("GET", "x")) for _ in range(20)))
    await connections.aclose()
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"] * 2
    assert [log.get("failed_calls") for log in logs] == [None, 20, None, 20]
    assert read_sample(metrics, "gateway_redis_errors_total", error="connection") == 42
    for outcome in ("unavailable", "ok"):
        assert read_sample(metrics, "gateway_redis_calls_total", command="read", outcome=outcome) == 40


def test_outage_with_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Successful calls among failing ones do not end an outage; an error response starts one too."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = RedisMonitor(Metrics(CollectorRegistry()))
    with capture_logs() as logs:
        for _ in range(100):
            monitor.record_error(RedisErrorKind.RESPONSE)
            monitor.record_call("reserve", RedisOutcome.UNAVAILABLE, 0)
            monitor.record_call("reserve", RedisOutcome.OK, 0)
            now += 0.5
        now += redis.QUIET_SECONDS
        monitor.record_error(RedisErrorKind.RESPONSE)
        monitor.record_call("reserve", RedisOutcome.ERROR, 0)
        monitor.record_call("reserve", RedisOutcome.OK, 0)
        monitor.record_error(RedisErrorKind.RESPONSE)
        monitor.record_call("reserve", RedisOutcome.ERROR, 0)
    assert [log["event"] for log in logs] == ["redis.unavailable", "redis.available"]


async def _wait_for_failures(failures: asyncio.Queue[RedisErrorKind]) -> None:
    while not failures.empty():
        failures.get_nowait()
    for _ in range(_FAILURES):
        await failures.get()
