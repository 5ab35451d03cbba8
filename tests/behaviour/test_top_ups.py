"""Exhausted accounts: probes, top-ups and failover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import KIND, PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.upstream_control import USER_KEY
from tests.support.valkey import Valkey

SPARE_KEY = "upstream-key-spare"


@pytest.fixture
async def harness(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway with a second account `spare`.

    Checks report no current balance, so that only a submission can find a top-up.
    """
    async with open_balance_harness(valkey, checked_balance="then") as opened_harness:
        await opened_harness.set_balance(50, 0, SPARE_KEY)
        response = await opened_harness.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": SPARE_KEY})
        assert response.status_code == 200, response.text
        yield opened_harness


async def read_submit_keys(harness: BalanceHarness) -> list[str]:
    """Return the user keys of all submits, in order."""
    return [request.user_key for request in await harness.control.list_requests() if request.operation == "submit"]


async def exhaust_main(harness: BalanceHarness) -> None:
    await harness.set_balance(1, 0)
    await harness.run_task()
    await harness.expect_refused_locally()


async def test_one_probe_per_minute(harness: BalanceHarness) -> None:
    await exhaust_main(harness)
    for _ in range(3):
        submits_before = await harness.sandbox.count_submits()
        await harness.gateway.advance(50)
        await harness.expect_refused_locally()
        await harness.gateway.advance(10)
        tasks, refused = await harness.submit_concurrently(6)
        assert (tasks, refused) == ([], {402: 6})
        assert await harness.sandbox.count_submits() == submits_before + 1
        assert (await harness.get_account())["state"] == "exhausted"
    await harness.set_balance(5, 0)
    await harness.expect_refused_locally()
    await harness.gateway.advance(60)
    await harness.run_task()
    assert await harness.shown_balance() == (4, 0)
    tasks, refused = await harness.submit_concurrently(5)
    assert (len(tasks), refused) == (4, {402: 1})


