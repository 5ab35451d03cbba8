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


def count_outcomes(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    """Return non-zero submission counts by period, kind and outcome."""
    return {
        (item["period"], item["kind"]): {name: number for name, number in item["tasks"].items() if number}
        for item in report["items"]
    }


async def test_every_outcome_is_counted_once(gateway: RunningGateway) -> None:
    assert (await read_usage(gateway))["items"] == []
    today = (await read_usage(gateway))["to"]
    await run_task(gateway)
    await gateway.upstream.fail_next_task()
    await run_task(gateway)
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    expect_problem(await gateway.submit("seamless"), 502, "upstream-rejected")
    await gateway.call_admin("PUT", "/accounts/dead", json={"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"})
    await gateway.put_tenant(accounts=["dead"])
    await gateway.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    expect_problem(await gateway.submit("seamless"), 503, "upstream-unavailable")
    await gateway.put_tenant()
    name = await submit_and_lose_response(gateway, "vectorize")
    await gateway.submit()
    usage = await read_usage(gateway)
    assert count_outcomes(usage) == {
        (today, "vectorize"): {"unknown": 1},
        (today, "face-enhance"): {"running": 1, "succeeded": 1, "failed": 1},
        (today, "seamless"): {"refused": 1, "not_sent": 1},
    }
    assert usage["total"]["tasks"] == dict.fromkeys(NO_SUBMISSIONS, 1)
    assert usage["total"]["charged"]["tasks"] == 4
    assert usage["unknown_submissions"] == [{"id": name, "kind": "vectorize", "day": today}]
    await recover_task(gateway, name)
    usage = await read_usage(gateway)
    assert count_outcomes(usage)[today, "vectorize"] == {"succeeded": 1}
    assert usage["unknown_submissions"] == []


async def test_usage_equals_the_windows(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    tasks = [await read_charged_today(gateway)]
    task = await run_task(gateway)
    tasks.append(await read_charged_today(gateway))
    await gateway.upstream.fail_next_task()
    await run_task(gateway)
    tasks.append(await read_charged_today(gateway))
    name = await submit_and_lose_response(gateway)
    tasks.append(await read_charged_today(gateway))
    await recover_task(gateway, name)
    tasks.append(await read_charged_today(gateway))
    expect_json(await post_refund(gateway, task=task["id"], reason="x"), 201)
    tasks.append(await read_charged_today(gateway))
    expect_json(
        await post_refund(gateway, submission=await submit_and_lose_response(gateway, "seamless"), reason="y"), 201
    )
    tasks.append(await read_charged_today(gateway))
    await gateway.upstream.keep_running()
    await gateway.submit()
    tasks.append(await read_charged_today(gateway))
    assert [number for number, _ in tasks] == [0, 1, 2, 3, 3, 2, 2, 3]


async def test_uses_and_money_add_up(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.set_balance(2, 100)
        await gateway.put_tenant(**UNREACHABLE_POLICIES)
        for _ in range(4):
            await harness.run_task()
        spending = (await read_usage(gateway))["total"]["spent"]
        assert spending["observed"] == {"count": 1, "money": 2 * PRICE_YUAN}
        assert spending["estimated"] == {"count": 1, "money": 0}
        count, money = await harness.upstream_balance()
        assert (2 - count, 100 - money) == (2, 2 * PRICE_YUAN)
        assert await read_charged_today(gateway) == (4, 2 * PRICE_YUAN)


async def test_overrun_is_reported(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.set_balance(0, 100)
        await harness.run_task()
        await harness.run_task()
        charged_money = (await read_usage(gateway))["total"]["charged"]["money"]
        await gateway.put_tenant(limits=[{"window": "total", "money": charged_money + PRICE_YUAN + 0.99, "tasks": 9}])
        await harness.set_behaviour(prices={"vector": PRICE_YUAN + 1})
        await harness.run_task()
        policies = expect_json(await gateway.call("GET", "/v1/quota"))["policies"]
        assert {policy["policy"]: policy["overrun"] for policy in policies} == {
            "total-tasks": None,
            "total-money": 0.01,
        }
        assert expect_json(await gateway.call_admin("GET", "/tenants/shop"))["policies"] == policies


async def test_unexplained_spending_is_no_tenants(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        await harness.set_balance(20, 100)
        for _ in range(2):
            await harness.run_task()
        assert (await harness.get_account())["unexplained"] == {"count": 0, "money": 0}
        await harness.set_balance(15, 100)
        await harness.run_task()
        assert (await harness.get_account())["unexplained"] == {"count": 3, "money": 0}
        assert (await read_usage(harness.gateway))["total"]["charged"] == {"tasks": 3, "money": 0}


async def test_months_and_totals(gateway: RunningGateway) -> None:
    first = await advance_to_next_window(gateway, "month")
    await run_task(gateway)
    second = await advance_to_next_window(gateway)
    await run_task(gateway)
    await run_task(gateway, "seamless")
    third = await advance_to_next_window(gateway, "month")
    await run_task(gateway)
    assert count_outcomes(await read_usage(gateway)) == {(str(third), "face-enhance"): {"succeeded": 1}}
    assert (await read_usage(gateway))["from"] == (await read_usage(gateway))["to"] == str(third)
    since = f"from={first}"
    assert Counter(item["period"] for item in (await read_usage(gateway, since))["items"]) == {
        str(first): 1,
        str(second): 2,
        str(third): 1,
    }
    by_month = await read_usage(gateway, f"{since}&interval=month&group_by=none")
    assert [(item["period"], item["charged"]["tasks"]) for item in by_month["items"]] == [
        (f"{first:%Y-%m}", 3),
        (f"{third:%Y-%m}", 1),
    ]
    assert {item["kind"] for item in by_month["items"]} == {None}
    (whole,) = (await read_usage(gateway, f"{since}&interval=total&group_by=none"))["items"]
    assert (whole["period"], whole["charged"]["tasks"]) == (f"{first}/{third}", 4)
    (only,) = (await read_usage(gateway, f"{since}&to={first}&interval=month"))["items"]
    assert only["charged"]["tasks"] == 1
    in_its_month = await read_usage(gateway, f"to={second}")
    assert (in_its_month["from"], in_its_month["total"]["charged"]["tasks"]) == (str(first), 3)
    for query in (since, f"{since}&interval=month", f"{since}&interval=total", f"{since}&group_by=none"):
        usage = await read_usage(gateway, query)
        assert sum(item["charged"]["tasks"] for item in usage["items"]) == usage["total"]["charged"]["tasks"] == 4
    assert await read_windows(gateway) == {"day": (1, 0), "month": (1, 0), "total": (4, 0)}


async def test_submission_belongs_to_the_day_of_its_creation(gateway: RunningGateway) -> None:
    before = await advance_to_next_window(gateway)
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    name = await submit_and_lose_response(gateway, "seamless")
    await advance_to_next_window(gateway)
    usage = await read_usage(gateway, f"from={before}")
    expected = {(str(before), "face-enhance"): {"running": 1}, (str(before), "seamless"): {"unknown": 1}}
    assert count_outcomes(usage) == expected
    assert usage["unknown_submissions"][0] == {"id": name, "kind": "seamless", "day": str(before)}
    assert task["created_at"][:10] == str(before)


async def test_usage_of_all_tenants(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    await run_task(gateway)
    await run_task(gateway, token=other)
    await run_task(gateway, "seamless", token=other)
    tenants = gateway.services.registry.current.tenants
    usage = (await read_all_usage(gateway))["items"]
    assert [(item["tenant"], item["tenant_id"], item["kind"]) for item in usage] == [
        ("other", tenants["other"].id, "face-enhance"),
        ("other", tenants["other"].id, "seamless"),
        ("shop", tenants["shop"].id, "face-enhance"),
    ]
    usage = (await read_all_usage(gateway, "group_by=tenant"))["items"]
    assert [(item["tenant"], item["kind"], item["charged"]["tasks"]) for item in usage] == [
        ("other", None, 2),
        ("shop", None, 1),
    ]
    usage = (await read_all_usage(gateway, "group_by=kind"))["items"]
    assert [(item["tenant_id"], item["kind"], item["charged"]["tasks"]) for item in usage] == [
        (None, "face-enhance", 2),
        (None, "seamless", 1),
    ]
    filtered = await read_all_usage(gateway, "tenant=other&group_by=kind")
    mine = await read_usage(gateway, token=other)
    for report in (filtered, mine):
        assert report["total"]["charged"]["tasks"] == 2
    assert [{**item, "tenant": None, "tenant_id": None} for item in mine["items"]] == filtered["items"]
    assert "tenant" not in str(mine)
    assert (await read_usage(gateway))["total"]["charged"]["tasks"] == 1
    await submit_and_lose_response(gateway)
    await gateway.upstream.lose_next_response()
    assert (await gateway.submit(token=other)).status_code == 504
    assert [
        unknown_submission["tenant"] for unknown_submission in (await read_all_usage(gateway))["unknown_submissions"]
    ] == ["other", "shop"]
    assert len((await read_usage(gateway))["unknown_submissions"]) == 1


async def test_usage_of_deleted_tenants(gateway: RunningGateway) -> None:
    await run_task(gateway)
    name = await submit_and_lose_response(gateway)
    old = gateway.services.registry.current.tenants["shop"].id
    before = await read_all_usage(gateway)
    await gateway.call_admin("DELETE", "/tenants/shop")
    assert await read_all_usage(gateway) == before
    await gateway.put_tenant()
    gateway.token = await gateway.new_token()
    assert (await read_usage(gateway))["total"]["charged"]["tasks"] == 0
    await run_task(gateway)
    new = gateway.services.registry.current.tenants["shop"].id
    usage = await read_all_usage(gateway, "tenant=shop")
    assert [(item["tenant_id"], item["charged"]["tasks"]) for item in usage["items"]] == [(old, 2), (new, 1)]
    assert usage["total"]["charged"]["tasks"] == 3
    (unknown,) = usage["unknown_submissions"]
    assert (unknown["id"], unknown["tenant"], unknown["tenant_id"]) == (name, "shop", old)


async def test_usage_of_a_tenant_deleted_while_running(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    await gateway.call_admin("DELETE", "/tenants/shop?force=true")
    await gateway.poll_due_tasks()
    (row,) = (await read_all_usage(gateway))["items"]
    assert (row["tenant"], row["tasks"]["succeeded"]) == ("shop", 1)
    submission = expect_json(await gateway.call_admin("GET", f"/submissions/{submission_id_of(gateway, task)}"))
    assert (submission["tenant"], submission["task"]["state"]) == ("shop", "succeeded")


async def test_kept_for_13_months(gateway: RunningGateway) -> None:
    day = await advance_to_next_window(gateway)
    await run_task(gateway)
    await gateway.advance(396 * 86_400)
    usage = await read_usage(gateway, f"from={day}&interval=total")
    assert [item["charged"]["tasks"] for item in usage["items"]] == [1]


async def test_stored_for_13_months(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        await harness.run_task()
        today = (date.fromisoformat((await read_usage(harness.gateway))["to"]) - date(1970, 1, 1)).days
        tenant = harness.gateway.services.registry.current.tenants["shop"].id
        connections = connect(valkey.url, timeout=5)
        try:
            client: Any = connections.commands
            ttl_ms = await client.pttl(Keys("gw").usage(tenant, today))
        finally:
            await connections.aclose()
        assert 396 * 86_400_000 < ttl_ms <= 401 * 86_400_000
