"""An operator gives back what a submission was charged for: once, at once, and for good."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import structlog

from service.usecases.ports import SubmitOutcome
from tests.behaviour.aftermath import EVERY_POLICY, problem
from tests.behaviour.books import PRICE, opened_books
from tests.behaviour.house import House, house_of_fakes
from tests.behaviour.spent import (
    all_usage,
    counted,
    later,
    lost,
    refund,
    shown,
    submission,
    submission_of,
    turned_up,
    usage,
    windows,
)
from tests.support.valkey import Valkey

FAULTS: Mapping[str, Sequence[Any]] = {
    "reason": [None, "", " \n\t", "x" * 501, 5, ["x"]],
    "task": [5, {}, []],
    "submission": [5, {}, []],
    "nonsense": ["x"],
    "Reason": ["x"],
}


async def spent(house: House) -> dict[str, Any]:
    """A task that has ended."""
    return await house.finished((await house.submit()).json()["id"])


async def test_refunded_task(house: House) -> None:
    """A refunded task counts for nothing in the windows; its submission and the usage show what, when and why."""
    await house.put_tenant(**EVERY_POLICY)
    task = await spent(house)
    assert (await counted(house))[0] == 1
    told = shown(await refund(house, task=task["id"], reason="It came out blank."), 201)
    assert await counted(house) == (0, 0)
    assert set((await windows(house)).values()) == {(0, 0)}
    given = told["refund"]
    assert (given["count"], given["money"], given["reason"]) == (1, 0, "It came out blank.")
    assert (told["tenant"], told["account"], told["task"]["id"]) == ("shop", "main", task["id"])
    assert told["cost"] == task["cost"]
    mine = await submission(house, told["id"])
    assert mine == {name: value for name, value in told.items() if name not in {"tenant", "account"}}
    found = await usage(house)
    (listed,) = found["refunds"]
    expected = {"submission": told["id"], "kind": "face-enhance", "day": task["created_at"][:10], **given}
    assert listed == expected
    assert found["total"]["tasks"]["succeeded"] == 1
    assert found["total"]["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    (listed,) = (await all_usage(house))["refunds"]
    assert listed == expected | {"tenant": "shop", "tenant_id": house.services.registry.current.tenants["shop"].id}
    assert (await house.call("GET", task["links"]["self"])).json() == task


async def test_room_at_once(house: House) -> None:
    """What was refunded can be spent again at once."""
    await house.put_tenant(limits=[{"window": "total", "tasks": 1}])
    task = await spent(house)
    problem(await house.submit(), 429, "quota-exceeded")
    shown(await refund(house, task=task["id"], reason="again"), 201)
    assert (await house.submit()).status_code == 201
    problem(await house.submit(), 429, "quota-exceeded")


async def test_once(house: House) -> None:
    """Of ten refunds of the same at once, named by task or by submission, one is made; the others are told of it."""
    await house.put_tenant(**EVERY_POLICY)
    task, other = await spent(house), await spent(house)
    name = submission_of(house, task)
    wishes = [refund(house, task=task["id"], reason=f"wish {number}") for number in range(5)]
    wishes += [refund(house, submission=name, reason=f"wish {number}") for number in range(5, 10)]
    answers = await asyncio.gather(*wishes)
    (made,) = [shown(each, 201) for each in answers if each.status_code == 201]
    for each in answers:
        if each.status_code != 201:
            detail = problem(each, 409, "conflict")["detail"]
            assert detail.endswith(f"with this reason: {made['refund']['reason']}")
            assert f"at {made['refund']['refunded_at'][:19]}" in detail
    assert (await counted(house))[0] == 1
    assert len((await usage(house))["refunds"]) == 1
    assert (await submission(house, submission_of(house, other)))["refund"] is None


async def test_unknown_that_turns_up(house: House) -> None:
    """A refunded submission of unknown outcome whose task turns up stays refunded, running and ended."""
    await house.put_tenant(**EVERY_POLICY)
    name = await lost(house)
    assert (await counted(house))[0] == 1
    shown(await refund(house, submission=name, reason="nobody knows"), 201)
    assert await counted(house) == (0, 0)
    task_id = await turned_up(house, name)
    told = await submission(house, name)
    assert (told["outcome"], told["task"]["id"], told["refund"]["reason"]) == ("accepted", task_id, "nobody knows")
    assert await counted(house) == (0, 0)
    await house.finished(task_id)
    assert await counted(house) == (0, 0)
    told = await submission(house, name)
    assert (told["refund"]["count"], told["cost"]["count"]) == (1, 1)
    found = (await usage(house))["total"]
    assert (found["tasks"]["succeeded"], found["tasks"]["unknown"]) == (1, 0)
    assert found["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    problem(await refund(house, task=task_id, reason="once more"), 409, "conflict")


async def test_failed_task(house: House) -> None:
    """A failed task stays charged until it is refunded."""
    await house.put_tenant(**EVERY_POLICY)
    await house.upstream.fail_next_task()
    task = await spent(house)
    assert task["state"] == "failed"
    assert (await counted(house))[0] == 1
    shown(await refund(house, task=task["id"], reason="it failed"), 201)
    assert await counted(house) == (0, 0)


async def test_refund_days_later(house: House) -> None:
    """A refund goes to the windows in which the submission was made, and shows on its day; those of today stay."""
    before = await later(house, "month")
    task = await spent(house)
    today = await later(house)
    await spent(house)
    shown(await refund(house, task=task["id"], reason="late"), 201)
    assert await windows(house) == {"day": (1, 0), "month": (1, 0), "total": (1, 0)}
    found = await usage(house)
    assert [(each["period"], each["charged"]["tasks"]) for each in found["items"]] == [
        (str(before), 0),
        (str(today), 1),
    ]
    (listed,) = found["refunds"]
    assert (listed["day"], listed["refunded_at"][:10]) == (str(before), str(today))


async def test_what_can_not_be_refunded(house: House) -> None:
    """What runs can't be refunded yet, what cost nothing never, and neither changes anything."""
    await house.put_tenant(**EVERY_POLICY)
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    before = await counted(house), await usage(house)
    for what in ({"task": task["id"]}, {"submission": submission_of(house, task)}):
        assert "has not ended" in problem(await refund(house, **what, reason="x"), 409, "conflict")["detail"]
    await house.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    with structlog.testing.capture_logs() as events:
        problem(await house.submit(), 502, "upstream-rejected")
    (refused,) = [each["reservation"] for each in events if each["event"] == "reservation.settled"]
    detail = problem(await refund(house, submission=refused, reason="x"), 409, "conflict")["detail"]
    assert detail == f"Submission {refused} cost nothing: it is refused."
    assert await counted(house) == before[0]
    assert (await usage(house))["refunds"] == []


