"""The control interface: injected faults, on the wire and in the request records, accounts and dials."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx2
import msgspec
import pytest

from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, FaultInjector, Field, FieldDefect, RequestOutcome
from service.sandbox.store import AccountBalance
from tests.sandbox import images
from tests.sandbox.conftest import ACCOUNTS, SandboxClient

FAULT_TIMINGS: list[tuple[Literal["before", "after"], RequestOutcome, AccountBalance]] = [
    ("before", "not_processed", AccountBalance(3, 10)),
    ("after", "accepted", AccountBalance(2, 10)),
]


def test_faults_are_a_script() -> None:
    """The first matching fault applies alone until it is used up; then the next one applies."""
    injector = FaultInjector()
    injector.behaviour = Behaviour(
        faults=(Fault(times=1, reply="reset"), Fault(on="check", reply="hang"), Fault(times=2, status=500))
    )
    faults = [injector.next_fault("submit", "key") for _ in range(4)]
    replies = [(fault.reply, fault.status) for fault in faults]
    assert replies == [("reset", 200), ("json", 500), ("json", 500), ("json", 200)]
    assert injector.behaviour.faults == (Fault(on="check", reply="hang"),)


@pytest.mark.parametrize(
    ("fault", "hits"),
    [
        (Fault(reply="hang"), {("submit", "a"), ("submit", "b"), ("check", "a"), ("check", "b")}),
        (Fault(reply="hang", on="check"), {("check", "a"), ("check", "b")}),
        (Fault(reply="hang", user_key="a"), {("submit", "a"), ("check", "a")}),
        (Fault(reply="hang", on="file", user_key="b"), {("file", "b")}),
    ],
)
def test_scope_of_faults(fault: Fault, hits: set[tuple[str, str]]) -> None:
    """A fault applies to its operation and key; without an operation it applies to calls but not to files."""
    injector = FaultInjector()
    injector.behaviour = Behaviour(faults=(fault,))
    operations: list[Literal["submit", "check", "file"]] = ["submit", "check", "file"]
    assert {(on, key) for on in operations for key in "ab" if injector.next_fault(on, key) is fault} == hits


@pytest.mark.parametrize(
    "content",
    [
        {"spelling": "Done"},
        {"speling": "Completed"},
        {"seconds": -1},
        {"seconds": "1"},
        {"prices": {"cats": 1}},
        {"faults": [{"times": 0}]},
        {"faults": [{"reply": "json", "when": "before"}]},
        {"faults": [{"on": "check", "fail": "x"}]},
        {"faults": [{"on": "file", "wrong": {"status": "null"}}]},
        {"faults": [{"on": "file", "status": 500}]},
    ],
)
def test_invalid_behaviour(content: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(content, Behaviour)


async def test_control_over_http(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """Behaviour and accounts can be set and read; an invalid body gets 400 with the reason and changes nothing."""
    content = {"seconds": 1.5, "faults": [{"on": "submit", "times": 2, "reply": "page", "status": 502}]}
    assert (await client.http.put("/_control/behaviour", json=content)).status_code == 200
    assert (await client.submit()).status_code == 502
    refused = await client.http.put("/_control/behaviour", json={"seconds": -1})
    assert (refused.status_code, "$.seconds" in refused.json()["error"]) == (400, True)
    response = await client.http.get("/_control/behaviour")
    assert msgspec.json.decode(response.content, type=Behaviour) == await sandbox.control.get_behaviour()
    assert response.json()["faults"][0]["times"] == 1

    await sandbox.control.set_behaviour(Behaviour())
    assert (await client.http.put("/_control/accounts/新", json={"count": 0, "money": 5})).status_code == 200
    assert (await client.submit(user_key="新")).json()["remaining_money"] == 4
    assert (await client.http.put("/_control/accounts/key", json={"count": -1, "money": 5})).status_code == 400
    accounts = (await client.http.get("/_control/accounts")).json()
    assert (accounts["新"], accounts["other"]) == ({"count": 0, "money": 4}, {"count": 1, "money": 0})
    for method, path in (("GET", "knobs"), ("POST", "behaviour")):
        assert (await client.http.request(method, f"/_control/{path}")).status_code == 404


async def test_request_records(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """Each request record has operation, fields and outcome, and does not change once it was read."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(times=1, latency=0.1),)))
    submitting = asyncio.ensure_future(client.submit_accepted(fields={"fit": "0.3"}))
    (early,) = await sandbox.control.wait_for_requests(lambda entries: len(entries) == 1)
    task_id = await submitting
    assert early.outcome == "pending"
    await client.check("1")
    submit, check = (await client.http.get("/_control/requests")).json()
    assert submit.pop("received_at") <= check.pop("received_at")
    assert submit.pop("image_bytes") > 0
    assert submit == {
        "operation": "submit",
        "path": "/api/submit_seamless_task",
        "user_key": "key",
        "task_id": task_id,
        "outcome": "accepted",
        "detail": "",
        "reply": "json",
        "fields": {"fit": "0.3"},
    }
    assert (check["outcome"], check["detail"]) == ("refused", "任务未找到或状态未知")


