"""Missing, malformed, huge and inconsistent balances."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.sandbox.faults import Fault, Field, FieldDefect
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.support.valkey import Valkey

UNUSABLE_VALUES: tuple[FieldDefect, ...] = ("missing", "null", "negative")
BALANCE_FIELDS: tuple[Field, ...] = ("remaining_count", "remaining_money")
MAX_MONEY_YUAN = 2**53 // 100
"""In yuan; in fen it is the largest integer that JSON readers and Lua represent exactly."""


@pytest.fixture
async def harness(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Yield a gateway that knows 20 uses and 50 yuan."""
    async with open_balance_harness(valkey) as opened_harness:
        await opened_harness.set_balance(21, 50)
        await opened_harness.run_task()
        assert await opened_harness.shown_balance() == (20, 50)
        yield opened_harness


async def corrupt_balances(
    harness: BalanceHarness, count: FieldDefect | None = None, money: FieldDefect | None = None
) -> None:
    """Corrupt uses or money in every response from now on."""
    ways = {field: way for field, way in zip(BALANCE_FIELDS, (count, money), strict=True) if way}
    await harness.set_behaviour(faults=(Fault(wrong=ways),))


@pytest.mark.parametrize("way", UNUSABLE_VALUES)
async def test_invalid_balance_keeps_the_last_valid_one(harness: BalanceHarness, way: FieldDefect) -> None:
    await corrupt_balances(harness, count=way)
    await harness.run_task()
    assert await harness.shown_balance() == (20, 50)
    await corrupt_balances(harness, money=way)
    await harness.run_task()
    assert await harness.shown_balance() == (18, 50)
    await corrupt_balances(harness, count=way, money=way)
    await harness.set_balance(30, 7)
    await harness.run_task()
    assert await harness.shown_balance() == (18, 50)
    assert (await harness.get_account())["state"] == "open"
    await corrupt_balances(harness)
    await harness.run_task()
    assert await harness.shown_balance() == await harness.upstream_balance() == (28, 7)
    assert (await harness.read_policies())["total-tasks"] == (5, 0)


async def test_balances_as_strings(harness: BalanceHarness) -> None:
    await corrupt_balances(harness, count="string", money="string")
    assert await harness.run_task() == {"count": 1, "money": 0, "basis": "observed"}
    await harness.set_balance(0, 50)
    await harness.run_task()
    assert await harness.run_task() == {"count": 0, "money": PRICE_YUAN, "basis": "observed"}
    assert await harness.shown_balance() == await harness.upstream_balance() == (0, 50 - 2 * PRICE_YUAN)


async def test_fractional_balances(harness: BalanceHarness) -> None:
    """A fraction of a use is invalid; a fraction of a yuan is not."""
    await corrupt_balances(harness, count="float", money="float")
    await harness.run_task()
    assert await harness.shown_balance() == (20, 50.5)
    assert (await harness.get_account())["state"] == "open"


async def test_upstream_without_balances(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        await corrupt_balances(harness, count="missing", money="missing")
        for _ in range(2):
            assert await harness.run_task() == {"count": 0, "money": 0, "basis": "unknown"}
        tasks, refused = await harness.submit_concurrently(3)
        assert (len(tasks), refused) == (3, {})
        account = await harness.get_account()
        assert (account["state"], account["remaining_count"], account["remaining_money"]) == ("open", None, None)
        for task in tasks:
            await harness.wait_for_cost(task)
        assert (await harness.read_policies())["total-money"] == (0, 0)
        await harness.gateway.put_tenant(spending_mode="count_only")
        tasks, refused = await harness.submit_concurrently(3)
        assert (len(tasks), refused) == (1, {402: 2})
        assert await harness.wait_for_cost(tasks[0]) == {"count": 0, "money": 0, "basis": "unknown"}


async def test_upstream_with_one_kind_of_balance(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        await harness.set_balance(1, 50)
        await corrupt_balances(harness, money="missing")
        for _ in range(3):
            await harness.run_task()
        account = await harness.get_account()
        assert (account["state"], account["remaining_count"]["value"], account["remaining_money"]) == ("open", 0, None)
        await corrupt_balances(harness, count="missing")
        await harness.run_task()
        assert await harness.shown_balance() == await harness.upstream_balance() == (0, 50 - 3 * PRICE_YUAN)


async def test_huge_balances_are_exact(harness: BalanceHarness) -> None:
    price = 12_345_678_901
    await harness.set_behaviour(prices={"vector": price})
    await harness.set_balance(0, MAX_MONEY_YUAN)
    await harness.run_task()
    assert await harness.run_task() == {"count": 0, "money": price, "basis": "observed"}
    assert await harness.shown_balance() == await harness.upstream_balance() == (0, MAX_MONEY_YUAN - 2 * price)
    await harness.gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": 10**10}})
    before = await harness.shown_balance()
    await harness.set_balance(2**60, 2**60)
    await harness.run_task()
    assert await harness.shown_balance() == before
    await harness.set_balance(2**53 - 1, MAX_MONEY_YUAN)
    await harness.run_task()
    assert await harness.shown_balance() == (2**53 - 2, MAX_MONEY_YUAN)


async def test_zero_balance_closes_and_top_up_reopens(harness: BalanceHarness) -> None:
    running = await harness.expect_accepted()
    await harness.set_balance(0, 0)
    await harness.wait_for_cost(running)
    await harness.expect_refused_locally()
    await harness.set_balance(4, 0)
    await harness.gateway.advance(60)
    await harness.run_task()
    assert await harness.shown_balance() == (3, 0)


async def randomize_upstream(harness: BalanceHarness, chance: random.Random) -> None:
    """Change the upstream's balance and behaviour at random."""
    ways: tuple[FieldDefect, ...] = (*UNUSABLE_VALUES, "string", "float")
    spoiled = {field: chance.choice(ways) for field in BALANCE_FIELDS if chance.random() < 0.4}
    await harness.set_behaviour(
        charge=chance.choice(("submit", "end")),
        checked_balance=chance.choice(("now", "then")),
        faults=(Fault(on=chance.choice(("submit", "check", None)), wrong=spoiled),),
    )
    if chance.random() < 0.5:
        await harness.set_balance(chance.randrange(6), chance.randrange(12))


@pytest.mark.parametrize("seed", range(4))
async def test_random_balances(harness: BalanceHarness, seed: int) -> None:
    chance = random.Random(seed)
    tasks: list[dict[str, Any]] = []
    for _ in range(8):
        await randomize_upstream(harness, chance)
        accepted, refused = await harness.submit_concurrently(chance.randrange(1, 4))
        assert set(refused) <= {402}
        tasks += accepted
        await harness.gateway.advance(chance.choice((1, 61)))
        await harness.gateway.poll_due_tasks()
    ended = [await harness.gateway.wait_for_task(task["id"]) for task in tasks]
    assert {task["state"] for task in ended} == {"succeeded"}
    costs = [task["cost"] for task in ended]
    assert all((cost["count"], cost["money"]) == (1, 0) or cost["count"] == 0 <= cost["money"] for cost in costs)

    await harness.set_behaviour(faults=())
    await harness.set_balance(9, 9)
    await harness.gateway.advance(60)
    costs.append(await harness.run_task())
    assert await harness.shown_balance() == await harness.upstream_balance() == (8, 9)
    counted = await harness.read_policies()
    assert counted["total-tasks"] == (len(costs) + 1, 0)
    assert counted["total-money"] == (sum(cost["money"] for cost in costs), 0)
    assert counted["max-active"] == (0, 0)
    assert (await harness.get_account())["in_flight"] == 0
