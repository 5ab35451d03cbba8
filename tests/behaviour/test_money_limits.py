"""A limit on money is kept as far as prices are known, and what passes it all the same is booked in full."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.aftermath import problem
from tests.behaviour.books import PRICE, Books, opened_books
from tests.support.valkey import Valkey


@pytest.fixture
async def books(valkey: Valkey) -> AsyncIterator[Books]:
    """Books of an account without uses, whose money pays for all."""
    async with opened_books(valkey) as found:
        await found.give(0, 1_000)
        yield found


async def limit(books: Books, money: float) -> None:
    """Put a limit on the money of the month, in yuan."""
    await books.house.put_tenant(limits=[{"window": "month", "money": money}])


async def month(books: Books) -> tuple[float, float, float]:
    """Of the month's money: used, held, and left."""
    (policy,) = (await books.house.call("GET", "/v1/quota")).json()["policies"]
    return policy["used"], policy["reserved"], policy["remaining"]


async def costs(books: Books, tasks: Sequence[dict[str, Any]]) -> list[float]:
    """What tasks cost in the end."""
    return [(await books.cost(task))["money"] for task in tasks]


async def test_price_of_the_operator(books: Books) -> None:
    """With a price that the operators named, exactly so many run at once as fit, and each is held at that price."""
    await books.house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE}})
    await limit(books, 3 * PRICE + 1.99)
    tasks, refused = await books.at_once(6)
    assert (len(tasks), refused) == (3, {429: 3})
    assert await month(books) == (0, 3 * PRICE, 1.99)
    assert await costs(books, tasks) == [PRICE] * 3
    assert await month(books) == (3 * PRICE, 0, 1.99)
    problem(await books.submit(), 429, "quota-exceeded")
    assert await books.held() == (0, 1_000 - 3 * PRICE)


async def test_price_of_receipts(books: Books) -> None:
    """With a price that was only seen in receipts, exactly so many run at once as fit."""
    for _ in range(2):
        await books.spend()
    await limit(books, 5 * PRICE)
    assert await month(books) == (PRICE, 0, 4 * PRICE)
    tasks, refused = await books.at_once(8)
    assert (len(tasks), refused) == (4, {429: 4})
    assert await month(books) == (PRICE, 4 * PRICE, 0)
    assert await costs(books, tasks) == [PRICE] * 4
    assert await month(books) == (5 * PRICE, 0, 0)


async def test_price_of_another_kind(books: Books) -> None:
    """The price of one kind says nothing of another's."""
    for _ in range(2):
        await books.spend()
    await limit(books, 100)
    assert (await books.submit(kind="upscale")).status_code == 201
    assert await month(books) == (PRICE, 100 - PRICE, 0)
    problem(await books.submit(), 429, "quota-exceeded")


async def test_price_unknown(books: Books) -> None:
    """While no price is known one submission holds all that remains, so that they go one by one."""
    await limit(books, 100)
    tasks, refused = await books.at_once(4)
    assert (len(tasks), refused) == (1, {429: 3})
    assert await month(books) == (0, 100, 0)
    (found,) = (await books.submit()).json()["violated_policies"]
    assert (found["policy"], found["limit"]) == ("month-money", 100)
    await costs(books, tasks)
    assert (await month(books))[1:] == (0, 100)
    assert (await books.spend())["money"] == PRICE
    assert await month(books) == (PRICE, 0, 100 - PRICE)


async def test_beyond_the_limit(books: Books) -> None:
    """A task that cost more than was held is booked in full, and leaves nothing rather than less than nothing."""
    for _ in range(2):
        await books.spend()
    await limit(books, 2 * PRICE)
    await books.turn(prices={"vector": 7 * PRICE})
    assert await books.spend() == {"count": 0, "money": 7 * PRICE, "basis": "observed"}
    assert await month(books) == (8 * PRICE, 0, 0)
    problem(await books.submit(), 429, "quota-exceeded")
    await limit(books, 15 * PRICE - 0.01)
    problem(await books.submit(), 429, "quota-exceeded")
    await limit(books, 15 * PRICE)
    assert (await books.spend())["money"] == 7 * PRICE
    assert await month(books) == (15 * PRICE, 0, 0)


async def test_uses_are_not_money(books: Books) -> None:
    """A limit on money that leaves nothing lets all through that known uses pay for, and no more."""
    await books.give(4, 1_000)
    await books.spend()
    await limit(books, 0)
    tasks, refused = await books.at_once(5)
    assert (len(tasks), refused) == (3, {429: 2})
    assert await costs(books, tasks) == [0] * 3
    assert await month(books) == (0, 0, 0)
    problem(await books.submit(), 429, "quota-exceeded")
    assert await books.held() == (0, 1_000)


async def test_refused_holds_nothing(books: Books) -> None:
    """What the upstream rejected gives its money back, and what became of nobody knows what keeps it."""
    await books.house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE}})
    await limit(books, 2 * PRICE)
    await books.turn(faults=(Fault(on="submit", times=1, reject="图片太小"),))
    problem(await books.submit(), 502, "upstream-rejected")
    assert await month(books) == (0, 0, 2 * PRICE)
    await books.turn(faults=(Fault(on="submit", times=1, reply="reset"),))
    problem(await books.submit(), 504, "submission-unknown")
    assert await month(books) == (PRICE, 0, PRICE)
    tasks, refused = await books.at_once(3)
    assert (len(tasks), refused) == (1, {429: 2})


@pytest.mark.parametrize(("charge", "taken"), [("submit", PRICE), ("end", 0)])
async def test_failed_task(books: Books, charge: str, taken: int) -> None:
    """A failed task stays charged, by an estimate: what its submission took, or else its price. It may be refunded."""
    await books.turn(charge=charge)
    for _ in range(2):
        await books.spend()
    await limit(books, 100)
    await books.turn(faults=(Fault(on="submit", times=1, fail="it could not be done"),))
    assert await books.spend() == {"count": 0, "money": PRICE, "basis": "estimated"}
    assert await month(books) == (2 * PRICE, 0, 100 - 2 * PRICE)
    assert await books.shown() == await books.held() == (0, 1_000 - 2 * PRICE - taken)


@pytest.mark.parametrize("checked_balance", ["now", "then"])
async def test_price_of_tasks_side_by_side(valkey: Valkey, checked_balance: str) -> None:
    """Tasks side by side on an account without uses are not put at a use, but at the price in money."""
    async with opened_books(valkey, checked_balance=checked_balance) as books:
        await books.give(2, 1_000)
        for _ in range(3):
            await books.spend()
        await books.give(2, 1_000)
        await books.house.advance(1)
        for _ in range(2):
            await books.spend()
        assert await books.shown() == (0, 1_000)
        tasks, _ = await books.at_once(3)
        assert [(await books.cost(task))["money"] for task in tasks] == [PRICE] * 3
