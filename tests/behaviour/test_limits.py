"""Limits are exact at every size and under concurrent changes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway

MAX_COUNT, MAX_YUAN = 10**12, 10**10
OVERSIZED_NUMBERS = (MAX_COUNT + 1, 2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, 10**400)

BODIES_BY_FIELD: Mapping[str, tuple[str, Any]] = {
    "tasks": ("limits[0].tasks", lambda value: {"limits": [{"window": "total", "tasks": value}]}),
    "money": ("limits[0].money", lambda value: {"limits": [{"window": "total", "money": value}]}),
    "max_active": ("max_active", lambda value: {"max_active": value}),
}


async def read_policies(gateway: RunningGateway) -> dict[str, dict[str, Any]]:
    report = (await gateway.call("GET", "/v1/quota")).json()
    return {policy["policy"]: policy for policy in report["policies"]}


async def submit_concurrently(gateway: RunningGateway, number: int) -> Counter[int]:
    responses = await asyncio.gather(*(gateway.submit() for _ in range(number)))
    return Counter(response.status_code for response in responses)


@pytest.mark.parametrize("name", BODIES_BY_FIELD)
async def test_oversized_limit_is_refused(gateway: RunningGateway, name: str) -> None:
    field, policy = BODIES_BY_FIELD[name]
    for value in (*OVERSIZED_NUMBERS, -1, -(2**53), -(10**30)):
        response = await gateway.call_admin("PUT", "/tenants/shop", json={"accounts": ["main"]} | policy(value))
        document = expect_problem(response, 422, "invalid-options")
        assert [error["field"] for error in document["errors"]] == [field], value
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["policies"] == []


async def test_largest_limits_are_exact(gateway: RunningGateway) -> None:
    largest = {"window": "total", "tasks": MAX_COUNT, "money": MAX_YUAN}
    finest = {"window": "month", "tasks": MAX_COUNT - 1, "money": MAX_YUAN - 0.01}
    await gateway.put_tenant(limits=[largest, finest], max_active=MAX_COUNT)
    response = await gateway.submit()
    assert response.headers["ratelimit-policy"].startswith(
        f'"total-tasks";q={MAX_COUNT}, "month-tasks";q={MAX_COUNT - 1};'
    )
    assert response.headers["ratelimit"].startswith(
        f'"total-tasks";r={MAX_COUNT - 1}, "month-tasks";r={MAX_COUNT - 2};'
    )
    policies = await read_policies(gateway)
    assert {name: item["limit"] - item["remaining"] for name, item in policies.items() if "tasks" in name} == {
        "total-tasks": 1,
        "month-tasks": 1,
    }
    assert (policies["max-active"]["limit"], policies["max-active"]["remaining"]) == (MAX_COUNT, MAX_COUNT - 1)
    assert (policies["total-money"]["limit"], policies["month-money"]["limit"]) == (MAX_YUAN, MAX_YUAN - 0.01)
    await gateway.wait_for_task(response.json()["id"])
    assert (await gateway.submit()).status_code == 201
    policies = await read_policies(gateway)
    assert (policies["total-tasks"]["remaining"], policies["total-money"]["reserved"]) == (MAX_COUNT - 2, 0)


async def test_lowered_and_raised_limit(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 4}])
    assert await submit_concurrently(gateway, 6) == {201: 4, 429: 2}
    for limit in (3, 0):
        await gateway.put_tenant(limits=[{"window": "month", "tasks": limit}])
        assert await submit_concurrently(gateway, 3) == {429: 3}
        month = (await read_policies(gateway))["month-tasks"]
        assert (month["limit"], month["used"], month["reserved"], month["remaining"]) == (limit, 4, 0, 0)
        refused = await gateway.submit()
        assert refused.headers["ratelimit"].startswith('"month-tasks";r=0;t=')
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 4}])
    assert await submit_concurrently(gateway, 2) == {429: 2}
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 7}])
    assert await submit_concurrently(gateway, 6) == {201: 3, 429: 3}
    assert await gateway.upstream.count_submits() == 7


async def test_lowered_limit_holds_until_the_reset(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    await gateway.put_tenant(limits=[{"window": "hour", "tasks": 5}])
    assert await submit_concurrently(gateway, 4) == {201: 4}
    await gateway.put_tenant(limits=[{"window": "hour", "tasks": 2}])
    refused = await gateway.submit()
    expect_problem(refused, 429, "quota-exceeded")
    await gateway.advance(int(refused.headers["retry-after"]))
    assert await submit_concurrently(gateway, 4) == {201: 2, 429: 2}


async def test_new_limit_counts_earlier_use(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    assert await submit_concurrently(gateway, 3) == {201: 3}
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 5}, {"window": "total", "tasks": 6}])
    assert await submit_concurrently(gateway, 4) == {201: 2, 429: 2}


async def test_lowered_max_active_blocks_until_tasks_end(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    running = [(await gateway.submit()).json() for _ in range(3)]
    await gateway.put_tenant(max_active=2)
    active = (await read_policies(gateway))["max-active"]
    assert (active["limit"], active["used"], active["remaining"]) == (2, 3, 0)
    expect_problem(await gateway.submit(), 429, "too-many-active-tasks")
    await gateway.put_tenant(max_active=5)
    assert await submit_concurrently(gateway, 4) == {201: 2, 429: 2}
    for task in running:
        await gateway.wait_for_task(task["id"])
    await gateway.put_tenant(max_active=2)
    assert await submit_concurrently(gateway, 4) == {201: 2, 429: 2}


async def test_limit_changed_during_concurrent_submits(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 3}])

    async def change() -> None:
        for limit in (1, 4, 0, 3, 5, 2):
            await gateway.put_tenant(limits=[{"window": "day", "tasks": limit}])

    statuses, _ = await asyncio.gather(submit_concurrently(gateway, 20), change())
    day = (await read_policies(gateway))["day-tasks"]
    assert set(statuses) <= {201, 429}
    assert statuses[201] == day["used"] == await gateway.upstream.count_submits() <= 5
    assert (day["reserved"], day["remaining"]) == (0, max(2 - statuses[201], 0))
