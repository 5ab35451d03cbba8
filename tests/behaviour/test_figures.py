"""Figures that are missing, spoiled, huge or jump about stop no task, and none of them becomes a zero by accident."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.sandbox.faults import Fault, Field, Wrong
from tests.behaviour.books import PRICE, Books, opened_books
from tests.support.valkey import Valkey

UNUSABLE: tuple[Wrong, ...] = ("missing", "null", "negative")
FIGURES: tuple[Field, ...] = ("remaining_count", "remaining_money")
LARGEST_MONEY = 2**53 // 100
"""In yuan: what in fen is still a whole number to every reader of JSON, and to Lua."""


@pytest.fixture
async def books(valkey: Valkey) -> AsyncIterator[Books]:
    """Books that have seen an account with 20 uses and 50 yuan."""
    async with opened_books(valkey) as found:
        await found.give(21, 50)
        await found.spend()
        assert await found.shown() == (20, 50)
        yield found


async def spoil(books: Books, count: Wrong | None = None, money: Wrong | None = None) -> None:
    """Let every answer from now on have the one or the other figure spoiled."""
    ways = {field: way for field, way in zip(FIGURES, (count, money), strict=True) if way}
    await books.turn(faults=(Fault(wrong=ways),))


@pytest.mark.parametrize("way", UNUSABLE)
async def test_unusable_figures(books: Books, way: Wrong) -> None:
    """A task is done though its figures are no use, of which the last good ones stay, each by itself."""
    await spoil(books, count=way)
    await books.spend()
    assert await books.shown() == (20, 50)
    await spoil(books, money=way)
    await books.spend()
    assert await books.shown() == (18, 50)
    await spoil(books, count=way, money=way)
    await books.give(30, 7)
    await books.spend()
    assert await books.shown() == (18, 50)
    assert (await books.account())["state"] == "open"
    await spoil(books)
    await books.spend()
    assert await books.shown() == await books.held() == (28, 7)
    assert (await books.counted())["total-tasks"] == (5, 0)


async def test_figures_as_text(books: Books) -> None:
    """Numbers in strings are numbers, and give receipts like any other."""
    await spoil(books, count="string", money="string")
    assert await books.spend() == {"count": 1, "money": 0, "basis": "observed"}
    await books.give(0, 50)
    await books.spend()
    assert await books.spend() == {"count": 0, "money": PRICE, "basis": "observed"}
    assert await books.shown() == await books.held() == (0, 50 - 2 * PRICE)


async def test_figures_with_fractions(books: Books) -> None:
    """Half a use is no figure, and half a yuan is fifty fen."""
    await spoil(books, count="float", money="float")
    await books.spend()
    assert await books.shown() == (20, 50.5)
    assert (await books.account())["state"] == "open"


async def test_nothing_ever_told(valkey: Valkey) -> None:
    """An upstream that never tells a figure is used all the same: nothing is shown, held against it, or made up."""
    async with opened_books(valkey) as books:
        await spoil(books, count="missing", money="missing")
        for _ in range(2):
            assert await books.spend() == {"count": 0, "money": 0, "basis": "unknown"}
        tasks, refused = await books.at_once(3)
        assert (len(tasks), refused) == (3, {})
        account = await books.account()
        assert (account["state"], account["remaining_count"], account["remaining_money"]) == ("open", None, None)
        for task in tasks:
            await books.cost(task)
        assert (await books.counted())["total-money"] == (0, 0)
        await books.house.put_tenant(purse="count_only")
        tasks, refused = await books.at_once(3)
        assert (len(tasks), refused) == (1, {402: 2})
        assert await books.cost(tasks[0]) == {"count": 0, "money": 0, "basis": "unknown"}


async def test_one_figure_only(valkey: Valkey) -> None:
    """Where only one of the figures is ever told, no use left does not mean that there is no money either."""
    async with opened_books(valkey) as books:
        await books.give(1, 50)
        await spoil(books, money="missing")
        for _ in range(3):
            await books.spend()
        account = await books.account()
        assert (account["state"], account["remaining_count"]["value"], account["remaining_money"]) == ("open", 0, None)
        await spoil(books, count="missing")
        await books.spend()
        assert await books.shown() == await books.held() == (0, 50 - 3 * PRICE)


async def test_huge_figures(books: Books) -> None:
    """The largest figures and prices are exact to the yuan, and what is larger still is no figure."""
    price = 12_345_678_901
    await books.turn(prices={"vector": price})
    await books.give(0, LARGEST_MONEY)
    await books.spend()
    assert await books.spend() == {"count": 0, "money": price, "basis": "observed"}
    assert await books.shown() == await books.held() == (0, LARGEST_MONEY - 2 * price)
    await books.house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": 10**10}})
    before = await books.shown()
    await books.give(2**60, 2**60)
    await books.spend()
    assert await books.shown() == before
    await books.give(2**53 - 1, LARGEST_MONEY)
    await books.spend()
    assert await books.shown() == (2**53 - 2, LARGEST_MONEY)


async def test_zero_that_is_one(books: Books) -> None:
    """Figures that are zero close the account at once, and those of a later top-up open it."""
    running = await books.accepted()
    await books.give(0, 0)
    await books.cost(running)
    await books.refused_unasked()
    await books.give(4, 0)
    await books.house.advance(60)
    await books.spend()
    assert await books.shown() == (3, 0)


async def stirred(books: Books, chance: random.Random) -> None:
    """Change what the upstream holds, does and tells, none of which the gateway has a hand in."""
    ways: tuple[Wrong, ...] = (*UNUSABLE, "string", "float")
    spoiled = {field: chance.choice(ways) for field in FIGURES if chance.random() < 0.4}
    await books.turn(
        charge=chance.choice(("submit", "end")),
        checked_balance=chance.choice(("now", "then")),
        faults=(Fault(on=chance.choice(("submit", "check", None)), wrong=spoiled),),
    )
    if chance.random() < 0.5:
        await books.give(chance.randrange(6), chance.randrange(12))


@pytest.mark.parametrize("seed", range(4))
async def test_up_and_down_at_random(books: Books, seed: int) -> None:
    """Whatever the figures do, a submit is taken or told that nothing is left, every task ends, and the sums agree."""
    chance = random.Random(seed)
    tasks: list[dict[str, Any]] = []
    for _ in range(8):
        await stirred(books, chance)
        found, refused = await books.at_once(chance.randrange(1, 4))
        assert set(refused) <= {402}
        tasks += found
        await books.house.advance(chance.choice((1, 61)))
        await books.house.watch()
    ended = [await books.house.finished(task["id"]) for task in tasks]
    assert {task["state"] for task in ended} == {"succeeded"}
    costs = [task["cost"] for task in ended]
    assert all((cost["count"], cost["money"]) == (1, 0) or cost["count"] == 0 <= cost["money"] for cost in costs)

    await books.turn(faults=())
    await books.give(9, 9)
    await books.house.advance(60)
    costs.append(await books.spend())
    assert await books.shown() == await books.held() == (8, 9)
    counted = await books.counted()
    assert counted["total-tasks"] == (len(costs) + 1, 0)
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await books.account())["in_flight"] == 0
