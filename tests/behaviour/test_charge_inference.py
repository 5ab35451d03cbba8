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
async def submit_charging(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    async with open_balance_harness(valkey, charge="submit", checked_balance="then") as opened_harness:
        yield opened_harness


@pytest.fixture
async def end_charging(valkey: Valkey) -> AsyncIterator[BalanceHarness]:
    async with open_balance_harness(valkey, charge="end", checked_balance="then") as opened_harness:
        yield opened_harness


async def submit_with_unknown_outcome(harness: BalanceHarness, balance: tuple[int, int], fault: Fault) -> str:
    """Let the ledger learn charge timing and price, then lose a submit response; return the submission id."""
    await harness.set_balance(*balance)
    for _ in range(2):
        await harness.run_task()
    await harness.set_behaviour(faults=(fault,))
    await harness.gateway.advance(0.001)
    response = expect_problem(await harness.gateway.submit(KIND), 504, "submission-unknown")
    await harness.control.wait_until_idle()
    name = str(response["submission_id"])
    assert await read_suggestion(harness, name) == "cannot-tell"
    return name


async def read_suggestion(harness: BalanceHarness, name: str) -> str:
    return str((await read_submission(harness.gateway, name))["balance_suggests"])


each_balance_kind = pytest.mark.parametrize("balance", [(9, 50), (0, 50)], ids=["uses", "money"])


@each_balance_kind
@pytest.mark.parametrize(("fault", "suggests"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_inference_where_submits_are_charged(
    submit_charging: BalanceHarness, balance: tuple[int, int], fault: Fault, suggests: str
) -> None:
    name = await submit_with_unknown_outcome(submit_charging, balance, fault)
    await submit_charging.expect_accepted()
    assert await read_suggestion(submit_charging, name) == suggests


@each_balance_kind
async def test_inference_where_completions_are_charged(end_charging: BalanceHarness, balance: tuple[int, int]) -> None:
    name = await submit_with_unknown_outcome(end_charging, balance, RESPONSE_LOST)
    await end_charging.expect_accepted()
    assert await read_suggestion(end_charging, name) == "charged"


@each_balance_kind
async def test_unchanged_balance_is_inconclusive_before_the_end(
    end_charging: BalanceHarness, balance: tuple[int, int]
) -> None:
    name = await submit_with_unknown_outcome(end_charging, balance, REQUEST_LOST)
    await end_charging.run_task()
    await end_charging.run_task()
    assert await read_suggestion(end_charging, name) == "cannot-tell"


async def test_no_inference_for_concurrent_submissions(submit_charging: BalanceHarness) -> None:
    await submit_charging.set_balance(9, 50)
    for _ in range(2):
        await submit_charging.run_task()
    running = await submit_charging.expect_accepted()
    await submit_charging.set_behaviour(faults=(RESPONSE_LOST,))
    name = str(expect_problem(await submit_charging.submit(), 504, "submission-unknown")["submission_id"])
    await submit_charging.wait_for_cost(running)
    await submit_charging.run_task()
    assert await read_suggestion(submit_charging, name) == "cannot-tell"


async def test_no_inference_from_an_excessive_drop(submit_charging: BalanceHarness) -> None:
    name = await submit_with_unknown_outcome(submit_charging, (9, 50), RESPONSE_LOST)
    await submit_charging.set_balance(2, 50)
    await submit_charging.run_task()
    assert await read_suggestion(submit_charging, name) == "cannot-tell"


@pytest.mark.parametrize("charge", ["submit", "end"])
@pytest.mark.parametrize(("fault", "expected"), [(RESPONSE_LOST, "charged"), (REQUEST_LOST, "not-charged")])
async def test_balance_check_infers_the_charge(valkey: Valkey, charge: str, fault: Fault, expected: str) -> None:
    """Where completions are charged, only after the task has ended."""
    async with open_balance_harness(valkey, charge=charge, checked_balance="now") as harness:
        await harness.set_balance(1, 0)
        await harness.run_task()
        await harness.expect_refused_locally()
        await harness.set_balance(2, 0)
        assert await harness.run_balance_checks() == 1
        name = await submit_with_unknown_outcome(harness, (4, 0), fault)
        submits_before = await harness.sandbox.count_submits()
        assert await harness.run_balance_checks() == 1
        assert await harness.sandbox.count_submits() == submits_before
        assert await read_suggestion(harness, name) == (
            expected if charge == "submit" or expected == "charged" else "cannot-tell"
        )


async def test_one_submission_per_minute_tries_the_last_use(submit_charging: BalanceHarness) -> None:
    await submit_with_unknown_outcome(submit_charging, (3, 0), RESPONSE_LOST)
    submits_before = await submit_charging.sandbox.count_submits()
    expect_problem(await submit_charging.submit(), 402, "balance-exhausted")
    assert await submit_charging.sandbox.count_submits() == submits_before + 1
    await submit_charging.expect_refused_locally()
    await submit_charging.set_balance(2, 0)
    await submit_charging.gateway.advance(60)
    await submit_charging.run_task()


async def test_last_use_is_spent_if_the_lost_submit_took_none(end_charging: BalanceHarness) -> None:
    await submit_with_unknown_outcome(end_charging, (3, 0), REQUEST_LOST)
    await end_charging.run_task()
    assert await end_charging.upstream_balance() == (0, 0)


async def test_prepaid_only_tenant_waits_for_a_balance_check(valkey: Valkey) -> None:
    async with open_balance_harness(valkey, charge="submit", checked_balance="now") as harness:
        await harness.gateway.put_tenant(spending_mode="count_only")
        await harness.set_balance(1, 50)
        await harness.run_task()
        await harness.expect_refused_locally()
        await harness.set_balance(2, 50)
        await harness.run_balance_checks()
        name = await submit_with_unknown_outcome(harness, (3, 50), REQUEST_LOST)
        await harness.expect_refused_locally()
        await harness.gateway.advance(60)
        await harness.expect_refused_locally()
        await harness.run_balance_checks()
        assert await read_suggestion(harness, name) == "not-charged"
        await harness.run_task()
        assert await harness.upstream_balance() == (0, 50)
        await harness.expect_refused_locally()
