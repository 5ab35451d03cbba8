"""An account is looked at by checking a finished task again, where that tells its balance, and nothing is spent."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.faults import Fault
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.aftermath import problem
from tests.behaviour.books import PRICE, Books, opened_books
from tests.support.valkey import Valkey


@pytest.fixture(params=["submit", "end"])
async def books(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[Books]:
    """Books over an upstream whose checks tell the balance of now."""
    async with opened_books(valkey, charge=request.param, checked_balance="now") as found:
        yield found


@pytest.fixture
async def known(books: Books) -> Books:
    """The same once the gateway has found out that checks tell the balance of now, with an exhausted account."""
    await run_dry(books)
    await books.give(1, 0)
    assert await books.looked() == 1
    await books.spend()
    assert (await books.account())["state"] == "exhausted"
    return books


async def run_dry(books: Books) -> None:
    """Take what the account holds, and be refused."""
    await books.give(2, 0)
    for _ in range(2):
        await books.spend()
    await books.refused_unasked()


async def test_top_up_is_seen(books: Books) -> None:
    """An exhausted account that is topped up is used again after one check, and no submission was tried on it."""
    await run_dry(books)
    asked = await books.sandbox.submits()
    await books.give(3, 0)
    assert await books.looked(50) == 0
    assert await books.looked(10) == 1
    account = await books.account()
    assert (account["state"], account["looks"]) == ("open", True)
    assert await books.shown() == (3, 0)
    assert await books.sandbox.submits() == asked
    await books.spend()


async def test_one_look_per_minute(known: Books) -> None:
    """However often two processes ask, an exhausted account is looked at once a minute, and never by a submission."""
    asked = await known.sandbox.submits()
    for _ in range(3):
        assert await known.looked(60) == 1
        for _ in range(5):
            assert await known.looked(11) == 0
            await known.refused_unasked()
        await known.house.advance(5)
    assert await known.sandbox.submits() == asked
    assert (await known.account())["state"] == "exhausted"


async def test_when_to_come_back(known: Books) -> None:
    """A refused tenant is told to come back when the next look is."""
    for passed, wait in ((0, 60), (20, 40), (30, 10)):
        await known.house.advance(passed)
        assert wait - 3 <= int((await known.refused_unasked()).headers["retry-after"]) <= wait
    await known.looked(10)
    assert int((await known.refused_unasked()).headers["retry-after"]) > 57


async def test_nothing_to_look_for(books: Books) -> None:
    """An account that can pay is not looked at."""
    await books.spend()
    assert await books.looked(3_600) == 0


async def test_uses_for_a_thrifty_tenant(books: Books) -> None:
    """A tenant that may spend uses only is served again after a top-up of uses, though the account had money left."""
    await books.house.put_tenant(purse="count_only")
    await books.give(2, 50)
    for _ in range(2):
        await books.spend()
    asked = await books.sandbox.submits()
    assert await books.looked() == 1
    await books.refused_unasked()
    await books.give(2, 50)
    assert await books.looked() == 1
    assert await books.sandbox.submits() == asked
    for _ in range(2):
        await books.spend()
    assert await books.held() == (0, 50)
    assert await books.looked(30) == 0
    assert 20 <= int((await books.refused_unasked()).headers["retry-after"]) <= 30


async def test_money_above_the_floor(books: Books) -> None:
    """An account that is too close to its floor for another task is looked at, and used again after a top-up."""
    await books.house.admin("PUT", "/accounts/main", json={"floor_money": 3 * PRICE, "max_price": {"vectorize": PRICE}})
    await books.give(0, 5 * PRICE - 1)
    await books.spend()
    await books.refused_unasked()
    assert await books.held() == (0, 4 * PRICE - 1)
    await books.give(0, 4 * PRICE)
    assert await books.looked() == 1
    await books.spend()
    assert await books.held() == (0, 3 * PRICE)


@pytest.mark.parametrize("gone", ["upstream", "store"])
async def test_task_that_is_gone(known: Books, valkey: Valkey, gone: str) -> None:
    """A finished task that is known no more, here or there, is asked about once; then submissions probe again."""
    if gone == "upstream":
        await known.turn(faults=(Fault(on="check", refuse="任务未找到或状态未知"),))
    else:
        await forget_tasks(valkey)
    assert await known.looked() == (1 if gone == "upstream" else 0)
    assert await known.looked() == 0
    await known.turn(faults=())
    asked = await known.sandbox.submits()
    problem(await known.submit(), 402, "balance-exhausted")
    assert await known.sandbox.submits() == asked + 1


async def forget_tasks(valkey: Valkey) -> None:
    """Let the store lose what it knows of tasks."""
    connections = connect(valkey.url, timeout=5)
    try:
        async for key in connections.commands.scan_iter(match=Keys("gw").task("*")):
            await connections.commands.delete(key)
    finally:
        await connections.aclose()


NO_ANSWERS = [
    Fault(on="check", reply="reset"),
    Fault(on="check", reply="page", status=503),
    Fault(on="check", refuse="系统繁忙"),
]


@pytest.mark.parametrize("fault", NO_ANSWERS, ids=["reset", "page", "refused"])
async def test_no_answer(known: Books, fault: Fault) -> None:
    """A look that is not answered changes nothing, and the next one tells."""
    await known.give(2, 0)
    await known.turn(faults=(fault,))
    before = await known.account()
    assert await known.looked() >= 1
    after = await known.account()
    assert after == before | {"look_again_at": after["look_again_at"]}
    await known.refused_unasked()
    await known.turn(faults=())
    await known.looked()
    assert await known.shown() == (2, 0)
    await known.spend()


async def test_never_an_answer(known: Books) -> None:
    """Where look after look is answered with nothing of use, submissions probe again, until a task has ended."""
    await known.turn(faults=(Fault(on="check", refuse="系统繁忙"),))
    for _ in range(5):
        await known.refused_unasked()
        await known.looked()
    await known.house.advance(60)
    asked = await known.sandbox.submits()
    problem(await known.submit(), 402, "balance-exhausted")
    assert await known.sandbox.submits() == asked + 1
    await known.refused_unasked()
    await known.turn(faults=())
    await known.give(1, 0)
    await known.house.advance(60)
    await known.spend()
    await known.house.advance(60)
    await known.refused_unasked()


async def test_invalid_account(known: Books) -> None:
    """An account that the upstream does not know is not looked at."""
    await known.house.admin("POST", "/accounts/main/reopen")
    await known.turn(faults=(Fault(on="submit", refuse="账户不存在"),))
    problem(await known.submit(), 503, "account-misconfigured")
    assert await known.looked(3_600) == 0


async def test_while_tasks_run(books: Books) -> None:
    """A look while the last uses are on their way lets no more be sent than there are."""
    await run_dry(books)
    await books.give(3, 0)
    await books.looked()
    await books.turn(seconds=3_600)
    taken = [await books.submit() for _ in range(4)]
    assert [answer.status_code for answer in taken] == [201, 201, 201, 402]
    for _ in range(3):
        await books.looked()
        await books.refused_unasked()


async def test_balance_of_then(valkey: Valkey) -> None:
    """Where a check tells the balance of its task's end, looks change nothing, and submissions go on to probe."""
    async with opened_books(valkey, checked_balance="then") as books:
        await run_dry(books)
        await books.give(3, 0)
        for _ in range(2):
            before = await books.shown()
            await books.looked()
            account = await books.account()
            assert (account["state"], account["looks"]) == ("exhausted", False)
            assert await books.shown() == before == (0, 0)
        await books.spend()
        assert await books.shown() == await books.held() == (2, 0)
