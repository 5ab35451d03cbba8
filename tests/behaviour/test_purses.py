"""What an account shall keep is kept, also of uses that no figure has shown yet."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import product

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.books import KIND, PRICE, Books, opened_books
from tests.support.valkey import Valkey

MISSING = Fault(wrong={"remaining_count": "missing", "remaining_money": "missing"})


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Books]:
    """Books over each kind of upstream."""
    charge, checked_balance = request.param
    async with opened_books(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def test_floor_at_the_operators_price(books: Books) -> None:
    """The operator's highest price keeps the floor on money as long as no price was seen."""
    await books.house.admin("PUT", "/accounts/main", json={"floor_money": 4 * PRICE, "max_price": {"vectorize": PRICE}})
    await books.give(3, 6 * PRICE)
    for _ in range(2):
        await books.spend()
    tasks, refused = await books.at_once(6)
    assert (len(tasks), refused) == (3, {402: 3})
    for task in tasks:
        await books.cost(task)
    assert await books.held() == (0, 4 * PRICE)


async def test_lost_answer_takes_a_use(books: Books) -> None:
    """A submission whose answer was lost may have taken the last use, so that a thrifty tenant sends no other."""
    await books.house.put_tenant(purse="count_only")
    await books.give(3, 50)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(Fault(on="submit", times=1, reply="reset"),))
    assert (await books.submit()).status_code == 504
    await books.control.idle()
    await books.refused_unasked()
    assert await books.held() == (0, 50)


async def test_lost_answer_and_the_floor(books: Books) -> None:
    """A submission whose answer was lost may have brought the account to its floor."""
    await books.house.admin("PUT", "/accounts/main", json={"floor_count": 5})
    await books.give(8, 0)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(Fault(on="submit", times=1, reply="reset"),))
    assert (await books.submit()).status_code == 504
    await books.control.idle()
    await books.refused_unasked()
    assert await books.held() == (5, 0)


async def test_use_that_was_never_told(books: Books) -> None:
    """Where the figures stay away, a task that has ended took a use all the same."""
    await books.house.put_tenant(purse="count_only")
    await books.give(4, 50)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(MISSING,))
    for _ in range(2):
        await books.spend()
    await books.refused_unasked()
    assert await books.held() == (0, 50)


async def test_figures_at_submits_only(books: Books) -> None:
    """Where checks tell no figures, a task that has ended took a use all the same."""
    await books.house.put_tenant(purse="count_only")
    await books.give(5, 50)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(Fault(on="check", wrong={"remaining_count": "missing", "remaining_money": "missing"}),))
    for _ in range(3):
        await books.spend()
    await books.refused_unasked()
    assert await books.held() == (0, 50)


async def test_overtaken(books: Books) -> None:
    """A thrifty tenant's task does not pay with money because another tenant's overtook it and took the last use."""
    await books.house.put_tenant("thrifty", purse="count_only")
    thrifty = await books.house.new_token("thrifty")
    await books.give(3, 50)
    for _ in range(2):
        await books.spend()
    asked = await books.sandbox.submits()
    await books.turn(faults=(Fault(on="submit", times=1, latency=1.0),))
    slow = asyncio.create_task(books.house.submit(KIND, token=thrifty))
    await books.control.until(lambda seen: sum(each.operation == "submit" for each in seen) == asked + 1)
    other = await books.submit()
    thriftys = await slow
    assert thriftys.status_code == 201
    cost = await books.cost(thriftys.json(), token=thrifty)
    spent = 50 - (await books.held())[1]
    assert cost["money"] == 0
    assert other.status_code == 402
    assert spent == 0


async def checked_out_of_order(books: Books, number: int) -> None:
    """Have two tasks done of which the first is checked last, with other tasks' figures known since."""
    house, watch = books.house, books.house.services.watch

    async def checks_after(seconds: float) -> None:
        await house.advance(seconds)
        while await watch.tick():
            pass
        await watch.settled()

    first = await books.accepted()
    await books.control.idle()
    await checks_after(1.5)
    second = await books.accepted()
    await books.control.idle()
    await books.turn(faults=(Fault(on="check", times=1, reply="page", status=500),))
    await checks_after(1)
    await checks_after(1.5)
    states = [(await house.call("GET", f"/v1/tasks/{each['id']}")).json()["state"] for each in (first, second)]
    assert states == ["queued", "succeeded"]
    assert await books.held() == (number, 50)
    await books.cost(first)


async def test_old_figures_of_a_check(books: Books) -> None:
    """A check that tells the balance of a task's end, before later tasks, does not bring back what they took."""
    await books.give(6, 50)
    for _ in range(2):
        await books.spend()
    await checked_out_of_order(books, 2)
    assert await books.shown() == await books.held()


async def test_old_figures_open_no_purse(books: Books) -> None:
    """Figures of an earlier task's end do not make a thrifty tenant spend money."""
    await books.house.put_tenant(purse="count_only")
    await books.give(5, 50)
    for _ in range(2):
        await books.spend()
    await checked_out_of_order(books, 1)
    tasks, refused = await books.at_once(3)
    for task in tasks:
        await books.cost(task)
    assert (len(tasks), refused) == (1, {402: 2})
    assert await books.held() == (0, 50)


async def test_running_side_by_side_from_the_beginning(books: Books) -> None:
    """What runs is held against the floor, also before the upstream has shown when it charges.

    As long as nobody knows, a running task may yet be charged: one use too many stays where it has been already.
    """
    await books.turn(seconds=3_600)
    await books.house.admin("PUT", "/accounts/main", json={"floor_count": 5})
    await books.give(8, 0)
    taken = 0
    for _ in range(8):
        taken += (await books.submit()).status_code == 201
    assert taken == (3 if (await books.control.dials()).charge == "end" else 2)
