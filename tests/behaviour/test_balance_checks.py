"""Balance checks of exhausted accounts by checking a finished task again."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.faults import Fault
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey


@pytest.fixture(params=["submit", "end"])
async def harness(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield gateways over upstreams whose checks report the current balance."""
    async with open_balance_harness(valkey, charge=request.param, checked_balance="now") as opened_harness:
        yield opened_harness


@pytest.fixture
async def detected_harness(harness: BalanceHarness) -> BalanceHarness:
    """Yield an exhausted account that is known to report current balances."""
    await exhaust_account(harness)
    await harness.set_balance(1, 0)
    assert await harness.run_balance_checks() == 1
    await harness.run_task()
    assert (await harness.get_account())["state"] == "exhausted"
    return harness


async def exhaust_account(harness: BalanceHarness) -> None:
    """Spend the balance of the account until a submit is refused."""
    await harness.set_balance(2, 0)
    for _ in range(2):
        await harness.run_task()
    await harness.expect_refused_locally()


async def test_top_up_is_found_by_a_balance_check(harness: BalanceHarness) -> None:
    await exhaust_account(harness)
    submits_before = await harness.sandbox.count_submits()
    await harness.set_balance(3, 0)
    assert await harness.run_balance_checks(50) == 0
    assert await harness.run_balance_checks(10) == 1
    account = await harness.get_account()
    assert (account["state"], account["live_balance_checks"]) == ("open", True)
    assert await harness.shown_balance() == (3, 0)
    assert await harness.sandbox.count_submits() == submits_before
    await harness.run_task()


async def test_one_balance_check_per_minute(detected_harness: BalanceHarness) -> None:
    submits_before = await detected_harness.sandbox.count_submits()
    for _ in range(3):
        assert await detected_harness.run_balance_checks(60) == 1
        for _ in range(5):
            assert await detected_harness.run_balance_checks(11) == 0
            await detected_harness.expect_refused_locally()
        await detected_harness.gateway.advance(5)
    assert await detected_harness.sandbox.count_submits() == submits_before
    assert (await detected_harness.get_account())["state"] == "exhausted"


async def test_retry_after_is_the_next_balance_check(detected_harness: BalanceHarness) -> None:
    for passed, wait in ((0, 60), (20, 40), (30, 10)):
        await detected_harness.gateway.advance(passed)
        assert wait - 3 <= int((await detected_harness.expect_refused_locally()).headers["retry-after"]) <= wait
    await detected_harness.run_balance_checks(10)
    assert int((await detected_harness.expect_refused_locally()).headers["retry-after"]) > 57


async def test_open_account_is_not_checked(harness: BalanceHarness) -> None:
    await harness.run_task()
    assert await harness.run_balance_checks(3_600) == 0


async def test_top_up_of_uses_serves_prepaid_only_tenants(harness: BalanceHarness) -> None:
    await harness.gateway.put_tenant(spending_mode="count_only")
    await harness.set_balance(2, 50)
    for _ in range(2):
        await harness.run_task()
    submits_before = await harness.sandbox.count_submits()
    assert await harness.run_balance_checks() == 1
    await harness.expect_refused_locally()
    await harness.set_balance(2, 50)
    assert await harness.run_balance_checks() == 1
    assert await harness.sandbox.count_submits() == submits_before
    for _ in range(2):
        await harness.run_task()
    assert await harness.upstream_balance() == (0, 50)
    assert await harness.run_balance_checks(30) == 0
    assert 20 <= int((await harness.expect_refused_locally()).headers["retry-after"]) <= 30


async def test_account_near_its_floor_is_checked(harness: BalanceHarness) -> None:
    await harness.gateway.call_admin(
        "PUT", "/accounts/main", json={"floor_money": 3 * PRICE_YUAN, "max_price": {"vectorize": PRICE_YUAN}}
    )
    await harness.set_balance(0, 5 * PRICE_YUAN - 1)
    await harness.run_task()
    await harness.expect_refused_locally()
    assert await harness.upstream_balance() == (0, 4 * PRICE_YUAN - 1)
    await harness.set_balance(0, 4 * PRICE_YUAN)
    assert await harness.run_balance_checks() == 1
    await harness.run_task()
    assert await harness.upstream_balance() == (0, 3 * PRICE_YUAN)


