"""Balance checks of exhausted accounts."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.ledger import AccountState, AccountStatus, Balance
from service.domain.tasks import TaskError
from service.usecases import poller
from service.usecases.poller import BalanceRefresher
from service.usecases.ports import CheckOutcome, CheckResult
from tests.unit.fake_gateway import FakeGateway, wait_until

MAIN = 2


class ExhaustedGateway(FakeGateway):
    """A gateway with a finished task, whose account is exhausted."""

    def __init__(self) -> None:
        super().__init__()
        self.refresher = BalanceRefresher(
            ledger=self.ledger,
            tasks=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
        )

    @property
    def account(self) -> AccountState:
        return self.ledger.states_by_account[MAIN]

    def is_open(self) -> bool:
        return self.account.status is AccountStatus.OPEN

    async def exhaust_account(self) -> None:
        self.upstream.count, self.upstream.money = 1, 0
        await self.submit_image()
        self.ledger.clock.now_ms += self.ledger.retention.check_interval_ms
        await self.poller.start_due()
        await self.poller.wait_idle()
        assert self.account.status is AccountStatus.EXHAUSTED

    async def run_balance_checks(self) -> int:
        """Advance to the next balance check; return the number of upstream checks."""
        before = len(self.upstream.checks)
        self.ledger.clock.now_ms += PROBE_INTERVAL_MS
        await self.refresher.refresh_due()
        return len(self.upstream.checks) - before


@pytest.fixture
async def gateway() -> ExhaustedGateway:
    exhausted_gateway = ExhaustedGateway()
    await exhausted_gateway.exhaust_account()
    return exhausted_gateway


async def test_balance_check_reopens_the_account(gateway: ExhaustedGateway) -> None:
    gateway.upstream.count = 4
    assert await gateway.run_balance_checks() == 1
    assert (gateway.account.status, gateway.account.live_balance_checks) == (AccountStatus.OPEN, True)
    assert await gateway.run_balance_checks() == 0


async def test_only_one_process_checks(gateway: ExhaustedGateway) -> None:
    before = len(gateway.upstream.checks)
    gateway.ledger.clock.now_ms += PROBE_INTERVAL_MS
    await asyncio.gather(gateway.refresher.refresh_due(), gateway.refresher.refresh_due())
    assert len(gateway.upstream.checks) == before + 1


@pytest.mark.parametrize("answered", [CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID])
async def test_failed_check_is_repeated(gateway: ExhaustedGateway, answered: CheckOutcome) -> None:
    gateway.upstream.next_checks.append(CheckResult(outcome=answered, balance=Balance(9, 900)))
    assert await gateway.run_balance_checks() == 1
    assert not gateway.is_open()
    gateway.upstream.count = 4
    assert await gateway.run_balance_checks() == 1
    assert gateway.is_open()


@pytest.mark.parametrize("answered", [CheckOutcome.NOT_FOUND, CheckOutcome.FAILED])
async def test_task_unknown_to_the_upstream_is_not_checked_again(
    gateway: ExhaustedGateway, answered: CheckOutcome
) -> None:
    gateway.upstream.next_checks.append(CheckResult(outcome=answered, error=TaskError("x", "X.")))
    assert await gateway.run_balance_checks() == 1
    assert await gateway.run_balance_checks() == 0


async def test_task_unknown_to_the_ledger_is_not_checked(gateway: ExhaustedGateway) -> None:
    gateway.ledger.tasks.clear()
    assert await gateway.run_balance_checks() == 0
    assert gateway.account.last_finished_task is None


async def test_outages_and_errors_do_not_end_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poller, "BALANCE_REFRESH_SECONDS", 0)
    gateway = ExhaustedGateway()
    await gateway.exhaust_account()
    gateway.ledger.clock.now_ms += PROBE_INTERVAL_MS
    gateway.upstream.count, gateway.ledger.is_unavailable = 4, True
    gateway.upstream.errors.append(RuntimeError("a fault of ours"))
    running = asyncio.create_task(gateway.refresher.run())
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        gateway.ledger.is_unavailable = False
        await wait_until(lambda: not gateway.upstream.errors)
        gateway.ledger.clock.now_ms += PROBE_INTERVAL_MS
        await wait_until(gateway.is_open)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
