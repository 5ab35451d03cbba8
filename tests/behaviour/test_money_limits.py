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
async def books(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield an account without prepaid uses and with enough money."""
    async with open_balance_harness(valkey) as found:
        await found.set_balance(0, 1_000)
        yield found


async def set_month_limit(books: BalanceHarness, money: float) -> None:
    await books.gateway.put_tenant(limits=[{"window": "month", "money": money}])


async def read_month_money(books: BalanceHarness) -> tuple[float, float, float]:
    """Return used, reserved and remaining yuan of the month."""
    (policy,) = (await books.gateway.call("GET", "/v1/quota")).json()["policies"]
    return policy["used"], policy["reserved"], policy["remaining"]


async def wait_for_costs(books: BalanceHarness, tasks: Sequence[dict[str, Any]]) -> list[float]:
    return [(await books.wait_for_cost(task))["money"] for task in tasks]


async def test_configured_price_is_held(books: BalanceHarness) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await set_month_limit(books, 3 * PRICE_YUAN + 1.99)
    tasks, refused = await books.submit_concurrently(6)
    assert (len(tasks), refused) == (3, {429: 3})
    assert await read_month_money(books) == (0, 3 * PRICE_YUAN, 1.99)
    assert await wait_for_costs(books, tasks) == [PRICE_YUAN] * 3
    assert await read_month_money(books) == (3 * PRICE_YUAN, 0, 1.99)
    expect_problem(await books.submit(), 429, "quota-exceeded")
    assert await books.upstream_balance() == (0, 1_000 - 3 * PRICE_YUAN)


async def test_observed_price_is_held(books: BalanceHarness) -> None:
    for _ in range(2):
        await books.run_task()
    await set_month_limit(books, 5 * PRICE_YUAN)
    assert await read_month_money(books) == (PRICE_YUAN, 0, 4 * PRICE_YUAN)
    tasks, refused = await books.submit_concurrently(8)
    assert (len(tasks), refused) == (4, {429: 4})
    assert await read_month_money(books) == (PRICE_YUAN, 4 * PRICE_YUAN, 0)
    assert await wait_for_costs(books, tasks) == [PRICE_YUAN] * 4
    assert await read_month_money(books) == (5 * PRICE_YUAN, 0, 0)


async def test_prices_are_per_kind(books: BalanceHarness) -> None:
    for _ in range(2):
        await books.run_task()
    await set_month_limit(books, 100)
    assert (await books.submit(kind="upscale")).status_code == 201
    assert await read_month_money(books) == (PRICE_YUAN, 100 - PRICE_YUAN, 0)
    expect_problem(await books.submit(), 429, "quota-exceeded")


async def test_unknown_price_holds_everything_left(books: BalanceHarness) -> None:
    await set_month_limit(books, 100)
    tasks, refused = await books.submit_concurrently(4)
    assert (len(tasks), refused) == (1, {429: 3})
    assert await read_month_money(books) == (0, 100, 0)
    (found,) = (await books.submit()).json()["violated_policies"]
    assert (found["policy"], found["limit"]) == ("month-money", 100)
    await wait_for_costs(books, tasks)
    assert (await read_month_money(books))[1:] == (0, 100)
    assert (await books.run_task())["money"] == PRICE_YUAN
    assert await read_month_money(books) == (PRICE_YUAN, 0, 100 - PRICE_YUAN)


async def test_cost_above_the_hold_is_booked_in_full(books: BalanceHarness) -> None:
    for _ in range(2):
        await books.run_task()
    await set_month_limit(books, 2 * PRICE_YUAN)
    await books.set_behaviour(prices={"vector": 7 * PRICE_YUAN})
    assert await books.run_task() == {"count": 0, "money": 7 * PRICE_YUAN, "basis": "observed"}
    assert await read_month_money(books) == (8 * PRICE_YUAN, 0, 0)
    expect_problem(await books.submit(), 429, "quota-exceeded")
    await set_month_limit(books, 15 * PRICE_YUAN - 0.01)
    expect_problem(await books.submit(), 429, "quota-exceeded")
    await set_month_limit(books, 15 * PRICE_YUAN)
    assert (await books.run_task())["money"] == 7 * PRICE_YUAN
    assert await read_month_money(books) == (15 * PRICE_YUAN, 0, 0)


async def test_prepaid_uses_pass_a_spent_money_limit(books: BalanceHarness) -> None:
    await books.set_balance(4, 1_000)
    await books.run_task()
    await set_month_limit(books, 0)
    tasks, refused = await books.submit_concurrently(5)
    assert (len(tasks), refused) == (3, {429: 2})
    assert await wait_for_costs(books, tasks) == [0] * 3
    assert await read_month_money(books) == (0, 0, 0)
    expect_problem(await books.submit(), 429, "quota-exceeded")
    assert await books.upstream_balance() == (0, 1_000)


async def test_refusal_frees_money_and_unknown_keeps_it(books: BalanceHarness) -> None:
    await books.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
    await set_month_limit(books, 2 * PRICE_YUAN)
    await books.set_behaviour(faults=(Fault(on="submit", times=1, reject="图片太小"),))
    expect_problem(await books.submit(), 502, "upstream-rejected")
    assert await read_month_money(books) == (0, 0, 2 * PRICE_YUAN)
    await books.set_behaviour(faults=(Fault(on="submit", times=1, reply="reset"),))
    expect_problem(await books.submit(), 504, "submission-unknown")
    assert await read_month_money(books) == (PRICE_YUAN, 0, PRICE_YUAN)
    tasks, refused = await books.submit_concurrently(3)
    assert (len(tasks), refused) == (1, {429: 2})


@pytest.mark.parametrize(("charge", "taken"), [("submit", PRICE_YUAN), ("end", 0)])
async def test_failed_task_stays_charged_until_refunded(books: BalanceHarness, charge: str, taken: int) -> None:
    await books.set_behaviour(charge=charge)
    for _ in range(2):
        await books.run_task()
    await set_month_limit(books, 100)
    await books.set_behaviour(faults=(Fault(on="submit", times=1, fail="it could not be done"),))
    assert await books.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "estimated"}
    assert await read_month_money(books) == (2 * PRICE_YUAN, 0, 100 - 2 * PRICE_YUAN)
    assert await books.shown_balance() == await books.upstream_balance() == (0, 1_000 - 2 * PRICE_YUAN - taken)


@pytest.mark.parametrize("checked_balance", ["now", "then"])
async def test_parallel_tasks_are_priced_in_money(valkey: Valkey, checked_balance: str) -> None:
    async with open_balance_harness(valkey, checked_balance=checked_balance) as books:
        await books.set_balance(2, 1_000)
        for _ in range(3):
            await books.run_task()
        await books.set_balance(2, 1_000)
        await books.gateway.advance(1)
        for _ in range(2):
            await books.run_task()
        assert await books.shown_balance() == (0, 1_000)
        tasks, _ = await books.submit_concurrently(3)
        assert [(await books.wait_for_cost(task))["money"] for task in tasks] == [PRICE_YUAN] * 3
