"""Refunds by operators."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import structlog

from service.usecases.ports import SubmitOutcome
from tests.behaviour.audit import UNREACHABLE_POLICIES, expect_problem
from tests.behaviour.balance_harness import PRICE_YUAN, open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.usage_requests import (
    advance_to_next_window,
    expect_json,
    post_refund,
    read_all_usage,
    read_charged_today,
    read_submission,
    read_usage,
    read_windows,
    recover_task,
    submission_id_of,
    submit_and_lose_response,
)
from tests.support.valkey import Valkey

INVALID_BODIES: Mapping[str, Sequence[Any]] = {
    "reason": [None, "", " \n\t", "x" * 501, 5, ["x"]],
    "task": [5, {}, []],
    "submission": [5, {}, []],
    "nonsense": ["x"],
    "Reason": ["x"],
}


async def run_task(gateway: RunningGateway) -> dict[str, Any]:
    return await gateway.wait_for_task((await gateway.submit()).json()["id"])


async def test_refunded_task(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    task = await run_task(gateway)
    assert (await read_charged_today(gateway))[0] == 1
    submission = expect_json(await post_refund(gateway, task=task["id"], reason="It came out blank."), 201)
    assert await read_charged_today(gateway) == (0, 0)
    assert set((await read_windows(gateway)).values()) == {(0, 0)}
    refund = submission["refund"]
    assert (refund["count"], refund["money"], refund["reason"]) == (1, 0, "It came out blank.")
    assert (submission["tenant"], submission["account"], submission["task"]["id"]) == ("shop", "main", task["id"])
    assert submission["cost"] == task["cost"]
    mine = await read_submission(gateway, submission["id"])
    assert mine == {name: value for name, value in submission.items() if name not in {"tenant", "account"}}
    usage = await read_usage(gateway)
    (listed,) = usage["refunds"]
    expected = {"submission": submission["id"], "kind": "face-enhance", "day": task["created_at"][:10], **refund}
    assert listed == expected
    assert usage["total"]["tasks"]["succeeded"] == 1
    assert usage["total"]["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    (listed,) = (await read_all_usage(gateway))["refunds"]
    assert listed == expected | {"tenant": "shop", "tenant_id": gateway.services.registry.current.tenants["shop"].id}
    assert (await gateway.call("GET", task["links"]["self"])).json() == task


async def test_refund_frees_the_limit_at_once(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    task = await run_task(gateway)
    expect_problem(await gateway.submit(), 429, "quota-exceeded")
    expect_json(await post_refund(gateway, task=task["id"], reason="again"), 201)
    assert (await gateway.submit()).status_code == 201
    expect_problem(await gateway.submit(), 429, "quota-exceeded")


async def test_concurrent_refunds_count_once(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    task, other = await run_task(gateway), await run_task(gateway)
    name = submission_id_of(gateway, task)
    wishes = [
        post_refund(gateway, **{field: target}, reason=f"{target} as {field}")
        for field in ("task", "submission")
        for target in (task["id"], name)
    ]
    responses = await asyncio.gather(*wishes)
    (made,) = [expect_json(item, 201) for item in responses if item.status_code == 201]
    for response in responses:
        if response.status_code != 201:
            detail = expect_problem(response, 409, "conflict")["detail"]
            assert detail.endswith(f"with this reason: {made['refund']['reason']}")
            assert f"at {made['refund']['refunded_at'][:19]}" in detail
    assert (await read_charged_today(gateway))[0] == 1
    assert len((await read_usage(gateway))["refunds"]) == 1
    assert (await read_submission(gateway, submission_id_of(gateway, other)))["refund"] is None


async def test_refunded_unknown_outcome_stays_refunded(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    name = await submit_and_lose_response(gateway)
    assert (await read_charged_today(gateway))[0] == 1
    expect_json(await post_refund(gateway, submission=name, reason="outcome unknown"), 201)
    assert await read_charged_today(gateway) == (0, 0)
    task_id = await recover_task(gateway, name)
    submission = await read_submission(gateway, name)
    assert (submission["outcome"], submission["task"]["id"], submission["refund"]["reason"]) == (
        "accepted",
        task_id,
        "outcome unknown",
    )
    assert await read_charged_today(gateway) == (0, 0)
    await gateway.wait_for_task(task_id)
    assert await read_charged_today(gateway) == (0, 0)
    submission = await read_submission(gateway, name)
    assert (submission["refund"]["count"], submission["cost"]["count"]) == (1, 1)
    total = (await read_usage(gateway))["total"]
    assert (total["tasks"]["succeeded"], total["tasks"]["unknown"]) == (1, 0)
    assert total["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    expect_problem(await post_refund(gateway, task=task_id, reason="once more"), 409, "conflict")


async def test_failed_task_can_be_refunded(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    await gateway.upstream.fail_next_task()
    task = await run_task(gateway)
    assert task["state"] == "failed"
    assert (await read_charged_today(gateway))[0] == 1
    expect_json(await post_refund(gateway, task=task["id"], reason="it failed"), 201)
    assert await read_charged_today(gateway) == (0, 0)


async def test_refund_goes_to_the_original_windows(gateway: RunningGateway) -> None:
    before = await advance_to_next_window(gateway, "month")
    task = await run_task(gateway)
    today = await advance_to_next_window(gateway)
    await run_task(gateway)
    expect_json(await post_refund(gateway, task=task["id"], reason="late"), 201)
    assert await read_windows(gateway) == {"day": (1, 0), "month": (1, 0), "total": (1, 0)}
    usage = await read_usage(gateway)
    assert [(item["period"], item["charged"]["tasks"]) for item in usage["items"]] == [
        (str(before), 0),
        (str(today), 1),
    ]
    (listed,) = usage["refunds"]
    assert (listed["day"], listed["refunded_at"][:10]) == (str(before), str(today))


async def test_running_and_free_submissions_are_not_refundable(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    before = await read_charged_today(gateway), await read_usage(gateway)
    for target in ({"task": task["id"]}, {"submission": submission_id_of(gateway, task)}):
        assert (
            "has not ended"
            in expect_problem(await post_refund(gateway, **target, reason="x"), 409, "conflict")["detail"]
        )
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    with structlog.testing.capture_logs() as events:
        expect_problem(await gateway.submit(), 502, "upstream-rejected")
    (refused,) = [event["reservation"] for event in events if event["event"] == "reservation.settled"]
    detail = expect_problem(await post_refund(gateway, submission=refused, reason="x"), 409, "conflict")["detail"]
    assert detail == f"Submission {refused} cost nothing: it is refused."
    assert await read_charged_today(gateway) == before[0]
    assert (await read_usage(gateway))["refunds"] == []


@pytest.mark.parametrize("field", INVALID_BODIES)
async def test_invalid_refund_fields(gateway: RunningGateway, field: str) -> None:
    for value in INVALID_BODIES[field]:
        body: dict[str, object] = {"task": "task_x", "reason": "x"}
        if field == "submission":
            del body["task"]
        document = expect_problem(await post_refund(gateway, **(body | {field: value})), 422, "invalid-options")
        assert [error["field"] for error in document["errors"]] == [field], value
        assert all(error["detail"] for error in document["errors"])


async def test_refund_needs_one_target_and_a_reason(gateway: RunningGateway) -> None:
    for body in ({}, {"task": "x", "submission": "y"}, {"task": None, "submission": None}):
        document = expect_problem(await post_refund(gateway, **body, reason="x"), 422, "invalid-options")
        assert document["errors"] == [{"field": "submission", "detail": "must be given, or `task`, but not both"}]
    document = expect_problem(await post_refund(gateway, task="x"), 422, "invalid-options")
    assert document["errors"] == [{"field": "reason", "detail": "is required"}]
    expect_problem(await gateway.call_admin("POST", "/refunds", content=b"{"), 400, "malformed-request")


async def test_unknown_target_is_404(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    forged = task["id"][:-4] + ("AAAA" if task["id"][-4:] != "AAAA" else "BBBB")
    altered_tasks = ("task_", forged, task["id"].upper(), task["id"] + "=")
    altered_submissions = ("0" * 32, "0" * 31, "G" * 32, "0" * 32 + "\n")
    for wrong in ("", "x", "商店", "../../x", *altered_tasks, *altered_submissions):
        for field in ("task", "submission"):
            expect_problem(await post_refund(gateway, **{field: wrong}, reason="x"), 404, "not-found")


async def test_lost_reservation() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        task = await run_task(gateway)
        ledger.reservations.clear()
        expect_problem(await post_refund(gateway, task=task["id"], reason="x"), 404, "not-found")


async def test_refunds_are_logged(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    with structlog.testing.capture_logs() as events:
        submission = expect_json(await post_refund(gateway, task=task["id"], reason="It came out blank."), 201)
        expect_problem(await post_refund(gateway, task=task["id"], reason="again"), 409, "conflict")
    (event,) = [item for item in events if item["event"] == "submission.refunded"]
    assert (event["tenant"], event["reservation"]) == ("shop", submission["id"])
    assert (event["kind"], event["reason"], event["uses"], event["yuan"]) == (
        "face-enhance",
        "It came out blank.",
        1,
        0,
    )


async def test_refund_of_a_deleted_tenant(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    await gateway.call_admin("DELETE", "/tenants/shop")
    submission = expect_json(await post_refund(gateway, task=task["id"], reason="a farewell"), 201)
    assert submission["tenant"] == "shop"
    usage = await read_all_usage(gateway)
    assert (usage["total"]["charged"]["tasks"], usage["refunds"][0]["tenant"]) == (0, "shop")


async def test_money_is_refunded_to_the_fen(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.set_balance(0, 100)
        await gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
        await gateway.put_tenant(**UNREACHABLE_POLICIES)
        await harness.run_task()
        task = await harness.expect_accepted()
        assert (await harness.wait_for_cost(task))["money"] == PRICE_YUAN
        unknown = await submit_and_lose_response(gateway, "vectorize")
        assert await read_charged_today(gateway) == (3, 3 * PRICE_YUAN)
        assert (await read_submission(gateway, unknown))["cost"] == {
            "count": 0,
            "money": PRICE_YUAN,
            "basis": "unknown",
        }
        expect_json(await post_refund(gateway, task=task["id"], reason="x"), 201)
        assert await read_charged_today(gateway) == (2, 2 * PRICE_YUAN)
        submission = expect_json(await post_refund(gateway, submission=unknown, reason="x"), 201)
        assert (submission["refund"]["count"], submission["refund"]["money"]) == (0, PRICE_YUAN)
        assert await read_charged_today(gateway) == (1, PRICE_YUAN)
        assert (await read_usage(gateway))["total"]["refunded"] == {"tasks": 2, "count": 0, "money": 2 * PRICE_YUAN}
