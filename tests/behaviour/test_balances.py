"""Costs, balances, floors and spending modes for each way of charging and of reporting a balance.

The vendor documents neither whether a task is charged at its submit or at its end, nor whether the check of a finished
task reports the current balance or that of its end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest

from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey

COST_OF_USE = {"count": 1, "money": 0}
COST_IN_MONEY = {"count": 0, "money": PRICE_YUAN}


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as found:
        yield found


async def assert_balances_match(books: BalanceHarness, costs: list[dict[str, Any]]) -> None:
    """Assert that the balance is the upstream's, the charges are the costs, and nothing is reserved."""
    assert await books.shown_balance() == await books.upstream_balance()
    counted = await books.read_policies()
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["total-tasks"] == (len(costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await books.get_account())["in_flight"] == 0


async def test_sequential_tasks_cost_the_balance_drop(books: BalanceHarness) -> None:
    await books.set_balance(3, 2 * PRICE_YUAN + 1)
    costs = [await books.run_task() for _ in range(5)]
    assert costs[0] == COST_OF_USE | {"basis": "estimated"}
    observed = {"basis": "observed"}
    assert costs[1:] == [COST_OF_USE | observed] * 2 + [COST_IN_MONEY | observed] * 2
    await assert_balances_match(books, costs)
    asked = await books.sandbox.count_submits()
    refused = await books.submit()
    assert (refused.status_code, refused.headers["retry-after"]) == (402, "60"), refused.text
    assert await books.sandbox.count_submits() == asked + 1
    await books.expect_refused_locally()
    assert (await books.get_account())["state"] == "exhausted"
    await assert_balances_match(books, costs)


async def test_sequential_tasks_paid_in_money(books: BalanceHarness) -> None:
    await books.set_balance(0, 4 * PRICE_YUAN)
    costs = [await books.run_task() for _ in range(4)]
    assert costs[0] == {"count": 0, "money": 0, "basis": "unknown"}
    assert costs[1:] == [COST_IN_MONEY | {"basis": "observed"}] * 3
    await books.expect_refused_locally()
    assert await books.upstream_balance() == (0, 0)
    await assert_balances_match(books, costs)


async def test_parallel_tasks_have_no_observed_cost(books: BalanceHarness) -> None:
    """The price in money is unknown before it was first observed."""
    await books.set_balance(4, 20 * PRICE_YUAN)
    costs = [await books.run_task() for _ in range(2)]
    for number in (3, 2):
        beside = [await books.expect_accepted() for _ in range(number)]
        costs += [await books.wait_for_cost(task) for task in beside]
    assert [cost["basis"] for cost in costs[2:]] == ["estimated"] * 2 + ["unknown"] * 3
    await assert_balances_match(books, costs)
    assert await books.upstream_balance() == (0, 17 * PRICE_YUAN)
    alone = await books.run_task()
    assert alone == COST_IN_MONEY | {"basis": "observed"}
    await assert_balances_match(books, [*costs, alone])


async def test_overlapping_tasks_have_no_observed_cost(books: BalanceHarness) -> None:
    await books.set_balance(9, 0)
    costs = [await books.run_task() for _ in range(2)]
    first = await books.expect_accepted()
    second = await books.expect_accepted()
    beside = [await books.wait_for_cost(first), await books.wait_for_cost(second)]
    assert [cost["basis"] for cost in beside] == ["estimated"] * 2
    assert await books.run_task() == COST_OF_USE | {"basis": "observed"}
    await assert_balances_match(books, [*costs, *beside, COST_OF_USE])


async def test_concurrent_submits_for_the_last_uses(books: BalanceHarness) -> None:
    await books.set_balance(5, 0)
    costs = [await books.run_task() for _ in range(2)]
    asked = await books.sandbox.count_submits()
    tasks, refused = await books.submit_concurrently(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await books.sandbox.count_submits() == asked + 3
    costs += [await books.wait_for_cost(task) for task in tasks]
    await books.expect_refused_locally()
    await assert_balances_match(books, costs)


async def test_concurrent_submits_for_the_last_money(books: BalanceHarness) -> None:
    await books.set_balance(0, 5 * PRICE_YUAN)
    costs = [await books.run_task() for _ in range(2)]
    asked = await books.sandbox.count_submits()
    tasks, refused = await books.submit_concurrently(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await books.sandbox.count_submits() == asked + 3
    costs += [await books.wait_for_cost(task) for task in tasks]
    await books.expect_refused_locally()
    await assert_balances_match(books, costs)


@pytest.mark.parametrize(
    ("floors", "given", "left"),
    [
        ({"floor_count": 3}, (8, 50), (3, 50)),
        ({"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN), (0, 3 * PRICE_YUAN)),
    ],
)
async def test_floors_hold_under_concurrent_submits(
    books: BalanceHarness, floors: dict[str, int], given: tuple[int, int], left: tuple[int, int]
) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await books.set_balance(*given)
    costs = [await books.run_task() for _ in range(2)]
    tasks, refused = await books.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {402: 3})
    costs += [await books.wait_for_cost(task) for task in tasks]
    assert await books.upstream_balance() == left
    await assert_balances_match(books, costs)
    for _ in range(2):
        await books.gateway.advance(3_600)
        await books.expect_refused_locally()


@pytest.mark.parametrize(
    ("floors", "given"), [({"floor_count": 3}, (8, 50)), ({"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN))]
)
async def test_floors_include_running_tasks(
    books: BalanceHarness, floors: dict[str, int], given: tuple[int, int]
) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await books.set_balance(*given)
    for _ in range(2):
        await books.run_task()
    await books.set_behaviour(seconds=3_600)
    for _ in range(3):
        await books.expect_accepted()
    for _ in range(2):
        await books.expect_refused_locally()
        await books.gateway.advance(3_600)


async def test_prepaid_only_tenant_takes_all_uses_and_no_money(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(purse="count_only")
    await books.set_balance(6, 50)
    tasks, refused = await books.submit_concurrently(4)
    assert (len(tasks), refused) == (1, {402: 3})
    costs = [await books.wait_for_cost(tasks[0]), await books.run_task()]
    tasks, refused = await books.submit_concurrently(7)
    assert (len(tasks), refused) == (4, {402: 3})
    costs += [await books.wait_for_cost(task) for task in tasks]
    for _ in range(2):
        await books.gateway.advance(3_600)
        await books.expect_refused_locally()
    assert await books.upstream_balance() == (0, 50)
    assert [cost["money"] for cost in costs] == [0] * 6
    await assert_balances_match(books, costs)


async def test_running_task_keeps_its_use_for_prepaid_only(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(purse="count_only")
    await books.set_balance(7, 50)
    costs = [await books.run_task() for _ in range(2)]
    while (await books.upstream_balance())[0]:
        answers = [await books.submit() for _ in range(7)]
        tasks = [answer.json() for answer in answers if answer.status_code == 201]
        assert tasks
        costs += [await books.wait_for_cost(task) for task in tasks]
    await books.expect_refused_locally()
    assert await books.upstream_balance() == (0, 50)
    assert len(costs) == 7
    await assert_balances_match(books, costs)


async def test_spending_modes_side_by_side(books: BalanceHarness) -> None:
    await books.gateway.put_tenant("thrifty", purse="count_only")
    thrifty = await books.gateway.new_token("thrifty")
    await books.set_balance(3, 5 * PRICE_YUAN)
    costs = [await books.run_task(), await books.run_task(token=thrifty), await books.run_task()]
    await books.expect_refused_locally(token=thrifty)
    assert await books.run_task() == COST_IN_MONEY | {"basis": "observed"}
    await books.expect_refused_locally(token=thrifty)
    assert await books.upstream_balance() == (0, 4 * PRICE_YUAN)
    assert [cost["money"] for cost in costs] == [0] * 3
    assert (await books.read_policies("thrifty"))["total-money"] == (0, 0)
    assert (await books.read_policies())["total-money"] == (PRICE_YUAN, 0)
