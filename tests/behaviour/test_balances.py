"""Costs, figures, floors and purses are right however the upstream charges and whichever balance a check tells.

The vendor says neither whether a task is charged at its submit or at its end, nor whether the check of a finished task
tells the balance of now or of then. All four combinations are tried.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest

from tests.behaviour.books import PRICE, Books, opened_books
from tests.support.valkey import Valkey

ONE_USE = {"count": 1, "money": 0}
ITS_PRICE = {"count": 0, "money": PRICE}


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Books]:
    """Books over each kind of upstream."""
    charge, checked_balance = request.param
    async with opened_books(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def balanced(books: Books, costs: list[dict[str, Any]]) -> None:
    """Fail unless the figures are the upstream's, the tenant was charged what its tasks cost, and nothing is held."""
    assert await books.shown() == await books.held()
    counted = await books.counted()
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["total-tasks"] == (len(costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await books.account())["in_flight"] == 0


async def test_one_after_the_other(books: Books) -> None:
    """Lone tasks cost what the balance drops by, from the first use to the last money; then 402 comes unasked."""
    await books.give(3, 2 * PRICE + 1)
    costs = [await books.spend() for _ in range(5)]
    assert costs[0] == ONE_USE | {"basis": "estimated"}
    observed = {"basis": "observed"}
    assert costs[1:] == [ONE_USE | observed] * 2 + [ITS_PRICE | observed] * 2
    await balanced(books, costs)
    asked = await books.sandbox.submits()
    refused = await books.submit()
    assert (refused.status_code, refused.headers["retry-after"]) == (402, "60"), refused.text
    assert await books.sandbox.submits() == asked + 1
    await books.refused_unasked()
    assert (await books.account())["state"] == "exhausted"
    await balanced(books, costs)


async def test_money_only(books: Books) -> None:
    """Where there are no uses every lone task but the first is known to have cost its price, to the last yuan."""
    await books.give(0, 4 * PRICE)
    costs = [await books.spend() for _ in range(4)]
    assert costs[0] == {"count": 0, "money": 0, "basis": "unknown"}
    assert costs[1:] == [ITS_PRICE | {"basis": "observed"}] * 3
    await books.refused_unasked()
    assert await books.held() == (0, 0)
    await balanced(books, costs)


async def test_side_by_side(books: Books) -> None:
    """No cost is called observed of tasks that ran beside others, from the last use into money too; the books agree.

    What a task costs in money is unknown before it was first seen.
    """
    await books.give(4, 20 * PRICE)
    costs = [await books.spend() for _ in range(2)]
    for number in (3, 2):
        beside = [await books.accepted() for _ in range(number)]
        costs += [await books.cost(task) for task in beside]
    assert [cost["basis"] for cost in costs[2:]] == ["estimated"] * 2 + ["unknown"] * 3
    await balanced(books, costs)
    assert await books.held() == (0, 17 * PRICE)
    alone = await books.spend()
    assert alone == ITS_PRICE | {"basis": "observed"}
    await balanced(books, [*costs, alone])


async def test_begun_while_another_ran(books: Books) -> None:
    """Two tasks that only overlapped are not observed, neither the one that ended first nor the one that began last."""
    await books.give(9, 0)
    costs = [await books.spend() for _ in range(2)]
    first = await books.accepted()
    second = await books.accepted()
    beside = [await books.cost(first), await books.cost(second)]
    assert [cost["basis"] for cost in beside] == ["estimated"] * 2
    assert await books.spend() == ONE_USE | {"basis": "observed"}
    await balanced(books, [*costs, *beside, ONE_USE])


async def test_last_uses_at_once(books: Books) -> None:
    """Of many submits at once exactly those are sent that the known uses pay for."""
    await books.give(5, 0)
    costs = [await books.spend() for _ in range(2)]
    asked = await books.sandbox.submits()
    tasks, refused = await books.at_once(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await books.sandbox.submits() == asked + 3
    costs += [await books.cost(task) for task in tasks]
    await books.refused_unasked()
    await balanced(books, costs)


async def test_last_money_at_once(books: Books) -> None:
    """Of many submits at once exactly those are sent that the known money pays for, at the price that was seen."""
    await books.give(0, 5 * PRICE)
    costs = [await books.spend() for _ in range(2)]
    asked = await books.sandbox.submits()
    tasks, refused = await books.at_once(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await books.sandbox.submits() == asked + 3
    costs += [await books.cost(task) for task in tasks]
    await books.refused_unasked()
    await balanced(books, costs)


@pytest.mark.parametrize(
    ("floors", "given", "left"),
    [
        ({"floor_count": 3}, (8, 50), (3, 50)),
        ({"floor_money": 3 * PRICE}, (0, 8 * PRICE), (0, 3 * PRICE)),
    ],
)
async def test_floors(books: Books, floors: dict[str, int], given: tuple[int, int], left: tuple[int, int]) -> None:
    """What shall stay in the account stays there under many submits at once, and no probe ever eats into it."""
    await books.house.admin("PUT", "/accounts/main", json=floors)
    await books.give(*given)
    costs = [await books.spend() for _ in range(2)]
    tasks, refused = await books.at_once(6)
    assert (len(tasks), refused) == (3, {402: 3})
    costs += [await books.cost(task) for task in tasks]
    assert await books.held() == left
    await balanced(books, costs)
    for _ in range(2):
        await books.house.advance(3_600)
        await books.refused_unasked()


@pytest.mark.parametrize(
    ("floors", "given"), [({"floor_count": 3}, (8, 50)), ({"floor_money": 3 * PRICE}, (0, 8 * PRICE))]
)
async def test_floors_while_others_run(books: Books, floors: dict[str, int], given: tuple[int, int]) -> None:
    """What running tasks will take counts against the floors, also where the figures only show it at their end."""
    await books.house.admin("PUT", "/accounts/main", json=floors)
    await books.give(*given)
    for _ in range(2):
        await books.spend()
    await books.turn(seconds=3_600)
    for _ in range(3):
        await books.accepted()
    for _ in range(2):
        await books.refused_unasked()
        await books.house.advance(3_600)


async def test_count_only(books: Books) -> None:
    """A tenant that may spend uses only goes one at a time until they are known, takes them all, and no money."""
    await books.house.put_tenant(purse="count_only")
    await books.give(6, 50)
    tasks, refused = await books.at_once(4)
    assert (len(tasks), refused) == (1, {402: 3})
    costs = [await books.cost(tasks[0]), await books.spend()]
    tasks, refused = await books.at_once(7)
    assert (len(tasks), refused) == (4, {402: 3})
    costs += [await books.cost(task) for task in tasks]
    for _ in range(2):
        await books.house.advance(3_600)
        await books.refused_unasked()
    assert await books.held() == (0, 50)
    assert [cost["money"] for cost in costs] == [0] * 6
    await balanced(books, costs)


async def test_count_only_while_others_run(books: Books) -> None:
    """Where uses only may be spent, a running task keeps its use, whether or not the figures show it yet."""
    await books.house.put_tenant(purse="count_only")
    await books.give(7, 50)
    costs = [await books.spend() for _ in range(2)]
    while (await books.held())[0]:
        answers = [await books.submit() for _ in range(7)]
        tasks = [answer.json() for answer in answers if answer.status_code == 201]
        assert tasks
        costs += [await books.cost(task) for task in tasks]
    await books.refused_unasked()
    assert await books.held() == (0, 50)
    assert len(costs) == 7
    await balanced(books, costs)


async def test_purses_side_by_side(books: Books) -> None:
    """Where one tenant may go on to money and another may not, only the first does once the last use is taken."""
    await books.house.put_tenant("thrifty", purse="count_only")
    thrifty = await books.house.new_token("thrifty")
    await books.give(3, 5 * PRICE)
    costs = [await books.spend(), await books.spend(token=thrifty), await books.spend()]
    await books.refused_unasked(token=thrifty)
    assert await books.spend() == ITS_PRICE | {"basis": "observed"}
    await books.refused_unasked(token=thrifty)
    assert await books.held() == (0, 4 * PRICE)
    assert [cost["money"] for cost in costs] == [0] * 3
    assert (await books.counted("thrifty"))["total-money"] == (0, 0)
    assert (await books.counted())["total-money"] == (PRICE, 0)
