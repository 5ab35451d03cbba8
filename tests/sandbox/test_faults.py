"""What goes wrong on demand, as it looks on the wire and in the journal."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import httpx2
import msgspec
import pytest

from service.sandbox.app import AccountBalance, RunningSandbox
from service.sandbox.faults import Behaviour, Fault, Field, FieldDefect, RequestOutcome
from tests.sandbox import images
from tests.sandbox.client import SandboxClient

When = Literal["before", "after"]
FAULT_TIMINGS: list[tuple[When, RequestOutcome, AccountBalance]] = [
    ("before", "not_reached", AccountBalance(3, 10)),
    ("after", "accepted", AccountBalance(2, 10)),
]


async def send_raw_submit(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a submit over a bare connection and leave its answer to be read."""
    request = httpx2.Request(
        "POST", f"{url}/api/submit_seamless_task", data={"user_key": "key"}, files={"input_image": images.plain_png()}
    )
    body = request.read()
    reader, writer = await asyncio.open_connection(request.url.host, request.url.port)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    writer.write(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode() + body)
    return reader, writer


@pytest.mark.parametrize(("when", "outcome", "left"), FAULT_TIMINGS)
async def test_reset_is_one_on_the_wire(
    sandbox: RunningSandbox, when: When, outcome: RequestOutcome, left: AccountBalance
) -> None:
    """A reset reaches the client as a TCP reset, and comes before the account is charged or after, as dialled."""
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
    """A request that hangs shows in the journal while it does, charged or not, and its connection stays open."""
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
    caller: SandboxClient,
    status: int,
    when: When,
    outcome: RequestOutcome,
    left: AccountBalance,
) -> None:
    """A page is HTML with the status that was dialled, in place of an answer."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="page", when=when, status=status),)))
    response = await caller.submit()
    assert response.status_code == status
    assert response.headers["content-type"].startswith("text/html")
    assert response.text.startswith("<html>")
    assert [entry.outcome for entry in await sandbox.control.list_requests()] == [outcome]
    assert (await sandbox.control.list_accounts())["key"] == left


async def test_cut_answer_ends_early(sandbox: RunningSandbox) -> None:
    """A cut answer closes the connection, in order, halfway through the length it announced."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="cut"),)))
    reader, writer = await send_raw_submit(sandbox.url)
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    await writer.wait_closed()
    announced = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    assert body.startswith(b'{"err_code":0')
    assert len(body) == announced // 2


async def test_garbled_answer_is_whole_but_no_json(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """A garbled answer has the length it announced, calls itself JSON, and is none."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply="garbled"),)))
    response = await caller.submit()
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
async def test_field_comes_wrong(
    sandbox: RunningSandbox, caller: SandboxClient, field: Field, wrong: FieldDefect, expected: object
) -> None:
    """A field is spoiled in the way that was dialled, and the fields beside it stay right."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(wrong={field: wrong}),)))
    answer: dict[str, Any] = (await caller.submit()).json()
    assert answer.pop(field, msgspec.UNSET) == expected
    assert answer.items() <= {
        "err_code": 0, "remaining_count": 2, "remaining_money": 10, "task_id": answer.get("task_id")
    }.items()  # fmt: skip


async def test_id_as_a_number_can_be_asked_for(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """A task id that comes as a number is the number that its digits say, exact even as a double."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(on="submit", wrong={"task_id": "int"}),)))
    number = (await caller.submit()).json()["task_id"]
    assert isinstance(number, int)
    await sandbox.control.wait_until_idle()
    assert (await caller.check(str(int(float(number)))))["status"] == "Completed"


async def test_status_without_a_task(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """A check can be made to tell that a state is null."""
    await sandbox.control.set_behaviour(Behaviour(seconds=3600, faults=(Fault(on="check", wrong={"status": "null"}),)))
    assert await caller.check(await caller.submit_accepted()) == {"err_code": 0, "status": None}


async def test_refusal_word_for_word(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """A check or submit can be refused with any message, although nothing is wrong with it."""
    task_id = await caller.submit_accepted()
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(refuse="任务未找到或状态未知", times=1),)))
    assert await caller.check(task_id) == {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    assert (await caller.check(task_id))["err_code"] == 0


@pytest.mark.parametrize("colon", [":", "："])
async def test_rejection_for_a_reason(
    sandbox: RunningSandbox, caller: SandboxClient, colon: Literal[":", "："]
) -> None:
    """A submit can be rejected for any reason, behind either colon, and is not charged."""
    await sandbox.control.set_behaviour(Behaviour(colon=colon, faults=(Fault(reject="图片内容违规"),)))
    answer = (await caller.submit()).json()
    assert answer == {"err_code": 1, "err_msg": f"任务提交失败{colon}图片内容违规"}
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


async def test_status_of_an_answer(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """An answer keeps its JSON when only its HTTP status is dialled."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(status=503),)))
    response = await caller.submit()
    assert response.status_code == 503
    assert response.json()["err_code"] == 0


async def test_latency_outlasts_the_client(sandbox: RunningSandbox, caller: SandboxClient) -> None:
    """A slow upstream carries out the request of a client that has given up meanwhile."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(latency=0.5),)))
    with pytest.raises(httpx2.ReadTimeout):
        await caller.http.post(
            "/api/submit_seamless_task",
            data={"user_key": "key"},
            files={"input_image": images.plain_png()},
            timeout=httpx2.Timeout(5, read=0.05),
        )
    await sandbox.control.wait_for_requests(lambda entries: entries[0].outcome == "accepted")


async def test_client_that_leaves_midway(sandbox: RunningSandbox) -> None:
    """A request whose body breaks off is written down as such, and nothing is done about it."""
    host, port = sandbox.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /api/submit_task HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    entries = await sandbox.control.wait_for_requests(
        lambda entries: [entry.outcome for entry in entries] == ["broken_off"]
    )
    assert entries[0].path == "/api/submit_task"
