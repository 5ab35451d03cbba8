"""Costs, balances, floors and spending modes compared with the sandbox's real balances.

The vendor documents neither whether a task is charged at its submit or at its end, nor whether the check of a finished
task reports the current balance or that of its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from itertools import product
from typing import Any

import pytest

from service.sandbox.faults import Fault, Field, FieldDefect
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import USER_KEY
from tests.support.valkey import Valkey

COST_OF_USE = {"count": 1, "money": 0}
COST_IN_MONEY = {"count": 0, "money": PRICE_YUAN}
OBSERVED = {"basis": "observed"}
MAX_PRICE = {"max_price": {"vectorize": PRICE_YUAN}}
"""In yuan; in fen it is the largest integer that JSON readers and Lua represent exactly."""
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


@pytest.fixture
async def default_harness(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    async with open_balance_harness(valkey) as opened_harness:
        yield opened_harness


async def assert_balances_match(harness: BalanceHarness, costs: list[dict[str, Any]]) -> None:
    """Assert that the balance is the upstream's, the charges are the costs, and nothing is reserved."""
    assert await harness.shown_balance() == await harness.upstream_balance()
    counted = await harness.read_policies()
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["total-tasks"] == (len(costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await harness.get_account())["in_flight"] == 0


async def run_tasks(harness: BalanceHarness, number: int = 2) -> list[dict[str, Any]]:
    """Run tasks one after the other; the ledger learns price and time of charging from two."""
    return [await harness.run_task() for _ in range(number)]


@pytest.mark.parametrize("harness", [*product(("submit", "end"), ("now", "then"))], ids="-".join, indirect=True)
async def test_sequential_tasks_cost_the_balance_drop(harness: BalanceHarness) -> None:
    await harness.set_balance(3, 2 * PRICE_YUAN + 1)
    costs = await run_tasks(harness, 5)
    assert costs[0] == COST_OF_USE | {"basis": "estimated"}
    assert costs[1:] == [COST_OF_USE | OBSERVED] * 2 + [COST_IN_MONEY | OBSERVED] * 2
    await assert_balances_match(harness, costs)
    submits_before = await harness.sandbox.count_submits()
    refused = await harness.submit()
    assert (refused.status_code, refused.headers["retry-after"]) == (402, "60"), refused.text
    assert await harness.sandbox.count_submits() == submits_before + 1
    await harness.expect_refused_locally()
    assert (await harness.get_account())["state"] == "exhausted"
    await assert_balances_match(harness, costs)


async def test_parallel_tasks_have_no_observed_cost(harness: BalanceHarness) -> None:
    """The price in money is unknown before it was first observed."""
    await harness.set_balance(4, 20 * PRICE_YUAN)
    costs = await run_tasks(harness)
    for number in (3, 2):
        beside = [await harness.expect_accepted() for _ in range(number)]
        costs += [await harness.wait_for_cost(task) for task in beside]
    assert [cost["basis"] for cost in costs[2:]] == ["estimated"] * 2 + ["unknown"] * 3
    assert await harness.upstream_balance() == (0, 17 * PRICE_YUAN)
    costs += await run_tasks(harness, 1)
    assert costs[-1] == COST_IN_MONEY | OBSERVED
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
    await harness.set_balance(*balance)
    costs = await run_tasks(harness)
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


@pytest.mark.parametrize(
    ("harness", "floors", "balance"),
    [
        (SUBMIT_NOW, {"floor_count": 3}, (8, 50)),
        (END_THEN, {"floor_money": 3 * PRICE_YUAN}, (0, 8 * PRICE_YUAN)),
    ],
    indirect=["harness"],
)
async def test_floors_include_running_tasks(
    harness: BalanceHarness, floors: dict[str, int], balance: tuple[int, int]
) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json=floors)
    await harness.set_balance(*balance)
    await run_tasks(harness)
    await harness.set_behaviour(seconds=3_600)
    for _ in range(3):
        await harness.expect_accepted()
    for _ in range(2):
        await harness.expect_refused_locally()
        await harness.gateway.advance(3_600)


async def test_running_task_may_yet_be_charged(harness: BalanceHarness) -> None:
    """While the time of charging is unknown, one use too many stays."""
    await harness.set_behaviour(seconds=3_600)
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 5})
    await harness.set_balance(8, 0)
    statuses = [(await harness.submit()).status_code for _ in range(5)]
    accepted = 3 if (await harness.control.get_behaviour()).charge == "end" else 2
    assert statuses == [201] * accepted + [402] * (5 - accepted)


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


