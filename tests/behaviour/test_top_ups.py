"""Exhausted and invalid accounts: probes, balance checks, top-ups and failover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from service.sandbox.faults import Fault
from service.storage.redis import Keys
from tests.behaviour.balance_harness import KIND, PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.gateway_fixture import USER_KEY
from tests.behaviour.requests import expect_problem
from tests.support.valkey import Valkey

SPARE_KEY = "upstream-key-spare"
DEAD_ACCOUNT = {"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"}


@pytest.fixture
async def probing(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway whose checks report no current balance: only a submission finds a top-up of `main`.

    There is a second account `spare`, which the tenant does not use.
    """
    async with open_balance_harness(valkey, checked_balance="then") as harness:
        await harness.set_balance(50, 0, SPARE_KEY)
        await harness.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": SPARE_KEY})
        yield harness


@pytest.fixture(params=["submit"])
async def checking(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway over an upstream whose checks report the current balance."""
    async with open_balance_harness(valkey, charge=request.param, checked_balance="now") as harness:
        yield harness


@pytest.fixture
async def checked(checking: BalanceHarness) -> BalanceHarness:
    """Yield an exhausted account that is known to report current balances."""
    await exhaust_account(checking)
    await checking.set_balance(1, 0)
    assert await checking.run_balance_checks() == 1
    await checking.run_task()
    assert (await checking.get_account())["state"] == "exhausted"
    return checking


async def exhaust_account(harness: BalanceHarness, uses: int = 2) -> None:
    """Spend the balance of the account until a submit is refused."""
    await harness.set_balance(uses, 0)
    for _ in range(uses):
        await harness.run_task()
    await harness.expect_refused_locally()


async def expect_failed_probe(harness: BalanceHarness) -> None:
    """Assert that one submission reaches the upstream, which refuses it."""
    submits_before = await harness.sandbox.count_submits()
    expect_problem(await harness.submit(), 402, "balance-exhausted")
    assert await harness.sandbox.count_submits() == submits_before + 1


async def read_submit_keys(harness: BalanceHarness) -> list[str]:
    """Return the user keys of all submits, in order."""
    return [request.user_key for request in await harness.control.list_requests() if request.operation == "submit"]


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
    await probing.set_balance(5, 0)
    await probing.expect_refused_locally()
    await probing.gateway.advance(60)
    await probing.run_task()
    assert await probing.shown_balance() == (4, 0)
    tasks, refused = await probing.submit_concurrently(5)
    assert (len(tasks), refused) == (4, {402: 1})


async def test_reopened_without_a_top_up(probing: BalanceHarness) -> None:
    await exhaust_account(probing, 1)
    response = await probing.gateway.call_admin("POST", "/accounts/main/reopen")
    assert (response.json()["state"], response.json()["remaining_count"]) == ("open", None)
    await expect_failed_probe(probing)
    await probing.set_balance(2, 0)
    await probing.expect_refused_locally()
    await probing.gateway.call_admin("POST", "/accounts/main/reopen")
    assert (await probing.run_task())["money"] == 0
    assert await probing.shown_balance() == await probing.upstream_balance() == (1, 0)


async def test_check_of_a_running_task_opens_and_closes(checking: BalanceHarness) -> None:
    await checking.set_balance(1, 0)
    running = await checking.expect_accepted()
    await checking.expect_refused_locally()
    await checking.set_balance(3, 0)
    await checking.wait_for_cost(running)
    assert (await checking.get_account())["state"] == "open"
    assert await checking.shown_balance() == (3, 0)
    running = await checking.expect_accepted()
    await checking.set_balance(0, 0)
    await checking.wait_for_cost(running)
    await checking.expect_refused_locally()


async def test_money_top_up_serves_money_tenants_only(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant("prepaid", spending_mode="count_only")
    prepaid_token = await probing.gateway.new_token("prepaid")
    await exhaust_account(probing, 1)
    await probing.set_balance(0, 3 * PRICE_YUAN)
    await probing.gateway.advance(60)
    await probing.expect_refused_locally(token=prepaid_token)
    await probing.run_task()
    assert await probing.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "observed"}
    await probing.expect_refused_locally(token=prepaid_token)
    assert await probing.upstream_balance() == (0, PRICE_YUAN)


async def test_accounts_in_order(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant(accounts=["main", "spare"])
    await probing.set_balance(2, 0)
    for _ in range(4):
        await probing.run_task()
    assert await read_submit_keys(probing) == [USER_KEY] * 2 + [SPARE_KEY] * 2
    assert (await probing.upstream_balance(), await probing.upstream_balance(SPARE_KEY)) == ((0, 0), (48, 0))
    assert (await probing.shown_balance(), await probing.shown_balance("spare")) == ((0, 0), (48, 0))
    await probing.set_balance(9, 0)
    await probing.gateway.advance(60)
    for _ in range(2):
        await probing.run_task()
    assert (await read_submit_keys(probing))[4:] == [USER_KEY] * 2
    assert await probing.shown_balance() == (7, 0)


async def test_failed_probe_fails_over(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant(accounts=["main", "spare"], limits=[{"window": "total", "tasks": 3}])
    await probing.set_balance(1, 0)
    await probing.run_task()
    await probing.expect_accepted()
    assert (await probing.get_account())["state"] == "exhausted"
    await probing.gateway.advance(60)
    await probing.expect_accepted()
    assert await read_submit_keys(probing) == [USER_KEY, SPARE_KEY, USER_KEY, SPARE_KEY]
    expect_problem(await probing.submit(), 429, "quota-exceeded")
    counted = await probing.read_policies()
    assert (counted["total-tasks"], counted["max-active"]) == ((3, 0), (2, 0))
    assert [(await probing.get_account(name))["in_flight"] for name in ("main", "spare")] == [0, 2]


async def test_unreachable_account_fails_over(probing: BalanceHarness) -> None:
    await probing.gateway.call_admin("PUT", "/accounts/dead", json=DEAD_ACCOUNT)
    await probing.gateway.put_tenant(accounts=["dead"])
    refused = await probing.submit()
    expect_problem(refused, 503, "upstream-unavailable")
    assert refused.headers["retry-after"]
    await probing.gateway.put_tenant(accounts=["dead", "main"])
    await probing.run_task()
    assert (await probing.read_policies())["total-tasks"] == (1, 0)


async def test_invalid_account_is_not_probed(probing: BalanceHarness) -> None:
    for method, path, body in (
        ("POST", "/accounts/main/reopen", {}),
        ("PUT", "/accounts/main", {"user_key": USER_KEY}),
        ("PUT", "/accounts/main", {"user_key": SPARE_KEY}),
    ):
        await probing.set_behaviour(faults=(Fault(on="submit", times=1, refuse="账户不存在"),))
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
    assert (await probing.read_policies())["total-tasks"] == (3, 0)


async def test_exhausted_account_outranks_an_invalid_one(probing: BalanceHarness) -> None:
    await probing.gateway.put_tenant(accounts=["main", "spare"])
    await probing.gateway.call_admin("PUT", "/accounts/main", json={"user_key": "unknown"})
    await probing.set_balance(1, 0, SPARE_KEY)
    await probing.expect_accepted()
    responses = await asyncio.gather(*(probing.gateway.submit(KIND) for _ in range(3)))
    assert {response.status_code for response in responses} == {402}
    assert await read_submit_keys(probing) == ["unknown", SPARE_KEY]
    assert [(await probing.get_account(name))["state"] for name in ("main", "spare")] == ["invalid", "exhausted"]
    report: dict[str, Any] = (await probing.gateway.call("GET", "/v1/quota")).json()["account"]
    assert report["can_pay"] is False
    assert report["look_again_at"] is not None


@pytest.mark.parametrize("checking", ["submit", "end"], indirect=True)
async def test_top_up_is_found_by_a_balance_check(checking: BalanceHarness) -> None:
    await exhaust_account(checking)
    submits_before = await checking.sandbox.count_submits()
    await checking.set_balance(3, 0)
    assert await checking.run_balance_checks(50) == 0
    assert await checking.run_balance_checks(10) == 1
    account = await checking.get_account()
    assert (account["state"], account["live_balance_checks"]) == ("open", True)
    assert await checking.shown_balance() == (3, 0)
    assert await checking.sandbox.count_submits() == submits_before
    await checking.run_task()
    assert await checking.run_balance_checks(3_600) == 0


async def test_one_balance_check_per_minute(checked: BalanceHarness) -> None:
    submits_before = await checked.sandbox.count_submits()
    for _ in range(2):
        assert await checked.run_balance_checks(60) == 1
        for passed in (11, 22, 33, 44):
            assert await checked.run_balance_checks(11) == 0
            refused = await checked.expect_refused_locally()
            assert 57 - passed <= int(refused.headers["retry-after"]) <= 60 - passed
        await checked.gateway.advance(16)
    assert await checked.sandbox.count_submits() == submits_before
    assert (await checked.get_account())["state"] == "exhausted"


async def test_top_up_of_uses_serves_prepaid_only_tenants(checking: BalanceHarness) -> None:
    await checking.gateway.put_tenant(spending_mode="count_only")
    await checking.set_balance(2, 50)
    for _ in range(2):
        await checking.run_task()
    submits_before = await checking.sandbox.count_submits()
    assert await checking.run_balance_checks() == 1
    await checking.expect_refused_locally()
    await checking.set_balance(2, 50)
    assert await checking.run_balance_checks() == 1
    assert await checking.sandbox.count_submits() == submits_before
    for _ in range(2):
        await checking.run_task()
    assert await checking.upstream_balance() == (0, 50)
    assert await checking.run_balance_checks(30) == 0
    assert 20 <= int((await checking.expect_refused_locally()).headers["retry-after"]) <= 30


@pytest.mark.parametrize(("lost_by", "checks"), [("upstream", 1), ("store", 0)])
async def test_lost_task_is_checked_once_then_probes_resume(
    checked: BalanceHarness, valkey: Valkey, lost_by: str, checks: int
) -> None:
    if lost_by == "upstream":
        await checked.set_behaviour(faults=(Fault(on="check", refuse="任务未找到或状态未知"),))
    else:
        async with Redis.from_url(valkey.url) as client:
            await client.delete(*[key async for key in client.scan_iter(match=Keys("gw").task("*"))])
    assert await checked.run_balance_checks() == checks
    assert await checked.run_balance_checks() == 0
    await checked.set_behaviour(faults=())
    await expect_failed_probe(checked)


async def test_failed_balance_check_is_repeated(checked: BalanceHarness) -> None:
    await checked.set_balance(2, 0)
    before = await checked.get_account()
    for fault in (
        Fault(on="check", reply="reset"),
        Fault(on="check", reply="page", status=503),
        Fault(on="check", refuse="系统繁忙"),
    ):
        await checked.set_behaviour(faults=(fault,))
        assert await checked.run_balance_checks() >= 1
        after = await checked.get_account()
        assert after == before | {"look_again_at": after["look_again_at"]}
        await checked.expect_refused_locally()
    await checked.set_behaviour(faults=())
    await checked.run_balance_checks()
    assert await checked.shown_balance() == (2, 0)
    await checked.run_task()


async def test_probes_resume_after_repeated_failures(checked: BalanceHarness) -> None:
    await checked.set_behaviour(faults=(Fault(on="check", refuse="系统繁忙"),))
    for _ in range(5):
        await checked.expect_refused_locally()
        await checked.run_balance_checks()
    await checked.gateway.advance(60)
    await expect_failed_probe(checked)
    await checked.expect_refused_locally()
    await checked.set_behaviour(faults=())
    await checked.set_balance(1, 0)
    await checked.gateway.advance(60)
    await checked.run_task()
    await checked.gateway.advance(60)
    await checked.expect_refused_locally()
