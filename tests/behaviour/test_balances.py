"""Costs, balances, floors and spending modes compared with the sandbox's real balances.

The vendor documents neither whether a task is charged at its submit or at its end, nor whether the check of a finished
task reports the current balance or that of its end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest

from service.sandbox.faults import Fault, Field, FieldDefect
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey

COST_OF_USE = {"count": 1, "money": 0}
COST_IN_MONEY = {"count": 0, "money": PRICE_YUAN}
OBSERVED = {"basis": "observed"}
MAX_PRICE = {"max_price": {"vectorize": PRICE_YUAN}}
MISSING: dict[Field, FieldDefect] = {"remaining_count": "missing", "remaining_money": "missing"}
LOST = Fault(on="submit", times=1, reply="reset")
FAILS = Fault(on="submit", times=1, fail="it could not be done")
SUBMIT_NOW, END_THEN = ("submit", "now"), ("end", "then")
"""When the upstream charges, and which balance its checks report."""


@pytest.fixture(params=[SUBMIT_NOW, END_THEN], ids="-".join)
async def harness(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as opened_harness:
        yield opened_harness


async def assert_balances_match(harness: BalanceHarness, costs: list[dict[str, Any]]) -> None:
    """Assert that the balance is the upstream's, the charges are the costs, and nothing is reserved."""
    assert await harness.shown_balance() == await harness.upstream_balance()
    counted = await harness.read_counts()
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["total-tasks"] == (len(costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await harness.get_account())["in_flight"] == 0


@pytest.mark.parametrize("harness", [*product(("submit", "end"), ("now", "then"))], ids="-".join, indirect=True)
async def test_sequential_tasks_cost_the_balance_drop(harness: BalanceHarness) -> None:
    await harness.sandbox.set_balance(3, 2 * PRICE_YUAN + 1)
    costs = await harness.run_tasks(5)
    assert costs[0] == COST_OF_USE | {"basis": "estimated"}
    assert costs[1:] == [COST_OF_USE | OBSERVED] * 2 + [COST_IN_MONEY | OBSERVED] * 2
    await assert_balances_match(harness, costs)
    await harness.expect_failed_probe()
    await harness.expect_refused_locally()
    assert (await harness.get_account())["state"] == "exhausted"
    await assert_balances_match(harness, costs)


@pytest.mark.parametrize(
    ("harness", "floors", "balance", "remaining"),
    [
        (SUBMIT_NOW, {}, (5, 0), (0, 0)),
        (END_THEN, {}, (0, 5 * PRICE_YUAN), (0, 0)),
        (END_THEN, {"floor_count": 3}, (8, 50), (3, 50)),
        (SUBMIT_NOW, {"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN), (0, 3 * PRICE_YUAN)),
        (END_THEN, {"floor_money": 4 * PRICE_YUAN} | MAX_PRICE, (3, 6 * PRICE_YUAN), (0, 4 * PRICE_YUAN)),
    ],
    indirect=["harness"],
)
async def test_concurrent_submits_spend_no_more_than_the_balance(
    harness: BalanceHarness, floors: dict[str, Any], balance: tuple[int, int], remaining: tuple[int, int]
) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await harness.sandbox.set_balance(*balance)
    costs = await harness.run_tasks()
    submits_before = await harness.sandbox.count_submits()
    tasks, refused = await harness.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {402: 3})
    assert await harness.sandbox.count_submits() == submits_before + 3
    costs += [await harness.wait_for_cost(task) for task in tasks]
    assert await harness.upstream_balance() == remaining
    await assert_balances_match(harness, costs)
    await harness.expect_refused_locally()
    if floors:  # no submission probes below a floor
        await harness.gateway.advance(3_600)
        await harness.expect_refused_locally()


async def test_prepaid_only_tenant_takes_all_uses_and_no_money(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.sandbox.set_balance(6, 50)
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


@pytest.mark.parametrize(
    ("harness", "mode", "floor", "uses"),
    [(END_THEN, "count_only", 0, 3), (SUBMIT_NOW, "count_then_money", 5, 8)],
    indirect=["harness"],
)
async def test_unknown_outcome_may_have_taken_the_last_use(
    harness: BalanceHarness, mode: str, floor: int, uses: int
) -> None:
    await harness.gateway.put_tenant(spending_mode=mode)
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"floor_count": floor, "floor_money": floor})
    await harness.sandbox.set_balance(uses, 5)
    await harness.run_tasks()
    await harness.sandbox.update_behaviour(faults=(LOST,))
    assert (await harness.submit()).status_code == 504
    await harness.sandbox.control.wait_until_idle()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (floor, 5)


async def test_invalid_balance_keeps_the_last_valid_one(harness: BalanceHarness) -> None:
    await harness.sandbox.set_balance(21, 50)
    await harness.run_task()
    for count, money, shown in (("negative", "int", 20), ("int", "null", 18), ("missing", "negative", 18)):
        await harness.sandbox.set_fault(wrong={"remaining_count": count, "remaining_money": money})
        await harness.run_task()
        assert await harness.shown_balance() == (shown, 50)


async def read_unexplained(harness: BalanceHarness) -> tuple[int, float]:
    """Return the unexplained uses and yuan of the account."""
    unexplained = (await harness.get_account())["unexplained"]
    return unexplained["count"], unexplained["money"]


@pytest.mark.parametrize(
    ("harness", "balance", "spent", "unexplained"),
    [
        (SUBMIT_NOW, (9, 40), [(3, 0), (0, 7), (1, 1)], [(3, 0), (3, 7), (4, 8)]),
        (END_THEN, (0, 100), [(0, 30)], [(0, 30)]),
    ],
    indirect=["harness"],
)
async def test_spending_elsewhere_adds_up(
    harness: BalanceHarness,
    balance: tuple[int, int],
    spent: list[tuple[int, int]],
    unexplained: list[tuple[int, int]],
) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json=MAX_PRICE)
    await harness.sandbox.set_balance(*balance)
    costs = await harness.run_tasks()
    assert await read_unexplained(harness) == (0, 0)
    for (count, money), expected in zip(spent, unexplained, strict=True):
        left = await harness.upstream_balance()
        await harness.sandbox.set_balance(left[0] - count, left[1] - money)
        costs.append(await harness.run_task())
        assert await read_unexplained(harness) == expected
    assert {cost["money"] for cost in costs} == {0 if balance[0] else PRICE_YUAN}
    await assert_balances_match(harness, costs)


@pytest.mark.parametrize(
    ("harness", "fault"),
    [(END_THEN, FAILS), (SUBMIT_NOW, LOST), (SUBMIT_NOW, Fault(times=2, wrong=MISSING))],
    indirect=["harness"],
)
async def test_parallel_tasks_leave_nothing_unexplained(harness: BalanceHarness, fault: Fault) -> None:
    await harness.sandbox.set_balance(6, 20 * PRICE_YUAN)
    await harness.run_tasks()
    await harness.sandbox.update_behaviour(faults=(fault,))
    for _ in range(2):
        tasks, _ = await harness.submit_concurrently(3)
        await harness.sandbox.control.wait_until_idle()
        for task in tasks:
            await harness.wait_for_cost(task)
        assert await read_unexplained(harness) == (0, 0)
    await harness.sandbox.update_behaviour(faults=())
    await harness.gateway.advance(600)
    await harness.run_tasks(3)
    assert await read_unexplained(harness) == (0, 0)
    assert await harness.shown_balance() == await harness.upstream_balance()
