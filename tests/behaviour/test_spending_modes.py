"""Floors and the prepaid-only mode while balances are incomplete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import product

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.balance_harness import KIND, PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey

MISSING_BALANCES = Fault(wrong={"remaining_count": "missing", "remaining_money": "missing"})


@pytest.fixture(params=product(("submit", "end"), ("now", "then")), ids="-".join)
async def harness(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    charge, checked_balance = request.param
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as opened_harness:
        yield opened_harness


async def test_configured_price_protects_the_floor(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin(
        "PUT", "/accounts/main", json={"floor_money": 4 * PRICE_YUAN, "max_price": {"vectorize": PRICE_YUAN}}
    )
    await harness.set_balance(3, 6 * PRICE_YUAN)
    for _ in range(2):
        await harness.run_task()
    tasks, refused = await harness.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {402: 3})
    for task in tasks:
        await harness.wait_for_cost(task)
    assert await harness.upstream_balance() == (0, 4 * PRICE_YUAN)


async def test_unknown_outcome_may_have_taken_the_last_use(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(3, 50)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, reply="reset"),))
    assert (await harness.submit()).status_code == 504
    await harness.control.wait_until_idle()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)


async def test_unknown_outcome_counts_against_the_floor(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 5})
    await harness.set_balance(8, 0)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, reply="reset"),))
    assert (await harness.submit()).status_code == 504
    await harness.control.wait_until_idle()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (5, 0)


async def test_finished_task_took_a_use_without_any_balance(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(4, 50)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(MISSING_BALANCES,))
    for _ in range(2):
        await harness.run_task()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)


async def test_finished_task_took_a_use_without_check_balances(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(5, 50)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(
        faults=(Fault(on="check", wrong={"remaining_count": "missing", "remaining_money": "missing"}),)
    )
    for _ in range(3):
        await harness.run_task()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 50)


async def test_overtaken_prepaid_only_task_pays_no_money(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant("prepaid", spending_mode="count_only")
    prepaid_token = await harness.gateway.new_token("prepaid")
    await harness.set_balance(3, 50)
    for _ in range(2):
        await harness.run_task()
    submits_before = await harness.sandbox.count_submits()
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, latency=1.0),))
    slow = asyncio.create_task(harness.gateway.submit(KIND, token=prepaid_token))
    await harness.control.wait_for_requests(
        lambda seen: sum(item.operation == "submit" for item in seen) == submits_before + 1
    )
    other = await harness.submit()
    prepaid_response = await slow
    assert prepaid_response.status_code == 201
    cost = await harness.wait_for_cost(prepaid_response.json(), token=prepaid_token)
    money_spent = 50 - (await harness.upstream_balance())[1]
    assert cost["money"] == 0
    assert other.status_code == 402
    assert money_spent == 0


async def check_out_of_order(harness: BalanceHarness, number: int) -> None:
    """Run two tasks; check the first after a later balance is known."""
    gateway, watch = harness.gateway, harness.gateway.services.task_poller

    async def checks_after(seconds: float) -> None:
        await gateway.advance(seconds)
        while await watch.start_due():
            pass
        await watch.wait_idle()

    first = await harness.expect_accepted()
    await harness.control.wait_until_idle()
    await checks_after(1.5)
    second = await harness.expect_accepted()
    await harness.control.wait_until_idle()
    await harness.set_behaviour(faults=(Fault(on="check", times=1, reply="page", status=500),))
    await checks_after(1)
    await checks_after(1.5)
    states = [(await gateway.call("GET", f"/v1/tasks/{item['id']}")).json()["state"] for item in (first, second)]
    assert states == ["queued", "succeeded"]
    assert await harness.upstream_balance() == (number, 50)
    await harness.wait_for_cost(first)


async def test_older_check_balance_restores_nothing(harness: BalanceHarness) -> None:
    await harness.set_balance(6, 50)
    for _ in range(2):
        await harness.run_task()
    await check_out_of_order(harness, 2)
    assert await harness.shown_balance() == await harness.upstream_balance()


async def test_older_balance_does_not_unlock_money(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(5, 50)
    for _ in range(2):
        await harness.run_task()
    await check_out_of_order(harness, 1)
    tasks, refused = await harness.submit_concurrently(3)
    for task in tasks:
        await harness.wait_for_cost(task)
    assert (len(tasks), refused) == (1, {402: 2})
    assert await harness.upstream_balance() == (0, 50)


async def test_running_tasks_count_against_the_floor(harness: BalanceHarness) -> None:
    """While the time of charging is unknown, a running task may yet be charged: one use too many stays."""
    await harness.set_behaviour(seconds=3_600)
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 5})
    await harness.set_balance(8, 0)
    accepted = 0
    for _ in range(8):
        accepted += (await harness.submit()).status_code == 201
    assert accepted == (3 if (await harness.control.get_behaviour()).charge == "end" else 2)
