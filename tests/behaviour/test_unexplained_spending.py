"""Detection of spending outside the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import product

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.upstream_control import USER_KEY
from tests.support.valkey import Valkey

MISSING = Fault(times=2, wrong={"remaining_count": "missing", "remaining_money": "null"})
LOST = Fault(on="submit", times=1, reply="reset")
FAILS = Fault(on="submit", times=1, fail="it could not be done")


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def harness(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as opened_harness:
        yield opened_harness


async def read_unexplained(harness: BalanceHarness) -> tuple[int, float]:
    """Return the unexplained uses and yuan of the account."""
    unexplained = (await harness.get_account())["unexplained"]
    return unexplained["count"], unexplained["money"]


async def spend_elsewhere(harness: BalanceHarness, count: int, money: int) -> None:
    """Spend from the upstream account without the gateway."""
    balance = await harness.upstream_balance()
    await harness.set_balance(balance[0] - count, balance[1] - money)


async def test_spending_between_submissions_adds_up(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await harness.set_balance(9, 40)
    for _ in range(2):
        await harness.run_task()
    assert await read_unexplained(harness) == (0, 0)
    await spend_elsewhere(harness, 3, 0)
    await harness.run_task()
    assert await read_unexplained(harness) == (3, 0)
    await spend_elsewhere(harness, 0, 7)
    await harness.run_task()
    assert await read_unexplained(harness) == (3, 7)
    await spend_elsewhere(harness, 1, 1)
    await harness.run_task()
    assert await read_unexplained(harness) == (4, 8)


async def test_spending_above_the_highest_price_is_unexplained(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await harness.set_balance(0, 100)
    for _ in range(2):
        await harness.run_task()
    await spend_elsewhere(harness, 0, 30)
    await harness.run_task()
    assert await read_unexplained(harness) == (0, 30)
    assert await harness.shown_balance() == await harness.upstream_balance() == (0, 70 - 3 * PRICE_YUAN)


async def test_detection_resumes_after_a_lost_failure(harness: BalanceHarness) -> None:
    await harness.set_balance(9, 0)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(FAILS,))
    await harness.run_task()
    await harness.run_task()
    assert await read_unexplained(harness) == (0, 0)
    await spend_elsewhere(harness, 2, 0)
    await harness.run_task()
    assert await read_unexplained(harness) == (2, 0)


@pytest.mark.parametrize("fault", [FAILS, LOST, MISSING], ids=["failed", "lost", "missing"])
async def test_parallel_tasks_leave_nothing_unexplained(harness: BalanceHarness, fault: Fault) -> None:
    await harness.set_balance(6, 20 * PRICE_YUAN)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(fault,))
    for _ in range(3):
        tasks, _ = await harness.submit_concurrently(3)
        await harness.control.wait_until_idle()
        for task in tasks:
            await harness.wait_for_cost(task)
        assert await read_unexplained(harness) == (0, 0)
    await harness.set_behaviour(faults=())
    await harness.gateway.advance(600)
    for _ in range(3):
        await harness.run_task()
    assert await read_unexplained(harness) == (0, 0)
    assert await harness.shown_balance() == await harness.upstream_balance()


async def test_response_older_than_a_top_up_is_explained(harness: BalanceHarness) -> None:
    await harness.set_balance(5, 0)
    for _ in range(2):
        await harness.run_task()
    submits_before = await harness.sandbox.count_submits()
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, latency=1.0),))
    slow = asyncio.create_task(harness.submit())
    await harness.control.wait_for_requests(
        lambda seen: sum(item.operation == "submit" for item in seen) == submits_before + 1
    )
    await harness.set_balance(9, 30)
    await harness.run_task()
    assert (await slow).status_code == 201
    await harness.wait_for_cost((await slow).json())
    await harness.run_task()
    assert await read_unexplained(harness) == (0, 0)


async def test_failover_moves_the_expected_charge(harness: BalanceHarness) -> None:
    await harness.set_balance(50, 0, "spare-key")
    await harness.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare-key"})
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.set_balance(2, 1)
    for _ in range(5):
        await harness.run_task()
    await harness.set_balance(4, 1)
    await harness.gateway.advance(120)
    for _ in range(2):
        await harness.run_task()
    for name, key in (("main", USER_KEY), ("spare", "spare-key")):
        assert (await harness.get_account(name))["unexplained"] == {"count": 0, "money": 0}
        assert await harness.shown_balance(name) == await harness.upstream_balance(key)
