"""Fault injection and the control API."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
import pytest

from service.sandbox.app import RunningSandbox
from service.sandbox.faults import Behaviour, Fault, FaultInjector
from service.sandbox.store import AccountBalance
from tests.sandbox.client import SandboxClient


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
def test_fault_scope(fault: Fault, hits: set[tuple[str, str]]) -> None:
    """A fault applies to its operation and key; without an operation it applies to calls but not to files."""
    injector = FaultInjector()
    injector.behaviour = Behaviour(faults=(fault,))
    operations: list[Literal["submit", "check", "file"]] = ["submit", "check", "file"]
    hit = {(on, key) for on in operations for key in "ab" if injector.next_fault(on, key) is fault}
    assert hit == hits


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"spelling": "Done"}, "Invalid enum value 'Done' - at `$.spelling`"),
        ({"speling": "Completed"}, "unknown field `speling`"),
        ({"seconds": -1}, "`float` >= 0.0 - at `$.seconds`"),
        ({"seconds": "1"}, "Expected `float"),
        ({"prices": {"cats": 1}}, "Invalid enum value 'cats'"),
        ({"faults": [{"times": 0}]}, "`int` >= 1 - at `$.faults[0].times`"),
        ({"faults": [{"reply": "json", "when": "before"}]}, "goes with hang, reset or page"),
        ({"faults": [{"on": "check", "fail": "x"}]}, "about submits"),
        ({"faults": [{"on": "file", "wrong": {"status": "null"}}]}, "a file has none"),
        ({"faults": [{"on": "file", "status": 500}]}, "is a `page`"),
    ],
)
async def test_invalid_behaviour_is_refused(
    sandbox: RunningSandbox, client: SandboxClient, content: dict[str, Any], reason: str
) -> None:
    """An invalid setting gets 400 with the reason and changes nothing."""
    response = await client.http.put("/_control/behaviour", json=content)
    assert response.status_code == 400
    assert reason in response.json()["error"]
    assert await sandbox.control.get_behaviour() == Behaviour()


async def test_behaviour_over_http(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """Faults set over HTTP apply, and the remaining ones can be read."""
    content = {"seconds": 1.5, "faults": [{"on": "submit", "times": 2, "reply": "page", "status": 502}]}
    assert (await client.http.put("/_control/behaviour", json=content)).status_code == 200
    assert (await client.submit()).status_code == 502
    response = await client.http.get("/_control/behaviour")
    assert msgspec.json.decode(response.content, type=Behaviour) == await sandbox.control.get_behaviour()
    assert response.json()["faults"][0]["times"] == 1


async def test_accounts_over_http(client: SandboxClient) -> None:
    """Accounts can be created over HTTP and are listed; a negative balance is refused."""
    created = await client.http.put("/_control/accounts/新", json={"count": 0, "money": 5})
    assert created.status_code == 200
    assert (await client.submit(user_key="新")).json()["remaining_money"] == 4
    refused = await client.http.put("/_control/accounts/key", json={"count": -1, "money": 5})
    assert refused.status_code == 400
    accounts = (await client.http.get("/_control/accounts")).json()
    assert accounts["新"] == {"count": 0, "money": 4}
    assert accounts["key"] == {"count": 3, "money": 10}


async def test_request_records_over_http(client: SandboxClient) -> None:
    """Each request record has operation, fields and outcome."""
    task_id = await client.submit_accepted(fields={"fit": "0.3"})
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


async def test_read_records_do_not_change(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """Records already read do not change while their request continues."""
    await sandbox.control.set_behaviour(Behaviour(faults=(Fault(latency=0.1),)))
    submit = asyncio.ensure_future(client.submit())
    (early,) = await sandbox.control.wait_for_requests(lambda entries: len(entries) == 1)
    await submit
    (late,) = await sandbox.control.list_requests()
    assert (early.outcome, late.outcome) == ("pending", "accepted")


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
    assert (await sandbox.control.list_accounts())["key"] == AccountBalance(3, 10)
    for task_id in (done, running):
        assert (await client.check(task_id))["err_msg"] == "任务未找到或状态未知"
    assert (await client.http.get(url)).status_code == 404


async def test_unknown_control_path(client: SandboxClient) -> None:
    assert (await client.http.get("/_control/knobs")).status_code == 404
    assert (await client.http.post("/_control/behaviour")).status_code == 404


@pytest.mark.parametrize("spelling", ["Completed", "COMPLETED", "completed"])
async def test_spelling_of_states(
    sandbox: RunningSandbox, client: SandboxClient, spelling: Literal["Completed", "COMPLETED", "completed"]
) -> None:
    """States have the letter case that was set."""
    await sandbox.control.set_behaviour(Behaviour(spelling=spelling))
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    assert (await client.check(task_id))["status"] == spelling


async def test_charge_at_the_end(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """When charging at the end, a submit is free, a finished task costs its price, a failed one nothing."""
    doom = Fault(on="submit", user_key="other", fail="内部错误")
    await sandbox.control.set_behaviour(Behaviour(charge="end", faults=(doom,)))
    assert (await client.submit()).json()["remaining_count"] == 3
    await client.submit_accepted(user_key="other")
    await sandbox.control.wait_until_idle()
    accounts = await sandbox.control.list_accounts()
    assert (accounts["key"].count, accounts["other"].count) == (2, 1)


async def test_empty_account_keeps_its_balance(sandbox: RunningSandbox, client: SandboxClient) -> None:
    """When charging at the end, a task finishes although its account can no longer pay."""
    await sandbox.control.set_behaviour(Behaviour(charge="end", seconds=0.1))
    task_id = await client.submit_accepted()
    await sandbox.control.set_account("key", AccountBalance(0, 0))
    await sandbox.control.wait_until_idle()
    answer = await client.check(task_id)
    assert (answer["status"], answer["remaining_money"]) == ("Completed", 0)


@pytest.mark.parametrize(("dial", "expected"), [("now", 99), ("then", 2)])
async def test_checked_balance(
    sandbox: RunningSandbox, client: SandboxClient, dial: Literal["now", "then"], expected: int
) -> None:
    """A check of a finished task returns the current balance or that at its end, as set."""
    await sandbox.control.set_behaviour(Behaviour(checked_balance=dial))
    task_id = await client.submit_accepted()
    await sandbox.control.wait_until_idle()
    await sandbox.control.set_account("key", AccountBalance(99, 0))
    assert (await client.check(task_id))["remaining_count"] == expected
