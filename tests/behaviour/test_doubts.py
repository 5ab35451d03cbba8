"""What the balance suggests of a submission whose answer was lost, and that no account is stuck because of one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.aftermath import problem
from tests.behaviour.books import KIND, Books, opened_books
from tests.behaviour.spent import submission
from tests.support.valkey import Valkey

TAKEN = Fault(on="submit", times=1, reply="reset")
NEVER_CAME = Fault(on="submit", times=1, reply="reset", when="before")


@pytest.fixture
async def at_once(valkey: Valkey) -> AsyncIterator[Books]:
    """Books over an upstream that charges at the submit."""
    async with opened_books(valkey, charge="submit", checked_balance="then") as found:
        yield found


@pytest.fixture
async def at_end(valkey: Valkey) -> AsyncIterator[Books]:
    """Books over an upstream that charges at the end."""
    async with opened_books(valkey, charge="end", checked_balance="then") as found:
        yield found


async def doubtful(books: Books, given: tuple[int, int], fault: Fault) -> str:
    """Have it known when tasks are charged, and for what, and lose the answer to a lone submission."""
    await books.give(*given)
    for _ in range(2):
        await books.spend()
    await books.turn(faults=(fault,))
    await books.house.advance(0.001)
    answer = problem(await books.house.submit(KIND), 504, "submission-unknown")
    await books.control.idle()
    name = str(answer["submission_id"])
    assert await suggested(books, name) == "cannot-tell"
    return name


async def suggested(books: Books, name: str) -> str:
    """What the balance suggests of a submission."""
    return str((await submission(books.house, name))["balance_suggests"])


PURSES = pytest.mark.parametrize("given", [(9, 50), (0, 50)], ids=["uses", "money"])


@PURSES
@pytest.mark.parametrize(("fault", "suggests"), [(TAKEN, "charged"), (NEVER_CAME, "not-charged")])
async def test_charged_at_the_submit(at_once: Books, given: tuple[int, int], fault: Fault, suggests: str) -> None:
    """The answer to the next submission tells whether the lost one was charged."""
    name = await doubtful(at_once, given, fault)
    await at_once.accepted()
    assert await suggested(at_once, name) == suggests


@PURSES
async def test_charged_at_the_end(at_end: Books, given: tuple[int, int]) -> None:
    """Where tasks are charged late, the next submission's answer shows one that has ended meanwhile."""
    name = await doubtful(at_end, given, TAKEN)
    await at_end.accepted()
    assert await suggested(at_end, name) == "charged"


@PURSES
async def test_not_charged_before_the_end(at_end: Books, given: tuple[int, int]) -> None:
    """Where tasks are charged late, a balance that did not drop tells nothing: its task may run."""
    name = await doubtful(at_end, given, NEVER_CAME)
    await at_end.spend()
    await at_end.spend()
    assert await suggested(at_end, name) == "cannot-tell"


async def test_several_at_once(at_once: Books) -> None:
    """Of a submission that did not have the account to itself the balance tells nothing."""
    await at_once.give(9, 50)
    for _ in range(2):
        await at_once.spend()
    running = await at_once.accepted()
    await at_once.turn(faults=(TAKEN,))
    name = str(problem(await at_once.submit(), 504, "submission-unknown")["submission_id"])
    await at_once.cost(running)
    await at_once.spend()
    assert await suggested(at_once, name) == "cannot-tell"


async def test_somebody_else(at_once: Books) -> None:
    """A drop that no two tasks can cause tells nothing of the lost one."""
    name = await doubtful(at_once, (9, 50), TAKEN)
    await at_once.give(2, 50)
    await at_once.spend()
    assert await suggested(at_once, name) == "cannot-tell"


@pytest.mark.parametrize("charge", ["submit", "end"])
@pytest.mark.parametrize(("fault", "told"), [(TAKEN, "charged"), (NEVER_CAME, "not-charged")])
async def test_a_look_tells(valkey: Valkey, charge: str, fault: Fault, told: str) -> None:
    """A look tells of a lost submission what the next one would: not before its end where tasks are charged late."""
    async with opened_books(valkey, charge=charge, checked_balance="now") as books:
        await books.give(1, 0)
        await books.spend()
        await books.refused_unasked()
        await books.give(2, 0)
        assert await books.looked() == 1
        name = await doubtful(books, (4, 0), fault)
        asked = await books.sandbox.submits()
        assert await books.looked() == 1
        assert await books.sandbox.submits() == asked
        assert await suggested(books, name) == (told if charge == "submit" or told == "charged" else "cannot-tell")


async def test_one_use_left(at_once: Books) -> None:
    """With one use left, which a lost submission may have taken, one submission per minute is tried."""
    await doubtful(at_once, (3, 0), TAKEN)
    asked = await at_once.sandbox.submits()
    problem(await at_once.submit(), 402, "balance-exhausted")
    assert await at_once.sandbox.submits() == asked + 1
    await at_once.refused_unasked()
    await at_once.give(2, 0)
    await at_once.house.advance(60)
    await at_once.spend()


async def test_one_use_left_that_never_came(at_end: Books) -> None:
    """With one use left that nobody took, the submission that is tried takes it."""
    await doubtful(at_end, (3, 0), NEVER_CAME)
    await at_end.spend()
    assert await at_end.held() == (0, 0)


async def test_thrifty_waits_for_a_look(valkey: Valkey) -> None:
    """A tenant that may spend uses only is never the one to try; a look, once the lost one is over, serves it again."""
    async with opened_books(valkey, charge="submit", checked_balance="now") as books:
        await books.house.put_tenant(purse="count_only")
        await books.give(1, 50)
        await books.spend()
        await books.refused_unasked()
        await books.give(2, 50)
        await books.looked()
        name = await doubtful(books, (3, 50), NEVER_CAME)
        await books.refused_unasked()
        await books.house.advance(60)
        await books.refused_unasked()
        await books.looked()
        assert await suggested(books, name) == "not-charged"
        await books.spend()
        assert await books.held() == (0, 50)
        await books.refused_unasked()
