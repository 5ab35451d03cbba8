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
async def harness(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as opened_harness:
        yield opened_harness


async def assert_balances_match(harness: BalanceHarness, costs: list[dict[str, Any]]) -> None:
    """Assert that the balance is the upstream's, the charges are the costs, and nothing is reserved."""
    assert await harness.shown_balance() == await harness.upstream_balance()
    counted = await harness.read_policies()
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["total-tasks"] == (len(costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await harness.get_account())["in_flight"] == 0


async def test_sequential_tasks_cost_the_balance_drop(harness: BalanceHarness) -> None:
    await harness.set_balance(3, 2 * PRICE_YUAN + 1)
    costs = [await harness.run_task() for _ in range(5)]
    assert costs[0] == COST_OF_USE | {"basis": "estimated"}
    observed = {"basis": "observed"}
    assert costs[1:] == [COST_OF_USE | observed] * 2 + [COST_IN_MONEY | observed] * 2
    await assert_balances_match(harness, costs)
    submits_before = await harness.sandbox.count_submits()
    refused = await harness.submit()
    assert (refused.status_code, refused.headers["retry-after"]) == (402, "60"), refused.text
    assert await harness.sandbox.count_submits() == submits_before + 1
    await harness.expect_refused_locally()
    assert (await harness.get_account())["state"] == "exhausted"
    await assert_balances_match(harness, costs)


async def test_sequential_tasks_paid_in_money(harness: BalanceHarness) -> None:
    await harness.set_balance(0, 4 * PRICE_YUAN)
    costs = [await harness.run_task() for _ in range(4)]
    assert costs[0] == {"count": 0, "money": 0, "basis": "unknown"}
    assert costs[1:] == [COST_IN_MONEY | {"basis": "observed"}] * 3
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 0)
    await assert_balances_match(harness, costs)


async def test_parallel_tasks_have_no_observed_cost(harness: BalanceHarness) -> None:
    """The price in money is unknown before it was first observed."""
    await harness.set_balance(4, 20 * PRICE_YUAN)
    costs = [await harness.run_task() for _ in range(2)]
    for number in (3, 2):
        beside = [await harness.expect_accepted() for _ in range(number)]
        costs += [await harness.wait_for_cost(task) for task in beside]
    assert [cost["basis"] for cost in costs[2:]] == ["estimated"] * 2 + ["unknown"] * 3
    await assert_balances_match(harness, costs)
    assert await harness.upstream_balance() == (0, 17 * PRICE_YUAN)
    alone = await harness.run_task()
    assert alone == COST_IN_MONEY | {"basis": "observed"}
    await assert_balances_match(harness, [*costs, alone])


async def test_overlapping_tasks_have_no_observed_cost(harness: BalanceHarness) -> None:
    await harness.set_balance(9, 0)
    costs = [await harness.run_task() for _ in range(2)]
    first = await harness.expect_accepted()
    second = await harness.expect_accepted()
    beside = [await harness.wait_for_cost(first), await harness.wait_for_cost(second)]
    assert [cost["basis"] for cost in beside] == ["estimated"] * 2
    assert await harness.run_task() == COST_OF_USE | {"basis": "observed"}
    await assert_balances_match(harness, [*costs, *beside, COST_OF_USE])


async def test_concurrent_submits_for_the_last_uses(harness: BalanceHarness) -> None:
    await harness.set_balance(5, 0)
    costs = [await harness.run_task() for _ in range(2)]
    submits_before = await harness.sandbox.count_submits()
    tasks, refused = await harness.submit_concurrently(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await harness.sandbox.count_submits() == submits_before + 3
    costs += [await harness.wait_for_cost(task) for task in tasks]
    await harness.expect_refused_locally()
    await assert_balances_match(harness, costs)


async def test_concurrent_submits_for_the_last_money(harness: BalanceHarness) -> None:
    await harness.set_balance(0, 5 * PRICE_YUAN)
    costs = [await harness.run_task() for _ in range(2)]
    submits_before = await harness.sandbox.count_submits()
    tasks, refused = await harness.submit_concurrently(8)
    assert (len(tasks), refused) == (3, {402: 5})
    assert await harness.sandbox.count_submits() == submits_before + 3
    costs += [await harness.wait_for_cost(task) for task in tasks]
    await harness.expect_refused_locally()
    await assert_balances_match(harness, costs)


@pytest.mark.parametrize(
    ("floors", "balance", "remaining"),
    [
        ({"floor_count": 3}, (8, 50), (3, 50)),
        ({"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN), (0, 3 * PRICE_YUAN)),
    ],
)
async def test_floors_hold_under_concurrent_submits(
    harness: BalanceHarness, floors: dict[str, int], balance: tuple[int, int], remaining: tuple[int, int]
) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await harness.set_balance(*balance)
    costs = [await harness.run_task() for _ in range(2)]
    tasks, refused = await harness.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {402: 3})
    costs += [await harness.wait_for_cost(task) for task in tasks]
    assert await harness.upstream_balance() == remaining
    await assert_balances_match(harness, costs)
    for _ in range(2):
        await harness.gateway.advance(3_600)
        await harness.expect_refused_locally()


@pytest.mark.parametrize(
    ("floors", "balance"), [({"floor_count": 3}, (8, 50)), ({"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN))]
)
async def test_floors_include_running_tasks(
    harness: BalanceHarness, floors: dict[str, int], balance: tuple[int, int]
) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await harness.set_balance(*balance)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(seconds=3_600)
    for _ in range(3):
        await harness.expect_accepted()
    for _ in range(2):
        await harness.expect_refused_locally()
        await harness.gateway.advance(3_600)


async def test_prepaid_only_tenant_takes_all_uses_and_no_money(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(6, 50)
    tasks, refused = await harness.submit_concurrently(4)
    assert (len(tasks), refused) == (1, {402: 3})
    costs = [await harness.wait_for_cost(tasks[0]), await harness.run_task()]
    tasks, refused = await harness.submit_concurrently(7)
    assert (len(tasks), refused) == (4, {402: 3})
    costs += [await harness.wait_for_cost(task) for task in tasks]
    for _ in range(2):
        await harness.gateway.advance(3_600)
        await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)
    assert [cost["money"] for cost in costs] == [0] * 6
    await assert_balances_match(harness, costs)


async def test_running_task_keeps_its_use_for_prepaid_only(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(7, 50)
    costs = [await harness.run_task() for _ in range(2)]
    while (await harness.upstream_balance())[0]:
        responses = [await harness.submit() for _ in range(7)]
        tasks = [response.json() for response in responses if response.status_code == 201]
        assert tasks
        costs += [await harness.wait_for_cost(task) for task in tasks]
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)
    assert len(costs) == 7
    await assert_balances_match(harness, costs)


async def test_spending_modes_side_by_side(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant("prepaid", spending_mode="count_only")
    prepaid_token = await harness.gateway.new_token("prepaid")
    await harness.set_balance(3, 5 * PRICE_YUAN)
    costs = [await harness.run_task(), await harness.run_task(token=prepaid_token), await harness.run_task()]
    await harness.expect_refused_locally(token=prepaid_token)
    assert await harness.run_task() == COST_IN_MONEY | {"basis": "observed"}
    await harness.expect_refused_locally(token=prepaid_token)
    assert await harness.upstream_balance() == (0, 4 * PRICE_YUAN)
    assert [cost["money"] for cost in costs] == [0] * 3
    assert (await harness.read_policies("prepaid"))["total-money"] == (0, 0)
    assert (await harness.read_policies())["total-money"] == (PRICE_YUAN, 0)
