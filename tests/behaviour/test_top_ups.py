"""Exhausted and invalid accounts: probes, balance checks, top-ups and failover."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.behaviour.balance_harness import BalanceHarness, open_balance_harness
from tests.behaviour.gateway_fixture import USER_KEY
from tests.behaviour.requests import expect_json, expect_problem, use_unreachable_account
from tests.support.valkey import Valkey

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
