"""Submissions as shown to tenants and operators."""

from __future__ import annotations

from typing import Any

import pytest
import structlog

from service.domain.ledger import ReservationState
from service.domain.tasks import Kind
from service.usecases.ports import Settlement, SubmitOutcome
from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import open_balance_harness
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.upstream_control import USER_KEY
from tests.behaviour.usage_requests import (
    expect_json,
    read_submission,
    recover_task,
    submission_id_of,
    submit_and_lose_response,
)
from tests.support.valkey import Valkey


async def submit_with_status(gateway: RunningGateway, status: int) -> str:
    """Submit and assert the status; return the submission id from the log."""
    with structlog.testing.capture_logs() as events:
        assert (await gateway.submit()).status_code == status
    return str([event["reservation"] for event in events if event["event"] == "reservation.settled"][-1])


async def test_accepted_submission_links_its_task(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    name = submission_id_of(gateway, task)
    response = await gateway.call("GET", f"/v1/submissions/{name}")
    assert response.headers["cache-control"] == "private, no-cache"
    submission = expect_json(response)
    settled_at = submission.pop("settled_at")
    assert settled_at >= task["created_at"]
    expected: dict[str, Any] = {
        "id": name,
        "outcome": "accepted",
        "kind": "face-enhance",
        "created_at": task["created_at"],
        "task": {"id": task["id"], "state": "queued", "link": task["links"]["self"]},
        "cost": {"count": 0, "money": 0, "basis": "unknown"},
        "balance_suggests": None,
        "refund": None,
    }
    assert submission == expected
    for task_or_submission in (name, task["id"]):
        operators = expect_json(await gateway.call_admin("GET", f"/submissions/{task_or_submission}"))
        assert operators == expected | {"settled_at": settled_at, "tenant": "shop", "account": "main"}


async def test_finished_submission_shows_its_cost(gateway: RunningGateway) -> None:
    for _ in range(2):
        task = await gateway.wait_for_task((await gateway.submit()).json()["id"])
        submission = await read_submission(gateway, submission_id_of(gateway, task))
        assert (submission["task"]["state"], submission["cost"]) == ("succeeded", task["cost"])


async def test_unknown_outcome(gateway: RunningGateway) -> None:
    name = await submit_and_lose_response(gateway)
    submission = await read_submission(gateway, name)
    assert (submission["outcome"], submission["task"], submission["refund"]) == ("unknown", None, None)
    assert submission["cost"] == {"count": 0, "money": 0, "basis": "unknown"}
    assert submission["balance_suggests"] == "cannot-tell"
    task_id = await recover_task(gateway, name)
    submission = await read_submission(gateway, name)
    assert (submission["outcome"], submission["balance_suggests"]) == ("accepted", None)
    assert submission["task"] == {"id": task_id, "state": "succeeded", "link": f"/v1/tasks/{task_id}"}


async def test_refused_submissions_are_free(gateway: RunningGateway) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片太小")
    refused = await submit_with_status(gateway, 502)
    dead = {"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"}
    await gateway.call_admin("PUT", "/accounts/dead", json=dead)
    await gateway.put_tenant(accounts=["dead"])
    await gateway.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    not_sent = await submit_with_status(gateway, 503)
    for name, outcome in ((refused, "refused"), (not_sent, "not-sent")):
        submission = await read_submission(gateway, name)
        assert (submission["outcome"], submission["task"], submission["cost"], submission["balance_suggests"]) == (
            outcome,
            None,
            None,
            None,
        )
        assert submission["settled_at"] >= submission["created_at"]
    await gateway.put_tenant()
    await gateway.call_admin("DELETE", "/accounts/dead")
    assert expect_json(await gateway.call_admin("GET", f"/submissions/{not_sent}"))["account"] is None


async def test_tombstone_has_no_creation_time(gateway: RunningGateway) -> None:
    registry = gateway.services.registry.current
    name = "5" * 32
    ledger: Any = gateway.services.quota.ledger
    await ledger.settle(
        Settlement(
            reservation=name,
            tenant=registry.tenants["shop"].id,
            account=registry.accounts["main"].id,
            kind=Kind.SEAMLESS,
            created_at=0,
            outcome=ReservationState.NOT_SENT,
        )
    )
    submission = await read_submission(gateway, name)
    assert (submission["outcome"], submission["created_at"], submission["settled_at"], submission["cost"]) == (
        "not-sent",
        None,
        None,
        None,
    )


async def test_balance_suggests_charged(valkey: Valkey) -> None:
    async with open_balance_harness(valkey) as harness:
        await harness.run_task()
        await harness.run_task()
        name = await submit_and_lose_response(harness.gateway, "vectorize")
        assert (await read_submission(harness.gateway, name))["balance_suggests"] == "cannot-tell"
        await harness.expect_accepted()
        assert (await read_submission(harness.gateway, name))["balance_suggests"] == "charged"


async def test_balance_suggests_not_charged() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        for _ in range(2):
            await gateway.wait_for_task((await gateway.submit()).json()["id"])
        name = await submit_and_lose_response(gateway)
        await gateway.advance(1)
        assert (await gateway.submit()).status_code == 201
        assert (await read_submission(gateway, name))["balance_suggests"] == "not-charged"


@pytest.mark.parametrize("what", ["another's", "none", "malformed"])
async def test_not_found(gateway: RunningGateway, what: str) -> None:
    name = submission_id_of(gateway, (await gateway.submit()).json())
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    never = expect_problem(await gateway.call("GET", f"/v1/submissions/{'0' * 32}", token=other), 404, "not-found")
    wrong = {
        "another's": [name],
        "none": ["f" * 32],
        "malformed": ["x", name[:-1], f"{name}0", name.upper(), f"{name}%0A", f"%00{name}", "%E5%95%86", "*", "%2E%2E"],
    }
    for item in wrong[what]:
        problem = expect_problem(await gateway.call("GET", f"/v1/submissions/{item}", token=other), 404, "not-found")
        assert problem | {"instance": ""} == never | {"instance": ""}, item
        if what != "another's":
            for resource in ("submissions", "tasks"):
                expect_problem(await gateway.call_admin("GET", f"/{resource}/{item}"), 404, "not-found")
    assert expect_json(await gateway.call_admin("GET", f"/submissions/{name}"))["tenant"] == "shop"


async def test_unavailable_store_is_503() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        name = submission_id_of(gateway, (await gateway.submit()).json())
        ledger.is_unavailable = True
        expect_problem(await gateway.call("GET", f"/v1/submissions/{name}"), 503, "ledger-unavailable")
        expect_problem(await gateway.call_admin("GET", f"/submissions/{name}"), 503, "ledger-unavailable")
        for malformed in ("x", f"{name}0", name[1:]):
            expect_problem(await gateway.call("GET", f"/v1/submissions/{malformed}"), 404, "not-found")
        refund = await gateway.call_admin("POST", "/refunds", json={"submission": name, "reason": "x"})
        expect_problem(refund, 503, "ledger-unavailable")
        expect_problem(await gateway.call("GET", "/v1/usage"), 503, "ledger-unavailable")
        expect_problem(await gateway.call_admin("GET", "/usage"), 503, "ledger-unavailable")
