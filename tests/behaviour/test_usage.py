"""Usage reports match the windows."""

from __future__ import annotations

from collections import Counter
from datetime import date
from typing import Any

from service.storage.connections import connect
from service.storage.redis import Keys
from service.usecases.ports import SubmitOutcome
from tests.behaviour.audit import UNREACHABLE_POLICIES, expect_problem
from tests.behaviour.balance_harness import PRICE_YUAN, open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.upstream_control import USER_KEY
from tests.behaviour.usage_requests import (
    NO_SUBMISSIONS,
    advance_to_next_window,
    expect_json,
    post_refund,
    read_all_usage,
    read_charged_today,
    read_usage,
    read_windows,
    recover_task,
    run_task,
    submission_id_of,
    submit_and_lose_response,
)
from tests.support.valkey import Valkey


def count_outcomes(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    """Return non-zero submission counts by period, kind and outcome."""
    return {
        (each["period"], each["kind"]): {name: number for name, number in each["tasks"].items() if number}
        for each in found["items"]
    }


async def test_every_outcome_is_counted_once(house: RunningGateway) -> None:
    assert (await read_usage(house))["items"] == []
    today = (await read_usage(house))["to"]
    await run_task(house)
    await house.upstream.fail_next_task()
    await run_task(house)
    await house.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    expect_problem(await house.submit("seamless"), 502, "upstream-rejected")
    await house.call_admin("PUT", "/accounts/dead", json={"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"})
    await house.put_tenant(accounts=["dead"])
    await house.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    expect_problem(await house.submit("seamless"), 503, "upstream-unavailable")
    await house.put_tenant()
    name = await submit_and_lose_response(house, "vectorize")
    await house.submit()
    found = await read_usage(house)
    assert count_outcomes(found) == {
        (today, "vectorize"): {"unknown": 1},
        (today, "face-enhance"): {"running": 1, "succeeded": 1, "failed": 1},
        (today, "seamless"): {"refused": 1, "not_sent": 1},
    }
    assert found["total"]["tasks"] == dict.fromkeys(NO_SUBMISSIONS, 1)
    assert found["total"]["charged"]["tasks"] == 4
    assert found["unknown_submissions"] == [{"id": name, "kind": "vectorize", "day": today}]
    await recover_task(house, name)
    found = await read_usage(house)
    assert count_outcomes(found)[today, "vectorize"] == {"succeeded": 1}
    assert found["unknown_submissions"] == []


async def test_usage_equals_the_windows(house: RunningGateway) -> None:
    await house.put_tenant(**UNREACHABLE_POLICIES)
    tasks = [await read_charged_today(house)]
    task = await run_task(house)
    tasks.append(await read_charged_today(house))
    await house.upstream.fail_next_task()
    await run_task(house)
    tasks.append(await read_charged_today(house))
    name = await submit_and_lose_response(house)
    tasks.append(await read_charged_today(house))
    await recover_task(house, name)
    tasks.append(await read_charged_today(house))
    expect_json(await post_refund(house, task=task["id"], reason="x"), 201)
    tasks.append(await read_charged_today(house))
    expect_json(await post_refund(house, submission=await submit_and_lose_response(house, "seamless"), reason="y"), 201)
    tasks.append(await read_charged_today(house))
    await house.upstream.keep_running()
    await house.submit()
    tasks.append(await read_charged_today(house))
    assert [number for number, _ in tasks] == [0, 1, 2, 3, 3, 2, 2, 3]


async def test_uses_and_money_add_up(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as books:
        house = books.gateway
        await books.set_balance(2, 100)
        await house.put_tenant(**UNREACHABLE_POLICIES)
        for _ in range(4):
            await books.run_task()
        spent = (await read_usage(house))["total"]["spent"]
        assert spent["observed"] == {"count": 1, "money": 2 * PRICE_YUAN}
        assert spent["estimated"] == {"count": 1, "money": 0}
        count, money = await books.upstream_balance()
        assert (2 - count, 100 - money) == (2, 2 * PRICE_YUAN)
        assert await read_charged_today(house) == (4, 2 * PRICE_YUAN)


async def test_overrun_is_reported(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as books:
        house = books.gateway
        await books.set_balance(0, 100)
        await books.run_task()
        await books.run_task()
        spent = (await read_usage(house))["total"]["charged"]["money"]
        await house.put_tenant(limits=[{"window": "total", "money": spent + PRICE_YUAN + 0.99, "tasks": 9}])
        await books.set_behaviour(prices={"vector": PRICE_YUAN + 1})
        await books.run_task()
        policies = expect_json(await house.call("GET", "/v1/quota"))["policies"]
        assert {each["policy"]: each["overrun"] for each in policies} == {"total-tasks": None, "total-money": 0.01}
        assert expect_json(await house.call_admin("GET", "/tenants/shop"))["policies"] == policies


async def test_unexplained_spending_is_no_tenants(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as books:
        await books.set_balance(20, 100)
        for _ in range(2):
            await books.run_task()
        assert (await books.get_account())["unexplained"] == {"count": 0, "money": 0}
        await books.set_balance(15, 100)
        await books.run_task()
        assert (await books.get_account())["unexplained"] == {"count": 3, "money": 0}
        assert (await read_usage(books.gateway))["total"]["charged"] == {"tasks": 3, "money": 0}


async def test_months_and_totals(house: RunningGateway) -> None:
    first = await advance_to_next_window(house, "month")
    await run_task(house)
    second = await advance_to_next_window(house)
    await run_task(house)
    await run_task(house, "seamless")
    third = await advance_to_next_window(house, "month")
    await run_task(house)
    assert count_outcomes(await read_usage(house)) == {(str(third), "face-enhance"): {"succeeded": 1}}
    assert (await read_usage(house))["from"] == (await read_usage(house))["to"] == str(third)
    since = f"from={first}"
    assert Counter(each["period"] for each in (await read_usage(house, since))["items"]) == {
        str(first): 1,
        str(second): 2,
        str(third): 1,
    }
    by_month = await read_usage(house, f"{since}&interval=month&group_by=none")
    assert [(each["period"], each["charged"]["tasks"]) for each in by_month["items"]] == [
        (f"{first:%Y-%m}", 3),
        (f"{third:%Y-%m}", 1),
    ]
    assert {each["kind"] for each in by_month["items"]} == {None}
    (whole,) = (await read_usage(house, f"{since}&interval=total&group_by=none"))["items"]
    assert (whole["period"], whole["charged"]["tasks"]) == (f"{first}/{third}", 4)
    (only,) = (await read_usage(house, f"{since}&to={first}&interval=month"))["items"]
    assert only["charged"]["tasks"] == 1
    in_its_month = await read_usage(house, f"to={second}")
    assert (in_its_month["from"], in_its_month["total"]["charged"]["tasks"]) == (str(first), 3)
    for query in (since, f"{since}&interval=month", f"{since}&interval=total", f"{since}&group_by=none"):
        found = await read_usage(house, query)
        assert sum(each["charged"]["tasks"] for each in found["items"]) == found["total"]["charged"]["tasks"] == 4
    assert await read_windows(house) == {"day": (1, 0), "month": (1, 0), "total": (4, 0)}


async def test_submission_belongs_to_the_day_of_its_creation(house: RunningGateway) -> None:
    before = await advance_to_next_window(house)
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    name = await submit_and_lose_response(house, "seamless")
    await advance_to_next_window(house)
    found = await read_usage(house, f"from={before}")
    expected = {(str(before), "face-enhance"): {"running": 1}, (str(before), "seamless"): {"unknown": 1}}
    assert count_outcomes(found) == expected
    assert found["unknown_submissions"][0] == {"id": name, "kind": "seamless", "day": str(before)}
    assert task["created_at"][:10] == str(before)


async def test_usage_of_all_tenants(house: RunningGateway) -> None:
    await house.put_tenant("other")
    other = await house.new_token("other")
    await run_task(house)
    await run_task(house, token=other)
    await run_task(house, "seamless", token=other)
    known = house.services.registry.current.tenants
    found = (await read_all_usage(house))["items"]
    assert [(each["tenant"], each["tenant_id"], each["kind"]) for each in found] == [
        ("other", known["other"].id, "face-enhance"),
        ("other", known["other"].id, "seamless"),
        ("shop", known["shop"].id, "face-enhance"),
    ]
    found = (await read_all_usage(house, "group_by=tenant"))["items"]
    assert [(each["tenant"], each["kind"], each["charged"]["tasks"]) for each in found] == [
        ("other", None, 2),
        ("shop", None, 1),
    ]
    found = (await read_all_usage(house, "group_by=kind"))["items"]
    assert [(each["tenant_id"], each["kind"], each["charged"]["tasks"]) for each in found] == [
        (None, "face-enhance", 2),
        (None, "seamless", 1),
    ]
    filtered = await read_all_usage(house, "tenant=other&group_by=kind")
    mine = await read_usage(house, token=other)
    for report in (filtered, mine):
        assert report["total"]["charged"]["tasks"] == 2
    assert [{**each, "tenant": None, "tenant_id": None} for each in mine["items"]] == filtered["items"]
    assert "tenant" not in str(mine)
    assert (await read_usage(house))["total"]["charged"]["tasks"] == 1
    await submit_and_lose_response(house)
    await house.upstream.lose_next_response()
    assert (await house.submit(token=other)).status_code == 504
    assert [each["tenant"] for each in (await read_all_usage(house))["unknown_submissions"]] == ["other", "shop"]
    assert len((await read_usage(house))["unknown_submissions"]) == 1


async def test_usage_of_deleted_tenants(house: RunningGateway) -> None:
    await run_task(house)
    name = await submit_and_lose_response(house)
    old = house.services.registry.current.tenants["shop"].id
    before = await read_all_usage(house)
    await house.call_admin("DELETE", "/tenants/shop")
    assert await read_all_usage(house) == before
    await house.put_tenant()
    house.token = await house.new_token()
    assert (await read_usage(house))["total"]["charged"]["tasks"] == 0
    await run_task(house)
    new = house.services.registry.current.tenants["shop"].id
    found = await read_all_usage(house, "tenant=shop")
    assert [(each["tenant_id"], each["charged"]["tasks"]) for each in found["items"]] == [(old, 2), (new, 1)]
    assert found["total"]["charged"]["tasks"] == 3
    (unknown,) = found["unknown_submissions"]
    assert (unknown["id"], unknown["tenant"], unknown["tenant_id"]) == (name, "shop", old)


async def test_usage_of_a_tenant_deleted_while_running(house: RunningGateway) -> None:
    task = (await house.submit()).json()
    await house.call_admin("DELETE", "/tenants/shop?force=true")
    await house.poll_due_tasks()
    (row,) = (await read_all_usage(house))["items"]
    assert (row["tenant"], row["tasks"]["succeeded"]) == ("shop", 1)
    told = expect_json(await house.call_admin("GET", f"/submissions/{submission_id_of(house, task)}"))
    assert (told["tenant"], told["task"]["state"]) == ("shop", "succeeded")


async def test_kept_for_13_months(house: RunningGateway) -> None:
    day = await advance_to_next_window(house)
    await run_task(house)
    await house.advance(396 * 86_400)
    found = await read_usage(house, f"from={day}&interval=total")
    assert [each["charged"]["tasks"] for each in found["items"]] == [1]


async def test_stored_for_13_months(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as books:
        await books.run_task()
        today = (date.fromisoformat((await read_usage(books.gateway))["to"]) - date(1970, 1, 1)).days
        tenant = books.gateway.services.registry.current.tenants["shop"].id
        connections = connect(valkey.url, timeout=5)
        try:
            client: Any = connections.commands
            left = await client.pttl(Keys("gw").usage(tenant, today))
        finally:
            await connections.aclose()
        assert 396 * 86_400_000 < left <= 401 * 86_400_000