@pytest.mark.parametrize("field", FAULTS)
async def test_faulty_refund(house: House, field: str) -> None:
    """A field of a refund that can't be what it must be is named."""
    for value in FAULTS[field]:
        body: dict[str, object] = {"task": "task_x", "reason": "x"}
        if field == "submission":
            del body["task"]
        document = problem(await refund(house, **(body | {field: value})), 422, "invalid-options")
        assert [each["field"] for each in document["errors"]] == [field], value
        assert all(each["detail"] for each in document["errors"])


async def test_one_thing_at_a_time(house: House) -> None:
    """A refund names a task or a submission, not both and not neither, and gives a reason."""
    for body in ({}, {"task": "x", "submission": "y"}, {"task": None, "submission": None}):
        document = problem(await refund(house, **body, reason="x"), 422, "invalid-options")
        assert document["errors"] == [{"field": "submission", "detail": "must be given, or `task`, but not both"}]
    document = problem(await refund(house, task="x"), 422, "invalid-options")
    assert document["errors"] == [{"field": "reason", "detail": "is required"}]
    problem(await house.admin("POST", "/refunds", content=b"{"), 400, "malformed-request")


async def test_nothing_to_refund(house: House) -> None:
    """What is no task and no submission of this gateway, or no longer one, is 404."""
    task = (await house.submit()).json()
    forged = task["id"][:-4] + ("AAAA" if task["id"][-4:] != "AAAA" else "BBBB")
    for wrong in ("", "task_", "x", forged, task["id"].upper(), task["id"] + "=", "商店"):
        problem(await refund(house, task=wrong, reason="x"), 404, "not-found")
    for wrong in ("", "x", "0" * 32, "0" * 31, "G" * 32, "../../x", task["id"], "0" * 32 + "\n"):
        problem(await refund(house, submission=wrong, reason="x"), 404, "not-found")


async def test_lost_reservation() -> None:
    """A task whose submission the ledger has lost can't be refunded: nobody knows any more what it was charged."""
    async with house_of_fakes() as (house, ledger, _):
        task = await spent(house)
        ledger.reservations.clear()
        problem(await refund(house, task=task["id"], reason="x"), 404, "not-found")


async def test_logged(house: House) -> None:
    """A refund is logged with the tenant, the submission, what was given and why; one that is not made is not."""
    task = await spent(house)
    with structlog.testing.capture_logs() as events:
        told = shown(await refund(house, task=task["id"], reason="It came out blank."), 201)
        problem(await refund(house, task=task["id"], reason="again"), 409, "conflict")
    (event,) = [each for each in events if each["event"] == "submission.refunded"]
    assert (event["tenant"], event["reservation"]) == ("shop", told["id"])
    assert (event["kind"], event["reason"], event["uses"], event["yuan"]) == (
        "face-enhance",
        "It came out blank.",
        1,
        0,
    )


async def test_refund_of_a_deleted_tenant(house: House) -> None:
    """What a deleted tenant spent can be refunded too, under its name, and its windows are not brought back to life."""
    task = await spent(house)
    await house.admin("DELETE", "/tenants/shop")
    told = shown(await refund(house, task=task["id"], reason="a farewell"), 201)
    assert told["tenant"] == "shop"
    found = await all_usage(house)
    assert (found["total"]["charged"]["tasks"], found["refunds"][0]["tenant"]) == (0, "shop")


async def test_money(valkey: Valkey) -> None:
    """Money is given back to the fen, whether it was spent or is held for an unknown outcome."""
    async with opened_books(valkey) as books:
        house = books.house
        await books.give(0, 100)
        await house.admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE}})
        await house.put_tenant(**EVERY_POLICY)
        await books.spend()
        task = await books.accepted()
        assert (await books.cost(task))["money"] == PRICE
        unknown = await lost(house, "vectorize")
        assert await counted(house) == (3, 3 * PRICE)
        assert (await submission(house, unknown))["cost"] == {"count": 0, "money": PRICE, "basis": "unknown"}
        shown(await refund(house, task=task["id"], reason="x"), 201)
        assert await counted(house) == (2, 2 * PRICE)
        told = shown(await refund(house, submission=unknown, reason="x"), 201)
        assert (told["refund"]["count"], told["refund"]["money"]) == (0, PRICE)
        assert await counted(house) == (1, PRICE)
        assert (await usage(house))["total"]["refunded"] == {"tasks": 2, "count": 0, "money": 2 * PRICE}
