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


async def read_counts(gateway: RunningGateway) -> tuple[float, float, float]:
    """Return used, reserved and active tasks of `shop`."""
    report = (await gateway.call("GET", "/v1/quota")).json()
    policies = {policy["policy"]: policy for policy in report["policies"]}
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


async def remove_by_force(gateway: RunningGateway, path: str) -> None:
    response = await gateway.call_admin("DELETE", f"{path}?force=true")
    assert response.status_code == 204, response.text


async def read_task(gateway: RunningGateway, task: dict[str, Any]) -> dict[str, Any]:
    response = await gateway.call("GET", task["links"]["self"])
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


async def test_account_removed_with_running_tasks(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    tasks = [(await gateway.submit()).json() for _ in range(2)]
    checks = await gateway.upstream.count_checks()
    await remove_by_force(gateway, "/accounts/main")
    await gateway.poll_due_tasks()
    await gateway.advance(LOST_AFTER_SECONDS - 60)
    await gateway.poll_due_tasks()
    assert [(await read_task(gateway, task))["state"] for task in tasks] == ["queued"] * 2
    assert await read_counts(gateway) == (2, 0, 2)
    expect_problem(await gateway.submit(), 503, "account-misconfigured")
    await gateway.advance(60)
    ended = [await gateway.wait_for_task(task["id"]) for task in tasks]
    assert {(task["state"], task["error"]["code"]) for task in ended} == {("failed", "task-lost")}
    assert {task["cost"]["basis"] for task in ended} <= {"estimated", "unknown"}
    assert [await read_task(gateway, task) for task in tasks] == ended
    assert await read_counts(gateway) == (2, 0, 0)
    assert await gateway.upstream.count_checks() == checks


async def test_lost_task_releases_its_money(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "money": 10}])
    task = (await gateway.submit()).json()

    async def money() -> tuple[float, float]:
        (policy,) = (await gateway.call("GET", "/v1/quota")).json()["policies"]
        return policy["reserved"], policy["remaining"]

    assert await money() == (10, 0)
    await remove_by_force(gateway, "/accounts/main")
    await gateway.poll_due_tasks()
    await gateway.advance(LOST_AFTER_SECONDS)
    assert (await gateway.wait_for_task(task["id"]))["error"]["code"] == "task-lost"
    assert await money() == (0, 10)


async def test_recreated_account_inherits_nothing(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    old = (await gateway.submit()).json()
    await remove_by_force(gateway, "/accounts/main")
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    fresh = (await gateway.call_admin("GET", "/accounts/main")).json()
    assert (fresh["state"], fresh["remaining_count"], fresh["in_flight"]) == ("open", None, 0)
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    new = (await gateway.submit()).json()
    await gateway.poll_due_tasks()
    assert (await gateway.wait_for_task(new["id"]))["state"] == "succeeded"
    assert (await read_task(gateway, old))["state"] == "queued"
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["in_flight"] == 0
    assert await read_counts(gateway) == (2, 0, 1)
    await gateway.advance(LOST_AFTER_SECONDS)
    assert (await gateway.wait_for_task(old["id"]))["error"]["code"] == "task-lost"
    assert await read_counts(gateway) == (2, 0, 0)


async def test_one_of_two_accounts_removed(gateway: RunningGateway) -> None:
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await gateway.put_tenant(accounts=["main", "spare"], limits=[{"window": "total", "tasks": 3}], max_active=3)
    lost = (await gateway.submit()).json()
    await remove_by_force(gateway, "/accounts/main")
    done = (await gateway.submit()).json()
    await gateway.poll_due_tasks()
    assert (await gateway.wait_for_task(done["id"]))["state"] == "succeeded"
    await gateway.advance(LOST_AFTER_SECONDS)
    assert (await gateway.wait_for_task(lost["id"]))["error"]["code"] == "task-lost"
    assert await read_counts(gateway) == (2, 0, 0)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 429, "quota-exceeded")


async def test_tenant_removed_with_running_tasks(gateway: RunningGateway) -> None:
    for _ in range(3):
        assert (await gateway.submit()).status_code == 201
    await remove_by_force(gateway, "/tenants/shop")
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["in_flight"] == 3
    with structlog.testing.capture_logs() as events:
        await gateway.poll_due_tasks()
    assert [event["state"] for event in events if event["event"] == "task.finished"] == ["succeeded"] * 3
    assert {event["log_level"] for event in events} <= {"info", "debug"}
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["in_flight"] == 0
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    gateway.token = await gateway.new_token()
    assert await read_counts(gateway) == (0, 0, 0)
    assert (await gateway.submit()).status_code == 201


async def test_tenant_and_account_removed(gateway: RunningGateway) -> None:
    for _ in range(2):
        assert (await gateway.submit()).status_code == 201
    checks = await gateway.upstream.count_checks()
    await remove_by_force(gateway, "/tenants/shop")
    await remove_by_force(gateway, "/accounts/main")
    with structlog.testing.capture_logs() as events:
        await gateway.poll_due_tasks()
        await gateway.advance(LOST_AFTER_SECONDS)
        await gateway.poll_due_tasks()
    assert [event["state"] for event in events if event["event"] == "task.finished"] == ["failed"] * 2
    assert {event["log_level"] for event in events} <= {"info", "debug"}
    assert await gateway.upstream.count_checks() == checks


@pytest.mark.parametrize("path", ["/tenants/shop", "/accounts/main"])
async def test_removed_while_sending(valkey: Valkey, path: str) -> None:
    async with open_balance_harness(valkey) as harness:
        submission = asyncio.create_task(harness.submit_concurrently(1))
        await harness.control.wait_for_requests(
            lambda requests: any(request.operation == "submit" for request in requests)
        )
        await remove_by_force(harness.gateway, path)
        (task,), _ = await submission
        await harness.gateway.advance(LOST_AFTER_SECONDS)
        with structlog.testing.capture_logs() as events:
            await harness.gateway.poll_due_tasks()
            await harness.gateway.advance(LOST_AFTER_SECONDS)
            await harness.gateway.poll_due_tasks()
        assert [event["event"] for event in events if event["event"] == "task.finished"] == ["task.finished"]
        assert {event["log_level"] for event in events} <= {"info", "debug"}
        assert await harness.sandbox.count_submits() == 1
        if path == "/tenants/shop":
            assert (await harness.get_account())["in_flight"] == 0
        else:
            assert (await harness.gateway.wait_for_task(task["id"]))["error"]["code"] == "task-lost"
            await harness.gateway.call_admin("PUT", "/tenants/shop", json={"accounts": []} | UNREACHABLE_LIMITS)
            assert await read_counts(harness.gateway) == (1, 0, 0)
