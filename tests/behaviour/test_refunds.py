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
from tests.behaviour.balance_harness import PRICE_YUAN, BalanceHarness, open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import (
    UNREACHABLE_POLICIES,
    advance_to_next_window,
    expect_json,
    expect_problem,
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
    assert (event["tenant"], event["reservation"], event["reason"]) == ("shop", submission["id"], "It came out blank.")
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


async def test_refunded_unknown_outcome_stays_refunded(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    name = await submit_and_lose_response(gateway)
    assert (await read_charged_today(gateway))[0] == 1
    expect_json(await post_refund(gateway, submission=name, reason="outcome unknown"), 201)
    assert await read_charged_today(gateway) == (0, 0)
    task_id = await recover_task(gateway, name)
    submission = await read_submission(gateway, name)
    assert (submission["outcome"], submission["task"]["id"]) == ("accepted", task_id)
    assert submission["refund"]["reason"] == "outcome unknown"
    assert await read_charged_today(gateway) == (0, 0)
    await gateway.wait_for_task(task_id)
    assert await read_charged_today(gateway) == (0, 0)
    submission = await read_submission(gateway, name)
    assert (submission["refund"]["count"], submission["cost"]["count"]) == (1, 1)
    total = (await read_usage(gateway))["total"]
    assert (total["tasks"]["succeeded"], total["tasks"]["unknown"]) == (1, 0)
    assert total["refunded"] == {"tasks": 1, "count": 1, "money": 0}
    expect_problem(await post_refund(gateway, task=task_id, reason="once more"), 409, "conflict")


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
    reasons: list[Any] = [None, "", " \n\t", "x" * 501, 5]
    wrong: list[tuple[str, dict[str, Any]]] = [
        *(("reason", {"task": "x", "reason": reason}) for reason in reasons),
        ("task", {"task": {}, "reason": "x"}),
        ("submission", {"submission": 5, "reason": "x"}),
        ("nonsense", {"task": "x", "reason": "x", "nonsense": "x"}),
        ("submission", {"reason": "x"}),
        ("submission", {"task": "x", "submission": "y", "reason": "x"}),
        ("reason", {"task": "x"}),
    ]
    for field, body in wrong:
        document = expect_problem(await post_refund(gateway, **body), 422, "invalid-options")
        assert [error["field"] for error in document["errors"]] == [field], body
    expect_problem(await gateway.call_admin("POST", "/refunds", content=b"{"), 400, "malformed-request")


async def test_unknown_target_is_404(gateway: RunningGateway, valkey: Valkey) -> None:
    task = await run_task(gateway)
    forged = task["id"][:-4] + ("AAAA" if task["id"][-4:] != "AAAA" else "BBBB")
    for wrong in ("", "x", "商店", "../../x", "task_", forged, task["id"].upper(), "0" * 32, "G" * 32, "0" * 32 + "\n"):
        for field in ("task", "submission"):
            expect_problem(await post_refund(gateway, **{field: wrong}, reason="x"), 404, "not-found")
    async with Redis.from_url(valkey.url) as client:  # the reservation is lost
        await client.delete(Keys("gw").reservation(submission_id_of(gateway, task)))
    expect_problem(await post_refund(gateway, task=task["id"], reason="x"), 404, "not-found")


async def test_refund_of_a_deleted_tenant(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    await gateway.call_admin("DELETE", "/tenants/shop")
    submission = expect_json(await post_refund(gateway, task=task["id"], reason="a farewell"), 201)
    assert submission["tenant"] == "shop"
    usage = await read_all_usage(gateway)
    assert (usage["total"]["charged"]["tasks"], usage["refunds"][0]["tenant"]) == (0, "shop")


async def test_money_is_refunded_to_the_fen(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        gateway = harness.gateway
        await harness.set_balance(0, 100)
        await gateway.call_admin("PUT", "/accounts/main", json={"max_price": {"vectorize": PRICE_YUAN}})
        await gateway.put_tenant(**UNREACHABLE_POLICIES)
        await harness.run_task()
        task = await harness.expect_accepted()
        assert (await harness.wait_for_cost(task))["money"] == PRICE_YUAN
        await harness.set_behaviour(seconds=3_600)
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
        assert await read_charged_today(gateway) == (1, PRICE_YUAN)


async def submit_with_unknown_outcome(harness: BalanceHarness, balance: tuple[int, int], fault: Fault) -> str:
    """Let the ledger learn charge timing and price, then lose a submit response; return the submission id."""
    await harness.set_balance(*balance)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(fault,))
    response = expect_problem(await harness.submit(), 504, "submission-unknown")
    await harness.control.wait_until_idle()
    name = str(response["submission_id"])
    assert await read_suggestion(harness, name) == "cannot-tell"
    return name


async def read_suggestion(harness: BalanceHarness, name: str) -> str:
    return str((await read_submission(harness.gateway, name))["balance_suggests"])


@pytest.mark.parametrize(
    ("charge", "fault", "balance", "suggests"),
    [
        ("submit", RESPONSE_LOST, (9, 50), "charged"),
        ("submit", REQUEST_LOST, (0, 50), "not-charged"),
        ("submit", REQUEST_LOST, (9, 50), "not-charged"),
        ("end", RESPONSE_LOST, (0, 50), "charged"),
        ("end", REQUEST_LOST, (9, 50), "cannot-tell"),  # its task may still be running
    ],
)
@pytest.mark.parametrize("seen_by", ["submission", "balance check"])
async def test_next_balance_suggests_the_charge(
    valkey: Valkey, charge: str, fault: Fault, balance: tuple[int, int], suggests: str, seen_by: str
) -> None:
    checked_balance = "now" if seen_by == "balance check" else "then"
    async with open_balance_harness(valkey, charge=charge, checked_balance=checked_balance) as harness:
        if seen_by == "balance check":
            await learn_current_balances(harness)
            balance = (4, 0)
        name = await submit_with_unknown_outcome(harness, balance, fault)
        submits_before = await harness.sandbox.count_submits()
        if seen_by == "balance check":
            assert await harness.run_balance_checks() == 1
            assert await harness.sandbox.count_submits() == submits_before
        else:
            await harness.expect_accepted()
        assert await read_suggestion(harness, name) == suggests


async def learn_current_balances(harness: BalanceHarness) -> None:
    """Let the ledger learn that checks of finished tasks report the current balance."""
    await harness.set_balance(1, 0)
    await harness.run_task()
    await harness.expect_refused_locally()
    await harness.set_balance(2, 0)
    assert await harness.run_balance_checks() == 1


async def test_ambiguous_balance_suggests_nothing(valkey: Valkey) -> None:
    """A task beside it, or spending elsewhere, may explain the drop."""
    async with open_balance_harness(valkey, checked_balance="then") as harness:
        name = await submit_with_unknown_outcome(harness, (9, 50), RESPONSE_LOST)
        await harness.set_balance(2, 50)
        await harness.run_task()
        assert await read_suggestion(harness, name) == "cannot-tell"
        await harness.set_balance(9, 50)
        await harness.gateway.advance(60)
        await harness.run_task()
        running = await harness.expect_accepted()
        await harness.set_behaviour(faults=(RESPONSE_LOST,))
        name = str(expect_problem(await harness.submit(), 504, "submission-unknown")["submission_id"])
        await harness.wait_for_cost(running)
        await harness.run_task()
        assert await read_suggestion(harness, name) == "cannot-tell"


async def test_one_submission_per_minute_tries_the_last_use(valkey: Valkey) -> None:
    async with open_balance_harness(valkey, checked_balance="then") as harness:
        await submit_with_unknown_outcome(harness, (3, 0), RESPONSE_LOST)
        submits_before = await harness.sandbox.count_submits()
        expect_problem(await harness.submit(), 402, "balance-exhausted")
        assert await harness.sandbox.count_submits() == submits_before + 1
        await harness.expect_refused_locally()
        await harness.set_balance(2, 0)
        await harness.gateway.advance(60)
        await harness.run_task()


async def test_prepaid_only_tenant_waits_for_a_balance_check(valkey: Valkey) -> None:
    async with open_balance_harness(valkey, checked_balance="now") as harness:
        await harness.gateway.put_tenant(spending_mode="count_only")
        await learn_current_balances(harness)
        name = await submit_with_unknown_outcome(harness, (3, 50), REQUEST_LOST)
        await harness.expect_refused_locally()
        await harness.gateway.advance(60)
        await harness.expect_refused_locally()
        await harness.run_balance_checks()
        assert await read_suggestion(harness, name) == "not-charged"
        await harness.run_task()
        assert await harness.upstream_balance() == (0, 50)
        await harness.expect_refused_locally()