@pytest.mark.parametrize("lost_by", ["upstream", "store"])
async def test_lost_task_is_checked_once_then_probes_resume(
    detected_harness: BalanceHarness, valkey: Valkey, lost_by: str
) -> None:
    if lost_by == "upstream":
        await detected_harness.set_behaviour(faults=(Fault(on="check", refuse="任务未找到或状态未知"),))
    else:
        await forget_tasks(valkey)
    assert await detected_harness.run_balance_checks() == (1 if lost_by == "upstream" else 0)
    assert await detected_harness.run_balance_checks() == 0
    await detected_harness.set_behaviour(faults=())
    submits_before = await detected_harness.sandbox.count_submits()
    expect_problem(await detected_harness.submit(), 402, "balance-exhausted")
    assert await detected_harness.sandbox.count_submits() == submits_before + 1


async def forget_tasks(valkey: Valkey) -> None:
    """Delete all tasks from Redis."""
    connections = connect(valkey.url, timeout=5)
    try:
        async for key in connections.commands.scan_iter(match=Keys("gw").task("*")):
            await connections.commands.delete(key)
    finally:
        await connections.aclose()


UNUSABLE_RESPONSES = [
    Fault(on="check", reply="reset"),
    Fault(on="check", reply="page", status=503),
    Fault(on="check", refuse="系统繁忙"),
]


@pytest.mark.parametrize("fault", UNUSABLE_RESPONSES, ids=["reset", "page", "refused"])
async def test_failed_balance_check_is_repeated(detected_harness: BalanceHarness, fault: Fault) -> None:
    await detected_harness.set_balance(2, 0)
    await detected_harness.set_behaviour(faults=(fault,))
    before = await detected_harness.get_account()
    assert await detected_harness.run_balance_checks() >= 1
    after = await detected_harness.get_account()
    assert after == before | {"look_again_at": after["look_again_at"]}
    await detected_harness.expect_refused_locally()
    await detected_harness.set_behaviour(faults=())
    await detected_harness.run_balance_checks()
    assert await detected_harness.shown_balance() == (2, 0)
    await detected_harness.run_task()


async def test_probes_resume_after_repeated_failures(detected_harness: BalanceHarness) -> None:
    await detected_harness.set_behaviour(faults=(Fault(on="check", refuse="系统繁忙"),))
    for _ in range(5):
        await detected_harness.expect_refused_locally()
        await detected_harness.run_balance_checks()
    await detected_harness.gateway.advance(60)
    submits_before = await detected_harness.sandbox.count_submits()
    expect_problem(await detected_harness.submit(), 402, "balance-exhausted")
    assert await detected_harness.sandbox.count_submits() == submits_before + 1
    await detected_harness.expect_refused_locally()
    await detected_harness.set_behaviour(faults=())
    await detected_harness.set_balance(1, 0)
    await detected_harness.gateway.advance(60)
    await detected_harness.run_task()
    await detected_harness.gateway.advance(60)
    await detected_harness.expect_refused_locally()


async def test_invalid_account_is_not_checked(detected_harness: BalanceHarness) -> None:
    await detected_harness.gateway.call_admin("POST", "/accounts/main/reopen")
    await detected_harness.set_behaviour(faults=(Fault(on="submit", refuse="账户不存在"),))
    expect_problem(await detected_harness.submit(), 503, "account-misconfigured")
    assert await detected_harness.run_balance_checks(3_600) == 0


async def test_balance_check_while_tasks_run(harness: BalanceHarness) -> None:
    await exhaust_account(harness)
    await harness.set_balance(3, 0)
    await harness.run_balance_checks()
    await harness.set_behaviour(seconds=3_600)
    responses = [await harness.submit() for _ in range(4)]
    assert [item.status_code for item in responses] == [201, 201, 201, 402]
    for _ in range(3):
        await harness.run_balance_checks()
        await harness.expect_refused_locally()


async def test_historic_balances_leave_probing_on(valkey: Valkey) -> None:
    async with open_balance_harness(valkey, checked_balance="then") as harness:
        await exhaust_account(harness)
        await harness.set_balance(3, 0)
        for _ in range(2):
            before = await harness.shown_balance()
            await harness.run_balance_checks()
            account = await harness.get_account()
            assert (account["state"], account["live_balance_checks"]) == ("exhausted", False)
            assert await harness.shown_balance() == before == (0, 0)
        await harness.run_task()
        assert await harness.shown_balance() == await harness.upstream_balance() == (2, 0)
