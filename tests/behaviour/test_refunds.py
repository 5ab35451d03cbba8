"""Refunds by operators, and the inference of whether an unknown submission was charged."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis

from service.sandbox.faults import Fault
from service.storage.redis import Keys
from service.usecases.ports import SubmitOutcome
from tests.behaviour.balance_harness import PRICE_YUAN, open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import (
    UNREACHABLE_POLICIES,
    advance_to_next_window,
    expect_invalid,
    expect_json,
    expect_problem,
    expect_unknown,
    post_refund,
    read_all_usage,
    read_charged_today,
    read_submission,
    read_usage,
    read_windows,
    recover_task,
    run_task,
    submission_id_of,
    submit_and_lose_response,
)
from tests.support.valkey import Valkey

RESPONSE_LOST = Fault(on="submit", times=1, reply="reset")
REQUEST_LOST = Fault(on="submit", times=1, reply="reset", when="before")


@pytest.mark.smoke
async def test_refunded_task(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    task = await run_task(gateway)
    assert (await read_charged_today(gateway))[0] == 1
    with structlog.testing.capture_logs() as events:
        submission = expect_json(await post_refund(gateway, task=task["id"], reason="It came out blank."), 201)
    (event,) = [item for item in events if item["event"] == "submission.refunded"]
    assert (event["reservation"], event["reason"]) == (submission["id"], "It came out blank.")
    assert await read_charged_today(gateway) == (0, 0)
    assert set((await read_windows(gateway)).values()) == {(0, 0)}
    refund = submission["refund"]
    assert (refund["count"], refund["money"], refund["reason"]) == (1, 0, "It came out blank.")
    assert (submission["tenant"], submission["account"], submission["task"]["id"]) == ("shop", "main", task["id"])
    assert submission["cost"] == task["cost"]
    mine = await read_submission(gateway, submission["id"])
    assert mine == {name: value for name, value in submission.items() if name not in {"tenant", "account"}}
    usage = await read_usage(gateway)
    expected = {"submission": submission["id"], "kind": "face-enhance", "day": task["created_at"][:10], **refund}
    assert usage["refunds"] == [expected]
    assert usage["total"]["tasks"]["succeeded"] == 1
    assert usage["total"]["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    (listed,) = (await read_all_usage(gateway))["refunds"]
    assert listed == expected | {"tenant": "shop", "tenant_id": gateway.services.registry.current.tenants["shop"].id}
    assert (await gateway.call("GET", task["links"]["self"])).json() == task


async def test_concurrent_refunds_count_once(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    task, other = await run_task(gateway), await run_task(gateway)
    name = submission_id_of(gateway, task)
    refunds = [
        post_refund(gateway, **{field: target}, reason=f"{target} as {field}")
        for field in ("task", "submission")
        for target in (task["id"], name)
    ]
    responses = await asyncio.gather(*refunds)
    (made,) = [expect_json(item, 201) for item in responses if item.status_code == 201]
    for response in responses:
        if response.status_code != 201:
            assert made["refund"]["reason"] in expect_problem(response, 409, "conflict")["detail"]
    assert (await read_charged_today(gateway))[0] == 1
    assert len((await read_usage(gateway))["refunds"]) == 1
    assert (await read_submission(gateway, submission_id_of(gateway, other)))["refund"] is None


async def test_refund_goes_to_the_original_windows(gateway: RunningGateway) -> None:
    before = await advance_to_next_window(gateway, "month")
    await gateway.upstream.fail_next_task()
    task = await run_task(gateway)
    assert task["state"] == "failed"
    today = await advance_to_next_window(gateway)
    await run_task(gateway)
    expect_json(await post_refund(gateway, task=task["id"], reason="late"), 201)
    assert await read_windows(gateway) == {"day": (1, 0), "month": (1, 0), "total": (1, 0)}
    usage = await read_usage(gateway)
    charged = [(item["period"], item["charged"]["tasks"]) for item in usage["items"]]
    assert charged == [(str(before), 0), (str(today), 1)]
    (listed,) = usage["refunds"]
    assert (listed["day"], listed["refunded_at"][:10]) == (str(before), str(today))


async def test_running_and_free_submissions_are_not_refundable(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    charged = await read_charged_today(gateway)
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    with structlog.testing.capture_logs() as events:
        expect_problem(await gateway.submit(), 502, "upstream-rejected")
    (refused,) = [event["reservation"] for event in events if event["event"] == "reservation.settled"]
    for target in ({"task": task["id"]}, {"submission": submission_id_of(gateway, task)}, {"submission": refused}):
        expect_problem(await post_refund(gateway, **target, reason="x"), 409, "conflict")
    assert await read_charged_today(gateway) == charged
    assert (await read_usage(gateway))["refunds"] == []


async def test_invalid_refunds(gateway: RunningGateway) -> None:
    wrong: list[tuple[str, dict[str, Any]]] = [
        *(("reason", {"task": "x", "reason": reason}) for reason in (None, " \n\t", "x" * 501, 5)),
        ("submission", {"submission": 5, "reason": "x"}),
        ("nonsense", {"task": "x", "reason": "x", "nonsense": "x"}),
        ("submission", {"reason": "x"}),
        ("submission", {"task": "x", "submission": "y", "reason": "x"}),
    ]
    for field, body in wrong:
        expect_invalid(await post_refund(gateway, **body), field)


async def test_unknown_target_is_404(gateway: RunningGateway, valkey: Valkey) -> None:
    task = await run_task(gateway)
    forged = task["id"][:-4] + ("AAAA" if task["id"][-4:] != "AAAA" else "BBBB")
    for wrong in ("", "商店", "../../x", forged, "0" * 32, "0" * 32 + "\n"):
        for field in ("task", "submission"):
            expect_problem(await post_refund(gateway, **{field: wrong}, reason="x"), 404, "not-found")
    async with Redis.from_url(valkey.url) as client:
        await client.delete(Keys("gw").reservation(submission_id_of(gateway, task)))
    expect_problem(await post_refund(gateway, task=task["id"], reason="x"), 404, "not-found")


async def test_money_is_refunded_to_the_fen(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.sandbox.set_balance(0, 100)
        await gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
        await gateway.put_tenant(**UNREACHABLE_POLICIES)
        await harness.run_task()
        task = await harness.expect_accepted()
        assert (await harness.wait_for_cost(task))["money"] == PRICE_YUAN
        await harness.sandbox.update_behaviour(seconds=3_600)
        unknown = await submit_and_lose_response(gateway, "vectorize")
        assert await read_charged_today(gateway) == (3, 3 * PRICE_YUAN)
        cost = {"count": 0, "money": PRICE_YUAN, "basis": "unknown"}
        assert (await read_submission(gateway, unknown))["cost"] == cost
        expect_json(await post_refund(gateway, task=task["id"], reason="x"), 201)
        assert await read_charged_today(gateway) == (2, 2 * PRICE_YUAN)
        submission = expect_json(await post_refund(gateway, submission=unknown, reason="x"), 201)
        assert (submission["refund"]["count"], submission["refund"]["money"]) == (0, PRICE_YUAN)
        assert await read_charged_today(gateway) == (1, PRICE_YUAN)
        assert (await read_usage(gateway))["total"]["refunded"] == {"tasks": 2, "count": 0, "money": 2 * PRICE_YUAN}
        await recover_task(gateway, unknown)
        submission = await read_submission(gateway, unknown)
        assert (submission["outcome"], submission["refund"]["money"]) == ("accepted", 0)  # until its cost is known
        expect_problem(await post_refund(gateway, submission=unknown, reason="once more"), 409, "conflict")
        assert await read_charged_today(gateway) == (1, PRICE_YUAN)


@pytest.mark.parametrize(
    ("charge", "fault", "balance", "suggests"),
    [
        ("submit", RESPONSE_LOST, (9, 50), "charged"),
        ("submit", REQUEST_LOST, (0, 50), "not-charged"),
        ("end", RESPONSE_LOST, (0, 50), "charged"),
        ("end", REQUEST_LOST, (9, 50), "cannot-tell"),  # its task may still be running
    ],
)
async def test_next_balance_suggests_the_charge(
    valkey: Valkey, charge: str, fault: Fault, balance: tuple[int, int], suggests: str
) -> None:
    async with open_balance_harness(valkey, charge=charge, checked_balance="then") as harness:
        await harness.sandbox.set_balance(*balance)
        await harness.run_tasks()  # from which the ledger learns price and time of charging
        await harness.sandbox.update_behaviour(faults=(fault,))
        name = expect_unknown(await harness.submit())["submission_id"]
        await harness.sandbox.control.wait_until_idle()
        for expected in ("cannot-tell", suggests):
            assert (await read_submission(harness.gateway, name))["balance_suggests"] == expected
            await harness.expect_accepted()
