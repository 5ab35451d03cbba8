"""Malformed, late and missing responses of the upstream.

Accepted and unknown submissions are charged, refused ones are not; each is sent once; no reservation remains.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import USER_KEY, RunningGateway, run_real_gateway
from tests.behaviour.requests import expect_problem, read_counts
from tests.contract.scripted_server import Handler, http_response, reply_with, run_server
from tests.support.valkey import Valkey

ACCEPTED = (201, None)
UNKNOWN = (504, "submission-unknown")
REJECTED = (502, "upstream-rejected")
MISCONFIGURED = (503, "account-misconfigured")
BUSY = (503, "upstream-unavailable")

SUBMIT_FAULTS: list[tuple[dict[str, Any], tuple[int, str | None]]] = [
    ({"reply": "reset"}, UNKNOWN),
    ({"reply": "reset", "when": "before"}, UNKNOWN),
    ({"reply": "cut"}, UNKNOWN),
    ({"reply": "page"}, UNKNOWN),
    ({"reply": "page", "status": 502, "when": "before"}, UNKNOWN),
    ({"reply": "page", "status": 302, "when": "before"}, MISCONFIGURED),
    ({"reply": "page", "status": 404, "when": "before"}, REJECTED),
    ({"reply": "page", "status": 429, "when": "before"}, BUSY),
    ({"status": 500}, ACCEPTED),
    ({"reject": "图片太小"}, REJECTED),
    ({"reject": "图片太小", "wrong": {"err_msg": "null"}}, REJECTED),
    ({"wrong": {"err_code": "missing"}}, ACCEPTED),
    ({"wrong": {"err_code": "negative"}}, UNKNOWN),
    ({"wrong": {"task_id": "null"}}, UNKNOWN),
    ({"wrong": {"task_id": "int"}}, ACCEPTED),
    ({"wrong": {"remaining_count": "negative", "remaining_money": "string"}}, ACCEPTED),
]
"""Faults of a submit at the sandbox, and the expected response."""

UNUSUAL_RESPONSES: list[tuple[bytes, tuple[int, str | None]]] = [
    (b"", UNKNOWN),
    (b'{"err_code": 0, "task_id": "\xff"}', UNKNOWN),
    (b'{"err_code": 0, "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", UNKNOWN),
    (b'{"err_code": 0, "x": "' + b"x" * 500_000 + b'"}', UNKNOWN),
    (json.dumps({"err_code": 0, "task_id": "t" * 60_000}).encode(), UNKNOWN),
    (json.dumps({"err_code": 1, "task_id": "t", "err_msg": "账户剩余次数不足"}).encode(), UNKNOWN),
    (b'{"err_code": 1, "err_msg": {"a": 1}}', REJECTED),
    (json.dumps({"err_code": 1, "err_msg": f"bad key {USER_KEY} at http://10.0.0.1/x\r\nX: y"}).encode(), REJECTED),
    (b'{"err_code":0,"task_id":"a","remaining_count":{},"remaining_money":"1e999"}', ACCEPTED),
    (b'\xef\xbb\xbf{"err_code": false, "task_id": "b", "remaining_count": true}', ACCEPTED),
    (b'{"err_code": 0, "task_id": "b"}', ACCEPTED),  # for the second time
]
"""Response bodies to a submit, and the expected response to the tenant."""

CHECK_FAULTS: list[dict[str, Any]] = [
    {"reply": "reset"},
    {"reply": "garbled"},
    {"reply": "page"},
    {"reply": "page", "status": 404},
    {"wrong": {"status": "null"}},
    {"wrong": {"images_url": "missing"}},
    {"refuse": "任务未找到或状态未知"},
    {"refuse": "账户不存在"},
]
"""Faults of the check of a task that has succeeded."""


@pytest.fixture
async def gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway with large limits and balances, and a second account, which nothing may be sent to."""
    async with run_real_gateway(valkey) as running_gateway:
        await running_gateway.call_admin("PUT", "/accounts/spare", json={"user_key": "spare-key"})
        limits = [{"window": "total", "tasks": 1_000}]
        await running_gateway.put_tenant(accounts=["main", "spare"], limits=limits, max_active=1_000)
        await running_gateway.upstream.set_balance(1_000, 1_000)
        await running_gateway.upstream.set_balance(1_000, 0, "spare-key")
        yield running_gateway


