"""An account that can't pay is left alone, looked at now and then, and used again once it can; the next one pays."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.aftermath import problem
from tests.behaviour.books import KIND, PRICE, Books, opened_books
from tests.behaviour.upstreams import USER_KEY
from tests.support.valkey import Valkey

SPARE_KEY = "upstream-key-spare"


@pytest.fixture
async def books(valkey: Valkey) -> AsyncIterator[Books]:
    """Books with a second account `spare`.

    No check tells the balance of now, so that nothing but a submission can find out whether an account can pay again.
    """
    async with opened_books(valkey, checked_balance="then") as found:
        await found.give(50, 0, SPARE_KEY)
        answer = await found.house.admin("PUT", "/accounts/spare", json={"user_key": SPARE_KEY})
        assert answer.status_code == 200, answer.text
        yield found


async def asked_with(books: Books) -> list[str]:
    """The keys that submits were sent with, in order."""
    return [each.user_key for each in await books.control.requests() if each.operation == "submit"]


async def exhausted(books: Books) -> None:
    """Let `main` run dry, and be known to."""
    await books.give(1, 0)
    await books.spend()
    await books.refused_unasked()


async def test_one_probe_per_minute(books: Books) -> None:
    """An exhausted account is asked with one submission a minute, however many want to, and then used as before."""
    await exhausted(books)
    for _ in range(3):
        asked = await books.sandbox.submits()
        await books.house.advance(50)
        await books.refused_unasked()
        await books.house.advance(10)
        tasks, refused = await books.at_once(6)
        assert (tasks, refused) == ([], {402: 6})
        assert await books.sandbox.submits() == asked + 1
        assert (await books.account())["state"] == "exhausted"
    await books.give(5, 0)
    await books.refused_unasked()
    await books.house.advance(60)
    await books.spend()
    assert await books.shown() == (4, 0)
    tasks, refused = await books.at_once(5)
    assert (len(tasks), refused) == (4, {402: 1})


async def test_one_probe_for_all_tenants(books: Books) -> None:
    """Two tenants that wait for the same account do not each get a probe."""
    await books.house.put_tenant("other")
    other = await books.house.new_token("other")
    await exhausted(books)
    await books.house.advance(60)
    asked = await books.sandbox.submits()
    answers = await asyncio.gather(books.house.submit(), books.house.submit(token=other))
    assert [answer.status_code for answer in answers] == [402, 402]
    assert await books.sandbox.submits() == asked + 1


async def test_reopened_without_a_top_up(books: Books) -> None:
    """An operator's reopening lets one submission find out, and if nothing was topped up the account closes again."""
    await exhausted(books)
    for _ in range(2):
        asked = await books.sandbox.submits()
        answer = await books.house.admin("POST", "/accounts/main/reopen")
        assert (answer.json()["state"], answer.json()["remaining_count"]) == ("open", None)
        problem(await books.submit(), 402, "balance-exhausted")
        assert await books.sandbox.submits() == asked + 1
        await books.refused_unasked()
    await books.give(2, 0)
    await books.refused_unasked()
    await books.house.admin("POST", "/accounts/main/reopen")
    assert (await books.spend())["money"] == 0
    assert await books.shown() == await books.held() == (1, 0)


async def test_top_up_that_a_check_tells(books: Books) -> None:
    """A running task whose check tells of a top-up opens its exhausted account, without any probe."""
    await books.turn(checked_balance="now")
    await books.give(1, 0)
    running = await books.accepted()
    await books.refused_unasked()
    await books.give(3, 0)
    await books.cost(running)
    assert (await books.account())["state"] == "open"
    assert await books.shown() == (3, 0)
    assert (await books.submit()).status_code == 201


async def test_topped_up_by_money(books: Books) -> None:
    """Money reopens an account that ran out of uses, but not for a tenant that may spend uses only."""
    await books.house.put_tenant("thrifty", purse="count_only")
    thrifty = await books.house.new_token("thrifty")
    await exhausted(books)
    await books.give(0, 3 * PRICE)
    await books.house.advance(60)
    await books.refused_unasked(token=thrifty)
    await books.spend()
    assert await books.spend() == {"count": 0, "money": PRICE, "basis": "observed"}
    await books.refused_unasked(token=thrifty)
    assert await books.held() == (0, PRICE)


