"""The sandbox as a server: its end, restarts and storage; faults, request records, accounts and dials that are set."""

from __future__ import annotations

import asyncio
import tempfile
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

import httpx2
import msgspec
import pytest

import service.sandbox.store
from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.faults import Behaviour, Fault, FaultInjector, Field, FieldDefect, Reply, RequestOutcome
from service.sandbox.store import AccountBalance
from tests.sandbox.conftest import ACCOUNTS, SandboxClient, open_client

CONFIG = SandboxConfig(accounts={"key": AccountBalance(3, 10)}, seconds=0)


@asynccontextmanager
async def run_sandbox(folder: Path, seconds: float = 0) -> AsyncIterator[tuple[RunningSandbox, SandboxClient]]:
    config = SandboxConfig(folder=folder, accounts=CONFIG.accounts, seconds=seconds)
    async with open_sandbox(config) as sandbox, open_client(sandbox.url) as client:
        yield sandbox, client


async def test_closing_cuts_hanging_and_delayed_requests() -> None:
    threads = threading.active_count()
    faults = (Fault(times=1, reply="hang"), Fault(times=1, latency=3600), Fault(times=1))
    async with asyncio.timeout(120):
        async with open_sandbox(CONFIG) as sandbox, open_client(sandbox.url) as client:
            await sandbox.control.set_behaviour(Behaviour(seconds=3600, faults=faults))
            submits = [asyncio.ensure_future(client.submit()) for _ in faults]
            await asyncio.wait(submits, return_when=asyncio.FIRST_COMPLETED)
            await sandbox.control.wait_for_requests(lambda entries: len(entries) == len(faults))
        outcomes = await asyncio.gather(*submits, return_exceptions=True)
    assert sum(isinstance(outcome, BaseException) for outcome in outcomes) == 2
    assert threading.active_count() == threads


async def test_restart_keeps_results_and_balances(tmp_path: Path) -> None:
    async with run_sandbox(tmp_path) as (sandbox, client):
        finished = await client.submit_accepted()
        await sandbox.control.wait_until_idle()
        content = (await client.http.get((await client.check(finished))["grid_url"])).content
        await sandbox.control.set_behaviour(Behaviour(seconds=0.3))
        unfinished, lost = [await client.submit_accepted() for _ in range(2)]
    (tmp_path / "tasks" / lost / "input").unlink()
    async with run_sandbox(tmp_path) as (sandbox, client):
        answer = await client.check(finished)
        assert (answer["status"], answer["remaining_count"]) == ("Completed", 0)
        assert (await client.http.get(answer["grid_url"])).content == content
        await sandbox.control.wait_until_idle()
        assert [(await client.check(task_id))["status"] for task_id in (unfinished, lost)] == ["Completed", "Failed"]
        assert await sandbox.control.list_accounts() == {"key": AccountBalance(0, 10)}


async def test_only_results_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    async with open_sandbox(CONFIG) as sandbox, open_client(sandbox.url) as client:
        task_id = await client.submit_accepted()
        await sandbox.control.set_account("key", AccountBalance(0, 0))
        assert (await client.submit()).json()["err_code"] == 1
        await sandbox.control.wait_until_idle()
        (tasks,) = tmp_path.rglob("tasks")
        files = {str(path.relative_to(tasks)) for path in tasks.rglob("*") if path.is_file()}
        assert files == {f"{task_id}/image.png", f"{task_id}/grid.png"}
    assert list(tmp_path.iterdir()) == []


async def test_oldest_ended_tasks_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks" / "9").mkdir(parents=True)  # of a submit that never became a task
    async with run_sandbox(tmp_path) as (sandbox, client):
        await sandbox.control.set_account("key", AccountBalance(9, 0))
        await sandbox.control.set_behaviour(Behaviour(seconds=3600))
        task_ids = [await client.submit_accepted()]
        await sandbox.control.set_behaviour(Behaviour(seconds=0))
        for name, limit, kept in (("MAX_TASKS", 9, [0, 1]), ("MAX_TASKS", 1, [0, 2]), ("MAX_BYTES", 1, [0, 3])):
            monkeypatch.setattr(service.sandbox.store, name, limit)
            task_ids.append(await client.submit_accepted())
            async with asyncio.timeout(120):
                while (await client.check(task_ids[-1]))["status"] != "Completed":
                    pass
            codes = [(await client.check(task_id))["err_code"] for task_id in task_ids]
            assert [number for number, code in enumerate(codes) if code == 0] == kept
            monkeypatch.setattr(service.sandbox.store, "MAX_TASKS", 9)
    assert {folder.name for folder in (tmp_path / "tasks").iterdir()} == {task_ids[0], task_ids[3]}