@pytest.mark.parametrize(
    ("harness", "mode", "floor", "balance", "remaining"),
    [(END_THEN, "count_only", 0, (3, 50), (0, 50)), (SUBMIT_NOW, "count_then_money", 5, (8, 0), (5, 0))],
    indirect=["harness"],
)
async def test_unknown_outcome_may_have_taken_the_last_use(
    harness: BalanceHarness, mode: str, floor: int, balance: tuple[int, int], remaining: tuple[int, int]
) -> None:
    await harness.gateway.put_tenant(spending_mode=mode)
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"floor_count": floor})
    await harness.set_balance(*balance)
    await run_tasks(harness)
    await harness.set_behaviour(faults=(LOST,))
    assert (await harness.submit()).status_code == 504
    await harness.control.wait_until_idle()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == remaining


@pytest.mark.parametrize(
    ("harness", "fault", "uses"),
    [(END_THEN, Fault(wrong=MISSING), 4), (SUBMIT_NOW, Fault(on="check", wrong=MISSING), 5)],
    indirect=["harness"],
)
async def test_finished_task_took_a_use_without_a_balance(harness: BalanceHarness, fault: Fault, uses: int) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(uses, 50)
    await run_tasks(harness)
    await harness.set_behaviour(faults=(fault,))
    await run_tasks(harness, uses - 2)
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)


