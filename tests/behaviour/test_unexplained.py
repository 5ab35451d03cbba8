"""What somebody else takes from an account is noticed, and what the gateway took is never blamed on anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import product

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.books import PRICE, Books, opened_books
from tests.behaviour.upstreams import USER_KEY
from tests.support.valkey import Valkey

MISSING = Fault(times=2, wrong={"remaining_count": "missing", "remaining_money": "null"})
LOST = Fault(on="submit", times=1, reply="reset")
FAILS = Fault(on="submit", times=1, fail="it could not be done")


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Books]:
    """Books over each kind of upstream."""
    charge, checked_balance = request.param
    async with opened_books(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def unexplained(books: Books) -> tuple[int, float]:
    """What somebody else has taken, as the gateway sees it: uses, and yuan."""
    found = (await books.account())["unexplained"]
    return found["count"], found["money"]


async def somebody_takes(books: Books, count: int, money: int) -> None:
    """Let somebody else spend so much with the same key."""
    held = await books.held()
    await books.give(held[0] - count, held[1] - money)


async def test_somebody_else(books: Books) -> None:
    """What is taken between two submissions adds up, in uses and in money, to the last of each."""
    await books.house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE}})
    await books.give(9, 40)
    for _ in range(2):
        await books.spend()
    assert await unexplained(books) == (0, 0)
    await somebody_takes(books, 3, 0)
    await books.spend()
    assert await unexplained(books) == (3, 0)
    await somebody_takes(books, 0, 7)
    await books.spend()
    assert await unexplained(books) == (3, 7)
    await somebody_takes(books, 1, 1)
    await books.spend()
    assert await unexplained(books) == (4, 8)


async def test_somebody_elses_money(books: Books) -> None:
    """Beside a task that is paid with money, what exceeds the operator's highest price was taken by somebody else."""
    await books.house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE}})
    await books.give(0, 100)
    for _ in range(2):
        await books.spend()
    await somebody_takes(books, 0, 30)
    await books.spend()
    assert await unexplained(books) == (0, 30)
    assert await books.shown() == await books.held() == (0, 70 - 3 * PRICE)


async def test_failure_that_was_lost_sight_of(books: Books) -> None:
    """Once a task that told nothing is over and the figures are known again, others are noticed as before."""
    await books.give(9, 0)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(FAILS,))
    await books.spend()
    await books.spend()
    assert await unexplained(books) == (0, 0)
    await somebody_takes(books, 2, 0)
    await books.spend()
    assert await unexplained(books) == (2, 0)


@pytest.mark.parametrize("fault", [FAILS, LOST, MISSING], ids=["failed", "lost", "untold"])
async def test_nobody_else(books: Books, fault: Fault) -> None:
    """Tasks side by side, from uses into money, with one that tells nothing, leave nothing to explain."""
    await books.give(6, 20 * PRICE)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(fault,))
    for _ in range(3):
        tasks, _ = await books.at_once(3)
        await books.control.idle()
        for task in tasks:
            await books.cost(task)
        assert await unexplained(books) == (0, 0)
    await books.turn(faults=())
    await books.house.advance(600)
    for _ in range(3):
        await books.spend()
    assert await unexplained(books) == (0, 0)
    assert await books.shown() == await books.held()


async def test_top_up_between_answers(books: Books) -> None:
    """An answer from before a top-up that comes after one from behind it is nobody's spending."""
    await books.give(5, 0)
    for _ in range(2):
        await books.spend()
    asked = await books.sandbox.submits()
    await books.turn(faults=(Fault(on="submit", times=1, latency=1.0),))
    slow = asyncio.create_task(books.submit())
    await books.control.until(lambda seen: sum(each.operation == "submit" for each in seen) == asked + 1)
    await books.give(9, 30)
    await books.spend()
    assert (await slow).status_code == 201
    await books.cost((await slow).json())
    await books.spend()
    assert await unexplained(books) == (0, 0)


async def test_two_accounts(books: Books) -> None:
    """A submission that goes on to the next account is expected there, and no longer where it was refused."""
    await books.give(50, 0, "spare-key")
    await books.house.admin("PUT", "/accounts/spare", json={"user_key": "spare-key"})
    await books.house.put_tenant(accounts=["main", "spare"])
    await books.give(2, 1)
    for _ in range(5):
        await books.spend()
    await books.give(4, 1)
    await books.house.advance(120)
    for _ in range(2):
        await books.spend()
    for name, key in (("main", USER_KEY), ("spare", "spare-key")):
        assert (await books.account(name))["unexplained"] == {"count": 0, "money": 0}
        assert await books.shown(name) == await books.held(key)