def test_faults_apply_one_after_the_other() -> None:
    injector = FaultInjector()
    on_check, of_other = Fault(on="check", reply="hang"), Fault(reply="hang", user_key="other")
    injector.behaviour = Behaviour(
        faults=(Fault(times=1, reply="reset"), on_check, of_other, Fault(times=2, status=500))
    )
    applied = [injector.next_fault("submit", "key") for _ in range(4)]
    replies = [(fault.reply, fault.status) for fault in applied]
    assert replies == [("reset", 200), ("json", 500), ("json", 500), ("json", 200)]
    assert injector.behaviour.faults == (on_check, of_other)
    assert injector.next_fault("check", "other") is on_check
    assert injector.next_fault("submit", "other") is of_other
    assert injector.next_fault("file", "other") not in (on_check, of_other)


async def test_control_over_http(sandbox: RunningSandbox, client: SandboxClient) -> None:
    content = {"seconds": 1.5, "faults": [{"on": "submit", "times": 2, "reply": "page", "status": 502}]}
    assert (await client.http.put("/_control/behaviour", json=content)).status_code == 200
    page = await client.submit()
    assert (page.status_code, page.headers["content-type"][:9], page.text[:6]) == (502, "text/html", "<html>")
    for invalid, reason in (
        ({"seconds": -1}, "$.seconds"),
        ({"speling": "Completed"}, "speling"),
        ({"faults": [{"reply": "json", "when": "before"}]}, "$.faults"),
        ({"faults": [{"on": "check", "fail": "x"}]}, "$.faults"),
    ):
        refused = await client.http.put("/_control/behaviour", json=invalid)
        assert (refused.status_code, reason in refused.json()["error"]) == (400, True)
    response = await client.http.get("/_control/behaviour")
    assert msgspec.json.decode(response.content, type=Behaviour) == await sandbox.control.get_behaviour()
    assert response.json()["faults"][0]["times"] == 1

    await sandbox.control.set_behaviour(Behaviour())
    assert (await client.http.put("/_control/accounts/新", json={"count": 0, "money": 5})).status_code == 200
    assert (await client.submit(user_key="新")).json()["remaining_money"] == 4
    assert (await client.http.put("/_control/accounts/key", json={"count": -1, "money": 5})).status_code == 400
    accounts = (await client.http.get("/_control/accounts")).json()
    assert (accounts["新"], accounts["other"]) == ({"count": 0, "money": 4}, {"count": 1, "money": 0})


async def test_request_records_do_not_change_once_read(sandbox: RunningSandbox, client: SandboxClient) -> None:
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(times=1, latency=0.1),)))
    submitting = asyncio.ensure_future(client.submit_accepted(fields={"fit": "0.3"}))
    (early,) = await sandbox.control.wait_for_requests(lambda entries: len(entries) == 1)
    task_id = await submitting
    assert early.outcome == "pending"
    await client.check("1")
    submit, check = (await client.http.get("/_control/requests")).json()
    assert (submit["operation"], submit["path"], submit["user_key"]) == ("submit", "/api/submit_seamless_task", "key")
    assert (submit["task_id"], submit["outcome"], submit["fields"]) == (task_id, "accepted", {"fit": "0.3"})
    assert (check["outcome"], check["detail"]) == ("refused", "任务未找到或状态未知")


