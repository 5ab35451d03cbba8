"""Accounts and tenants that are removed by force leave no place held, no task out of sight, and nothing uncounted."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from tests.behaviour.aftermath import problem
from tests.behaviour.books import opened_books
from tests.behaviour.house import House
from tests.behaviour.upstreams import USER_KEY
from tests.support.valkey import Valkey

BOUNDLESS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 1_000}], "max_active": 1_000}
PATIENCE = 1_800
"""Seconds after which a task is given up that nobody can tell anything of."""


async def counted(house: House) -> tuple[float, float, float]:
    """Of all tasks of `shop`: counted and held; and how many are active."""
    report = (await house.call("GET", "/v1/quota")).json()
    policies = {each["policy"]: each for each in report["policies"]}
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


async def removed(house: House, path: str) -> None:
    """Remove by force."""
    answer = await house.admin("DELETE", f"{path}?force=true")
    assert answer.status_code == 204, answer.text


async def read(house: House, task: dict[str, Any]) -> dict[str, Any]:
    """A task as it is read, which it has to be."""
    answer = await house.call("GET", task["links"]["self"])
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_account_removed_under_its_tasks(house: House) -> None:
    """Tasks of a removed account can be read until they are given up as lost; they stay charged and hold no place."""
    await house.put_tenant(**BOUNDLESS)
    tasks = [(await house.submit()).json() for _ in range(2)]
    checks = await house.upstream.checks()
    await removed(house, "/accounts/main")
    await house.watch()
    await house.advance(PATIENCE - 60)
    await house.watch()
    assert [(await read(house, task))["state"] for task in tasks] == ["queued"] * 2
    assert await counted(house) == (2, 0, 2)
    problem(await house.submit(), 503, "account-misconfigured")
    await house.advance(60)
    ended = [await house.finished(task["id"]) for task in tasks]
    assert {(task["state"], task["error"]["code"]) for task in ended} == {("failed", "task-lost")}
    assert {task["cost"]["basis"] for task in ended} <= {"estimated", "unknown"}
    assert [await read(house, task) for task in tasks] == ended
    assert await counted(house) == (2, 0, 0)
    assert await house.upstream.checks() == checks


async def test_money_held_for_a_lost_task(house: House) -> None:
    """The money that a task of a removed account holds, all there is while no price is known, is free in the end."""
    await house.put_tenant(limits=[{"window": "total", "money": 10}])
    task = (await house.submit()).json()

    async def money() -> tuple[float, float]:
        (policy,) = (await house.call("GET", "/v1/quota")).json()["policies"]
        return policy["reserved"], policy["remaining"]

    assert await money() == (10, 0)
    await removed(house, "/accounts/main")
    await house.watch()
    await house.advance(PATIENCE)
    assert (await house.finished(task["id"]))["error"]["code"] == "task-lost"
    assert await money() == (0, 10)


async def test_account_removed_and_made_anew(house: House) -> None:
    """An account that is given the name of a removed one knows nothing of its balance, and has none of its tasks."""
    await house.put_tenant(**BOUNDLESS)
    old = (await house.submit()).json()
    await removed(house, "/accounts/main")
    await house.admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    fresh = (await house.admin("GET", "/accounts/main")).json()
    assert (fresh["state"], fresh["remaining_count"], fresh["in_flight"]) == ("open", None, 0)
    await house.put_tenant(**BOUNDLESS)
    new = (await house.submit()).json()
    await house.watch()
    assert (await house.finished(new["id"]))["state"] == "succeeded"
    assert (await read(house, old))["state"] == "queued"
    assert (await house.admin("GET", "/accounts/main")).json()["in_flight"] == 0
    assert await counted(house) == (2, 0, 1)
    await house.advance(PATIENCE)
    assert (await house.finished(old["id"]))["error"]["code"] == "task-lost"
    assert await counted(house) == (2, 0, 0)


async def test_one_of_two_accounts_removed(house: House) -> None:
    """A tenant goes on with the account that is left, while its tasks on the removed one run out."""
    await house.admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await house.put_tenant(accounts=["main", "spare"], limits=[{"window": "total", "tasks": 3}], max_active=3)
    lost = (await house.submit()).json()
    await removed(house, "/accounts/main")
    done = (await house.submit()).json()
    await house.watch()
    assert (await house.finished(done["id"]))["state"] == "succeeded"
    await house.advance(PATIENCE)
    assert (await house.finished(lost["id"]))["error"]["code"] == "task-lost"
    assert await counted(house) == (2, 0, 0)
    assert (await house.submit()).status_code == 201
    problem(await house.submit(), 429, "quota-exceeded")


async def test_tenant_removed_under_its_tasks(house: House) -> None:
    """The tasks of a removed tenant are watched to their end, after which its account has nothing open."""
    for _ in range(3):
        assert (await house.submit()).status_code == 201
    await removed(house, "/tenants/shop")
    assert (await house.admin("GET", "/accounts/main")).json()["in_flight"] == 3
    with structlog.testing.capture_logs() as events:
        await house.watch()
    assert [each["state"] for each in events if each["event"] == "task.ended"] == ["succeeded"] * 3
    assert {each["log_level"] for each in events} <= {"info", "debug"}
    assert (await house.admin("GET", "/accounts/main")).json()["in_flight"] == 0
    await house.put_tenant(**BOUNDLESS)
    house.token = await house.new_token()
    assert await counted(house) == (0, 0, 0)
    assert (await house.submit()).status_code == 201


async def test_both_removed(house: House) -> None:
    """Where tenant and account are both gone their tasks run out all the same, and nothing fails over them."""
    for _ in range(2):
        assert (await house.submit()).status_code == 201
    checks = await house.upstream.checks()
    await removed(house, "/tenants/shop")
    await removed(house, "/accounts/main")
    with structlog.testing.capture_logs() as events:
        await house.watch()
        await house.advance(PATIENCE)
        await house.watch()
    assert [each["state"] for each in events if each["event"] == "task.ended"] == ["failed"] * 2
    assert {each["log_level"] for each in events} <= {"info", "debug"}
    assert await house.upstream.checks() == checks


@pytest.mark.parametrize("path", ["/tenants/shop", "/accounts/main"])
async def test_removed_while_sending(valkey: Valkey, path: str) -> None:
    """A submission that is on its way when its tenant or account is removed is sent once, answered, and lets go."""
    async with opened_books(valkey) as books:
        asked = asyncio.create_task(books.at_once(1))
        await books.control.until(lambda seen: any(each.operation == "submit" for each in seen))
        await removed(books.house, path)
        (task,), _ = await asked
        await books.house.advance(PATIENCE)
        with structlog.testing.capture_logs() as events:
            await books.house.watch()
            await books.house.advance(PATIENCE)
            await books.house.watch()
        assert [each["event"] for each in events if each["event"] == "task.ended"] == ["task.ended"]
        assert {each["log_level"] for each in events} <= {"info", "debug"}
        assert await books.sandbox.submits() == 1
        if path == "/tenants/shop":
            assert (await books.account())["in_flight"] == 0
        else:
            assert (await books.house.finished(task["id"]))["error"]["code"] == "task-lost"
            await books.house.admin("PUT", "/tenants/shop", json={"accounts": []} | BOUNDLESS)
            assert await counted(books.house) == (1, 0, 0)
