"""Refusals by limits and accounts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.usecases.ports import SubmitOutcome
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.upstream_control import USER_KEY
from tests.support.images import make_png


async def read_policies(gateway: RunningGateway) -> dict[str, dict[str, Any]]:
    report = (await gateway.call("GET", "/v1/quota")).json()
    return {policy["policy"]: policy for policy in report["policies"]}


async def test_task_limit_resets_with_its_window(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "minute", "tasks": 2}, {"window": "day", "tasks": 4}])
    first = await gateway.submit()
    assert first.headers["ratelimit-policy"] == '"minute-tasks";q=2;w=60, "day-tasks";q=4;w=86400'
    assert first.headers["ratelimit"].startswith('"minute-tasks";r=1;t=')
    assert (await gateway.submit()).status_code == 201

    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
    (violated,) = refused.json()["violated_policies"]
    assert (violated["policy"], violated["limit"]) == ("minute-tasks", 2)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"].startswith('"minute-tasks";r=0;t=')
    assert await gateway.upstream.count_submits() == 2

    await gateway.advance(int(refused.headers["retry-after"]))
    assert [(await gateway.submit()).status_code for _ in range(2)] == [201, 201]
    await gateway.advance(60)
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "quota-exceeded")
    assert [violated_policy["policy"] for violated_policy in refused.json()["violated_policies"]] == ["day-tasks"]
    assert await gateway.upstream.count_submits() == 4


async def test_total_limit_has_no_retry_after(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    assert (await gateway.submit()).headers["ratelimit-policy"] == '"total-tasks";q=1'
    refused = await gateway.submit()
    assert refused.status_code == 429
    assert refused.json()["violated_policies"] == [{"policy": "total-tasks", "limit": 1, "resets_at": None}]
    assert "retry-after" not in refused.headers


async def test_all_violated_policies_are_listed(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "minute", "tasks": 0}, {"window": "hour", "tasks": 0}], max_active=0)
    refused = await gateway.submit()
    body = refused.json()
    assert [violated_policy["policy"] for violated_policy in body["violated_policies"]] == [
        "minute-tasks",
        "hour-tasks",
        "max-active",
    ]
    assert body["code"] == "quota-exceeded"
    report = await read_policies(gateway)
    assert report["hour-tasks"]["resets_at"][:19] == body["violated_policies"][1]["resets_at"][:19]


async def test_concurrent_submits_up_to_the_limit(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(100, 0)
    await gateway.put_tenant(limits=[{"window": "month", "tasks": 5}])
    responses = await asyncio.gather(*(gateway.submit() for _ in range(20)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [201] * 5 + [429] * 15
    assert await gateway.upstream.count_submits() == 5


async def test_max_active_tasks(gateway: RunningGateway) -> None:
    await gateway.put_tenant(max_active=2)
    tasks = [(await gateway.submit()).json() for _ in range(2)]
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "too-many-active-tasks")
    assert "retry-after" not in refused.headers
    for task in tasks:
        await gateway.wait_for_task(task["id"])
    assert (await gateway.submit()).status_code == 201


async def test_quota_report(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 10, "money": 12.5}], max_active=3)
    await gateway.submit()
    report = await read_policies(gateway)
    day, active = report["day-tasks"], report["max-active"]
    assert (day["limit"], day["used"], day["reserved"], day["remaining"]) == (10, 1, 0, 9)
    assert (active["limit"], active["used"], active["remaining"], active["resets_at"]) == (3, 1, 2, None)
    assert report["day-money"]["limit"] == 12.5
    assert (await gateway.call("GET", "/v1/quota")).json()["account"] == {"can_pay": True, "look_again_at": None}


async def test_exhausted_account_is_probed(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 0)
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (402, "balance-exhausted")
    assert int(refused.headers["retry-after"]) == 60
    assert "账户" not in refused.text
    refused = await gateway.submit()
    assert refused.status_code == 402
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert await gateway.upstream.count_submits() == 1
    account = (await gateway.call("GET", "/v1/quota")).json()["account"]
    assert account["can_pay"] is False

    await gateway.upstream.set_balance(5, 0)
    await gateway.advance(60)
    assert (await gateway.submit()).status_code == 201
    assert (await gateway.submit()).status_code == 201


async def test_zero_balance_refuses_without_the_upstream(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(1, 0)
    assert (await gateway.submit()).status_code == 201
    assert (await gateway.submit()).status_code == 402
    assert await gateway.upstream.count_submits() == 1


async def test_floor_is_kept(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(7, 0)
    await gateway.call_admin("PUT", "/accounts/main", json={"floor_count": 5})
    for _ in range(2):
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
    assert (await gateway.submit()).status_code == 402
    await gateway.advance(120)
    assert (await gateway.submit()).status_code == 402
    assert await gateway.upstream.count_submits() == 2


async def test_unknown_account_is_misconfigured(gateway: RunningGateway) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.INVALID_ACCOUNT)
    for _ in range(2):
        refused = await gateway.submit()
        assert (refused.status_code, refused.json()["code"]) == (503, "account-misconfigured")
        assert USER_KEY not in refused.text
    assert await gateway.upstream.count_submits() == 1
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["state"] == "invalid"
    assert (await gateway.call_admin("POST", "/accounts/main/reopen")).json()["state"] == "open"
    assert (await gateway.submit()).status_code == 201


async def test_rejected_image_is_free(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 1}])
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片格式不支持")
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (502, "upstream-rejected")
    assert refused.json()["upstream_reason"] == "图片格式不支持"
    day = (await read_policies(gateway))["day-tasks"]
    assert (day["used"], day["reserved"]) == (0, 0)
    assert (await gateway.submit()).status_code == 201


async def test_unknown_outcome_stays_charged(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 2}], max_active=1)
    await gateway.upstream.lose_next_response()
    lost = await gateway.submit()
    assert (lost.status_code, lost.json()["code"]) == (504, "submission-unknown")
    assert lost.json()["submission_id"]
    assert await gateway.upstream.count_submits() == 1
    report = await read_policies(gateway)
    assert (report["day-tasks"]["used"], report["day-tasks"]["reserved"]) == (1, 0)
    assert report["max-active"]["used"] == 0
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["unknown"] == 1
    assert (await gateway.submit()).status_code == 201
    assert (await gateway.submit()).status_code == 429


async def test_money_limit_holds_the_highest_price(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 100)
    await gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"face-enhance": 40}})
    await gateway.put_tenant(limits=[{"window": "month", "money": 100}])
    await gateway.upstream.keep_running()
    assert [(await gateway.submit()).status_code for _ in range(3)] == [201, 201, 429]
    money = (await read_policies(gateway))["month-money"]
    assert (money["used"], money["reserved"], money["remaining"]) == (0, 80, 20)


@pytest.mark.parametrize("change", [{"state": "read-only"}, {"kinds": ["upscale"]}])
async def test_disabled_tenant_or_kind_is_refused_before_the_image(
    gateway: RunningGateway, change: dict[str, Any]
) -> None:
    await gateway.put_tenant(**change)
    refused = await gateway.submit(image=b"no image at all")
    assert refused.status_code == 403
    assert refused.json()["code"] in {"tenant-read-only", "kind-not-allowed"}
    assert await gateway.upstream.count_submits() == 0


async def test_failover_to_the_next_account(gateway: RunningGateway) -> None:
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await gateway.put_tenant(accounts=["main", "spare"], limits=[{"window": "day", "tasks": 1}])
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert (await gateway.submit()).status_code == 201
    assert await gateway.upstream.count_submits() == 2
    assert (await read_policies(gateway))["day-tasks"]["used"] == 1
    states = {item["name"]: item for item in (await gateway.call_admin("GET", "/accounts")).json()["items"]}
    assert (states["main"]["state"], states["main"]["in_flight"]) == ("exhausted", 0)
    assert (states["spare"]["state"], states["spare"]["in_flight"]) == ("open", 1)


async def test_unreachable_upstream_fails_over(gateway: RunningGateway) -> None:
    dead = {"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"}
    await gateway.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await gateway.call_admin("PUT", "/accounts/dead", json=dead)
    await gateway.put_tenant(accounts=["dead"])
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "upstream-unavailable")
    assert refused.headers["retry-after"]
    await gateway.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await gateway.put_tenant(accounts=["dead", "main"])
    assert (await gateway.submit()).status_code == 201


async def test_single_task_has_an_observed_cost(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(5, 100)
    costs = []
    for _ in range(2):
        task = (await gateway.submit()).json()
        costs.append((await gateway.wait_for_task(task["id"]))["cost"])
    assert costs[0] == {"count": 1, "money": 0, "basis": "estimated"}
    assert costs[1] == {"count": 1, "money": 0, "basis": "observed"}


async def test_parallel_tasks_have_estimated_costs(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(9, 0)
    for _ in range(2):
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
    beside = [(await gateway.submit()).json()["id"] for _ in range(2)]
    for task in beside:
        assert (await gateway.wait_for_task(task))["cost"] == {"count": 1, "money": 0, "basis": "estimated"}


async def test_deleted_tenant_spends_nothing(gateway: RunningGateway) -> None:
    registry: Any = gateway.services.registry
    stale = registry.current
    assert (await gateway.call_admin("DELETE", "/tenants/shop")).status_code == 204
    registry.current = stale
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
    assert await gateway.upstream.count_submits() == 0


async def test_balance_source_is_shown(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    account = (await gateway.call_admin("GET", "/accounts/main")).json()
    assert (account["remaining_count"]["value"], account["remaining_count"]["source"]) == (9, "submit")
    assert (account["remaining_money"]["value"], account["in_flight"]) == (300, 1)
    await gateway.wait_for_task(task["id"])
    account = (await gateway.call_admin("GET", "/accounts/main")).json()
    assert (account["remaining_count"]["source"], account["in_flight"]) == ("check", 0)


async def test_options_in_the_query_are_refused(gateway: RunningGateway) -> None:
    files = {"image": ("picture.png", make_png(), "image/png")}
    refused = await gateway.call("POST", "/v1/tasks/upscale?scale=3", files=files)
    assert (refused.status_code, refused.json()["errors"]) == (
        422,
        [{"field": "scale", "detail": "goes into the form"}],
    )
    assert await gateway.upstream.count_submits() == 0


async def test_same_key_reopens_a_closed_account(gateway: RunningGateway) -> None:
    await gateway.submit()
    await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["remaining_count"]["value"] == 9
    await gateway.upstream.refuse_next(SubmitOutcome.INVALID_ACCOUNT)
    await gateway.submit()
    assert (await gateway.call_admin("GET", "/accounts/main")).json()["state"] == "invalid"
    assert (await gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})).json()["state"] == "open"