async def test_slow_response_holds_its_use(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant("prepaid", spending_mode="count_only")
    prepaid_token = await harness.gateway.new_token("prepaid")
    await harness.set_balance(3, 50)
    await run_tasks(harness)
    with harness.gateway.hold_responses() as held:
        slow = asyncio.create_task(harness.submit(token=prepaid_token))
        await wait_until(lambda: held.count == 1)
        await harness.expect_refused_locally()
    response = await slow
    assert response.status_code == 201
    assert (await harness.wait_for_cost(response.json(), token=prepaid_token))["money"] == 0
    assert await harness.upstream_balance() == (0, 50)


async def test_older_balance_restores_nothing(harness: BalanceHarness) -> None:
    """The first of two tasks is checked after a later balance is known."""
    gateway, poller = harness.gateway, harness.gateway.services.task_poller

    async def check_after(seconds: float) -> None:
        await harness.control.wait_until_idle()
        await gateway.advance(seconds)
        while await poller.start_due():
            pass
        await poller.wait_idle()

    await gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(5, 50)
    await run_tasks(harness)
    first = await harness.expect_accepted()
    await check_after(1.5)
    second = await harness.expect_accepted()
    await harness.set_behaviour(faults=(Fault(on="check", times=1, reply="page", status=500),))
    await check_after(1)
    await check_after(1.5)
    states = [(await gateway.call("GET", item["links"]["self"])).json()["state"] for item in (first, second)]
    assert states == ["queued", "succeeded"]
    await harness.wait_for_cost(first)
    assert await harness.shown_balance() == await harness.upstream_balance() == (1, 50)
    tasks, refused = await harness.submit_concurrently(3)
    assert (len(tasks), refused) == (1, {402: 2})
    await harness.wait_for_cost(tasks[0])
    assert await harness.upstream_balance() == (0, 50)


async def test_invalid_balance_keeps_the_last_valid_one(default_harness: BalanceHarness) -> None:
    harness = default_harness
    await harness.set_balance(21, 50)
    await run_tasks(harness, 1)
    defects: list[tuple[FieldDefect, FieldDefect, tuple[float | None, float | None]]] = [
        ("negative", "int", (20, 50)),
        ("int", "null", (18, 50)),
        ("missing", "negative", (18, 50)),
    ]
    for count, money, shown in defects:
        await harness.set_behaviour(faults=(Fault(wrong={"remaining_count": count, "remaining_money": money}),))
        await run_tasks(harness, 1)
        assert await harness.shown_balance() == shown
        assert (await harness.get_account())["state"] == "open"


async def randomize_upstream(harness: BalanceHarness, chance: random.Random) -> None:
    """Change the upstream's balance and behaviour at random."""
    defects: tuple[FieldDefect, ...] = ("missing", "null", "negative", "string", "float")
    fields: tuple[Field, ...] = ("remaining_count", "remaining_money")
    wrong = {field: chance.choice(defects) for field in fields if chance.random() < 0.4}
    await harness.set_behaviour(
        charge=chance.choice(("submit", "end")),
        checked_balance=chance.choice(("now", "then")),
        faults=(Fault(on=chance.choice(("submit", "check", None)), wrong=wrong),),
    )
    if chance.random() < 0.5:
        await harness.set_balance(chance.randrange(6), chance.randrange(12))


@pytest.mark.parametrize("seed", range(3))
async def test_random_balances(default_harness: BalanceHarness, seed: int) -> None:
    harness, chance = default_harness, random.Random(seed)
    tasks: list[dict[str, Any]] = []
    for _ in range(8):
        await randomize_upstream(harness, chance)
        accepted, refused = await harness.submit_concurrently(chance.randrange(1, 4))
        assert set(refused) <= {402}
        tasks += accepted
        await harness.gateway.advance(chance.choice((1, 61)))
        await harness.gateway.poll_due_tasks()
    ended = [await harness.gateway.wait_for_task(task["id"]) for task in tasks]
    assert {task["state"] for task in ended} == {"succeeded"}
    costs = [task["cost"] for task in ended]
    assert all((cost["count"], cost["money"]) == (1, 0) or cost["count"] == 0 <= cost["money"] for cost in costs)
    await harness.set_behaviour(faults=())
    await harness.set_balance(9, 9)
    await harness.gateway.advance(60)
    costs.append(await harness.run_task())
    assert await harness.upstream_balance() == (8, 9)
    await assert_balances_match(harness, costs)


async def read_unexplained(harness: BalanceHarness, account: str = "main") -> tuple[int, float]:
    """Return the unexplained uses and yuan of the account."""
    unexplained = (await harness.get_account(account))["unexplained"]
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
    await harness.set_balance(*balance)
    await run_tasks(harness)
    assert await read_unexplained(harness) == (0, 0)
    for (count, money), expected in zip(spent, unexplained, strict=True):
        left = await harness.upstream_balance()
        await harness.set_balance(left[0] - count, left[1] - money)
        await run_tasks(harness, 1)
        assert await read_unexplained(harness) == expected
    assert await harness.shown_balance() == await harness.upstream_balance()
    assert (await harness.read_policies())["total-tasks"] == (2 + len(spent), 0)


async def test_detection_resumes_after_a_failed_task(harness: BalanceHarness) -> None:
    await harness.set_balance(9, 0)
    await run_tasks(harness)
    await harness.set_behaviour(faults=(FAILS,))
    await run_tasks(harness)
    assert await read_unexplained(harness) == (0, 0)
    uses, _ = await harness.upstream_balance()
    await harness.set_balance(uses - 2, 0)
    await run_tasks(harness, 1)
    assert await read_unexplained(harness) == (2, 0)


@pytest.mark.parametrize(
    ("harness", "fault"),
    [(END_THEN, FAILS), (SUBMIT_NOW, LOST), (END_THEN, LOST), (SUBMIT_NOW, Fault(times=2, wrong=MISSING))],
    indirect=["harness"],
)
async def test_parallel_tasks_leave_nothing_unexplained(harness: BalanceHarness, fault: Fault) -> None:
    await harness.set_balance(6, 20 * PRICE_YUAN)
    await run_tasks(harness)
    await harness.set_behaviour(faults=(fault,))
    for _ in range(2):
        tasks, _ = await harness.submit_concurrently(3)
        await harness.control.wait_until_idle()
        for task in tasks:
            await harness.wait_for_cost(task)
        assert await read_unexplained(harness) == (0, 0)
    await harness.set_behaviour(faults=())
    await harness.gateway.advance(600)
    await run_tasks(harness, 3)
    assert await read_unexplained(harness) == (0, 0)
    assert await harness.shown_balance() == await harness.upstream_balance()


async def test_response_older_than_a_top_up_is_explained(harness: BalanceHarness) -> None:
    await harness.set_balance(5, 0)
    await run_tasks(harness)
    with harness.gateway.hold_responses() as held:
        slow = asyncio.create_task(harness.submit())
        await wait_until(lambda: held.count == 1)
        harness.gateway.services.submitter.upstream = held.upstream
        await harness.set_balance(9, 30)
        await run_tasks(harness, 1)
    await harness.wait_for_cost((await slow).json())
    await run_tasks(harness, 1)
    assert await read_unexplained(harness) == (0, 0)


async def test_failover_moves_the_expected_charge(harness: BalanceHarness) -> None:
    await harness.set_balance(50, 0, "spare-key")
    await harness.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare-key"})
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.set_balance(2, 1)
    await run_tasks(harness, 5)
    await harness.set_balance(4, 1)
    await harness.gateway.advance(120)
    await run_tasks(harness)
    for name, key in (("main", USER_KEY), ("spare", "spare-key")):
        assert await read_unexplained(harness, name) == (0, 0)
        assert await harness.shown_balance(name) == await harness.upstream_balance(key)
