"""Forced removals release every reservation."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.upstream_control import USER_KEY
from tests.support.valkey import Valkey

UNREACHABLE_LIMITS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 1_000}], "max_active": 1_000}
LOST_AFTER_SECONDS = 1_800
"""Seconds after which a task that cannot be checked is given up."""


async def read_counts(house: RunningGateway) -> tuple[float, float, float]:
    """Return used, reserved and active tasks of `shop`."""
    report = (await house.call("GET", "/v1/quota")).json()
    policies = {each["policy"]: each for each in report["policies"]}
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


async def remove_by_force(house: RunningGateway, path: str) -> None:
    answer = await house.call_admin("DELETE", f"{path}?force=true")
    assert answer.status_code == 204, answer.text


async def read_task(house: RunningGateway, task: dict[str, Any]) -> dict[str, Any]:
    answer = await house.call("GET", task["links"]["self"])
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_account_removed_with_running_tasks(house: RunningGateway) -> None:
    await house.put_tenant(**UNREACHABLE_LIMITS)
    tasks = [(await house.submit()).json() for _ in range(2)]
    checks = await house.upstream.count_checks()
    await remove_by_force(house, "/accounts/main")
    await house.poll_due_tasks()
    await house.advance(LOST_AFTER_SECONDS - 60)
    await house.poll_due_tasks()
    assert [(await read_task(house, task))["state"] for task in tasks] == ["queued"] * 2
    assert await read_counts(house) == (2, 0, 2)
    expect_problem(await house.submit(), 503, "account-misconfigured")
    await house.advance(60)
    ended = [await house.wait_for_task(task["id"]) for task in tasks]
    assert {(task["state"], task["error"]["code"]) for task in ended} == {("failed", "task-lost")}
    assert {task["cost"]["basis"] for task in ended} <= {"estimated", "unknown"}
    assert [await read_task(house, task) for task in tasks] == ended
    assert await read_counts(house) == (2, 0, 0)
    assert await house.upstream.count_checks() == checks


async def test_lost_task_releases_its_money(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "total", "money": 10}])
    task = (await house.submit()).json()

    async def money() -> tuple[float, float]:
        (policy,) = (await house.call("GET", "/v1/quota")).json()["policies"]
        return policy["reserved"], policy["remaining"]

    assert await money() == (10, 0)
    await remove_by_force(house, "/accounts/main")
    await house.poll_due_tasks()
    await house.advance(LOST_AFTER_SECONDS)
    assert (await house.wait_for_task(task["id"]))["error"]["code"] == "task-lost"
    assert await money() == (0, 10)


async def test_recreated_account_inherits_nothing(house: RunningGateway) -> None:
    await house.put_tenant(**UNREACHABLE_LIMITS)
    old = (await house.submit()).json()
    await remove_by_force(house, "/accounts/main")
    await house.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    fresh = (await house.call_admin("GET", "/accounts/main")).json()
    assert (fresh["state"], fresh["remaining_count"], fresh["in_flight"]) == ("open", None, 0)
    await house.put_tenant(**UNREACHABLE_LIMITS)
    new = (await house.submit()).json()
    await house.poll_due_tasks()
    assert (await house.wait_for_task(new["id"]))["state"] == "succeeded"
    assert (await read_task(house, old))["state"] == "queued"
    assert (await house.call_admin("GET", "/accounts/main")).json()["in_flight"] == 0
    assert await read_counts(house) == (2, 0, 1)
    await house.advance(LOST_AFTER_SECONDS)
    assert (await house.wait_for_task(old["id"]))["error"]["code"] == "task-lost"
    assert await read_counts(house) == (2, 0, 0)


async def test_one_of_two_accounts_removed(house: RunningGateway) -> None:
    await house.call_admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await house.put_tenant(accounts=["main", "spare"], limits=[{"window": "total", "tasks": 3}], max_active=3)
    lost = (await house.submit()).json()
    await remove_by_force(house, "/accounts/main")
    done = (await house.submit()).json()
    await house.poll_due_tasks()
    assert (await house.wait_for_task(done["id"]))["state"] == "succeeded"
    await house.advance(LOST_AFTER_SECONDS)
    assert (await house.wait_for_task(lost["id"]))["error"]["code"] == "task-lost"
    assert await read_counts(house) == (2, 0, 0)
    assert (await house.submit()).status_code == 201
    expect_problem(await house.submit(), 429, "quota-exceeded")


async def test_tenant_removed_with_running_tasks(house: RunningGateway) -> None:
    for _ in range(3):
        assert (await house.submit()).status_code == 201
    await remove_by_force(house, "/tenants/shop")
    assert (await house.call_admin("GET", "/accounts/main")).json()["in_flight"] == 3
    with structlog.testing.capture_logs() as events:
        await house.poll_due_tasks()
    assert [each["state"] for each in events if each["event"] == "task.finished"] == ["succeeded"] * 3
    assert {each["log_level"] for each in events} <= {"info", "debug"}
    assert (await house.call_admin("GET", "/accounts/main")).json()["in_flight"] == 0
    await house.put_tenant(**UNREACHABLE_LIMITS)
    house.token = await house.new_token()
    assert await read_counts(house) == (0, 0, 0)
    assert (await house.submit()).status_code == 201


async def test_tenant_and_account_removed(house: RunningGateway) -> None:
    for _ in range(2):
        assert (await house.submit()).status_code == 201
    checks = await house.upstream.count_checks()
    await remove_by_force(house, "/tenants/shop")
    await remove_by_force(house, "/accounts/main")
    with structlog.testing.capture_logs() as events:
        await house.poll_due_tasks()
        await house.advance(LOST_AFTER_SECONDS)
        await house.poll_due_tasks()
    assert [each["state"] for each in events if each["event"] == "task.finished"] == ["failed"] * 2
    assert {each["log_level"] for each in events} <= {"info", "debug"}
    assert await house.upstream.count_checks() == checks


@pytest.mark.parametrize("path", ["/tenants/shop", "/accounts/main"])
async def test_removed_while_sending(valkey: Valkey, path: str) -> None:
    async with open_balance_harness(valkey) as books:
        asked = asyncio.create_task(books.submit_concurrently(1))
        await books.control.wait_for_requests(lambda seen: any(each.operation == "submit" for each in seen))
        await remove_by_force(books.gateway, path)
        (task,), _ = await asked
        await books.gateway.advance(LOST_AFTER_SECONDS)
        with structlog.testing.capture_logs() as events:
            await books.gateway.poll_due_tasks()
            await books.gateway.advance(LOST_AFTER_SECONDS)
            await books.gateway.poll_due_tasks()
        assert [each["event"] for each in events if each["event"] == "task.finished"] == ["task.finished"]
        assert {each["log_level"] for each in events} <= {"info", "debug"}
        assert await books.sandbox.count_submits() == 1
        if path == "/tenants/shop":
            assert (await books.get_account())["in_flight"] == 0
        else:
            assert (await books.gateway.wait_for_task(task["id"]))["error"]["code"] == "task-lost"
            await books.gateway.call_admin("PUT", "/tenants/shop", json={"accounts": []} | UNREACHABLE_LIMITS)
            assert await read_counts(books.gateway) == (1, 0, 0)
