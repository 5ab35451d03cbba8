"""What cost nothing frees its idempotency key, and what is replayed asks neither for quota nor for an account."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from service.usecases.ports import SubmitOutcome
from tests.behaviour.house import MAX_BYTES, House, house_of_fakes
from tests.behaviour.keyed import PLENTY, counted, keyed, lost, made, photo, refused, replayed
from tests.behaviour.upstreams import USER_KEY
from tests.support.images import png

Change = Callable[[House], Awaitable[Any]]


async def _nothing(_: House) -> None:
    """Leave all as it is."""


def _policy(**policy: Any) -> Change:
    return lambda house: house.put_tenant(**policy)


def _next(outcome: SubmitOutcome) -> Change:
    return lambda house: house.upstream.refuse_next(outcome, "因为")


async def _reopen(house: House) -> None:
    assert (await house.admin("POST", "/accounts/main/reopen")).status_code == 200


async def _unreachable(house: House) -> None:
    await house.upstream.refuse_next(SubmitOutcome.NOT_SENT)
    await house.admin("PUT", "/accounts/dead", json={"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"})
    await house.put_tenant(accounts=["dead"])


REFUSALS: dict[str, tuple[Change, int, str, Change]] = {
    "limit": (_policy(limits=[{"window": "total", "tasks": 0}]), 429, "quota-exceeded", _nothing),
    "active tasks": (_policy(max_active=0), 429, "too-many-active-tasks", _nothing),
    "no account": (_policy(accounts=[]), 503, "account-misconfigured", _nothing),
    "rejected": (_next(SubmitOutcome.REJECTED), 502, "upstream-rejected", _nothing),
    "exhausted": (_next(SubmitOutcome.EXHAUSTED), 402, "balance-exhausted", _reopen),
    "unknown account": (_next(SubmitOutcome.INVALID_ACCOUNT), 503, "account-misconfigured", _reopen),
    "not sent": (_unreachable, 503, "upstream-unavailable", _nothing),
}


@pytest.mark.parametrize("why", REFUSALS)
@pytest.mark.parametrize("content", ["same", "other"])
async def test_refusal_frees_the_key(house: House, why: str, content: str) -> None:
    """Once the cause of a refusal is gone the key submits anew, the same or something else, and stands for that."""
    refuse, status, code, mend = REFUSALS[why]
    await refuse(house)
    refused(await keyed(house), status, code)
    await mend(house)
    await house.put_tenant(**PLENTY)
    before = await house.upstream.submits()
    image, other = (photo(), photo(b"b")) if content == "same" else (photo(b"b"), photo())
    task = made(await keyed(house, image=image))
    replayed(await keyed(house, image=image), task)
    refused(await keyed(house, image=other), 422, "idempotency-key-reused")
    assert await house.upstream.submits() == before + 1
    assert await counted(house) == (1, 0, 1)


async def test_refusal_is_given_anew(house: House) -> None:
    """Without a change of its cause a refusal is not replayed but found again, and the upstream asked again."""
    for submits in (1, 2):
        await house.upstream.refuse_next(SubmitOutcome.REJECTED, f"理由{submits}")
        problem = refused(await keyed(house), 502, "upstream-rejected")
        assert problem["upstream_reason"] == f"理由{submits}"
        assert await house.upstream.submits() == submits


async def test_faulty_submission_frees_the_key(house: House) -> None:
    """A submission that could not be read, or whose options or image are wrong, leaves the key to the right one."""
    refused(await keyed(house, fields={"fit": "7"}), 422, "invalid-options")
    refused(await keyed(house, fields={"metadata": "[]"}), 422, "invalid-options")
    refused(await keyed(house, image=png()[:-20]), 422, "invalid-image")
    refused(await keyed(house, image=b"no image"), 415, "unsupported-media-type")
    refused(await keyed(house, image=bytes(MAX_BYTES + 1)), 413, "image-too-large")
    task = made(await keyed(house, fields={"fit": "0.7"}))
    replayed(await keyed(house, fields={"fit": "0.7"}), task)
    assert await house.upstream.submits() == 1


async def test_store_that_was_away() -> None:
    """Where nothing could be reserved the key is still free."""
    async with house_of_fakes() as (house, ledger, upstream):
        ledger.away = True
        refused(await keyed(house), 503, "ledger-unavailable")
        ledger.away = False
        made(await keyed(house, image=photo(b"b")))
        assert len(upstream.submits) == 1


async def _exhausted(house: House) -> None:
    await house.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert (await house.submit()).status_code == 402


async def _deleted(house: House) -> None:
    assert (await house.admin("DELETE", "/accounts/main?force=true")).status_code == 204


OBSTACLES: dict[str, tuple[Change, int, str]] = {
    "limit": (_policy(limits=[{"window": "total", "tasks": 1}]), 429, "quota-exceeded"),
    "active tasks": (_policy(max_active=0), 429, "too-many-active-tasks"),
    "exhausted account": (_exhausted, 402, "balance-exhausted"),
    "no account": (_policy(accounts=[]), 503, "account-misconfigured"),
    "deleted account": (_deleted, 503, "account-misconfigured"),
}


@asynccontextmanager
async def unsent(house: House) -> AsyncIterator[None]:
    """Within the block nothing may reach the upstream."""
    before = await house.upstream.submits()
    yield
    assert await house.upstream.submits() == before


@pytest.mark.parametrize("obstacle", OBSTACLES)
async def test_replayed_whatever_stands_in_the_way(house: House, obstacle: str) -> None:
    """Where a new submission is refused, one of before is replayed all the same, and its key is refused as reused."""
    task = made(await keyed(house))
    hinder, status, code = OBSTACLES[obstacle]
    await hinder(house)
    async with unsent(house):
        refused(await keyed(house, key="another"), status, code)
        replayed(await keyed(house), task)
        refused(await keyed(house, image=photo(b"b")), 422, "idempotency-key-reused")
        refused(await keyed(house, key="another"), status, code)


async def test_lost_answer_without_an_account(house: House) -> None:
    """An unknown outcome is replayed as such, not as a refusal, when the account is gone and the limit used up."""
    await house.upstream.lose_next_answer()
    first = lost(await keyed(house))
    await house.put_tenant(accounts=[], limits=[{"window": "total", "tasks": 1}])
    async with unsent(house):
        lost(await keyed(house), first)


async def test_replay_shows_the_limits_of_now(house: House) -> None:
    """The limits that a replay shows are those of now, and it is not counted towards them."""
    task = made(await keyed(house))
    await house.put_tenant(limits=[{"window": "total", "tasks": 2}])
    for _ in range(3):
        again = await keyed(house)
        replayed(again, task)
        assert (again.headers["ratelimit"], again.headers["ratelimit-policy"]) == (
            '"total-tasks";r=1',
            '"total-tasks";q=2',
        )
    made(await keyed(house, key="another"))
    assert (await keyed(house)).headers["ratelimit"] == '"total-tasks";r=0'


@pytest.mark.parametrize(
    ("policy", "code"), [({"disabled": True}, "tenant-disabled"), ({"kinds": ["vectorize"]}, "kind-not-allowed")]
)
async def test_not_for_who_may_not_submit(house: House, policy: dict[str, Any], code: str) -> None:
    """Who may not submit any more gets no replay either, until it may again."""
    task = made(await keyed(house))
    await house.put_tenant(**policy)
    refused(await keyed(house), 403, code)
    await house.put_tenant()
    replayed(await keyed(house), task)
    assert await house.upstream.submits() == 1
