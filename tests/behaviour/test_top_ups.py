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
async def books(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway with a second account `spare`.

    Checks report no current balance, so that only a submission can find a top-up.
    """
    async with open_balance_harness(valkey, checked_balance="then") as found:
        await found.set_balance(50, 0, SPARE_KEY)
        answer = await found.gateway.call_admin("PUT", "/accounts/spare", json={"user_key": SPARE_KEY})
        assert answer.status_code == 200, answer.text
        yield found


async def read_submit_keys(books: BalanceHarness) -> list[str]:
    """Return the user keys of all submits, in order."""
    return [each.user_key for each in await books.control.list_requests() if each.operation == "submit"]


async def exhaust_main(books: BalanceHarness) -> None:
    await books.set_balance(1, 0)
    await books.run_task()
    await books.expect_refused_locally()


async def test_one_probe_per_minute(books: BalanceHarness) -> None:
    await exhaust_main(books)
    for _ in range(3):
        asked = await books.sandbox.count_submits()
        await books.gateway.advance(50)
        await books.expect_refused_locally()
        await books.gateway.advance(10)
        tasks, refused = await books.submit_concurrently(6)
        assert (tasks, refused) == ([], {402: 6})
        assert await books.sandbox.count_submits() == asked + 1
        assert (await books.get_account())["state"] == "exhausted"
    await books.set_balance(5, 0)
    await books.expect_refused_locally()
    await books.gateway.advance(60)
    await books.run_task()
    assert await books.shown_balance() == (4, 0)
    tasks, refused = await books.submit_concurrently(5)
    assert (len(tasks), refused) == (4, {402: 1})


async def test_one_probe_for_all_tenants(books: BalanceHarness) -> None:
    await books.gateway.put_tenant("other")
    other = await books.gateway.new_token("other")
    await exhaust_main(books)
    await books.gateway.advance(60)
    asked = await books.sandbox.count_submits()
    answers = await asyncio.gather(books.gateway.submit(), books.gateway.submit(token=other))
    assert [answer.status_code for answer in answers] == [402, 402]
    assert await books.sandbox.count_submits() == asked + 1


async def test_reopened_without_a_top_up(books: BalanceHarness) -> None:
    await exhaust_main(books)
    for _ in range(2):
        asked = await books.sandbox.count_submits()
        answer = await books.gateway.call_admin("POST", "/accounts/main/reopen")
        assert (answer.json()["state"], answer.json()["remaining_count"]) == ("open", None)
        expect_problem(await books.submit(), 402, "balance-exhausted")
        assert await books.sandbox.count_submits() == asked + 1
        await books.expect_refused_locally()
    await books.set_balance(2, 0)
    await books.expect_refused_locally()
    await books.gateway.call_admin("POST", "/accounts/main/reopen")
    assert (await books.run_task())["money"] == 0
    assert await books.shown_balance() == await books.upstream_balance() == (1, 0)


async def test_check_of_a_running_task_finds_the_top_up(books: BalanceHarness) -> None:
    await books.set_behaviour(checked_balance="now")
    await books.set_balance(1, 0)
    running = await books.expect_accepted()
    await books.expect_refused_locally()
    await books.set_balance(3, 0)
    await books.wait_for_cost(running)
    assert (await books.get_account())["state"] == "open"
    assert await books.shown_balance() == (3, 0)
    assert (await books.submit()).status_code == 201


async def test_money_top_up_serves_money_tenants_only(books: BalanceHarness) -> None:
    await books.gateway.put_tenant("thrifty", purse="count_only")
    thrifty = await books.gateway.new_token("thrifty")
    await exhaust_main(books)
    await books.set_balance(0, 3 * PRICE_YUAN)
    await books.gateway.advance(60)
    await books.expect_refused_locally(token=thrifty)
    await books.run_task()
    assert await books.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "observed"}
    await books.expect_refused_locally(token=thrifty)
    assert await books.upstream_balance() == (0, PRICE_YUAN)


async def test_accounts_in_order(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await books.set_balance(2, 0)
    for _ in range(4):
        await books.run_task()
    assert await read_submit_keys(books) == [USER_KEY] * 2 + [SPARE_KEY] * 2
    assert (await books.upstream_balance(), await books.upstream_balance(SPARE_KEY)) == ((0, 0), (48, 0))
    assert (await books.shown_balance(), await books.shown_balance("spare")) == ((0, 0), (48, 0))
    await books.set_balance(9, 0)
    await books.gateway.advance(60)
    for _ in range(2):
        await books.run_task()
    assert (await read_submit_keys(books))[4:] == [USER_KEY] * 2
    assert await books.shown_balance() == (7, 0)


async def test_failed_probe_fails_over(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await exhaust_main_with_spare(books)
    await books.gateway.advance(60)
    assert (await books.submit()).status_code == 201
    assert (await read_submit_keys(books))[-2:] == [USER_KEY, SPARE_KEY]
    counted = await books.read_policies()
    assert (counted["total-tasks"], counted["max-active"]) == ((3, 0), (2, 0))
    assert [(await books.get_account(name))["in_flight"] for name in ("main", "spare")] == [0, 2]


async def exhaust_main_with_spare(books: BalanceHarness) -> None:
    """Exhaust `main` while `spare` can pay."""
    await books.set_balance(1, 0)
    await books.run_task()
    assert (await books.submit()).status_code == 201
    assert (await books.get_account())["state"] == "exhausted"


async def test_all_accounts_exhausted(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await books.set_balance(1, 0)
    await books.set_balance(1, 0, SPARE_KEY)
    await books.expect_accepted()
    await books.gateway.advance(30)
    await books.expect_accepted()
    refused = await books.expect_refused_locally()
    assert int(refused.headers["retry-after"]) <= 30


async def test_invalid_account_fails_over(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await books.gateway.call_admin("PUT", "/accounts/main", json={"user_key": "nobody"})
    for _ in range(3):
        await books.run_task()
        await books.gateway.advance(86_400)
    assert await read_submit_keys(books) == ["nobody"] + [SPARE_KEY] * 3
    assert (await books.get_account())["state"] == "invalid"
    assert (await books.read_policies())["total-tasks"] == (3, 0)


@pytest.mark.parametrize("cure", ["reopen", "the same key", "a new key"])
async def test_invalid_account_is_not_probed(books: BalanceHarness, cure: str) -> None:
    await books.set_behaviour(faults=(Fault(on="submit", times=1, refuse="账户不存在"),))
    refused = expect_problem(await books.submit(), 503, "account-misconfigured")
    assert "账户" not in str(refused)
    for seconds in (0, 60, 86_400):
        await books.gateway.advance(seconds)
        answer = await books.submit()
        expect_problem(answer, 503, "account-misconfigured")
        assert "retry-after" not in answer.headers
    assert await read_submit_keys(books) == [USER_KEY]
    assert (await books.get_account())["look_again_at"] is None
    if cure == "reopen":
        await books.gateway.call_admin("POST", "/accounts/main/reopen")
    else:
        key = USER_KEY if cure == "the same key" else SPARE_KEY
        await books.gateway.call_admin("PUT", "/accounts/main", json={"user_key": key})
    await books.run_task()
    assert (await books.read_policies())["total-tasks"] == (1, 0)


async def test_exhausted_account_outranks_an_invalid_one(books: BalanceHarness) -> None:
    await books.gateway.put_tenant(accounts=["main", "spare"])
    await books.gateway.call_admin("PUT", "/accounts/main", json={"user_key": "nobody"})
    await books.set_balance(1, 0, SPARE_KEY)
    await books.expect_accepted()
    answers = await asyncio.gather(*(books.gateway.submit(KIND) for _ in range(3)))
    assert {answer.status_code for answer in answers} == {402}
    assert await read_submit_keys(books) == ["nobody", SPARE_KEY]
    report: dict[str, Any] = (await books.gateway.call("GET", "/v1/quota")).json()["account"]
    assert report["can_pay"] is False
    assert report["look_again_at"] is not None
