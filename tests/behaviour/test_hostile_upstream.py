"""Malformed upstream responses.

Accepted and unknown submissions are charged, refused ones are not; each is sent once; no reservation remains.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.sandbox.faults import Behaviour, Fault, RequestType
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.contract.scripted_server import http_response, reply_with, run_server
from tests.support.valkey import Valkey

ACCEPTED = (201, None)
UNKNOWN = (504, "submission-unknown")
REJECTED = (502, "upstream-rejected")
MISCONFIGURED = (503, "account-misconfigured")
BUSY = (503, "upstream-unavailable")

SUBMIT_FAULTS: dict[str, tuple[dict[str, Any], tuple[int, str | None]]] = {
    "reset instead of an answer": ({"reply": "reset"}, UNKNOWN),
    "reset before it was read": ({"reply": "reset", "when": "before"}, UNKNOWN),
    "half the body": ({"reply": "cut"}, UNKNOWN),
    "half the JSON": ({"reply": "garbled"}, UNKNOWN),
    "a page with 200": ({"reply": "page"}, UNKNOWN),
    "a page with 302": ({"reply": "page", "status": 302, "when": "before"}, MISCONFIGURED),
    "a page with 303": ({"reply": "page", "status": 303}, UNKNOWN),
    "a page with 500": ({"reply": "page", "status": 500}, UNKNOWN),
    "a page with 502, unsent by its words": ({"reply": "page", "status": 502, "when": "before"}, UNKNOWN),
    "a page with 504": ({"reply": "page", "status": 504}, UNKNOWN),
    "an acceptance with 500": ({"status": 500}, ACCEPTED),
    "an acceptance with 400": ({"status": 400}, ACCEPTED),
    "an acceptance with 202": ({"status": 202}, ACCEPTED),
    "a page with 400": ({"reply": "page", "status": 400, "when": "before"}, REJECTED),
    "a page with 404": ({"reply": "page", "status": 404, "when": "before"}, REJECTED),
    "a page with 413": ({"reply": "page", "status": 413, "when": "before"}, REJECTED),
    "a page with 429": ({"reply": "page", "status": 429, "when": "before"}, BUSY),
    "a rejection": ({"reject": "图片太小"}, REJECTED),
    "an unknown message": ({"refuse": "系统繁忙"}, REJECTED),
    "an empty message": ({"refuse": ""}, REJECTED),
    "a rejection without its message": ({"reject": "图片太小", "wrong": {"err_msg": "null"}}, REJECTED),
    "a rejection whose code is text": ({"reject": "图片太小", "wrong": {"err_code": "string"}}, REJECTED),
    "err_code as text": ({"wrong": {"err_code": "string"}}, ACCEPTED),
    "err_code null": ({"wrong": {"err_code": "null"}}, ACCEPTED),
    "err_code missing": ({"wrong": {"err_code": "missing"}}, ACCEPTED),
    "err_code negative": ({"wrong": {"err_code": "negative"}}, UNKNOWN),
    "task_id missing": ({"wrong": {"task_id": "missing"}}, UNKNOWN),
    "task_id null": ({"wrong": {"task_id": "null"}}, UNKNOWN),
    "task_id a number": ({"wrong": {"task_id": "int"}}, ACCEPTED),
    "figures missing": ({"wrong": {"remaining_count": "missing", "remaining_money": "missing"}}, ACCEPTED),
    "figures null": ({"wrong": {"remaining_count": "null", "remaining_money": "null"}}, ACCEPTED),
    "figures as text": ({"wrong": {"remaining_count": "string", "remaining_money": "string"}}, ACCEPTED),
    "figures negative": ({"wrong": {"remaining_count": "negative", "remaining_money": "negative"}}, ACCEPTED),
    "figures with fractions": ({"wrong": {"remaining_count": "float", "remaining_money": "float"}}, ACCEPTED),
}
"""Faults of a submit at the sandbox, and the expected response."""

UNUSUAL_RESPONSES: dict[str, tuple[bytes, tuple[int, str | None]]] = {
    "nothing": (b"", UNKNOWN),
    "null": (b"null", UNKNOWN),
    "a list": (b'[{"err_code": 0, "task_id": "t"}]', UNKNOWN),
    "a text": (b'"ok"', UNKNOWN),
    "an empty object": (b"{}", UNKNOWN),
    "success and no more": (b'{"err_code": 0}', UNKNOWN),
    "not UTF-8": (b'{"err_code": 0, "task_id": "\xff"}', UNKNOWN),
    "very deep": (b'{"err_code": 0, "x": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", UNKNOWN),
    "very large": (b'{"err_code": 0, "x": "' + b"x" * 500_000 + b'"}', UNKNOWN),
    "an id that is a list": (b'{"err_code": 0, "task_id": ["t"]}', UNKNOWN),
    "an id that is an object": (b'{"err_code": 0, "task_id": {"id": "t"}}', UNKNOWN),
    "an id that is false": (b'{"err_code": 0, "task_id": false}', UNKNOWN),
    "an empty id": (b'{"err_code": 0, "task_id": ""}', UNKNOWN),
    "an id of 100,000 characters": (json.dumps({"err_code": 0, "task_id": "t" * 60_000}).encode(), UNKNOWN),
    "error and id": (b'{"err_code": 1, "task_id": "t"}', UNKNOWN),
    "no uses left, and an id": (
        json.dumps({"err_code": 1, "task_id": "t", "err_msg": "账户剩余次数不足"}).encode(),
        UNKNOWN,
    ),
    "a rejection, and an id": (
        json.dumps({"err_code": 1, "task_id": "t", "err_msg": "任务提交失败:图片太小"}).encode(),
        UNKNOWN,
    ),
    "an unknown error code": (b'{"err_code": 7, "err_msg": "?"}', REJECTED),
    "a message that is an object": (b'{"err_code": 1, "err_msg": {"a": 1}}', REJECTED),
    "a message with our secrets": (
        json.dumps({"err_code": 1, "err_msg": f"bad key {USER_KEY} at http://10.0.0.1/x\r\nX: y"}).encode(),
        REJECTED,
    ),
    "nonsense as figures": (b'{"err_code":0,"task_id":"a","remaining_count":{},"remaining_money":"1e999"}', ACCEPTED),
    "huge figures": (
        b'{"err_code":0,"task_id":"b","remaining_count":1e300,"remaining_money":' + b"9" * 400 + b"}",
        ACCEPTED,
    ),
    "true and false": (b'{"err_code":false,"task_id":"c","remaining_count":true}', ACCEPTED),
    "a byte order mark": (b'\xef\xbb\xbf{"err_code": 0, "task_id": "d"}', ACCEPTED),
}
"""Response bodies to a submit, and the expected response to the tenant."""

CHECK_FAULTS: dict[str, dict[str, Any]] = {
    "reset": {"reply": "reset"},
    "half the body": {"reply": "cut"},
    "half the JSON": {"reply": "garbled"},
    "a page": {"reply": "page"},
    "a page with 500": {"reply": "page", "status": 500},
    "a page with 404": {"reply": "page", "status": 404},
    "a page with 301": {"reply": "page", "status": 301},
    "null status": {"wrong": {"status": "null"}},
    "no status": {"wrong": {"status": "missing"}},
    "a number as status": {"wrong": {"status": "int"}},
    "no result": {"wrong": {"images_url": "missing"}},
    "a null result": {"wrong": {"images_url": "null"}},
    "a number as result": {"wrong": {"images_url": "int"}},
    "unknown task": {"refuse": "任务未找到或状态未知"},
    "unknown account": {"refuse": "账户不存在"},
    "an unknown message": {"refuse": "系统繁忙"},
}
"""Faults of the check of a task that has succeeded."""


@pytest.fixture
async def faulty_gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway with limits, so that counters are reported, and a large balance."""
    async with run_real_gateway(valkey) as gateway:
        await gateway.put_tenant(limits=[{"window": "day", "tasks": 1_000}], max_active=1_000)
        await gateway.upstream.set_balance(1_000, 1_000)
        yield gateway


