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
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def read_unexplained(books: BalanceHarness) -> tuple[int, float]:
    """Return the unexplained uses and yuan of the account."""
    found = (await books.get_account())["unexplained"]
    return found["count"], found["money"]


async def spend_elsewhere(books: BalanceHarness, count: int, money: int) -> None:
    """Spend from the upstream account without the gateway."""
    held = await books.upstream_balance()
    await books.set_balance(held[0] - count, held[1] - money)


async def test_spending_between_submissions_adds_up(books: BalanceHarness) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await books.set_balance(9, 40)
    for _ in range(2):
        await books.run_task()
    assert await read_unexplained(books) == (0, 0)
    await spend_elsewhere(books, 3, 0)
    await books.run_task()
    assert await read_unexplained(books) == (3, 0)
    await spend_elsewhere(books, 0, 7)
    await books.run_task()
    assert await read_unexplained(books) == (3, 7)
    await spend_elsewhere(books, 1, 1)
    await books.run_task()
    assert await read_unexplained(books) == (4, 8)


async def test_spending_above_the_highest_price_is_unexplained(books: BalanceHarness) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await books.set_balance(0, 100)
    for _ in range(2):
        await books.run_task()
    await spend_elsewhere(books, 0, 30)
    await books.run_task()
    assert await read_unexplained(books) == (0, 30)
    assert await books.shown_balance() == await books.upstream_balance() == (0, 70 - 3 * PRICE_YUAN)


async def test_detection_resumes_after_a_lost_failure(books: BalanceHarness) -> None:
    await books.set_balance(9, 0)
    for _ in range(2):
        await books.run_task()
    await books.set_behaviour(faults=(FAILS,))
    await books.run_task()
    await books.run_task()
    assert await read_unexplained(books) == (0, 0)
    await spend_elsewhere(books, 2, 0)
    await books.run_task()
    assert await read_unexplained(books) == (2, 0)


@pytest.mark.parametrize("fault", [FAILS, LOST, MISSING], ids=["failed", "lost", "untold"])
async def test_parallel_tasks_leave_nothing_unexplained(books: BalanceHarness, fault: Fault) -> None:
    await books.set_balance(6, 20 * PRICE_YUAN)
    for _ in range(2):
        await books.run_task()
    await books.set_behaviour(faults=(fault,))
    for _ in range(3):
        tasks, _ = await books.submit_concurrently(3)
        await books.control.wait_until_idle()
        for task in tasks:
            await books.wait_for_cost(task)
        assert await read_unexplained(books) == (0, 0)
    await books.set_behaviour(faults=())
    await books.gateway.advance(600)
    for _ in range(3):
        await books.run_task()
    assert await read_unexplained(books) == (0, 0)
    assert await books.shown_balance() == await books.upstream_balance()


async def test_response_older_than_a_top_up_is_explained(books: BalanceHarness) -> None:
    await books.set_balance(5, 0)
    for _ in range(2):
        await books.run_task()
    asked = await books.sandbox.count_submits()
    await books.set_behaviour(faults=(Fault(on="submit", times=1, latency=1.0),))
    slow = asyncio.create_task(books.submit())
    await books.control.wait_for_requests(lambda seen: sum(each.operation == "submit" for each in seen) == asked + 1)
    await books.set_balance(9, 30)
    await books.run_task()
    assert (await slow).status_code == 201
    await books.wait_for_cost((await slow).json())
    await books.run_task()
    assert await read_unexplained(books) == (0, 0)


async def test_failover_moves_the_expected_charge(books: BalanceHarness) -> None:
    await books.set_balance(50, 0, "spare-key")
    await books.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare-key"})
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await books.set_balance(2, 1)
    for _ in range(5):
        await books.run_task()
    await books.set_balance(4, 1)
    await books.gateway.advance(120)
    for _ in range(2):
        await books.run_task()
    for name, key in (("main", USER_KEY), ("spare", "spare-key")):
        assert (await books.get_account(name))["unexplained"] == {"count": 0, "money": 0}
        assert await books.shown_balance(name) == await books.upstream_balance(key)
