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
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield gateways over upstreams whose checks report the current balance."""
    async with open_balance_harness(valkey, charge=request.param, checked_balance="now") as found:
        yield found


@pytest.fixture
async def known(books: BalanceHarness) -> BalanceHarness:
    """Yield an exhausted account that is known to report current balances."""
    await exhaust_account(books)
    await books.set_balance(1, 0)
    assert await books.run_balance_checks() == 1
    await books.run_task()
    assert (await books.get_account())["state"] == "exhausted"
    return books


async def exhaust_account(books: BalanceHarness) -> None:
    """Spend the balance of the account until a submit is refused."""
    await books.set_balance(2, 0)
    for _ in range(2):
        await books.run_task()
    await books.expect_refused_locally()


async def test_top_up_is_found_by_a_balance_check(books: BalanceHarness) -> None:
    await exhaust_account(books)
    asked = await books.sandbox.count_submits()
    await books.set_balance(3, 0)
    assert await books.run_balance_checks(50) == 0
    assert await books.run_balance_checks(10) == 1
    account = await books.get_account()
    assert (account["state"], account["looks"]) == ("open", True)
    assert await books.shown_balance() == (3, 0)
    assert await books.sandbox.count_submits() == asked
    await books.run_task()


async def test_one_balance_check_per_minute(known: BalanceHarness) -> None:
    asked = await known.sandbox.count_submits()
    for _ in range(3):
        assert await known.run_balance_checks(60) == 1
        for _ in range(5):
            assert await known.run_balance_checks(11) == 0
            await known.expect_refused_locally()
        await known.gateway.advance(5)
    assert await known.sandbox.count_submits() == asked
    assert (await known.get_account())["state"] == "exhausted"


async def test_retry_after_is_the_next_balance_check(known: BalanceHarness) -> None:
    for passed, wait in ((0, 60), (20, 40), (30, 10)):
        await known.gateway.advance(passed)
        assert wait - 3 <= int((await known.expect_refused_locally()).headers["retry-after"]) <= wait
    await known.run_balance_checks(10)
    assert int((await known.expect_refused_locally()).headers["retry-after"]) > 57


async def test_open_account_is_not_checked(books: BalanceHarness) -> None:
    await books.run_task()
    assert await books.run_balance_checks(3_600) == 0


async def test_top_up_of_uses_serves_prepaid_only_tenants(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(purse="count_only")
    await books.set_balance(2, 50)
    for _ in range(2):
        await books.run_task()
    asked = await books.sandbox.count_submits()
    assert await books.run_balance_checks() == 1
    await books.expect_refused_locally()
    await books.set_balance(2, 50)
    assert await books.run_balance_checks() == 1
    assert await books.sandbox.count_submits() == asked
    for _ in range(2):
        await books.run_task()
    assert await books.upstream_balance() == (0, 50)
    assert await books.run_balance_checks(30) == 0
    assert 20 <= int((await books.expect_refused_locally()).headers["retry-after"]) <= 30


async def test_account_near_its_floor_is_checked(books: BalanceHarness) -> None:
    await books.gateway.call_admin(
        "PUT", "/accounts/main", json={"floor_money": 3 * PRICE_YUAN, "max_price": {"vectorize": PRICE_YUAN}}
    )
    await books.set_balance(0, 5 * PRICE_YUAN - 1)
    await books.run_task()
    await books.expect_refused_locally()
    assert await books.upstream_balance() == (0, 4 * PRICE_YUAN - 1)
    await books.set_balance(0, 4 * PRICE_YUAN)
    assert await books.run_balance_checks() == 1
    await books.run_task()
    assert await books.upstream_balance() == (0, 3 * PRICE_YUAN)


@pytest.mark.parametrize("gone", ["upstream", "store"])
async def test_lost_task_is_checked_once_then_probes_resume(known: BalanceHarness, valkey: Valkey, gone: str) -> None:
    if gone == "upstream":
        await known.set_behaviour(faults=(Fault(on="check", refuse="任务未找到或状态未知"),))
    else:
        await forget_tasks(valkey)
    assert await known.run_balance_checks() == (1 if gone == "upstream" else 0)
    assert await known.run_balance_checks() == 0
    await known.set_behaviour(faults=())
    asked = await known.sandbox.count_submits()
    expect_problem(await known.submit(), 402, "balance-exhausted")
    assert await known.sandbox.count_submits() == asked + 1


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
async def test_failed_balance_check_is_repeated(known: BalanceHarness, fault: Fault) -> None:
    await known.set_balance(2, 0)
    await known.set_behaviour(faults=(fault,))
    before = await known.get_account()
    assert await known.run_balance_checks() >= 1
    after = await known.get_account()
    assert after == before | {"look_again_at": after["look_again_at"]}
    await known.expect_refused_locally()
    await known.set_behaviour(faults=())
    await known.run_balance_checks()
    assert await known.shown_balance() == (2, 0)
    await known.run_task()


async def test_probes_resume_after_repeated_failures(known: BalanceHarness) -> None:
    await known.set_behaviour(faults=(Fault(on="check", refuse="系统繁忙"),))
    for _ in range(5):
        await known.expect_refused_locally()
        await known.run_balance_checks()
    await known.gateway.advance(60)
    asked = await known.sandbox.count_submits()
    expect_problem(await known.submit(), 402, "balance-exhausted")
    assert await known.sandbox.count_submits() == asked + 1
    await known.expect_refused_locally()
    await known.set_behaviour(faults=())
    await known.set_balance(1, 0)
    await known.gateway.advance(60)
    await known.run_task()
    await known.gateway.advance(60)
    await known.expect_refused_locally()


async def test_invalid_account_is_not_checked(known: BalanceHarness) -> None:
    await known.gateway.call_admin("POST", "/accounts/main/reopen")
    await known.set_behaviour(faults=(Fault(on="submit", refuse="账户不存在"),))
    expect_problem(await known.submit(), 503, "account-misconfigured")
    assert await known.run_balance_checks(3_600) == 0


async def test_balance_check_while_tasks_run(books: BalanceHarness) -> None:
    await exhaust_account(books)
    await books.set_balance(3, 0)
    await books.run_balance_checks()
    await books.set_behaviour(seconds=3_600)
    taken = [await books.submit() for _ in range(4)]
    assert [answer.status_code for answer in taken] == [201, 201, 201, 402]
    for _ in range(3):
        await books.run_balance_checks()
        await books.expect_refused_locally()


async def test_historic_balances_leave_probing_on(valkey: Valkey) -> None:
    async with open_balance_harness(valkey, checked_balance="then") as books:
        await exhaust_account(books)
        await books.set_balance(3, 0)
        for _ in range(2):
            before = await books.shown_balance()
            await books.run_balance_checks()
            account = await books.get_account()
            assert (account["state"], account["looks"]) == ("exhausted", False)
            assert await books.shown_balance() == before == (0, 0)
        await books.run_task()
        assert await books.shown_balance() == await books.upstream_balance() == (2, 0)
