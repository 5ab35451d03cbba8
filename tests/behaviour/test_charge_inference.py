"""What the balance suggests of a submission whose answer was lost, and that no account is stuck because of one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.faults import Fault
from tests.behaviour.audit import expect_problem
from tests.behaviour.balance_harness import KIND, BalanceHarness, open_balance_harness
from tests.behaviour.usage_requests import read_submission
from tests.support.valkey import Valkey

RESPONSE_LOST = Fault(on="submit", times=1, reply="reset")
REQUEST_LOST = Fault(on="submit", times=1, reply="reset", when="before")


@pytest.fixture
async def at_once(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Books over an upstream that charges at the submit."""
    async with open_balance_harness(valkey, charge="submit", checked_balance="then") as found:
        yield found


@pytest.fixture
async def at_end(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    """Books over an upstream that charges at the end."""
    async with open_balance_harness(valkey, charge="end", checked_balance="then") as found:
        yield found


async def submit_with_unknown_outcome(books: BalanceHarness, given: tuple[int, int], fault: Fault) -> str:
    """Have it known when tasks are charged, and for what, and lose the answer to a lone submission."""
    await books.set_balance(*given)
    for _ in range(2):
        await books.run_task()
    await books.set_behaviour(faults=(fault,))
    await books.gateway.advance(0.001)
    answer = expect_problem(await books.gateway.submit(KIND), 504, "submission-unknown")
    await books.control.wait_until_idle()
    name = str(answer["submission_id"])
    assert await read_suggestion(books, name) == "cannot-tell"
    return name


async def read_suggestion(books: BalanceHarness, name: str) -> str:
    """What the balance suggests of a submission."""
    return str((await read_submission(books.gateway, name))["balance_suggests"])


each_balance_kind = pytest.mark.parametrize("given", [(9, 50), (0, 50)], ids=["uses", "money"])


@each_balance_kind
@pytest.mark.parametrize(("fault", "suggests"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_charged_at_the_submit(
    at_once: BalanceHarness, given: tuple[int, int], fault: Fault, suggests: str
) -> None:
    """The answer to the next submission tells whether the lost one was charged."""
    name = await submit_with_unknown_outcome(at_once, given, fault)
    await at_once.expect_accepted()
    assert await read_suggestion(at_once, name) == suggests


@each_balance_kind
async def test_charged_at_the_end(at_end: BalanceHarness, given: tuple[int, int]) -> None:
    """Where tasks are charged late, the next submission's answer shows one that has ended meanwhile."""
    name = await submit_with_unknown_outcome(at_end, given, RESPONSE_LOST)
    await at_end.expect_accepted()
    assert await read_suggestion(at_end, name) == "charged"


@each_balance_kind
async def test_not_charged_before_the_end(at_end: BalanceHarness, given: tuple[int, int]) -> None:
    """Where tasks are charged late, a balance that did not drop tells nothing: its task may run."""
    name = await submit_with_unknown_outcome(at_end, given, REQUEST_LOST)
    await at_end.run_task()
    await at_end.run_task()
    assert await read_suggestion(at_end, name) == "cannot-tell"


async def test_several_at_once(at_once: BalanceHarness) -> None:
    """Of a submission that did not have the account to itself the balance tells nothing."""
    await at_once.set_balance(9, 50)
    for _ in range(2):
        await at_once.run_task()
    running = await at_once.expect_accepted()
    await at_once.set_behaviour(faults=(RESPONSE_LOST,))
    name = str(expect_problem(await at_once.submit(), 504, "submission-unknown")["submission_id"])
    await at_once.wait_for_cost(running)
    await at_once.run_task()
    assert await read_suggestion(at_once, name) == "cannot-tell"


async def test_somebody_else(at_once: BalanceHarness) -> None:
    """A drop that no two tasks can cause tells nothing of the lost one."""
    name = await submit_with_unknown_outcome(at_once, (9, 50), RESPONSE_LOST)
    await at_once.set_balance(2, 50)
    await at_once.run_task()
    assert await read_suggestion(at_once, name) == "cannot-tell"


@pytest.mark.parametrize("charge", ["submit", "end"])
@pytest.mark.parametrize(("fault", "told"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_a_look_tells(valkey: Valkey, charge: str, fault: Fault, told: str) -> None:
    """A look tells of a lost submission what the next one would: not before its end where tasks are charged late."""
    async with open_balance_harness(valkey, charge=charge, checked_balance="now") as books:
        await books.set_balance(1, 0)
        await books.run_task()
        await books.expect_refused_locally()
        await books.set_balance(2, 0)
        assert await books.run_balance_checks() == 1
        name = await submit_with_unknown_outcome(books, (4, 0), fault)
        asked = await books.sandbox.count_submits()
        assert await books.run_balance_checks() == 1
        assert await books.sandbox.count_submits() == asked
        assert await read_suggestion(books, name) == (
            told if charge == "submit" or told == "charged" else "cannot-tell"
        )


async def test_one_use_left(at_once: BalanceHarness) -> None:
    """With one use left, which a lost submission may have taken, one submission per minute is tried."""
    await submit_with_unknown_outcome(at_once, (3, 0), RESPONSE_LOST)
    asked = await at_once.sandbox.count_submits()
    expect_problem(await at_once.submit(), 402, "balance-exhausted")
    assert await at_once.sandbox.count_submits() == asked + 1
    await at_once.expect_refused_locally()
    await at_once.set_balance(2, 0)
    await at_once.gateway.advance(60)
    await at_once.run_task()


async def test_one_use_left_that_never_came(at_end: BalanceHarness) -> None:
    """With one use left that nobody took, the submission that is tried takes it."""
    await submit_with_unknown_outcome(at_end, (3, 0), REQUEST_LOST)
    await at_end.run_task()
    assert await at_end.upstream_balance() == (0, 0)


async def test_thrifty_waits_for_a_look(valkey: Valkey) -> None:
    """A tenant that may spend uses only is never the one to try; a look, once the lost one is over, serves it again."""
    async with open_balance_harness(valkey, charge="submit", checked_balance="now") as books:
        await books.gateway.put_tenant(purse="count_only")
        await books.set_balance(1, 50)
        await books.run_task()
        await books.expect_refused_locally()
        await books.set_balance(2, 50)
        await books.run_balance_checks()
        name = await submit_with_unknown_outcome(books, (3, 50), REQUEST_LOST)
        await books.expect_refused_locally()
        await books.gateway.advance(60)
        await books.expect_refused_locally()
        await books.run_balance_checks()
        assert await read_suggestion(books, name) == "not-charged"
        await books.run_task()
        assert await books.upstream_balance() == (0, 50)
        await books.expect_refused_locally()