async def submit_and_check(gateway: RunningGateway, expected: tuple[int, str | None], case: object) -> str:
    """Submit once, assert the response and the charge; return the response text."""
    used, _, active = await read_counts(gateway)
    response = await gateway.submit()
    status, code = expected
    if code is None:
        assert (response.status_code, response.json()["state"]) == (status, "queued"), (case, response.text)
    else:
        problem = expect_problem(response, status, code)
        assert ("submission_id" in problem) == (expected == UNKNOWN)
        assert ("upstream_reason" in problem) == (expected == REJECTED)
        assert ("retry-after" in response.headers) == (expected == BUSY)
    charged = expected in {ACCEPTED, UNKNOWN}
    assert await read_counts(gateway) == (used + charged, 0, active + (expected == ACCEPTED)), case
    assert USER_KEY not in response.text
    return response.text


async def submit_to(gateway: RunningGateway, serve: Handler, expected: tuple[int, str | None], case: object) -> None:
    """Submit once to a scripted server; assert as above, and that it was called once."""
    async with run_server(serve) as server:
        change = {"user_key": USER_KEY, "base_url": server.url}
        assert (await gateway.call_admin("PUT", "/accounts/main", json=change)).status_code == 200
        text = await submit_and_check(gateway, expected, case)
        assert (len(server.requests), await gateway.upstream.count_submits()) == (1, 0), case
        assert "10.0.0.1" not in text
        assert server.url not in text


async def test_faulty_submit_response(gateway: RunningGateway) -> None:
    for number, (fault, expected) in enumerate(SUBMIT_FAULTS, 1):
        await gateway.upstream.set_fault(on="submit", times=1, **fault)
        await submit_and_check(gateway, expected, fault)
        assert await gateway.upstream.count_submits() == number
    await submit_and_check(gateway, ACCEPTED, "a whole response")


async def test_unusual_submit_response(gateway: RunningGateway) -> None:
    for body, expected in UNUSUAL_RESPONSES:
        await submit_to(gateway, reply_with(http_response(body, Content_Type="application/json")), expected, body[:80])


async def test_redirects_are_not_followed(gateway: RunningGateway) -> None:
    """Only a 303 may follow a charge."""
    async with run_server(reply_with(http_response(b"{}"))) as lure:
        for status in (301, 302, 303, 307, 308):
            away = http_response(b"", status, Location=f"{lure.url}/api/submit_face_enhance_task")
            await submit_to(gateway, reply_with(away), UNKNOWN if status == 303 else MISCONFIGURED, status)
        assert lure.connections == 0


@pytest.mark.parametrize(
    ("fault", "status", "counts"),
    [({}, 201, (1, 0, 1)), ({"reject": "图片太小"}, 502, (0, 0, 0)), ({"reply": "reset"}, 504, (1, 0, 0))],
    ids=["accepted", "rejected", "lost"],
)
async def test_response_after_the_lease(
    gateway: RunningGateway, fault: dict[str, Any], status: int, counts: tuple[int, int, int]
) -> None:
    await gateway.upstream.set_fault(on="submit", times=1, **fault)
    with gateway.hold_responses() as held:
        submitting = asyncio.create_task(gateway.submit())
        await wait_until(lambda: held.count == 1)
        assert await read_counts(gateway) == (0, 1, 1)
        await gateway.advance(gateway.services.drain_seconds)
        (settlement,) = await gateway.services.submitter.ledger.settle_expired(100)
        assert await read_counts(gateway) == (1, 0, 0)
    assert (await submitting).status_code == status
    assert await read_counts(gateway) == counts
    outcome = (await gateway.call("GET", f"/v1/submissions/{settlement.reservation}")).json()["outcome"]
    assert outcome == {201: "accepted", 502: "refused", 504: "unknown"}[status]
    assert await gateway.upstream.count_submits() == 1


async def test_faulty_check_response_changes_nothing(gateway: RunningGateway) -> None:
    for fault in CHECK_FAULTS:
        task = (await gateway.submit()).json()
        checks = await gateway.upstream.count_checks()
        await gateway.upstream.set_fault(on="check", times=1, **fault)
        await gateway.poll_due_tasks()
        assert await gateway.upstream.count_checks() == checks + 1
        response = await gateway.call("GET", task["links"]["self"])
        assert (response.status_code, response.json()["state"]) == (200, "queued"), (fault, response.text)
        assert response.json()["artifacts"] == []
        assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded", fault
    assert (await read_counts(gateway))[1:] == (0, 0)


async def test_task_without_usable_results_fails_in_time(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    await gateway.upstream.set_fault(on="check", wrong={"images_url": "missing"})
    await gateway.poll_due_tasks()
    await gateway.advance(86_400)
    assert (await gateway.call("GET", task["links"]["self"])).json()["state"] == "queued"
    ended = await gateway.wait_for_task(task["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "result-unusable")
    assert (await read_counts(gateway))[1:] == (0, 0)
