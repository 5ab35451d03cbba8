"""Watched tasks are checked often, others ever more rarely, each by one process at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.storage.redis import MAX_CHECK_BACKOFF_MS, MAX_CHECK_INTERVAL_MS
from service.usecases.ports import CheckOutcome, CheckResult
from tests.storage.store_fixture import KEYS, StoreFixture, open_store
from tests.support.valkey import Valkey

RUNNING, NO_RESPONSE, SUCCEEDED = CheckOutcome.RUNNING, CheckOutcome.NO_RESPONSE, CheckOutcome.SUCCEEDED
SLACK_MS = 1_000
"""Milliseconds that a test may take between two reads of the clock."""
HOUR = 3_600_000


@pytest.fixture
async def task_store(valkey: Valkey) -> AsyncIterator[StoreFixture]:
    """Yield a tenant with one running task."""
    async with open_store(valkey.url) as store:
        await store.accept_tasks("r1")
        yield store


async def next_check_ms(task_store: StoreFixture) -> int:
    due = await task_store.next_check_ms("r1")
    assert due is not None
    return due


async def test_order(task_store: StoreFixture) -> None:
    """Tasks are returned in the requested order, with the current time; unknown ones are None."""
    await task_store.accept_tasks("r2")
    result = await task_store.tasks.touch(["r2", "never", "r1"])
    assert [item and item[0].reservation for item in result] == ["r2", None, "r1"]
    assert result[0]
    assert abs(result[0][1] - await task_store.now()) < SLACK_MS


async def test_touch_brings_the_check_forward(task_store: StoreFixture) -> None:
    """Touching a task that was long unwatched schedules a check at once, then at every interval."""
    await task_store.check_due_task(RUNNING)
    await task_store.advance(HOUR)
    await task_store.check_due_task(RUNNING)
    assert MAX_CHECK_INTERVAL_MS - SLACK_MS < await next_check_ms(task_store) <= MAX_CHECK_INTERVAL_MS
    await task_store.tasks.touch(["r1"])
    assert await next_check_ms(task_store) <= 0
    await task_store.check_due_task(RUNNING)
    assert await next_check_ms(task_store) <= task_store.retention.check_interval_ms
    await task_store.tasks.touch(["r1"])
    assert await next_check_ms(task_store) > task_store.retention.check_interval_ms - SLACK_MS


async def test_touch_during_a_check(task_store: StoreFixture) -> None:
    """Touching a task during its check schedules the next one soon."""
    await task_store.check_due_task(RUNNING)
    await task_store.advance(HOUR)
    (due,) = await task_store.tasks.claim_checks(1)
    await task_store.tasks.touch(["r1"])
    await task_store.tasks.record_check(due, CheckResult(outcome=RUNNING))
    assert await next_check_ms(task_store) <= task_store.retention.check_interval_ms


async def test_interval_grows_again(task_store: StoreFixture) -> None:
    await task_store.tasks.touch(["r1"])
    assert 0 < await task_store.client.pttl(KEYS.poll_watched("r1")) <= task_store.retention.watched_ms
    await task_store.client.pexpire(KEYS.poll_watched("r1"), 0)
    await task_store.advance(HOUR)
    await task_store.check_due_task(RUNNING)
    assert MAX_CHECK_INTERVAL_MS - SLACK_MS < await next_check_ms(task_store) <= MAX_CHECK_INTERVAL_MS


async def test_touch_of_ended_tasks(task_store: StoreFixture) -> None:
    """Touching an ended or unknown task stores nothing and schedules nothing."""
    await task_store.check_due_task(SUCCEEDED)
    before = sorted(await task_store.client.keys())
    await task_store.tasks.touch(["r1", "never"])
    assert sorted(await task_store.client.keys()) == before
    assert await task_store.next_check_ms("r1") is None


async def test_failing_checks(task_store: StoreFixture) -> None:
    """Failing checks back off to a minute however often the task is touched; a success resets that."""
    intervals = []
    for _ in range(6):
        await task_store.check_due_task(NO_RESPONSE)
        await task_store.tasks.touch(["r1"])
        intervals.append(await next_check_ms(task_store))
    expected = [5_000, 10_000, 20_000, 40_000, MAX_CHECK_BACKOFF_MS, MAX_CHECK_BACKOFF_MS]
    assert all(most - SLACK_MS < interval <= most for interval, most in zip(intervals, expected, strict=True))
    await task_store.check_due_task(RUNNING)
    assert await next_check_ms(task_store) <= task_store.retention.check_interval_ms


async def test_claims(task_store: StoreFixture) -> None:
    await task_store.advance(task_store.retention.check_interval_ms)
    assert len(await task_store.tasks.claim_checks(5)) == 1
    await task_store.advance(task_store.retention.claim_lease_ms - SLACK_MS)
    assert await task_store.tasks.claim_checks(5) == []
    await task_store.advance(SLACK_MS)
    assert len(await task_store.tasks.claim_checks(5)) == 1


async def test_expired_claim(task_store: StoreFixture) -> None:
    """A slow check and its replacement record one end, and the task is not checked again."""
    await task_store.advance(task_store.retention.check_interval_ms)
    (slow,) = await task_store.tasks.claim_checks(5)
    await task_store.advance(task_store.retention.claim_lease_ms)
    (second,) = await task_store.tasks.claim_checks(5)
    assert await task_store.tasks.record_check(second, CheckResult(outcome=SUCCEEDED))
    assert await task_store.tasks.record_check(slow, CheckResult(outcome=RUNNING)) is None
    await task_store.advance(HOUR)
    assert await task_store.tasks.claim_checks(5) == []
    assert await task_store.client.zcard(KEYS.poll_claimed) == 0


async def test_lost_task(task_store: StoreFixture) -> None:
    """A task without its key is dropped and delays no other."""
    await task_store.accept_tasks("r2")
    await task_store.client.delete(KEYS.task("r1"))
    await task_store.advance(task_store.retention.check_interval_ms)
    assert await task_store.tasks.touch(["r1"]) == [None]
    assert [due.task.reservation for due in await task_store.tasks.claim_checks(5)] == ["r2"]
    assert await task_store.next_check_ms("r1") is None
