"""Reached thresholds of limits are reported once per window, whatever fails and however many processes report."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from service.domain.errors import LedgerUnavailable
from service.domain.tenants import Limit, Window
from service.domain.thresholds import LATE_MS
from service.storage.redis import DAY_MS
from service.usecases import quota_thresholds
from tests.usecases.gateway_fixture import (
    INTERNAL_ERROR,
    START_MS,
    TENANT,
    UNAVAILABLE,
    URL,
    UseCases,
    run_job,
    wait_until,
)

DAY_LIMIT = Limit(Window.DAY, tasks=4, warn_at=(50, 100))
TO_MIDNIGHT_MS = DAY_MS - START_MS % DAY_MS
"""From the start of a test."""


@pytest.fixture(autouse=True)
async def limits(gateway: UseCases) -> None:
    await gateway.set_webhook(url=URL)
    await gateway.set_limits(DAY_LIMIT)


async def report(gateway: UseCases) -> list[dict[str, Any]]:
    """Report and deliver what was reached; return the data of all events so far."""
    await gateway.reporter.report_reached()
    return await received(gateway)


async def received(gateway: UseCases) -> list[dict[str, Any]]:
    await gateway.deliver()
    assert {url for url, _, _ in gateway.receivers.sent} <= {URL}
    events = [msgspec.json.decode(body) for _, _, body in gateway.receivers.sent]
    return [event["data"] for event in events if event["type"] == "quota.threshold"]


async def reported_shares(gateway: UseCases) -> list[tuple[str, int, float]]:
    """Return what was reported: deliveries that are due at the same time have no order."""
    return sorted((data["policy"], data["threshold"], data["limit"]) for data in await report(gateway))


async def submit(gateway: UseCases, number: int) -> None:
    for _ in range(number):
        await gateway.submit_task()


async def test_each_threshold_is_reported_once(gateway: UseCases) -> None:
    await submit(gateway, 1)
    assert await report(gateway) == []
    await submit(gateway, 1)
    (data,) = await report(gateway)
    assert data == {
        "tenant": "shop",
        "policy": "day-tasks",
        "unit": "tasks",
        "window": "day",
        "threshold": 50,
        "limit": 4,
        "used": 2,
        "reserved": 0,
        "remaining": 2,
        "resets_at": "2026-09-22T00:00:00Z",
    }
    await submit(gateway, 1)
    assert len(await report(gateway)) == 1
    await submit(gateway, 1)
    assert await reported_shares(gateway) == [("day-tasks", 50, 4), ("day-tasks", 100, 4)]
    gateway.reporter = gateway.make_reporter()  # of another process
    assert len(await report(gateway)) == 2


async def test_money_and_tasks_have_thresholds_each(gateway: UseCases) -> None:
    gateway.upstream.count = 0
    await gateway.set_limits(Limit(Window.TOTAL, tasks=3, money_fen=250, warn_at=(80,)))
    for _ in range(3):  # the first one shows no price
        await submit(gateway, 1)
        await gateway.poll()
    money, tasks = sorted(await report(gateway), key=lambda data: data["policy"])
    assert (tasks["policy"], tasks["used"], tasks["resets_at"]) == ("total-tasks", 3, None)
    assert (money["policy"], money["unit"], money["limit"], money["used"]) == ("total-money", "money", 2.5, 2)


async def test_refund_and_second_crossing_send_nothing_more(gateway: UseCases) -> None:
    await submit(gateway, 2)
    await gateway.poll()
    assert len(await report(gateway)) == 1
    (reservation, *_) = await gateway.reservations()
    assert await gateway.redis_ledger.refund(TENANT, reservation, "a mistake")
    assert len(await report(gateway)) == 1
    await submit(gateway, 1)
    for reporter in (gateway.reporter, gateway.make_reporter()):
        gateway.reporter = reporter
        assert len(await report(gateway)) == 1


async def test_next_window_and_raised_limit_are_reported_again(gateway: UseCases) -> None:
    await submit(gateway, 2)
    await report(gateway)
    await gateway.advance(DAY_MS)
    assert len(await report(gateway)) == 1
    await submit(gateway, 2)
    assert len(await report(gateway)) == 2
    await gateway.set_limits(Limit(Window.DAY, tasks=5, warn_at=(50,)))
    assert len(await report(gateway)) == 2
    await submit(gateway, 1)
    expected = [("day-tasks", 50, 4), ("day-tasks", 50, 4), ("day-tasks", 50, 5)]
    assert await reported_shares(gateway) == expected
    await gateway.set_limits(DAY_LIMIT)  # lowered again
    assert await reported_shares(gateway) == expected


@pytest.mark.parametrize("when", ["before", "after"])
async def test_failed_report_is_repeated(gateway: UseCases, when: str) -> None:
    """Neither a process that dies nor an answer that is lost loses or repeats an event."""
    await submit(gateway, 2)
    getattr(gateway.faults, when)["queue_threshold"] = [UNAVAILABLE]
    with pytest.raises(LedgerUnavailable):
        await gateway.reporter.report_reached()
    assert len(await received(gateway)) == (when == "after")
    for reporter in (gateway.reporter, gateway.make_reporter()):
        gateway.reporter = reporter
        assert len(await report(gateway)) == 1


async def test_concurrent_processes_report_once(gateway: UseCases) -> None:
    await submit(gateway, 4)
    await asyncio.gather(*(gateway.make_reporter().report_reached() for _ in range(5)))
    assert len(await received(gateway)) == 2


async def test_window_is_reported_after_its_end(gateway: UseCases) -> None:
    """A window that ended before the report is reported, also if the next has begun; later new thresholds are not."""
    await gateway.advance(TO_MIDNIGHT_MS - 10)
    await submit(gateway, 2)
    await gateway.advance(10)
    await submit(gateway, 1)
    (data,) = await report(gateway)
    assert (data["used"], data["resets_at"]) == (2, "2026-09-22T00:00:00Z")
    await gateway.advance(LATE_MS)
    await gateway.set_limits(Limit(Window.DAY, tasks=8, warn_at=(25,)))
    assert len(await report(gateway)) == 1


async def test_window_that_is_reached_after_the_next_is_reported_once(gateway: UseCases) -> None:
    """The server's clock may step back, and tasks of a window may end after the next was reported."""
    await gateway.advance(TO_MIDNIGHT_MS)
    await submit(gateway, 2)
    assert len(await report(gateway)) == 1
    await gateway.advance(-1_000)
    await submit(gateway, 2)
    for reporter in (gateway.reporter, gateway.make_reporter()):
        gateway.reporter = reporter
        assert sorted(data["resets_at"][:10] for data in await report(gateway)) == ["2026-09-22", "2026-09-23"]
    await gateway.advance(1_000)
    gateway.reporter = gateway.make_reporter()
    assert len(await report(gateway)) == 2


async def test_only_tenants_with_an_address_are_told(gateway: UseCases) -> None:
    await gateway.set_webhook(url=None)
    await submit(gateway, 2)
    assert await report(gateway) == []
    await gateway.set_webhook(url=URL)
    assert len(await report(gateway)) == 1
    await submit(gateway, 2)
    tenant, reporter = gateway.tenant, gateway.make_reporter()
    reporter.registry = type("Outdated", (), {"current": gateway.registry.current})()
    await gateway.change_registry(drop_tenants=(tenant,))
    await reporter.report_reached()
    assert len(await received(gateway)) == 1


async def test_job_survives_outages_and_errors(gateway: UseCases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quota_thresholds, "CHECK_SECONDS", 0.001)
    await submit(gateway, 2)
    gateway.faults.before["tenant_figures"] = [UNAVAILABLE, INTERNAL_ERROR]
    async with run_job(gateway.reporter.run()):
        await wait_until(lambda: not gateway.faults.before["tenant_figures"])
        await wait_until(lambda: "queue_threshold" in [name for name, _ in gateway.faults.calls])
        await wait_until(lambda: gateway.faults.calls[-1][0] == "tenant_figures")  # the next check
    assert len(await received(gateway)) == 1
