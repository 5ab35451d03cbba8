"""Limits of tenants on tasks, active tasks and money: exact at every size and under concurrent changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import advance_to_next_window, expect_problem, read_policies
from tests.support.valkey import Valkey

MAX_COUNT, MAX_YUAN = 10**12, 10**10


async def submit_concurrently(gateway: RunningGateway, number: int) -> Counter[int]:
    responses = await asyncio.gather(*(gateway.submit() for _ in range(number)))
    return Counter(response.status_code for response in responses)


@pytest.mark.smoke
async def test_task_limit_resets_with_its_window(gateway: RunningGateway) -> None:
    await advance_to_next_window(gateway)  # noon, where the clock stands still
    await gateway.put_tenant(limits=[{"window": "minute", "tasks": 2}, {"window": "day", "tasks": 4}])
    first = await gateway.submit()
    assert first.headers["ratelimit-policy"] == '"minute-tasks";q=2;w=60, "day-tasks";q=4;w=86400'
    assert first.headers["ratelimit"].startswith('"minute-tasks";r=1;t=')
    assert (await gateway.submit()).status_code == 201
    refused = await gateway.submit()
    (violated,) = expect_problem(refused, 429, "rate-limited")["violated_policies"]
    assert (violated["policy"], violated["limit"]) == ("minute-tasks", 2)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"].startswith('"minute-tasks";r=0;t=')
    await gateway.advance(int(refused.headers["retry-after"]))
    assert [(await gateway.submit()).status_code for _ in range(2)] == [201, 201]
    await gateway.advance(60)
    (violated,) = expect_problem(await gateway.submit(), 429, "quota-exceeded")["violated_policies"]
    assert violated["policy"] == "day-tasks"
    assert await gateway.upstream.count_submits() == 4


async def test_violated_policies(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 0}])
    refused = await gateway.submit()
    violations = expect_problem(refused, 429, "quota-exceeded")["violated_policies"]
    assert violations == [{"policy": "total-tasks", "limit": 0, "resets_at": None}]
    assert "retry-after" not in refused.headers
    assert refused.headers["ratelimit-policy"] == '"total-tasks";q=0'
    await gateway.put_tenant(limits=[{"window": "minute", "tasks": 0}, {"window": "hour", "tasks": 0}], max_active=0)
    violations = expect_problem(await gateway.submit(), 429, "quota-exceeded")["violated_policies"]
    assert [violation["policy"] for violation in violations] == ["minute-tasks", "hour-tasks", "max-active"]


async def test_largest_limits_are_exact(gateway: RunningGateway) -> None:
    largest = {"window": "total", "tasks": MAX_COUNT, "money": MAX_YUAN}
    finest = {"window": "month", "tasks": MAX_COUNT - 1, "money": MAX_YUAN - 0.01}
    await gateway.put_tenant(limits=[largest, finest], max_active=MAX_COUNT)
    assert f'"total-tasks";r={MAX_COUNT - 1}, ' in (await gateway.submit()).headers["ratelimit"]
    policies = await read_policies(gateway)
    assert {name: (item["limit"], item["remaining"]) for name, item in policies.items() if "money" not in name} == {
        "total-tasks": (MAX_COUNT, MAX_COUNT - 1),
        "month-tasks": (MAX_COUNT - 1, MAX_COUNT - 2),
        "max-active": (MAX_COUNT, MAX_COUNT - 1),
    }
    assert (policies["total-money"]["limit"], policies["month-money"]["limit"]) == (MAX_YUAN, MAX_YUAN - 0.01)


async def test_lowered_and_raised_limits(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    assert await submit_concurrently(gateway, 2) == {201: 2}  # counted before there is a limit
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 6}])
    assert await submit_concurrently(gateway, 6) == {201: 4, 429: 2}
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 3}])
    assert await submit_concurrently(gateway, 3) == {429: 3}
    month = (await read_policies(gateway))["month-tasks"]
    assert (month["limit"], month["used"], month["reserved"], month["remaining"]) == (3, 6, 0, 0)
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 9}])
    assert await submit_concurrently(gateway, 6) == {201: 3, 429: 3}
    await gateway.put_tenant(max_active=4)
    active = (await read_policies(gateway))["max-active"]
    assert (active["limit"], active["used"], active["remaining"]) == (4, 9, 0)
    refused = await gateway.submit()
    expect_problem(refused, 429, "too-many-active-tasks")
    assert "retry-after" not in refused.headers
    for task in (await gateway.call("GET", "/v1/tasks")).json()["items"]:
        await gateway.wait_for_task(task["id"])
    assert await submit_concurrently(gateway, 6) == {201: 4, 429: 2}


async def test_deleted_tenant_spends_nothing(gateway: RunningGateway) -> None:
    registry: Any = gateway.services.registry
    stale = registry.current
    assert (await gateway.call_admin("DELETE", "/tenants/shop")).status_code == 204
    registry.current = stale
    expect_problem(await gateway.submit(), 503, "ledger-unavailable")
    assert await gateway.upstream.count_submits() == 0


@pytest.fixture
async def harness(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield an account without prepaid uses and with enough money; its second task has an observed price."""
    async with open_balance_harness(valkey) as opened_harness:
        await opened_harness.sandbox.set_balance(0, 1_000)
        yield opened_harness


async def set_month_limit(harness: BalanceHarness, money: float) -> None:
    await harness.gateway.put_tenant(limits=[{"window": "month", "money": money}])