async def test_reset_while_a_task_runs(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_ids = [await client.submit_accepted()]
    await sandbox.control.wait_until_idle()
    url = (await client.check(task_ids[0]))["images_url"]
    await sandbox.control.set_behaviour(Behaviour(seconds=3600))
    task_ids.append(await client.submit_accepted())
    assert (await client.http.post("/_control/reset")).status_code == 200
    assert await sandbox.control.list_requests() == []
    assert await sandbox.control.get_behaviour() == Behaviour()
    assert await sandbox.control.list_accounts() == ACCOUNTS
    assert [(await client.check(task_id))["err_code"] for task_id in task_ids] == [1, 1]
    assert (await client.http.get(url)).status_code == 404


async def test_charge_at_the_end(sandbox: RunningSandbox, client: SandboxClient) -> None:
    doom = Fault(on="submit", user_key="other", fail="内部错误")
    await sandbox.control.set_behaviour(Behaviour(charge="end", faults=(doom,)))
    task_id = await client.submit_accepted()
    await client.submit_accepted(user_key="other")
    await sandbox.control.wait_until_idle()
    accounts = await sandbox.control.list_accounts()
    assert (accounts["key"].count, accounts["other"].count) == (2, 1)
    unpaid = await client.submit_accepted()
    await sandbox.control.set_account("key", AccountBalance(0, 0))
    await sandbox.control.wait_until_idle()
    answer = await client.check(unpaid)
    assert (answer["status"], answer["remaining_money"]) == ("Completed", 0)
    await sandbox.control.set_behaviour(Behaviour(spelling="COMPLETED", checked_balance="then"))
    answer = await client.check(task_id)
    assert (answer["status"], answer["remaining_count"]) == ("COMPLETED", 2)


@pytest.mark.parametrize(("when", "outcome", "left"), [("before", "not_processed", 3), ("after", "accepted", 2)])
async def test_missing_answer_before_or_after_the_charge(
    sandbox: RunningSandbox, client: SandboxClient, when: Literal["before", "after"], outcome: RequestOutcome, left: int
) -> None:
    replies: tuple[Reply, ...] = ("reset", "hang")
    for reply in replies:
        await sandbox.control.reset()
        await sandbox.control.set_behaviour(Behaviour(faults=(Fault(reply=reply, when=when),)))
        submitting = asyncio.create_task(client.submit())
        (entry,) = await sandbox.control.wait_for_requests(
            lambda entries: [entry.outcome for entry in entries] == [outcome]
        )
        assert (entry.reply, (await sandbox.control.list_accounts())["key"].count) == (reply, left)
        await asyncio.wait({submitting}, timeout=0.1 if reply == "hang" else None)
        assert submitting.done() == (reply == "reset")
        submitting.cancel()
        (error,) = await asyncio.gather(submitting, return_exceptions=True)
        assert isinstance(error, httpx2.ReadError if reply == "reset" else asyncio.CancelledError)


async def test_damaged_bodies(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    url = (await client.check(task_id))["images_url"]
    faults = (Fault(on="submit", times=1, reply="cut"), Fault(on="file", times=1, reply="cut"), Fault(reply="garbled"))
    await sandbox.control.set_behaviour(Behaviour(faults=faults))
    for call in (client.submit(), client.http.get(url)):
        with pytest.raises(httpx2.RemoteProtocolError):
            await call
    response = await client.submit()
    assert response.headers["content-type"] == "application/json"
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(response.content)
    assert (await client.http.get(url)).status_code == 200


async def test_wrong_fields(sandbox: RunningSandbox, client: SandboxClient) -> None:
    wrongs: list[tuple[dict[Field, FieldDefect], dict[str, object]]] = [
        ({"err_code": "string", "remaining_count": "float"}, {"err_code": "0", "remaining_count": 2.5}),
        ({"err_code": "missing", "remaining_money": "int"}, {"remaining_count": 1, "remaining_money": 10}),
        ({"remaining_count": "null", "remaining_money": "missing"}, {"err_code": 0, "remaining_count": None}),
        ({"task_id": "null", "remaining_count": "negative"}, {"err_code": 0, "remaining_count": -1, "task_id": None}),
    ]
    for wrong, expected in wrongs:
        await sandbox.control.set_behaviour(Behaviour(faults=(Fault(wrong=wrong),)))
        answer = (await client.submit()).json()
        assert {name: answer.get(name, ...) for name in wrong} == {name: expected.get(name, ...) for name in wrong}
        assert expected.items() <= answer.items()
    await sandbox.control.set_account("key", AccountBalance(1, 0))
    faults = (Fault(on="submit", wrong={"task_id": "int"}), Fault(on="check", times=1, wrong={"status": "null"}))
    await sandbox.control.set_behaviour(Behaviour(faults=faults))
    number = (await client.submit()).json()["task_id"]
    assert isinstance(number, int)
    await sandbox.control.wait_until_idle()
    # It has the value of its digits, exact even as a double.
    states = [(await client.check(str(int(float(number)))))["status"] for _ in range(2)]
    assert states == [None, "Completed"]


async def test_refusals_are_not_charged(sandbox: RunningSandbox, client: SandboxClient) -> None:
    task_id = await client.submit_accepted(user_key="other")
    faults = (Fault(times=1, refuse="任务未找到或状态未知"), Fault(reject="图片内容违规", status=503))
    await sandbox.control.set_behaviour(Behaviour(colon="：", faults=faults))
    assert await client.check(task_id, "other") == {"err_code": 1, "err_msg": "任务未找到或状态未知"}
    response = await client.submit()
    assert response.status_code == 503  # a response with another status keeps its JSON
    assert response.json() == {"err_code": 1, "err_msg": "任务提交失败：图片内容违规"}
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)


async def test_request_is_carried_out_without_its_client(sandbox: RunningSandbox, client: SandboxClient) -> None:
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(latency=0.5),)))
    submitting = asyncio.create_task(client.submit())
    await sandbox.control.wait_for_requests(lambda entries: [entry.outcome for entry in entries] == ["pending"])
    submitting.cancel()
    await sandbox.control.wait_for_requests(lambda entries: entries[0].outcome == "accepted")
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(2, 10)
