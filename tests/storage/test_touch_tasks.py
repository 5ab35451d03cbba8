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
async def kept(valkey: Valkey) -> AsyncIterator[StoreFixture]:
    """Yield a tenant with one running task."""
    async with open_store(valkey.url) as found:
        await found.accept_tasks("r1")
        yield found


async def next_check_ms(kept: StoreFixture) -> int:
    due = await kept.next_check_ms("r1")
    assert due is not None
    return due


async def test_order(kept: StoreFixture) -> None:
    """Tasks are returned in the requested order, with the current time; unknown ones are None."""
    await kept.accept_tasks("r2")
    found = await kept.tasks.touch(["r2", "never", "r1"])
    assert [item and item[0].reservation for item in found] == ["r2", None, "r1"]
    assert found[0]
    assert abs(found[0][1] - await kept.now()) < SLACK_MS


async def test_touch_brings_the_check_forward(kept: StoreFixture) -> None:
    """Touching a task that was long unwatched schedules a check at once, then at every interval."""
    await kept.check_due_task(RUNNING)
    await kept.advance(HOUR)
    await kept.check_due_task(RUNNING)
    assert MAX_CHECK_INTERVAL_MS - SLACK_MS < await next_check_ms(kept) <= MAX_CHECK_INTERVAL_MS
    await kept.tasks.touch(["r1"])
    assert await next_check_ms(kept) <= 0
    await kept.check_due_task(RUNNING)
    assert await next_check_ms(kept) <= kept.retention.check_interval_ms
    await kept.tasks.touch(["r1"])
    assert await next_check_ms(kept) > kept.retention.check_interval_ms - SLACK_MS


async def test_touch_during_a_check(kept: StoreFixture) -> None:
    """Touching a task during its check schedules the next one soon."""
    await kept.check_due_task(RUNNING)
    await kept.advance(HOUR)
    (due,) = await kept.tasks.claim_checks(1)
    await kept.tasks.touch(["r1"])
    await kept.tasks.record_check(due, CheckResult(outcome=RUNNING))
    assert await next_check_ms(kept) <= kept.retention.check_interval_ms


async def test_interval_grows_again(kept: StoreFixture) -> None:
    await kept.tasks.touch(["r1"])
    assert 0 < await kept.client.pttl(KEYS.poll_watched("r1")) <= kept.retention.watched_ms
    await kept.client.pexpire(KEYS.poll_watched("r1"), 0)
    await kept.advance(HOUR)
    await kept.check_due_task(RUNNING)
    assert MAX_CHECK_INTERVAL_MS - SLACK_MS < await next_check_ms(kept) <= MAX_CHECK_INTERVAL_MS


async def test_touch_of_ended_tasks(kept: StoreFixture) -> None:
    """Touching an ended or unknown task stores nothing and schedules nothing."""
    await kept.check_due_task(SUCCEEDED)
    before = sorted(await kept.client.keys())
    await kept.tasks.touch(["r1", "never"])
    assert sorted(await kept.client.keys()) == before
    assert await kept.next_check_ms("r1") is None


async def test_failing_checks(kept: StoreFixture) -> None:
    """Failing checks back off to a minute however often the task is touched; a success resets that."""
    intervals = []
    for _ in range(6):
        await kept.check_due_task(NO_RESPONSE)
        await kept.tasks.touch(["r1"])
        intervals.append(await next_check_ms(kept))
    expected = [5_000, 10_000, 20_000, 40_000, MAX_CHECK_BACKOFF_MS, MAX_CHECK_BACKOFF_MS]
    assert all(most - SLACK_MS < interval <= most for interval, most in zip(intervals, expected, strict=True))
    await kept.check_due_task(RUNNING)
    assert await next_check_ms(kept) <= kept.retention.check_interval_ms


async def test_claims(kept: StoreFixture) -> None:
    await kept.advance(kept.retention.check_interval_ms)
    assert len(await kept.tasks.claim_checks(5)) == 1
    await kept.advance(kept.retention.claim_lease_ms - SLACK_MS)
    assert await kept.tasks.claim_checks(5) == []
    await kept.advance(SLACK_MS)
    assert len(await kept.tasks.claim_checks(5)) == 1


async def test_expired_claim(kept: StoreFixture) -> None:
    """A slow check and its replacement record one end, and the task is not checked again."""
    await kept.advance(kept.retention.check_interval_ms)
    (slow,) = await kept.tasks.claim_checks(5)
    await kept.advance(kept.retention.claim_lease_ms)
    (second,) = await kept.tasks.claim_checks(5)
    assert await kept.tasks.record_check(second, CheckResult(outcome=SUCCEEDED))
    assert await kept.tasks.record_check(slow, CheckResult(outcome=RUNNING)) is None
    await kept.advance(HOUR)
    assert await kept.tasks.claim_checks(5) == []
    assert await kept.client.zcard(KEYS.poll_claimed) == 0


async def test_lost_task(kept: StoreFixture) -> None:
    """A task without its key is dropped and delays no other."""
    await kept.accept_tasks("r2")
    await kept.client.delete(KEYS.task("r1"))
    await kept.advance(kept.retention.check_interval_ms)
    assert await kept.tasks.touch(["r1"]) == [None]
    assert [due.task.reservation for due in await kept.tasks.claim_checks(5)] == ["r2"]
    assert await kept.next_check_ms("r1") is None