async def test_reset(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A reset drops tasks, results and records, and restores faults and accounts, even while a task runs."""
    done = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    url = (await client.check(done))["images_url"]
    await sandbox.control.set_behaviour(Behaviour(seconds=3600))
    running = await client.submit_accepted()
    assert (await client.http.post("/_control/reset")).status_code == 200
    assert await sandbox.control.list_requests() == []
    assert await sandbox.control.get_behaviour() == Behaviour()
    assert await sandbox.control.list_accounts() == ACCOUNTS
    for task_id in (done, running):
        assert (await client.check(task_id))["err_msg"] == "任务未找到或状态未知"
    assert (await client.http.get(url)).status_code == 404


async def test_charge_at_the_end(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A submit is free then, a finished task costs its price if the account can pay, a failed one nothing."""
    doom = Fault(on="submit", user_key="other", fail="内部错误")
    await sandbox.control.set_behaviour(Behaviour(charge="end", faults=(doom,)))
    assert (await client.submit()).json()["remaining_count"] == 3
    await client.submit_accepted(user_key="other")
    await sandbox.control.wait_until_idle()
    accounts = await sandbox.control.list_accounts()
    assert (accounts["key"].count, accounts["other"].count) == (2, 1)
    await sandbox.control.set_behaviour(Behaviour(charge="end", seconds=0.1))
    task_id = await client.submit_accepted()
    await sandbox.control.set_account("key", AccountBalance(0, 0))
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    assert (answer["status"], answer["remaining_money"]) == ("Completed", 0)


async def test_dials_of_checks(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A check returns the state in the letter case, and the balance of now or of the task's end, as set."""
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    await sandbox.control.set_account("key", AccountBalance(99, 0))
    for behaviour, state, count in (
        (Behaviour(), "Completed", 99),
        (Behaviour(spelling="COMPLETED", checked_balance="now"), "COMPLETED", 99),
        (Behaviour(spelling="completed", checked_balance="then"), "completed", 2),
    ):
        await sandbox.control.set_behaviour(behaviour)
        answer = await client.check(task_id)
        assert (answer["status"], answer["remaining_count"]) == (state, count)


async def send_raw_submit(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a submit on a raw connection, without reading the response."""
    request = httpx2.Request(
        "POST", f"{url}/api/submit_seamless_task", data={"user_key": "key"}, files={"input_image": images.plain_png()}
    )
    body = request.read()
    reader, writer = await asyncio.open_connection(request.url.host, request.url.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    writer.write(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return reader, writer


@pytest.mark.parametrize(("when", "outcome", "left"), FAULT_TIMINGS)
async def test_no_answers(
    sandbox: RunningSandbox,
    client: SandboxClient,
    when: Literal["before", "after"],
    outcome: RequestOutcome,
    left: AccountBalance,
) -> None:
    """A TCP reset, a request that hangs and a page of HTML come before or after the charge, as set."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="reset", when=when),)))
    reader, writer = await send_raw_submit(sandbox.url)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionResetError):
        await writer.wait_closed()
    (entry,) = await sandbox.control.wait_for_requests(
        lambda entries: [entry.outcome for entry in entries] == [outcome]
    )
    assert entry.reply == "reset"
    assert (await sandbox.control.list_accounts())["key"] == left

    await sandbox.control.reset()
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="hang", when=when),)))
    reader, writer = await send_raw_submit(sandbox.url)
    await sandbox.control.wait_for_requests(lambda entries: [entry.outcome for entry in entries] == [outcome])
    assert (await sandbox.control.list_accounts())["key"] == left
    answer = asyncio.ensure_future(reader.read())
    await asyncio.wait({answer}, timeout=0.1)
    assert not answer.done()
    writer.close()
    await writer.wait_closed()
    await answer

    for status in (200, 502):
        await sandbox.control.reset()
        await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="page", when=when, status=status),)))
        response = await client.submit()
        assert (response.status_code, response.text[:6]) == (status, "<html>")
        assert response.headers["content-type"].startswith("text/html")
        assert [entry.outcome for entry in await sandbox.control.list_requests()] == [outcome]
        assert (await sandbox.control.list_accounts())["key"] == left


