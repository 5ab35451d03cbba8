"""Refusals free the idempotency key; replays ignore quota and accounts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.usecases.ports import SubmitOutcome
from tests.behaviour.gateway_fixture import MAX_BYTES, RunningGateway, run_fake_gateway
from tests.behaviour.idempotent_requests import (
    UNREACHABLE_LIMITS,
    expect_created,
    expect_refused,
    expect_replayed,
    expect_unknown,
    make_jpeg,
    read_counts,
    submit_with_key,
)
from tests.behaviour.upstream_control import USER_KEY
from tests.support.images import make_png

Change = Callable[[RunningGateway], Awaitable[Any]]


async def _change_nothing(_: RunningGateway) -> None:
    """Change nothing."""


def _set_policy(**policy: Any) -> Change:
    return lambda gateway: gateway.put_tenant(**policy)


def _refuse_next(outcome: SubmitOutcome) -> Change:
    return lambda gateway: gateway.upstream.refuse_next(outcome, "因为")


async def _reopen(gateway: RunningGateway) -> None:
    assert (await gateway.call_admin("POST", "/accounts/main/reopen")).status_code == 200


async def _use_unreachable_account(gateway: RunningGateway) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await gateway.call_admin("PUT", "/accounts/dead", json={"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"})
    await gateway.put_tenant(accounts=["dead"])


REFUSALS: dict[str, tuple[Change, int, str, Change]] = {
    "limit": (_set_policy(limits=[{"window": "total", "tasks": 0}]), 429, "quota-exceeded", _change_nothing),
    "active tasks": (_set_policy(max_active=0), 429, "too-many-active-tasks", _change_nothing),
    "no account": (_set_policy(accounts=[]), 503, "account-misconfigured", _change_nothing),
    "rejected": (_refuse_next(SubmitOutcome.REJECTED), 502, "upstream-rejected", _change_nothing),
    "exhausted": (_refuse_next(SubmitOutcome.EXHAUSTED), 402, "balance-exhausted", _reopen),
    "unknown account": (_refuse_next(SubmitOutcome.INVALID_ACCOUNT), 503, "account-misconfigured", _reopen),
    "not sent": (_use_unreachable_account, 503, "upstream-unavailable", _change_nothing),
}


@pytest.mark.parametrize("why", REFUSALS)
@pytest.mark.parametrize("content", ["same", "other"])
async def test_refusal_frees_the_key(gateway: RunningGateway, why: str, content: str) -> None:
    refuse, status, code, mend = REFUSALS[why]
    await refuse(gateway)
    expect_refused(await submit_with_key(gateway), status, code)
    await mend(gateway)
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    before = await gateway.upstream.count_submits()
    image, other = (make_jpeg(), make_jpeg(b"b")) if content == "same" else (make_jpeg(b"b"), make_jpeg())
    task = expect_created(await submit_with_key(gateway, image=image))
    expect_replayed(await submit_with_key(gateway, image=image), task)
    expect_refused(await submit_with_key(gateway, image=other), 422, "idempotency-key-reused")
    assert await gateway.upstream.count_submits() == before + 1
    assert await read_counts(gateway) == (1, 0, 1)


async def test_repeated_refusal_is_not_a_replay(gateway: RunningGateway) -> None:
    for submits in (1, 2):
        await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, f"理由{submits}")
        problem = expect_refused(await submit_with_key(gateway), 502, "upstream-rejected")
        assert problem["upstream_reason"] == f"理由{submits}"
        assert await gateway.upstream.count_submits() == submits


async def test_invalid_submission_frees_the_key(gateway: RunningGateway) -> None:
    expect_refused(await submit_with_key(gateway, fields={"fit": "7"}), 422, "invalid-options")
    expect_refused(await submit_with_key(gateway, fields={"metadata": "[]"}), 422, "invalid-options")
    expect_refused(await submit_with_key(gateway, image=make_png()[:-20]), 422, "invalid-image")
    expect_refused(await submit_with_key(gateway, image=b"no image"), 415, "unsupported-media-type")
    expect_refused(await submit_with_key(gateway, image=bytes(MAX_BYTES + 1)), 413, "image-too-large")
    task = expect_created(await submit_with_key(gateway, fields={"fit": "0.7"}))
    expect_replayed(await submit_with_key(gateway, fields={"fit": "0.7"}), task)
    assert await gateway.upstream.count_submits() == 1


async def test_unavailable_store_leaves_the_key_free() -> None:
    async with run_fake_gateway() as (gateway, ledger, upstream):
        ledger.is_unavailable = True
        expect_refused(await submit_with_key(gateway), 503, "ledger-unavailable")
        ledger.is_unavailable = False
        expect_created(await submit_with_key(gateway, image=make_jpeg(b"b")))
        assert len(upstream.submits) == 1


async def _exhaust_account(gateway: RunningGateway) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert (await gateway.submit()).status_code == 402


async def _delete_account(gateway: RunningGateway) -> None:
    assert (await gateway.call_admin("DELETE", "/accounts/main?force=true")).status_code == 204


OBSTACLES: dict[str, tuple[Change, int, str]] = {
    "limit": (_set_policy(limits=[{"window": "total", "tasks": 1}]), 429, "quota-exceeded"),
    "active tasks": (_set_policy(max_active=0), 429, "too-many-active-tasks"),
    "exhausted account": (_exhaust_account, 402, "balance-exhausted"),
    "no account": (_set_policy(accounts=[]), 503, "account-misconfigured"),
    "deleted account": (_delete_account, 503, "account-misconfigured"),
}


@asynccontextmanager
async def assert_no_submits(gateway: RunningGateway) -> AsyncIterator[None]:
    before = await gateway.upstream.count_submits()
    yield
    assert await gateway.upstream.count_submits() == before


@pytest.mark.parametrize("obstacle", OBSTACLES)
async def test_replay_ignores_refusals_of_new_submissions(gateway: RunningGateway, obstacle: str) -> None:
    task = expect_created(await submit_with_key(gateway))
    hinder, status, code = OBSTACLES[obstacle]
    await hinder(gateway)
    async with assert_no_submits(gateway):
        expect_refused(await submit_with_key(gateway, key="another"), status, code)
        expect_replayed(await submit_with_key(gateway), task)
        expect_refused(await submit_with_key(gateway, image=make_jpeg(b"b")), 422, "idempotency-key-reused")
        expect_refused(await submit_with_key(gateway, key="another"), status, code)


async def test_unknown_outcome_is_replayed_without_an_account(gateway: RunningGateway) -> None:
    await gateway.upstream.lose_next_response()
    first = expect_unknown(await submit_with_key(gateway))
    await gateway.put_tenant(accounts=[], limits=[{"window": "total", "tasks": 1}])
    async with assert_no_submits(gateway):
        expect_unknown(await submit_with_key(gateway), first)


async def test_replay_shows_current_limits(gateway: RunningGateway) -> None:
    task = expect_created(await submit_with_key(gateway))
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}])
    for _ in range(3):
        again = await submit_with_key(gateway)
        expect_replayed(again, task)
        assert (again.headers["ratelimit"], again.headers["ratelimit-policy"]) == (
            '"total-tasks";r=1',
            '"total-tasks";q=2',
        )
    expect_created(await submit_with_key(gateway, key="another"))
    assert (await submit_with_key(gateway)).headers["ratelimit"] == '"total-tasks";r=0'


@pytest.mark.parametrize(
    ("policy", "code"), [({"state": "read-only"}, "tenant-read-only"), ({"kinds": ["vectorize"]}, "kind-not-allowed")]
)
async def test_disabled_tenant_gets_no_replay(gateway: RunningGateway, policy: dict[str, Any], code: str) -> None:
    task = expect_created(await submit_with_key(gateway))
    await gateway.put_tenant(**policy)
    expect_refused(await submit_with_key(gateway), 403, code)
    await gateway.put_tenant()
    expect_replayed(await submit_with_key(gateway), task)
    assert await gateway.upstream.count_submits() == 1
