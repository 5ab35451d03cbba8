"""Tasks that somebody looks at are checked often, the others ever more rarely, and each by one process at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.usecases.ports import Answered, Check
from tests.model.ledger_model import LONGEST, LONGEST_BACKOFF
from tests.storage.shop import KEYS, Shop, shop
from tests.support.valkey import Valkey

RUNNING, NOTHING, SUCCEEDED = Answered.RUNNING, Answered.NOTHING, Answered.SUCCEEDED
SLACK = 1_000
"""Milliseconds that a test may take between two looks at the clock."""
HOUR = 3_600_000


@pytest.fixture
async def kept(valkey: Valkey) -> AsyncIterator[Shop]:
    """A tenant with one running task."""
    async with shop(valkey.url) as found:
        await found.accept("r1")
        yield found


async def next_check(kept: Shop) -> int:
    """In how many milliseconds the task is checked again."""
    due = await kept.due_in("r1")
    assert due is not None
    return due


async def test_what_is_known(kept: Shop) -> None:
    """Each task is given in the order asked for, with the time now; what is not known is None."""
    await kept.accept("r2")
    found = await kept.tasks.attend(["r2", "never", "r1"])
    assert [each and each[0].reservation for each in found] == ["r2", None, "r1"]
    assert found[0]
    assert abs(found[0][1] - await kept.now()) < SLACK


async def test_a_look_brings_the_check_forward(kept: Shop) -> None:
    """A task that nobody looked at for long is checked at once when somebody does, and then at every interval."""
    await kept.check(RUNNING)
    await kept.advance(HOUR)
    await kept.check(RUNNING)
    assert LONGEST - SLACK < await next_check(kept) <= LONGEST
    await kept.tasks.attend(["r1"])
    assert await next_check(kept) <= 0
    await kept.check(RUNNING)
    assert await next_check(kept) <= kept.spans.check_after
    await kept.tasks.attend(["r1"])
    assert await next_check(kept) > kept.spans.check_after - SLACK


async def test_a_look_during_a_check(kept: Shop) -> None:
    """Who looks while the task is being checked has the next check come soon too."""
    await kept.check(RUNNING)
    await kept.advance(HOUR)
    (due,) = await kept.tasks.claim(1)
    await kept.tasks.attend(["r1"])
    await kept.tasks.record(due, Check(answered=RUNNING))
    assert await next_check(kept) <= kept.spans.check_after


async def test_interest_wanes(kept: Shop) -> None:
    """A while after the last look the interval grows again."""
    await kept.tasks.attend(["r1"])
    assert 0 < await kept.client.pttl(KEYS.interest("r1")) <= kept.spans.interest
    await kept.client.pexpire(KEYS.interest("r1"), 0)
    await kept.advance(HOUR)
    await kept.check(RUNNING)
    assert LONGEST - SLACK < await next_check(kept) <= LONGEST


async def test_no_interest_in_the_past(kept: Shop) -> None:
    """A look at a task that has ended, or never was, leaves nothing behind and has nothing checked."""
    await kept.check(SUCCEEDED)
    before = sorted(await kept.client.keys())
    await kept.tasks.attend(["r1", "never"])
    assert sorted(await kept.client.keys()) == before
    assert await kept.due_in("r1") is None


async def test_failing_checks(kept: Shop) -> None:
    """Checks that fail come ever more rarely, up to a minute, however many look on; one that works ends that."""
    intervals = []
    for _ in range(6):
        await kept.check(NOTHING)
        await kept.tasks.attend(["r1"])
        intervals.append(await next_check(kept))
    expected = [5_000, 10_000, 20_000, 40_000, LONGEST_BACKOFF, LONGEST_BACKOFF]
    assert all(most - SLACK < interval <= most for interval, most in zip(intervals, expected, strict=True))
    await kept.check(RUNNING)
    assert await next_check(kept) <= kept.spans.check_after


async def test_claims(kept: Shop) -> None:
    """A task that is being checked is given to nobody else until the claim runs out."""
    await kept.advance(kept.spans.check_after)
    assert len(await kept.tasks.claim(5)) == 1
    await kept.advance(kept.spans.claim - SLACK)
    assert await kept.tasks.claim(5) == []
    await kept.advance(SLACK)
    assert len(await kept.tasks.claim(5)) == 1


async def test_a_claim_that_ran_out(kept: Shop) -> None:
    """A slow check and the one that took its place record one end, and the task is not checked again."""
    await kept.advance(kept.spans.check_after)
    (slow,) = await kept.tasks.claim(5)
    await kept.advance(kept.spans.claim)
    (second,) = await kept.tasks.claim(5)
    assert await kept.tasks.record(second, Check(answered=SUCCEEDED))
    assert await kept.tasks.record(slow, Check(answered=RUNNING)) is None
    await kept.advance(HOUR)
    assert await kept.tasks.claim(5) == []
    assert await kept.client.zcard(KEYS.claims) == 0


async def test_a_task_that_vanished(kept: Shop) -> None:
    """A task whose key is gone is dropped from the watch and holds up no other."""
    await kept.accept("r2")
    await kept.client.delete(KEYS.task("r1"))
    await kept.advance(kept.spans.check_after)
    assert await kept.tasks.attend(["r1"]) == [None]
    assert [due.task.reservation for due in await kept.tasks.claim(5)] == ["r2"]
    assert await kept.due_in("r1") is None
