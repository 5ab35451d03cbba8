"""Injected faults, on the wire and in the request records."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx2
import msgspec
import pytest

from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, Field, FieldDefect, RequestOutcome
from service.sandbox.store import AccountBalance
from tests.sandbox import images
from tests.sandbox.client import SandboxClient

When = Literal["before", "after"]
FAULT_TIMINGS: list[tuple[When, RequestOutcome, AccountBalance]] = [
    ("before", "not_processed", AccountBalance(3, 10)),
    ("after", "accepted", AccountBalance(2, 10)),
]


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
async def test_reset_on_the_wire(
    sandbox: RunningSandbox, when: When, outcome: RequestOutcome, left: AccountBalance
) -> None:
    """A reset is a TCP reset, before or after the charge, as set."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="reset", when=when),)))
    reader, writer = await send_raw_submit(sandbox.url)
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()
    with pytest.raises(ConnectionResetError):
        await writer.wait_closed()
    entries = await sandbox.control.wait_for_requests(lambda entries: [entry.outcome for entry in entries] == [outcome])
    assert entries[0].reply == "reset"
    assert (await sandbox.control.list_accounts())["key"] == left


@pytest.mark.parametrize(("when", "outcome", "left"), FAULT_TIMINGS)
async def test_hang_never_answers(
    sandbox: RunningSandbox, when: When, outcome: RequestOutcome, left: AccountBalance
) -> None:
    """A hanging request is in the records while it hangs, and its connection stays open."""
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


@pytest.mark.parametrize(("when", "outcome", "left"), FAULT_TIMINGS)
@pytest.mark.parametrize("status", [200, 500, 502])
async def test_page_is_html(
    sandbox: RunningSandbox,
    client: SandboxClient,
    status: int,
    when: When,
    outcome: RequestOutcome,
    left: AccountBalance,
) -> None:
    """A page is HTML with the status that was set."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="page", when=when, status=status),)))
    response = await client.submit()
    assert response.status_code == status
    assert response.headers["content-type"].startswith("text/html")
    assert response.text.startswith("<html>")
    assert [entry.outcome for entry in await sandbox.control.list_requests()] == [outcome]
    assert (await sandbox.control.list_accounts())["key"] == left


async def test_cut_response_ends_early(sandbox: RunningSandbox) -> None:
    """A cut response closes the connection halfway through its Content-Length."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="cut"),)))
    reader, writer = await send_raw_submit(sandbox.url)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    announced = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert body.startswith(b'{"err_code":0')
    assert len(body) == announced // 2


async def test_garbled_response_is_invalid_json(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A garbled response has its full length and the JSON content type, and invalid JSON."""
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
        ("status", "null", None),
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
    assert answer.items() <= {
        "err_code": 0, "remaining_count": 2, "remaining_money": 10, "task_id": answer.get("task_id")
    }.items()  # fmt: skip


async def test_numeric_task_id(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A numeric task id has the value of its digits, exact even as a double."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(on="submit", wrong={"task_id": "int"}),)))
    number = (await client.submit()).json()["task_id"]
    assert isinstance(number, int)
    await sandbox.control.wait_until_idle()
    assert (await client.check(str(int(float(number)))))["status"] == "Completed"


async def test_null_state(sandbox: RunningSandbox, client: SandboxClient) -> None:
    await sandbox.control.set_behaviour(Behaviour(seconds=3600, faults=(Fault(on="check", wrong={"status": "null"}),)))
    assert await client.check(await client.submit_accepted()) == {"err_code": 0, "status": None}


async def test_refusal_with_any_message(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted()
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(refuse="任务未找到或状态未知", times=1),)))
    assert await client.check(task_id) == {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    assert (await client.check(task_id))["err_code"] == 0


@pytest.mark.parametrize("colon", [":", "："])
async def test_rejection_with_any_reason(
    sandbox: RunningSandbox, client: SandboxClient, colon: Literal[":", "："]
) -> None:
    """A submit can be rejected with any reason and either colon, uncharged."""
    await sandbox.control.set_behaviour(Behaviour(colon=colon, faults=(Fault(reject="图片内容违规"),)))
    answer = (await client.submit()).json()
    assert answer == {"err_code": 1, "err_msg": f"任务提交失败{colon}图片内容违规"}
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


async def test_status_of_a_response(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """With only the HTTP status set, a response keeps its JSON."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(status=503),)))
    response = await client.submit()
    assert response.status_code == 503
    assert response.json()["err_code"] == 0


async def test_latency_outlasts_the_client(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """A slow request is carried out although its client has disconnected."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(latency=0.5),)))
    with pytest.raises(httpx2.ReadTimeout):
        await client.http.post(
            "/api/submit_seamless_task",
            data={"user_key": "key"},
            files={"input_image": images.plain_png()},
            timeout=httpx2.Timeout(5, read=0.05),
        )
    await sandbox.control.wait_for_requests(lambda entries: entries[0].outcome == "accepted")


async def test_client_that_disconnects(sandbox: RunningSandbox) -> None:
    """A request whose body is cut off is recorded as such, and has no effect."""
    host, port = sandbox.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /api/submit_task HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    entries = await sandbox.control.wait_for_requests(
        lambda entries: [entry.outcome for entry in entries] == ["client_disconnected"]
    )
    assert entries[0].path == "/api/submit_task"
