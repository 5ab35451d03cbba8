"""Refusals by limits and accounts."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.usecases.ports import SubmitOutcome
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.upstream_control import USER_KEY
from tests.support.images import make_png


async def read_policies(house: RunningGateway) -> dict[str, dict[str, Any]]:
    report = (await house.call("GET", "/v1/quota")).json()
    return {each["policy"]: each for each in report["policies"]}


async def test_task_limit_resets_with_its_window(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "minute", "tasks": 2}, {"window": "day", "tasks": 4}])
    first = await house.submit()
    assert first.headers["ratelimit-policy"] == '"minute-tasks";q=2;w=60, "day-tasks";q=4;w=86400'
    assert first.headers["ratelimit"].startswith('"minute-tasks";r=1;t=')
    assert (await house.submit()).status_code == 201

    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "rate-limited")
    (violated,) = refused.json()["violated_policies"]
    assert (violated["policy"], violated["limit"]) == ("minute-tasks", 2)
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.headers["ratelimit"].startswith('"minute-tasks";r=0;t=')
    assert await house.upstream.count_submits() == 2

    await house.advance(int(refused.headers["retry-after"]))
    assert [(await house.submit()).status_code for _ in range(2)] == [201, 201]
    await house.advance(60)
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "quota-exceeded")
    assert [each["policy"] for each in refused.json()["violated_policies"]] == ["day-tasks"]
    assert await house.upstream.count_submits() == 4


async def test_total_limit_has_no_retry_after(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "total", "tasks": 1}])
    assert (await house.submit()).headers["ratelimit-policy"] == '"total-tasks";q=1'
    refused = await house.submit()
    assert refused.status_code == 429
    assert refused.json()["violated_policies"] == [{"policy": "total-tasks", "limit": 1, "resets_at": None}]
    assert "retry-after" not in refused.headers


async def test_all_violated_policies_are_listed(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "minute", "tasks": 0}, {"window": "hour", "tasks": 0}], max_active=0)
    refused = await house.submit()
    body = refused.json()
    assert [each["policy"] for each in body["violated_policies"]] == ["minute-tasks", "hour-tasks", "max-active"]
    assert body["code"] == "quota-exceeded"
    report = await read_policies(house)
    assert report["hour-tasks"]["resets_at"][:19] == body["violated_policies"][1]["resets_at"][:19]


async def test_concurrent_submits_up_to_the_limit(house: RunningGateway) -> None:
    await house.upstream.set_balance(100, 0)
    await house.put_tenant(limits=[{"window": "month", "tasks": 5}])
    answers = await asyncio.gather(*(house.submit() for _ in range(20)))
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] * 5 + [429] * 15
    assert await house.upstream.count_submits() == 5


async def test_max_active_tasks(house: RunningGateway) -> None:
    await house.put_tenant(max_active=2)
    tasks = [(await house.submit()).json() for _ in range(2)]
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (429, "too-many-active-tasks")
    assert "retry-after" not in refused.headers
    for task in tasks:
        await house.wait_for_task(task["id"])
    assert (await house.submit()).status_code == 201


async def test_quota_report(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "day", "tasks": 10, "money": 12.5}], max_active=3)
    await house.submit()
    report = await read_policies(house)
    day, active = report["day-tasks"], report["max-active"]
    assert (day["limit"], day["used"], day["reserved"], day["remaining"]) == (10, 1, 0, 9)
    assert (active["limit"], active["used"], active["remaining"], active["resets_at"]) == (3, 1, 2, None)
    assert report["day-money"]["limit"] == 12.5
    assert (await house.call("GET", "/v1/quota")).json()["account"] == {"can_pay": True, "look_again_at": None}


async def test_exhausted_account_is_probed(house: RunningGateway) -> None:
    await house.upstream.set_balance(0, 0)
    await house.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (402, "balance-exhausted")
    assert int(refused.headers["retry-after"]) == 60
    assert "账户" not in refused.text
    refused = await house.submit()
    assert refused.status_code == 402
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert await house.upstream.count_submits() == 1
    account = (await house.call("GET", "/v1/quota")).json()["account"]
    assert account["can_pay"] is False

    await house.upstream.set_balance(5, 0)
    await house.advance(60)
    assert (await house.submit()).status_code == 201
    assert (await house.submit()).status_code == 201


async def test_zero_balance_refuses_without_the_upstream(house: RunningGateway) -> None:
    await house.upstream.set_balance(1, 0)
    assert (await house.submit()).status_code == 201
    assert (await house.submit()).status_code == 402
    assert await house.upstream.count_submits() == 1


async def test_floor_is_kept(house: RunningGateway) -> None:
    await house.upstream.set_balance(7, 0)
    await house.call_admin("PUT", "/accounts/main", json={"floor_count": 5})
    for _ in range(2):
        await house.wait_for_task((await house.submit()).json()["id"])
    assert (await house.submit()).status_code == 402
    await house.advance(120)
    assert (await house.submit()).status_code == 402
    assert await house.upstream.count_submits() == 2


async def test_unknown_account_is_misconfigured(house: RunningGateway) -> None:
    await house.upstream.refuse_next(SubmitOutcome.INVALID_ACCOUNT)
    for _ in range(2):
        refused = await house.submit()
        assert (refused.status_code, refused.json()["code"]) == (503, "account-misconfigured")
        assert USER_KEY not in refused.text
    assert await house.upstream.count_submits() == 1
    assert (await house.call_admin("GET", "/accounts/main")).json()["state"] == "invalid"
    assert (await house.call_admin("POST", "/accounts/main/reopen")).json()["state"] == "open"
    assert (await house.submit()).status_code == 201


async def test_rejected_image_is_free(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "day", "tasks": 1}])
    await house.upstream.refuse_next(SubmitOutcome.REJECTED, "图片格式不支持")
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (502, "upstream-rejected")
    assert refused.json()["upstream_reason"] == "图片格式不支持"
    day = (await read_policies(house))["day-tasks"]
    assert (day["used"], day["reserved"]) == (0, 0)
    assert (await house.submit()).status_code == 201


async def test_unknown_outcome_stays_charged(house: RunningGateway) -> None:
    await house.put_tenant(limits=[{"window": "day", "tasks": 2}], max_active=1)
    await house.upstream.lose_next_response()
    lost = await house.submit()
    assert (lost.status_code, lost.json()["code"]) == (504, "submission-unknown")
    assert lost.json()["submission_id"]
    assert await house.upstream.count_submits() == 1
    report = await read_policies(house)
    assert (report["day-tasks"]["used"], report["day-tasks"]["reserved"]) == (1, 0)
    assert report["max-active"]["used"] == 0
    assert (await house.call_admin("GET", "/accounts/main")).json()["unknown"] == 1
    assert (await house.submit()).status_code == 201
    assert (await house.submit()).status_code == 429


async def test_money_limit_holds_the_highest_price(house: RunningGateway) -> None:
    await house.upstream.set_balance(0, 100)
    await house.call_admin("PUT", "/accounts/main", json={"max_price": {"face-enhance": 40}})
    await house.put_tenant(limits=[{"window": "month", "money": 100}])
    await house.upstream.keep_running()
    assert [(await house.submit()).status_code for _ in range(3)] == [201, 201, 429]
    money = (await read_policies(house))["month-money"]
    assert (money["used"], money["reserved"], money["remaining"]) == (0, 80, 20)


@pytest.mark.parametrize("change", [{"disabled": True}, {"kinds": ["upscale"]}])
async def test_disabled_tenant_or_kind_is_refused_before_the_image(
    house: RunningGateway, change: dict[str, Any]
) -> None:
    await house.put_tenant(**change)
    refused = await house.submit(image=b"no image at all")
    assert refused.status_code == 403
    assert refused.json()["code"] in {"tenant-disabled", "kind-not-allowed"}
    assert await house.upstream.count_submits() == 0


async def test_failover_to_the_next_account(house: RunningGateway) -> None:
    await house.call_admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await house.put_tenant(accounts=["main", "spare"], limits=[{"window": "day", "tasks": 1}])
    await house.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert (await house.submit()).status_code == 201
    assert await house.upstream.count_submits() == 2
    assert (await read_policies(house))["day-tasks"]["used"] == 1
    states = {each["name"]: each for each in (await house.call_admin("GET", "/accounts")).json()["items"]}
    assert (states["main"]["state"], states["main"]["in_flight"]) == ("exhausted", 0)
    assert (states["spare"]["state"], states["spare"]["in_flight"]) == ("open", 1)


async def test_unreachable_upstream_fails_over(house: RunningGateway) -> None:
    dead = {"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"}
    await house.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await house.call_admin("PUT", "/accounts/dead", json=dead)
    await house.put_tenant(accounts=["dead"])
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "upstream-unavailable")
    assert refused.headers["retry-after"]
    await house.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await house.put_tenant(accounts=["dead", "main"])
    assert (await house.submit()).status_code == 201


async def test_single_task_has_an_observed_cost(house: RunningGateway) -> None:
    await house.upstream.set_balance(5, 100)
    costs = []
    for _ in range(2):
        task = (await house.submit()).json()
        costs.append((await house.wait_for_task(task["id"]))["cost"])
    assert costs[0] == {"count": 1, "money": 0, "basis": "estimated"}
    assert costs[1] == {"count": 1, "money": 0, "basis": "observed"}


async def test_parallel_tasks_have_estimated_costs(house: RunningGateway) -> None:
    await house.upstream.set_balance(9, 0)
    for _ in range(2):
        await house.wait_for_task((await house.submit()).json()["id"])
    beside = [(await house.submit()).json()["id"] for _ in range(2)]
    for task in beside:
        assert (await house.wait_for_task(task))["cost"] == {"count": 1, "money": 0, "basis": "estimated"}


async def test_deleted_tenant_spends_nothing(house: RunningGateway) -> None:
    registry: Any = house.services.registry
    stale = registry.current
    assert (await house.call_admin("DELETE", "/tenants/shop")).status_code == 204
    registry.current = stale
    refused = await house.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
    assert await house.upstream.count_submits() == 0


async def test_balance_source_is_shown(house: RunningGateway) -> None:
    task = (await house.submit()).json()
    told = (await house.call_admin("GET", "/accounts/main")).json()
    assert (told["remaining_count"]["value"], told["remaining_count"]["seen_in"]) == (9, "submit")
    assert (told["remaining_money"]["value"], told["in_flight"]) == (300, 1)
    await house.wait_for_task(task["id"])
    told = (await house.call_admin("GET", "/accounts/main")).json()
    assert (told["remaining_count"]["seen_in"], told["in_flight"]) == ("check", 0)


async def test_options_in_the_query_are_refused(house: RunningGateway) -> None:
    files = {"image": ("picture.png", make_png(), "image/png")}
    refused = await house.call("POST", "/v1/tasks/upscale?scale=3", files=files)
    assert (refused.status_code, refused.json()["errors"]) == (
        422,
        [{"field": "scale", "detail": "goes into the form"}],
    )
    assert await house.upstream.count_submits() == 0


async def test_same_key_reopens_a_closed_account(house: RunningGateway) -> None:
    await house.submit()
    await house.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})
    assert (await house.call_admin("GET", "/accounts/main")).json()["remaining_count"]["value"] == 9
    await house.upstream.refuse_next(SubmitOutcome.INVALID_ACCOUNT)
    await house.submit()
    assert (await house.call_admin("GET", "/accounts/main")).json()["state"] == "invalid"
    assert (await house.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY})).json()["state"] == "open"
