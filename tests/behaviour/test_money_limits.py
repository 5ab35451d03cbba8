"""Limits on money."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey


@pytest.fixture
async def harness(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield an account without prepaid uses and with enough money."""
    async with open_balance_harness(valkey) as opened_harness:
        await opened_harness.set_balance(0, 1_000)
        yield opened_harness


async def set_month_limit(harness: BalanceHarness, money: float) -> None:
    await harness.gateway.put_tenant(limits=[{"window": "month", "money": money}])


async def read_month_money(harness: BalanceHarness) -> tuple[float, float, float]:
    """Return used, reserved and remaining yuan of the month."""
    (policy,) = (await harness.gateway.call("GET", "/v1/quota")).json()["policies"]
    return policy["used"], policy["reserved"], policy["remaining"]


async def wait_for_costs(harness: BalanceHarness, tasks: Sequence[dict[str, Any]]) -> list[float]:
    return [(await harness.wait_for_cost(task))["money"] for task in tasks]


async def test_configured_price_is_held(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await set_month_limit(harness, 3 * PRICE_YUAN + 1.99)
    tasks, refused = await harness.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {429: 3})
    assert await read_month_money(harness) == (0, 3 * PRICE_YUAN, 1.99)
    assert await wait_for_costs(harness, tasks) == [PRICE_YUAN] * 3
    assert await read_month_money(harness) == (3 * PRICE_YUAN, 0, 1.99)
    expect_problem(await harness.submit(), 429, "quota-exceeded")
    assert await harness.upstream_balance() == (0, 1_000 - 3 * PRICE_YUAN)


async def test_observed_price_is_held(harness: BalanceHarness) -> None:
    for _ in range(2):
        await harness.run_task()
    await set_month_limit(harness, 5 * PRICE_YUAN)
    assert await read_month_money(harness) == (PRICE_YUAN, 0, 4 * PRICE_YUAN)
    tasks, refused = await harness.submit_concurrently(8)
    assert (len(tasks), refused) == (4, {429: 4})
    assert await read_month_money(harness) == (PRICE_YUAN, 4 * PRICE_YUAN, 0)
    assert await wait_for_costs(harness, tasks) == [PRICE_YUAN] * 4
    assert await read_month_money(harness) == (5 * PRICE_YUAN, 0, 0)


async def test_prices_are_per_kind(harness: BalanceHarness) -> None:
    for _ in range(2):
        await harness.run_task()
    await set_month_limit(harness, 100)
    assert (await harness.submit(kind="upscale")).status_code == 201
    assert await read_month_money(harness) == (PRICE_YUAN, 100 - PRICE_YUAN, 0)
    expect_problem(await harness.submit(), 429, "quota-exceeded")


async def test_unknown_price_holds_everything_left(harness: BalanceHarness) -> None:
    await set_month_limit(harness, 100)
    tasks, refused = await harness.submit_concurrently(4)
    assert (len(tasks), refused) == (1, {429: 3})
    assert await read_month_money(harness) == (0, 100, 0)
    (violation,) = (await harness.submit()).json()["violated_policies"]
    assert (violation["policy"], violation["limit"]) == ("month-money", 100)
    await wait_for_costs(harness, tasks)
    assert (await read_month_money(harness))[1:] == (0, 100)
    assert (await harness.run_task())["money"] == PRICE_YUAN
    assert await read_month_money(harness) == (PRICE_YUAN, 0, 100 - PRICE_YUAN)


async def test_cost_above_the_hold_is_booked_in_full(harness: BalanceHarness) -> None:
    for _ in range(2):
        await harness.run_task()
    await set_month_limit(harness, 2 * PRICE_YUAN)
    await harness.set_behaviour(prices={"vector": 7 * PRICE_YUAN})
    assert await harness.run_task() == {"count": 0, "money": 7 * PRICE_YUAN, "basis": "observed"}
    assert await read_month_money(harness) == (8 * PRICE_YUAN, 0, 0)
    expect_problem(await harness.submit(), 429, "quota-exceeded")
    await set_month_limit(harness, 15 * PRICE_YUAN - 0.01)
    expect_problem(await harness.submit(), 429, "quota-exceeded")
    await set_month_limit(harness, 15 * PRICE_YUAN)
    assert (await harness.run_task())["money"] == 7 * PRICE_YUAN
    assert await read_month_money(harness) == (15 * PRICE_YUAN, 0, 0)


async def test_prepaid_uses_pass_a_spent_money_limit(harness: BalanceHarness) -> None:
    await harness.set_balance(4, 1_000)
    await harness.run_task()
    await set_month_limit(harness, 0)
    tasks, refused = await harness.submit_concurrently(5)
    assert (len(tasks), refused) == (3, {429: 2})
    assert await wait_for_costs(harness, tasks) == [0] * 3
    assert await read_month_money(harness) == (0, 0, 0)
    expect_problem(await harness.submit(), 429, "quota-exceeded")
    assert await harness.upstream_balance() == (0, 1_000)


async def test_refusal_frees_money_and_unknown_keeps_it(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await set_month_limit(harness, 2 * PRICE_YUAN)
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, reject="图片太小"),))
    expect_problem(await harness.submit(), 502, "upstream-rejected")
    assert await read_month_money(harness) == (0, 0, 2 * PRICE_YUAN)
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, reply="reset"),))
    expect_problem(await harness.submit(), 504, "submission-unknown")
    assert await read_month_money(harness) == (PRICE_YUAN, 0, PRICE_YUAN)
    tasks, refused = await harness.submit_concurrently(3)
    assert (len(tasks), refused) == (1, {429: 2})


@pytest.mark.parametrize(("charge", "charged"), [("submit", PRICE_YUAN), ("end", 0)])
async def test_failed_task_stays_charged_until_refunded(harness: BalanceHarness, charge: str, charged: int) -> None:
    await harness.set_behaviour(charge=charge)
    for _ in range(2):
        await harness.run_task()
    await set_month_limit(harness, 100)
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, fail="it could not be done"),))
    assert await harness.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "estimated"}
    assert await read_month_money(harness) == (2 * PRICE_YUAN, 0, 100 - 2 * PRICE_YUAN)
    assert await harness.shown_balance() == await harness.upstream_balance() == (0, 1_000 - 2 * PRICE_YUAN - charged)


@pytest.mark.parametrize("checked_balance", ["now", "then"])
async def test_parallel_tasks_are_priced_in_money(valkey: Valkey, checked_balance: str) -> None:
    async with open_balance_harness(valkey, checked_balance=checked_balance) as harness:
        await harness.set_balance(2, 1_000)
        for _ in range(3):
            await harness.run_task()
        await harness.set_balance(2, 1_000)
        await harness.gateway.advance(1)
        for _ in range(2):
            await harness.run_task()
        assert await harness.shown_balance() == (0, 1_000)
        tasks, _ = await harness.submit_concurrently(3)
        assert [(await harness.wait_for_cost(task))["money"] for task in tasks] == [PRICE_YUAN] * 3