async def test_damaged_bodies(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A cut response ends halfway through its Content-Length; a garbled one is complete, but no JSON."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="cut"),)))
    reader, writer = await send_raw_submit(sandbox.url)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    announced = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert body.startswith(b'{"err_code":0')
    assert len(body) == announced // 2
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="garbled"),)))
    response = await client.submit()
    assert response.headers["content-type"] == "application/json"
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(response.content)


@pytest.mark.parametrize(
    ("field", "wrong", "expected"),
    [
        ("err_code", "string", "0"),
        ("err_code", "missing", msgspec.UNSET),
        ("remaining_count", "string", "2"),
        ("remaining_count", "float", 2.5),
        ("remaining_count", "negative", -3),
        ("remaining_count", "null", None),
        ("remaining_money", "missing", msgspec.UNSET),
        ("remaining_money", "int", 10),
        ("task_id", "null", None),
        ("status", "string", msgspec.UNSET),
    ],
)
async def test_wrong_field(
    sandbox: RunningSandbox, client: SandboxClient, field: Field, wrong: FieldDefect, expected: object
) -> None:
    """A field is altered as set; other fields stay correct."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(wrong={field: wrong}),)))
    answer: dict[str, Any] = (await client.submit()).json()
    assert answer.pop(field, msgspec.UNSET) == expected
    answer.pop("task_id", None)
    assert answer.items() <= {"err_code": 0, "remaining_count": 2, "remaining_money": 10}.items()


async def test_wrong_fields_of_checks(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A numeric task id has the value of its digits, exact even as a double; a state can be null."""
    faults = (Fault(on="submit", wrong={"task_id": "int"}), Fault(on="check", times=1, wrong={"status": "null"}))
    await sandbox.control.set_behaviour(Behaviour(faults=faults))
    number = (await client.submit()).json()["task_id"]
    assert isinstance(number, int)
    await sandbox.control.wait_until_idle()
    states = [(await client.check(str(int(float(number)))))["status"] for _ in range(2)]
    assert states == [None, "Completed"]


@pytest.mark.parametrize("colon", [":", "："])
async def test_refusals(sandbox: RunningSandbox, client: SandboxClient, colon: Literal[":", "："]) -> None:
    """Any call can be refused with any message, a submit with any reason and either colon, uncharged."""
    task_id = await client.submit_accepted(user_key="other")
    faults = (Fault(times=1, refuse="任务未找到或状态未知"), Fault(reject="图片内容违规", status=503))
    await sandbox.control.set_behaviour(Behaviour(colon=colon, faults=faults))
    assert await client.check(task_id, "other") == {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    response = await client.submit()
    assert response.status_code == 503  # a response with another status keeps its JSON
    assert response.json() == {"err_code": 1, "err_msg": f"任务提交失败{colon}图片内容违规"}
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


async def test_clients_that_disconnect(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A slow request is carried out without its client; one whose body is cut off has no effect."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(latency=0.5),)))
    _, writer = await send_raw_submit(sandbox.url)
    await sandbox.control.wait_for_requests(lambda entries: [entry.outcome for entry in entries] == ["pending"])
    writer.close()
    await writer.wait_closed()
    await sandbox.control.wait_for_requests(lambda entries: entries[0].outcome == "accepted")
    _, writer = await asyncio.open_connection(client.http.base_url.host, client.http.base_url.port)
    writer.write(b"POST /api/submit_task HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    await sandbox.control.wait_for_requests(lambda entries: entries[-1].outcome == "client_disconnected")
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(2, 10)


async def test_faults_of_files(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A file can be cut or replaced by a page, and is complete afterwards."""
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    url = (await client.check(task_id))["images_url"]
    faults = (
        Fault(on="file", times=1, reply="cut"),
        Fault(on="file", times=1, reply="page", when="before", status=503),
        Fault(on="file", times=1, reply="page", status=500),
    )
    await sandbox.control.set_behaviour(Behaviour(faults=faults))
    with pytest.raises(httpx2.RemoteProtocolError):
        await client.http.get(url)
    assert [(await client.http.get(url)).status_code for _ in range(3)] == [503, 500, 200]
    served = [entry.outcome for entry in await sandbox.control.list_requests() if entry.operation == "file"]
    assert served == ["served", "not_processed", "served", "served"]
