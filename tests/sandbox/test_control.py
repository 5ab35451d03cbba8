"""The dials themselves, and the control side over HTTP."""

from __future__ import annotations

import asyncio
from typing import Any, Literal

import msgspec
import pytest

from service.sandbox.app import Balance, RunningSandbox
from service.sandbox.faults import Dials, Fault
from tests.sandbox.caller import Caller


def test_faults_are_a_script() -> None:
    """The first fault that matches applies alone, until it is used up and the next one gets its turn."""
    dials = Dials(faults=(Fault(times=1, reply="reset"), Fault(on="check", reply="hang"), Fault(times=2, status=500)))
    seen = []
    for _ in range(4):
        fault, dials = dials.strike("submit", "key")
        seen.append((fault.reply, fault.status))
    assert seen == [("reset", 200), ("json", 500), ("json", 500), ("json", 200)]
    assert dials.faults == (Fault(on="check", reply="hang"),)


@pytest.mark.parametrize(
    ("fault", "hits"),
    [
        (Fault(reply="hang"), {("submit", "a"), ("submit", "b"), ("check", "a"), ("check", "b")}),
        (Fault(reply="hang", on="check"), {("check", "a"), ("check", "b")}),
        (Fault(reply="hang", user_key="a"), {("submit", "a"), ("check", "a")}),
        (Fault(reply="hang", on="file", user_key="b"), {("file", "b")}),
    ],
)
def test_fault_hits_whom_it_names(fault: Fault, hits: set[tuple[str, str]]) -> None:
    """A fault hits the operation and the key it names; one that names no operation hits calls but not files."""
    dials = Dials(faults=(fault,))
    operations: list[Literal["submit", "check", "file"]] = ["submit", "check", "file"]
    struck = {(on, key) for on in operations for key in "ab" if dials.strike(on, key)[0] is fault}
    assert struck == hits


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
async def test_wrong_dial_is_refused(
    sandbox: RunningSandbox, caller: Caller, content: dict[str, Any], reason: str
) -> None:
    """A dial that does not exist, or not like this, is answered 400 with the reason and changes nothing."""
    response = await caller.client.put("/_control/dials", json=content)
    assert response.status_code == 400
    assert reason in response.json()["error"]
    assert await sandbox.control.dials() == Dials()


async def test_dials_over_http(sandbox: RunningSandbox, caller: Caller) -> None:
    """Dials put over HTTP are in force, and what is left of them can be read."""
    content = {"seconds": 1.5, "faults": [{"on": "submit", "times": 2, "reply": "page", "status": 502}]}
    assert (await caller.client.put("/_control/dials", json=content)).status_code == 200
    assert (await caller.submit()).status_code == 502
    response = await caller.client.get("/_control/dials")
    assert msgspec.json.decode(response.content, type=Dials) == await sandbox.control.dials()
    assert response.json()["faults"][0]["times"] == 1


async def test_accounts_over_http(caller: Caller) -> None:
    """An account can be made over HTTP and is listed with the others; one with a negative figure is refused."""
    made = await caller.client.put("/_control/accounts/新", json={"count": 0, "money": 5})
    assert made.status_code == 200
    assert (await caller.submit(user_key="新")).json()["remaining_money"] == 4
    refused = await caller.client.put("/_control/accounts/key", json={"count": -1, "money": 5})
    assert refused.status_code == 400
    accounts = (await caller.client.get("/_control/accounts")).json()
    assert accounts["新"] == {"count": 0, "money": 4}
    assert accounts["key"] == {"count": 3, "money": 10}


async def test_journal_over_http(caller: Caller) -> None:
    """The journal tells of each request what it was, what it carried and what became of it."""
    task_id = await caller.submitted(fields={"fit": "0.3"})
    await caller.check("1")
    submit, check = (await caller.client.get("/_control/requests")).json()
    assert submit.pop("at") <= check.pop("at")
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


async def test_journal_that_was_read_stands_still(sandbox: RunningSandbox, caller: Caller) -> None:
    """Entries that were read do not change when their request goes on."""
    await sandbox.control.set_dials(Dials(faults=(Fault(latency=0.1),)))
    submit = asyncio.ensure_future(caller.submit())
    (early,) = await sandbox.control.until(lambda entries: len(entries) == 1)
    await submit
    (late,) = await sandbox.control.requests()
    assert (early.outcome, late.outcome) == ("arrived", "accepted")


async def test_reset_leads_back_to_the_beginning(sandbox: RunningSandbox, caller: Caller) -> None:
    """A reset forgets tasks, results and requests, and sets dials and accounts back, even while a task runs."""
    done = await caller.submitted()
    await sandbox.control.idle()
    url = (await caller.check(done))["images_url"]
    await sandbox.control.set_dials(Dials(seconds=3600))
    running = await caller.submitted()
    assert (await caller.client.post("/_control/reset")).status_code == 200
    assert await sandbox.control.requests() == []
    assert await sandbox.control.dials() == Dials()
    assert (await sandbox.control.accounts())["key"] == Balance(3, 10)
    for task_id in (done, running):
        assert (await caller.check(task_id))["err_msg"] == "任务未找到或状态未知"
    assert (await caller.client.get(url)).status_code == 404


async def test_unknown_control(caller: Caller) -> None:
    """What the control side does not have is 404."""
    assert (await caller.client.get("/_control/knobs")).status_code == 404
    assert (await caller.client.post("/_control/dials")).status_code == 404


@pytest.mark.parametrize("spelling", ["Completed", "COMPLETED", "completed"])
async def test_spelling_of_states(
    sandbox: RunningSandbox, caller: Caller, spelling: Literal["Completed", "COMPLETED", "completed"]
) -> None:
    """Every state comes in the letter case that was dialled."""
    await sandbox.control.set_dials(Dials(spelling=spelling))
    task_id = await caller.submitted()
    await sandbox.control.idle()
    assert (await caller.check(task_id))["status"] == spelling


async def test_charge_at_the_end(sandbox: RunningSandbox, caller: Caller) -> None:
    """Charged at the end, a submit costs nothing yet, a completed task its price, and a failed one nothing."""
    doom = Fault(on="submit", user_key="other", fail="内部错误")
    await sandbox.control.set_dials(Dials(charge="end", faults=(doom,)))
    assert (await caller.submit()).json()["remaining_count"] == 3
    await caller.submitted(user_key="other")
    await sandbox.control.idle()
    accounts = await sandbox.control.accounts()
    assert (accounts["key"].count, accounts["other"].count) == (2, 1)


async def test_account_that_ran_dry_keeps_what_it_has(sandbox: RunningSandbox, caller: Caller) -> None:
    """Charged at the end, a task completes although its account can no longer pay."""
    await sandbox.control.set_dials(Dials(charge="end", seconds=0.1))
    task_id = await caller.submitted()
    await sandbox.control.set_account("key", Balance(0, 0))
    await sandbox.control.idle()
    answer = await caller.check(task_id)
    assert (answer["status"], answer["remaining_money"]) == ("Completed", 0)


@pytest.mark.parametrize(("dial", "expected"), [("now", 99), ("then", 2)])
async def test_checked_balance(
    sandbox: RunningSandbox, caller: Caller, dial: Literal["now", "then"], expected: int
) -> None:
    """A check of a finished task tells the balance of now or that of the task's end, as dialled."""
    await sandbox.control.set_dials(Dials(checked_balance=dial))
    task_id = await caller.submitted()
    await sandbox.control.idle()
    await sandbox.control.set_account("key", Balance(99, 0))
    assert (await caller.check(task_id))["remaining_count"] == expected