async def read_month_money(harness: BalanceHarness) -> tuple[float, float, float]:
    """Return used, reserved and remaining yuan of the month."""
    policy = (await read_policies(harness.gateway))["month-money"]
    return policy["used"], policy["reserved"], policy["remaining"]


async def expect_concurrent(harness: BalanceHarness, number: int, accepted: int) -> list[dict[str, Any]]:
    """Submit concurrently; assert that some are accepted and the others are over a limit."""
    tasks, refused = await harness.submit_concurrently(number)
    assert (len(tasks), refused) == (accepted, {429: number - accepted})
    return tasks


async def wait_for_costs(harness: BalanceHarness, tasks: list[dict[str, Any]]) -> list[float]:
    return [(await harness.wait_for_cost(task))["money"] for task in tasks]


async def test_observed_price_of_a_kind_is_held(harness: BalanceHarness) -> None:
    await harness.run_tasks()
    await set_month_limit(harness, 5 * PRICE_YUAN)
    assert await read_month_money(harness) == (PRICE_YUAN, 0, 4 * PRICE_YUAN)
    tasks = await expect_concurrent(harness, 8, accepted=4)
    assert await read_month_money(harness) == (PRICE_YUAN, 4 * PRICE_YUAN, 0)
    assert await wait_for_costs(harness, tasks) == [PRICE_YUAN] * 4
    assert await read_month_money(harness) == (5 * PRICE_YUAN, 0, 0)
    await set_month_limit(harness, 100)
    await harness.expect_accepted(kind="upscale")
    assert await read_month_money(harness) == (5 * PRICE_YUAN, 100 - 5 * PRICE_YUAN, 0)
    expect_problem(await harness.submit(), 429, "quota-exceeded")


async def test_unknown_price_holds_everything_left(harness: BalanceHarness) -> None:
    await set_month_limit(harness, 100)
    tasks = await expect_concurrent(harness, 4, accepted=1)
    assert await read_month_money(harness) == (0, 100, 0)
    (violation,) = (await harness.submit()).json()["violated_policies"]
    assert (violation["policy"], violation["limit"]) == ("month-money", 100)
    await wait_for_costs(harness, tasks)
    assert (await read_month_money(harness))[1:] == (0, 100)
    assert (await harness.run_task())["money"] == PRICE_YUAN
    assert await read_month_money(harness) == (PRICE_YUAN, 0, 100 - PRICE_YUAN)


async def test_cost_above_the_hold_is_booked_in_full(harness: BalanceHarness) -> None:
    await harness.run_tasks()
    await set_month_limit(harness, 2 * PRICE_YUAN)
    await harness.sandbox.update_behaviour(prices={"vector": 7 * PRICE_YUAN})
    assert await harness.run_task() == {"count": 0, "money": 7 * PRICE_YUAN, "basis": "observed"}
    assert await read_month_money(harness) == (8 * PRICE_YUAN, 0, 0)
    assert (await read_policies(harness.gateway))["month-money"]["overrun"] == 6 * PRICE_YUAN
    for limit in (2 * PRICE_YUAN, 15 * PRICE_YUAN - 0.01):
        await set_month_limit(harness, limit)
        expect_problem(await harness.submit(), 429, "quota-exceeded")
    await set_month_limit(harness, 15 * PRICE_YUAN)
    assert (await harness.run_task())["money"] == 7 * PRICE_YUAN
    assert await read_month_money(harness) == (15 * PRICE_YUAN, 0, 0)


async def test_prepaid_uses_pass_a_spent_money_limit(harness: BalanceHarness) -> None:
    await harness.sandbox.set_balance(4, 1_000)
    await harness.run_task()
    await set_month_limit(harness, 0)
    tasks = await expect_concurrent(harness, 5, accepted=3)
    assert await wait_for_costs(harness, tasks) == [0] * 3
    assert await read_month_money(harness) == (0, 0, 0)
    assert await harness.upstream_balance() == (0, 1_000)


async def test_configured_price_is_held(harness: BalanceHarness) -> None:
    price = {"max_price": {"vectorize": PRICE_YUAN}}
    await harness.gateway.call_admin("PUT", "/accounts/main", json=price)
    await set_month_limit(harness, 3 * PRICE_YUAN + 1.99)
    tasks = await expect_concurrent(harness, 6, accepted=3)
    assert await read_month_money(harness) == (0, 3 * PRICE_YUAN, 1.99)
    assert await wait_for_costs(harness, tasks) == [PRICE_YUAN] * 3
    assert await read_month_money(harness) == (3 * PRICE_YUAN, 0, 1.99)


@pytest.mark.parametrize(("charge", "charged"), [("submit", PRICE_YUAN), ("end", 0)])
async def test_failed_task_stays_charged_until_refunded(harness: BalanceHarness, charge: str, charged: int) -> None:
    await harness.sandbox.update_behaviour(charge=charge)
    await harness.run_tasks()
    await set_month_limit(harness, 100)
    await harness.sandbox.set_fault(on="submit", times=1, fail="it could not be done")
    assert await harness.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "estimated"}
    assert await read_month_money(harness) == (2 * PRICE_YUAN, 0, 100 - 2 * PRICE_YUAN)
    assert await harness.shown_balance() == await harness.upstream_balance() == (0, 1_000 - 2 * PRICE_YUAN - charged)