async def test_accounts_in_order(books: Books) -> None:
    """The first account that can pay is used, an exhausted one is passed over, and used again once it was topped up."""
    await books.house.put_tenant(accounts=["main", "spare"])
    await books.give(2, 0)
    for _ in range(4):
        await books.spend()
    assert await asked_with(books) == [USER_KEY] * 2 + [SPARE_KEY] * 2
    assert (await books.held(), await books.held(SPARE_KEY)) == ((0, 0), (48, 0))
    assert (await books.shown(), await books.shown("spare")) == ((0, 0), (48, 0))
    await books.give(9, 0)
    await books.house.advance(60)
    for _ in range(2):
        await books.spend()
    assert (await asked_with(books))[4:] == [USER_KEY] * 2
    assert await books.shown() == (7, 0)


async def test_probe_goes_on_to_the_next(books: Books) -> None:
    """A submission that was to probe an account goes on to the next one, so that its tenant does not notice."""
    await books.house.put_tenant(accounts=["main", "spare"])
    await exhausted_beside_spare(books)
    await books.house.advance(60)
    assert (await books.submit()).status_code == 201
    assert (await asked_with(books))[-2:] == [USER_KEY, SPARE_KEY]
    counted = await books.counted()
    assert (counted["total-tasks"], counted["max-active"]) == ((3, 0), (2, 0))
    assert [(await books.account(name))["in_flight"] for name in ("main", "spare")] == [0, 2]


async def exhausted_beside_spare(books: Books) -> None:
    """Let `main` run dry while `spare` goes on."""
    await books.give(1, 0)
    await books.spend()
    assert (await books.submit()).status_code == 201
    assert (await books.account())["state"] == "exhausted"


async def test_all_exhausted(books: Books) -> None:
    """When no account can pay the tenant is told when the first of them is looked at again, and none is asked."""
    await books.house.put_tenant(accounts=["main", "spare"])
    await books.give(1, 0)
    await books.give(1, 0, SPARE_KEY)
    await books.accepted()
    await books.house.advance(30)
    await books.accepted()
    refused = await books.refused_unasked()
    assert int(refused.headers["retry-after"]) <= 30


async def test_unknown_account_is_passed_over(books: Books) -> None:
    """An account that the upstream does not know is asked once; its tenant is served by the next and not bothered."""
    await books.house.put_tenant(accounts=["main", "spare"])
    await books.house.admin("PUT", "/accounts/main", json={"user_key": "nobody"})
    for _ in range(3):
        await books.spend()
        await books.house.advance(86_400)
    assert await asked_with(books) == ["nobody"] + [SPARE_KEY] * 3
    assert (await books.account())["state"] == "invalid"
    assert (await books.counted())["total-tasks"] == (3, 0)


@pytest.mark.parametrize("cure", ["reopen", "the same key", "a new key"])
async def test_unknown_account(books: Books, cure: str) -> None:
    """An account that the upstream does not know is not asked again before an operator did something about it."""
    await books.turn(faults=(Fault(on="submit", times=1, refuse="账户不存在"),))
    refused = problem(await books.submit(), 503, "account-misconfigured")
    assert "账户" not in str(refused)
    for seconds in (0, 60, 86_400):
        await books.house.advance(seconds)
        answer = await books.submit()
        problem(answer, 503, "account-misconfigured")
        assert "retry-after" not in answer.headers
    assert await asked_with(books) == [USER_KEY]
    assert (await books.account())["look_again_at"] is None
    if cure == "reopen":
        await books.house.admin("POST", "/accounts/main/reopen")
    else:
        key = USER_KEY if cure == "the same key" else SPARE_KEY
        await books.house.admin("PUT", "/accounts/main", json={"user_key": key})
    await books.spend()
    assert (await books.counted())["total-tasks"] == (1, 0)


async def test_neither_known_nor_able(books: Books) -> None:
    """Of an unknown account and an exhausted one the tenant hears of the one that can get better by itself."""
    await books.house.put_tenant(accounts=["main", "spare"])
    await books.house.admin("PUT", "/accounts/main", json={"user_key": "nobody"})
    await books.give(1, 0, SPARE_KEY)
    await books.accepted()
    answers = await asyncio.gather(*(books.house.submit(KIND) for _ in range(3)))
    assert {answer.status_code for answer in answers} == {402}
    assert await asked_with(books) == ["nobody", SPARE_KEY]
    report: dict[str, Any] = (await books.house.call("GET", "/v1/quota")).json()["account"]
    assert report["can_pay"] is False
    assert report["look_again_at"] is not None