async def inject_fault(gateway: RunningGateway, on: RequestType, **fault: Any) -> None:
    """Inject a fault into the next submit or check only."""
    assert isinstance(gateway.upstream, SandboxUpstreamControl)
    await gateway.upstream.control.set_behaviour(Behaviour(faults=(Fault(on=on, times=1, **fault),)))


async def read_counts(gateway: RunningGateway) -> tuple[int, int, int]:
    """Return used, reserved and active tasks of the day."""
    report = (await gateway.call("GET", "/v1/quota")).json()
    policies: dict[str, dict[str, Any]] = {policy["policy"]: policy for policy in report["policies"]}
    return policies["day-tasks"]["used"], policies["day-tasks"]["reserved"], policies["max-active"]["used"]


async def submit_and_check(gateway: RunningGateway, expected: tuple[int, str | None], name: str) -> str:
    """Submit once, assert the response and the charge; return the response text."""
    used, _, active = await read_counts(gateway)
    response = await gateway.submit()
    status, code = expected
    if code is None:
        assert (response.status_code, response.json()["state"]) == (status, "queued"), (name, response.text)
    else:
        problem = expect_problem(response, status, code)
        assert ("submission_id" in problem) == (expected == UNKNOWN)
        assert ("upstream_reason" in problem) == (expected == REJECTED)
        assert ("retry-after" in response.headers) == (expected == BUSY)
    charged = expected in {ACCEPTED, UNKNOWN}
    assert await read_counts(gateway) == (used + charged, 0, active + (expected == ACCEPTED)), name
    assert USER_KEY not in response.text
    return response.text


