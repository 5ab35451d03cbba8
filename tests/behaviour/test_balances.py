"""Costs, balances, floors, spending modes and top-ups compared with the sandbox's real balances.

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
from tests.behaviour.gateway_fixture import USER_KEY
from tests.behaviour.requests import expect_json, expect_problem, use_unreachable_account
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
    harness: BalanceHarness, balance: tuple[int, int], spent: list[tuple[int, int]], unexplained: list[tuple[int, int]]
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


SPARE_KEY = "upstream-key-spare"


@pytest.fixture
async def probing(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway whose checks report no current balance: only a submission finds a top-up of `main`.

    There is a second account `spare`, which the tenant does not use.
    """
    async with open_balance_harness(valkey, checked_balance="then") as harness:
        await harness.sandbox.set_balance(50, 0, SPARE_KEY)
        await harness.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": SPARE_KEY})
        yield harness


@pytest.fixture(params=["submit", "end"])
async def checking(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway over an upstream whose checks report the current balance."""
    async with open_balance_harness(valkey, charge=request.param, checked_balance="now") as harness:
        yield harness


async def exhaust_account(harness: BalanceHarness, uses: int = 2) -> None:
    """Spend the balance of the account until a submit is refused."""
    await harness.sandbox.set_balance(uses, 0)
    await harness.run_tasks(uses)
    await harness.expect_refused_locally()


async def read_submit_keys(harness: BalanceHarness) -> list[str]:
    """Return the user keys of all submits, in order."""
    return [
        request.user_key for request in await harness.sandbox.control.list_requests() if request.operation == "submit"
    ]


async def test_one_probe_per_minute(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant("other")
    other = await probing.gateway.new_token("other")
    await exhaust_account(probing, 1)
    for _ in range(2):
        submits_before = await probing.sandbox.count_submits()
        await probing.gateway.advance(50)
        await probing.expect_refused_locally()
        await probing.gateway.advance(10)
        assert await probing.submit_concurrently(4) == ([], {402: 4})
        await probing.expect_refused_locally(token=other)
        assert await probing.sandbox.count_submits() == submits_before + 1
        assert (await probing.get_account())["state"] == "exhausted"
        shown = expect_json(await probing.gateway.call("GET", "/v1/quota"))["account"]
        assert (shown["can_pay"], shown["look_again_at"] is None) == (False, False)
    await probing.sandbox.set_balance(5, 0)
    await probing.expect_refused_locally()
    await probing.gateway.advance(60)
    await probing.run_task()
    assert await probing.shown_balance() == (4, 0)
    tasks, refused = await probing.submit_concurrently(5)
    assert (len(tasks), refused) == (4, {402: 1})


async def test_accounts_in_order(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant(accounts=["main", "spare"])
    await probing.sandbox.set_balance(2, 0)
    await probing.run_tasks(4)
    assert await read_submit_keys(probing) == [USER_KEY] * 2 + [SPARE_KEY] * 2
    assert (await probing.shown_balance(), await probing.shown_balance("spare")) == ((0, 0), (48, 0))
    await probing.sandbox.set_balance(9, 0)
    await probing.gateway.advance(60)
    await probing.run_tasks()
    assert (await read_submit_keys(probing))[4:] == [USER_KEY] * 2
    assert await probing.shown_balance() == (7, 0)


async def test_failed_probe_fails_over(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant(accounts=["main", "spare"], limits=[{"window": "total", "tasks": 3}])
    await probing.sandbox.set_balance(1, 0)
    await probing.run_task()
    await probing.expect_accepted()
    assert (await probing.get_account())["state"] == "exhausted"
    await probing.gateway.advance(60)
    await probing.expect_accepted()
    assert await read_submit_keys(probing) == [USER_KEY, SPARE_KEY, USER_KEY, SPARE_KEY]
    expect_problem(await probing.submit(), 429, "quota-exceeded")
    counted = await probing.read_counts()
    assert (counted["total-tasks"], counted["max-active"]) == ((3, 0), (2, 0))
    assert [(await probing.get_account(name))["in_flight"] for name in ("main", "spare")] == [0, 2]


async def test_unreachable_account_fails_over(probing: BalanceHarness) -> None:
    await use_unreachable_account(probing.gateway)
    refused = await probing.submit()
    expect_problem(refused, 503, "upstream-unavailable")
    assert refused.headers["retry-after"]
    await probing.gateway.put_tenant(accounts=["dead", "main"])
    await probing.run_task()
    assert (await probing.read_counts())["total-tasks"] == (1, 0)


async def test_invalid_account_is_not_probed(probing: BalanceHarness) -> None:
    for method, path, body in (
        ("POST", "/accounts/main/reopen", {}),
        ("PUT", "/accounts/main", {"user_key": USER_KEY}),
        ("PUT", "/accounts/main", {"user_key": SPARE_KEY}),
    ):
        await probing.sandbox.set_fault(on="submit", times=1, refuse="账户不存在")
        submits_before = await probing.sandbox.count_submits()
        for seconds in (0, 60, 86_400):
            await probing.gateway.advance(seconds)
            response = await probing.submit()
            refused = expect_problem(response, 503, "account-misconfigured")
            assert "retry-after" not in response.headers
            assert "账户" not in str(refused)
            assert USER_KEY not in str(refused)
        assert await probing.sandbox.count_submits() == submits_before + 1
        assert (await probing.get_account())["look_again_at"] is None
        assert await probing.run_balance_checks(3_600) == 0
        await probing.gateway.call_admin(method, path, json=body)
        await probing.run_task()
    assert (await probing.read_counts())["total-tasks"] == (3, 0)


async def test_top_up_is_found_by_a_balance_check_or_else_by_a_probe(checking: BalanceHarness) -> None:
    await exhaust_account(checking)
    submits_before = await checking.sandbox.count_submits()
    await checking.sandbox.set_balance(3, 0)
    assert await checking.run_balance_checks(50) == 0
    assert await checking.run_balance_checks(10) == 1
    account = await checking.get_account()
    assert (account["state"], account["live_balance_checks"]) == ("open", True)
    assert await checking.shown_balance() == (3, 0)
    assert await checking.sandbox.count_submits() == submits_before
    await checking.run_task()
    assert await checking.run_balance_checks(3_600) == 0
    # When the checks of an account that reports current balances fail, probes resume.
    await checking.run_tasks(2)
    assert (await checking.get_account())["state"] == "exhausted"
    await checking.sandbox.set_fault(on="check", refuse="系统繁忙")
    for _ in range(5):
        await checking.expect_refused_locally()
        await checking.run_balance_checks()
    await checking.gateway.advance(60)
    await checking.expect_failed_probe()
    await checking.expect_refused_locally()
    await checking.sandbox.update_behaviour(faults=())
    await checking.sandbox.set_balance(1, 0)
    await checking.gateway.advance(60)
    await checking.run_task()
