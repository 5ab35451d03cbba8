"""Inference of whether a submission with an unknown outcome was charged."""

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
    async with open_balance_harness(valkey, charge="submit", checked_balance="then") as found:
        yield found


@pytest.fixture
async def at_end(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    async with open_balance_harness(valkey, charge="end", checked_balance="then") as found:
        yield found


async def submit_with_unknown_outcome(books: BalanceHarness, given: tuple[int, int], fault: Fault) -> str:
    """Let the ledger learn charge timing and price, then lose a submit response; return the submission id."""
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
    return str((await read_submission(books.gateway, name))["balance_suggests"])


each_balance_kind = pytest.mark.parametrize("given", [(9, 50), (0, 50)], ids=["uses", "money"])


@each_balance_kind
@pytest.mark.parametrize(("fault", "suggests"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_inference_where_submits_are_charged(
    at_once: BalanceHarness, given: tuple[int, int], fault: Fault, suggests: str
) -> None:
    name = await submit_with_unknown_outcome(at_once, given, fault)
    await at_once.expect_accepted()
    assert await read_suggestion(at_once, name) == suggests


@each_balance_kind
async def test_inference_where_completions_are_charged(at_end: BalanceHarness, given: tuple[int, int]) -> None:
    name = await submit_with_unknown_outcome(at_end, given, RESPONSE_LOST)
    await at_end.expect_accepted()
    assert await read_suggestion(at_end, name) == "charged"


@each_balance_kind
async def test_unchanged_balance_is_inconclusive_before_the_end(at_end: BalanceHarness, given: tuple[int, int]) -> None:
    name = await submit_with_unknown_outcome(at_end, given, REQUEST_LOST)
    await at_end.run_task()
    await at_end.run_task()
    assert await read_suggestion(at_end, name) == "cannot-tell"


async def test_no_inference_for_concurrent_submissions(at_once: BalanceHarness) -> None:
    await at_once.set_balance(9, 50)
    for _ in range(2):
        await at_once.run_task()
    running = await at_once.expect_accepted()
    await at_once.set_behaviour(faults=(RESPONSE_LOST,))
    name = str(expect_problem(await at_once.submit(), 504, "submission-unknown")["submission_id"])
    await at_once.wait_for_cost(running)
    await at_once.run_task()
    assert await read_suggestion(at_once, name) == "cannot-tell"


async def test_no_inference_from_an_excessive_drop(at_once: BalanceHarness) -> None:
    name = await submit_with_unknown_outcome(at_once, (9, 50), RESPONSE_LOST)
    await at_once.set_balance(2, 50)
    await at_once.run_task()
    assert await read_suggestion(at_once, name) == "cannot-tell"


@pytest.mark.parametrize("charge", ["submit", "end"])
@pytest.mark.parametrize(("fault", "told"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_balance_check_infers_the_charge(valkey: Valkey, charge: str, fault: Fault, told: str) -> None:
    """Where completions are charged, only after the task has ended."""
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


async def test_one_submission_per_minute_tries_the_last_use(at_once: BalanceHarness) -> None:
    await submit_with_unknown_outcome(at_once, (3, 0), RESPONSE_LOST)
    asked = await at_once.sandbox.count_submits()
    expect_problem(await at_once.submit(), 402, "balance-exhausted")
    assert await at_once.sandbox.count_submits() == asked + 1
    await at_once.expect_refused_locally()
    await at_once.set_balance(2, 0)
    await at_once.gateway.advance(60)
    await at_once.run_task()


async def test_last_use_is_spent_if_the_lost_submit_took_none(at_end: BalanceHarness) -> None:
    await submit_with_unknown_outcome(at_end, (3, 0), REQUEST_LOST)
    await at_end.run_task()
    assert await at_end.upstream_balance() == (0, 0)


async def test_prepaid_only_tenant_waits_for_a_balance_check(valkey: Valkey) -> None:
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