async def test_one_probe_for_all_tenants(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant("other")
    other = await harness.gateway.new_token("other")
    await exhaust_main(harness)
    await harness.gateway.advance(60)
    submits_before = await harness.sandbox.count_submits()
    responses = await asyncio.gather(harness.gateway.submit(), harness.gateway.submit(token=other))
    assert [response.status_code for response in responses] == [402, 402]
    assert await harness.sandbox.count_submits() == submits_before + 1


async def test_reopened_without_a_top_up(harness: BalanceHarness) -> None:
    await exhaust_main(harness)
    for _ in range(2):
        submits_before = await harness.sandbox.count_submits()
        response = await harness.gateway.call_admin("POST", "/accounts/main/reopen")
        assert (response.json()["state"], response.json()["remaining_count"]) == ("open", None)
        expect_problem(await harness.submit(), 402, "balance-exhausted")
        assert await harness.sandbox.count_submits() == submits_before + 1
        await harness.expect_refused_locally()
    await harness.set_balance(2, 0)
    await harness.expect_refused_locally()
    await harness.gateway.call_admin("POST", "/accounts/main/reopen")
    assert (await harness.run_task())["money"] == 0
    assert await harness.shown_balance() == await harness.upstream_balance() == (1, 0)


async def test_check_of_a_running_task_finds_the_top_up(harness: BalanceHarness) -> None:
    await harness.set_behaviour(checked_balance="now")
    await harness.set_balance(1, 0)
    running = await harness.expect_accepted()
    await harness.expect_refused_locally()
    await harness.set_balance(3, 0)
    await harness.wait_for_cost(running)
    assert (await harness.get_account())["state"] == "open"
    assert await harness.shown_balance() == (3, 0)
    assert (await harness.submit()).status_code == 201


async def test_money_top_up_serves_money_tenants_only(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant("prepaid", spending_mode="count_only")
    prepaid_token = await harness.gateway.new_token("prepaid")
    await exhaust_main(harness)
    await harness.set_balance(0, 3 * PRICE_YUAN)
    await harness.gateway.advance(60)
    await harness.expect_refused_locally(token=prepaid_token)
    await harness.run_task()
    assert await harness.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "observed"}
    await harness.expect_refused_locally(token=prepaid_token)
    assert await harness.upstream_balance() == (0, PRICE_YUAN)


async def test_accounts_in_order(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.set_balance(2, 0)
    for _ in range(4):
        await harness.run_task()
    assert await read_submit_keys(harness) == [USER_KEY] * 2 + [SPARE_KEY] * 2
    assert (await harness.upstream_balance(), await harness.upstream_balance(SPARE_KEY)) == ((0, 0), (48, 0))
    assert (await harness.shown_balance(), await harness.shown_balance("spare")) == ((0, 0), (48, 0))
    await harness.set_balance(9, 0)
    await harness.gateway.advance(60)
    for _ in range(2):
        await harness.run_task()
    assert (await read_submit_keys(harness))[4:] == [USER_KEY] * 2
    assert await harness.shown_balance() == (7, 0)


async def test_failed_probe_fails_over(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await exhaust_main_with_spare(harness)
    await harness.gateway.advance(60)
    assert (await harness.submit()).status_code == 201
    assert (await read_submit_keys(harness))[-2:] == [USER_KEY, SPARE_KEY]
    counted = await harness.read_policies()
    assert (counted["total-tasks"], counted["max-active"]) == ((3, 0), (2, 0))
    assert [(await harness.get_account(name))["in_flight"] for name in ("main", "spare")] == [0, 2]


async def exhaust_main_with_spare(harness: BalanceHarness) -> None:
    """Exhaust `main` while `spare` can pay."""
    await harness.set_balance(1, 0)
    await harness.run_task()
    assert (await harness.submit()).status_code == 201
    assert (await harness.get_account())["state"] == "exhausted"


async def test_all_accounts_exhausted(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.set_balance(1, 0)
    await harness.set_balance(1, 0, SPARE_KEY)
    await harness.expect_accepted()
    await harness.gateway.advance(30)
    await harness.expect_accepted()
    refused = await harness.expect_refused_locally()
    assert int(refused.headers["retry-after"]) <= 30


async def test_invalid_account_fails_over(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"user_key": "unknown"})
    for _ in range(3):
        await harness.run_task()
        await harness.gateway.advance(86_400)
    assert await read_submit_keys(harness) == ["unknown"] + [SPARE_KEY] * 3
    assert (await harness.get_account())["state"] == "invalid"
    assert (await harness.read_policies())["total-tasks"] == (3, 0)


@pytest.mark.parametrize("cure", ["reopen", "the same key", "a new key"])
async def test_invalid_account_is_not_probed(harness: BalanceHarness, cure: str) -> None:
    await harness.set_behaviour(faults=(Fault(on="submit", times=1, refuse="账户不存在"),))
    refused = expect_problem(await harness.submit(), 503, "account-misconfigured")
    assert "账户" not in str(refused)
    for seconds in (0, 60, 86_400):
        await harness.gateway.advance(seconds)
        response = await harness.submit()
        expect_problem(response, 503, "account-misconfigured")
        assert "retry-after" not in response.headers
    assert await read_submit_keys(harness) == [USER_KEY]
    assert (await harness.get_account())["look_again_at"] is None
    if cure == "reopen":
        await harness.gateway.call_admin("POST", "/accounts/main/reopen")
    else:
        key = USER_KEY if cure == "the same key" else SPARE_KEY
        await harness.gateway.call_admin("PUT", "/accounts/main", json={"user_key": key})
    await harness.run_task()
    assert (await harness.read_policies())["total-tasks"] == (1, 0)


async def test_exhausted_account_outranks_an_invalid_one(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(accounts=["main", "spare"])
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"user_key": "unknown"})
    await harness.set_balance(1, 0, SPARE_KEY)
    await harness.expect_accepted()
    responses = await asyncio.gather(*(harness.gateway.submit(KIND) for _ in range(3)))
    assert {response.status_code for response in responses} == {402}
    assert await read_submit_keys(harness) == ["unknown", SPARE_KEY]
    report: dict[str, Any] = (await harness.gateway.call("GET", "/v1/quota")).json()["account"]
    assert report["can_pay"] is False
    assert report["look_again_at"] is not None