async def test_faulty_submit_response(faulty_gateway: RunningGateway) -> None:
    for number, (name, (fault, expected)) in enumerate(SUBMIT_FAULTS.items(), 1):
        await inject_fault(faulty_gateway, "submit", **fault)
        await submit_and_check(faulty_gateway, expected, name)
        assert await faulty_gateway.upstream.count_submits() == number
    await submit_and_check(faulty_gateway, ACCEPTED, "a whole answer")


async def test_unusual_submit_response(faulty_gateway: RunningGateway) -> None:
    for name, (body, expected) in UNUSUAL_RESPONSES.items():
        async with run_server(reply_with(http_response(body, Content_Type="application/json"))) as peer:
            change = {"user_key": USER_KEY, "base_url": peer.url}
            assert (await faulty_gateway.call_admin("PUT", "/accounts/main", json=change)).status_code == 200
            text = await submit_and_check(faulty_gateway, expected, name)
            assert len(peer.requests) == 1, name
            assert "10.0.0.1" not in text
            assert peer.url not in text


async def test_busy_upstream_passes_on_retry_after_and_frees_the_key(faulty_gateway: RunningGateway) -> None:
    key = {"Idempotency-Key": "once"}
    async with run_server(reply_with(http_response(b"busy", 429, Retry_After="37"))) as peer:
        await faulty_gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY, "base_url": peer.url})
        response = await faulty_gateway.submit(headers=key)
        expect_problem(response, *BUSY)
        assert response.headers["retry-after"] == "37"
    body = json.dumps({"err_code": 1, "err_msg": "任务提交失败:图片太小"}, ensure_ascii=False).encode("gb18030")
    async with run_server(reply_with(http_response(body, 422))) as peer:
        await faulty_gateway.call_admin("PUT", "/accounts/main", json={"user_key": USER_KEY, "base_url": peer.url})
        assert expect_problem(await faulty_gateway.submit(headers=key), *REJECTED)["upstream_reason"] == "图片太小"
    assert (await read_counts(faulty_gateway)) == (0, 0, 0)


async def test_faulty_check_response_changes_nothing(faulty_gateway: RunningGateway) -> None:
    for name, fault in CHECK_FAULTS.items():
        task = (await faulty_gateway.submit()).json()
        checks = await faulty_gateway.upstream.count_checks()
        await inject_fault(faulty_gateway, "check", **fault)
        await faulty_gateway.poll_due_tasks()
        assert await faulty_gateway.upstream.count_checks() == checks + 1
        response = await faulty_gateway.call("GET", task["links"]["self"])
        assert (response.status_code, response.json()["state"]) == (200, "queued"), (name, response.text)
        assert response.json()["artifacts"] == []
        assert (await faulty_gateway.wait_for_task(task["id"]))["state"] == "succeeded", name
    assert (await read_counts(faulty_gateway))[1:] == (0, 0)


async def test_task_without_usable_results_fails_in_time(faulty_gateway: RunningGateway) -> None:
    task = (await faulty_gateway.submit()).json()
    assert isinstance(faulty_gateway.upstream, SandboxUpstreamControl)
    fault = Fault(on="check", wrong={"images_url": "missing"})
    await faulty_gateway.upstream.control.set_behaviour(Behaviour(faults=(fault,)))
    await faulty_gateway.poll_due_tasks()
    await faulty_gateway.advance(86_400)
    assert (await faulty_gateway.call("GET", task["links"]["self"])).json()["state"] == "queued"
    ended = await faulty_gateway.wait_for_task(task["id"])
    assert (ended["state"], ended["error"]["code"]) == ("failed", "result-unusable")
    assert (await read_counts(faulty_gateway))[1:] == (0, 0)


async def test_redirects_are_not_followed(faulty_gateway: RunningGateway) -> None:
    """Only a 303 may follow a charge."""
    async with run_server(reply_with(http_response(b"{}"))) as lure:
        for status in (301, 302, 303, 307, 308):
            away = http_response(b"", status, Location=f"{lure.url}/api/submit_face_enhance_task")
            async with run_server(reply_with(away)) as peer:
                change = {"user_key": USER_KEY, "base_url": peer.url}
                assert (await faulty_gateway.call_admin("PUT", "/accounts/main", json=change)).status_code == 200
                await submit_and_check(faulty_gateway, UNKNOWN if status == 303 else MISCONFIGURED, str(status))
                assert len(peer.requests) == 1
        assert lure.connections == 0
