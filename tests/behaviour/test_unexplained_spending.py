"""What somebody else takes from an account is noticed, and what the gateway took is never blamed on anybody."""

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
    """Books over each kind of upstream."""
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def read_unexplained(books: BalanceHarness) -> tuple[int, float]:
    """What somebody else has taken, as the gateway sees it: uses, and yuan."""
    found = (await books.get_account())["unexplained"]
    return found["count"], found["money"]


async def spend_elsewhere(books: BalanceHarness, count: int, money: int) -> None:
    """Let somebody else spend so much with the same key."""
    held = await books.upstream_balance()
    await books.set_balance(held[0] - count, held[1] - money)


async def test_somebody_else(books: BalanceHarness) -> None:
    """What is taken between two submissions adds up, in uses and in money, to the last of each."""
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


async def test_somebody_elses_money(books: BalanceHarness) -> None:
    """Beside a task that is paid with money, what exceeds the operator's highest price was taken by somebody else."""
    await books.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await books.set_balance(0, 100)
    for _ in range(2):
        await books.run_task()
    await spend_elsewhere(books, 0, 30)
    await books.run_task()
    assert await read_unexplained(books) == (0, 30)
    assert await books.shown_balance() == await books.upstream_balance() == (0, 70 - 3 * PRICE_YUAN)


async def test_failure_that_was_lost_sight_of(books: BalanceHarness) -> None:
    """Once a task that told nothing is over and the figures are known again, others are noticed as before."""
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
async def test_nobody_else(books: BalanceHarness, fault: Fault) -> None:
    """Tasks side by side, from uses into money, with one that tells nothing, leave nothing to explain."""
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


async def test_top_up_between_answers(books: BalanceHarness) -> None:
    """An answer from before a top-up that comes after one from behind it is nobody's spending."""
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


async def test_two_accounts(books: BalanceHarness) -> None:
    """A submission that goes on to the next account is expected there, and no longer where it was refused."""
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
