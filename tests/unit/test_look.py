"""Accounts are looked at when the ledger says so, and go on to be whatever one look came to."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.availability import PROBE_INTERVAL
from service.domain.ledger import AccountState, Figures, Status
from service.domain.tasks import TaskError
from service.usecases import poller
from service.usecases.poller import FreeLooks
from service.usecases.ports import Answered, Check
from tests.unit.over_fakes import Gateway, until

MAIN = 2


class Looking(Gateway):
    """A gateway with a finished task, whose account is exhausted."""

    def __init__(self) -> None:
        super().__init__()
        self.looks = FreeLooks(
            ledger=self.ledger,
            tasks=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
        )

    @property
    def account(self) -> AccountState:
        return self.ledger.account_states[MAIN]

    def is_open(self) -> bool:
        return self.account.status is Status.OPEN

    async def run_dry(self) -> None:
        """Have a task done that takes the last use."""
        self.upstream.count, self.upstream.money = 1, 0
        await self.submitted()
        self.ledger.clock.at += self.ledger.spans.check_after
        await self.watch.tick()
        await self.watch.settled()
        assert self.account.status is Status.EXHAUSTED

    async def look(self) -> int:
        """Let the interval pass and look; the checks that took."""
        before = len(self.upstream.checks)
        self.ledger.clock.at += PROBE_INTERVAL
        await self.looks.tick()
        return len(self.upstream.checks) - before


@pytest.fixture
async def gateway() -> Looking:
    found = Looking()
    await found.run_dry()
    return found


async def test_top_up(gateway: Looking) -> None:
    """The newest finished task is checked again, and what it tells opens the account."""
    gateway.upstream.count = 4
    assert await gateway.look() == 1
    assert (gateway.account.status, gateway.account.looks) == (Status.OPEN, True)
    assert await gateway.look() == 0


async def test_two_processes(gateway: Looking) -> None:
    """Of two that ask at once one looks."""
    before = len(gateway.upstream.checks)
    gateway.ledger.clock.at += PROBE_INTERVAL
    await asyncio.gather(gateway.looks.tick(), gateway.looks.tick())
    assert len(gateway.upstream.checks) == before + 1


@pytest.mark.parametrize("answered", [Answered.NOTHING, Answered.UNUSABLE])
async def test_no_answer(gateway: Looking, answered: Answered) -> None:
    """What is not answered, or with nothing of use, changes nothing, and is asked again after the interval."""
    gateway.upstream.next_checks.append(Check(answered=answered, figures=Figures(9, 900)))
    assert await gateway.look() == 1
    assert not gateway.is_open()
    gateway.upstream.count = 4
    assert await gateway.look() == 1
    assert gateway.is_open()


@pytest.mark.parametrize("answered", [Answered.SILENT, Answered.FAILED])
async def test_task_that_tells_nothing(gateway: Looking, answered: Answered) -> None:
    """A task that the upstream knows no more is not asked about again."""
    gateway.upstream.next_checks.append(Check(answered=answered, error=TaskError("x", "X.")))
    assert await gateway.look() == 1
    assert await gateway.look() == 0


async def test_forgotten_task(gateway: Looking) -> None:
    """A task that the ledger knows no more is not asked about at all."""
    gateway.ledger.tasks.clear()
    assert await gateway.look() == 0
    assert gateway.account.newest is None


async def test_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a store that is away nor a fault of ours ends the looking."""
    monkeypatch.setattr(poller, "LOOK_SECONDS", 0)
    gateway = Looking()
    await gateway.run_dry()
    gateway.ledger.clock.at += PROBE_INTERVAL
    gateway.upstream.count, gateway.ledger.away = 4, True
    gateway.upstream.faults.append(RuntimeError("a fault of ours"))
    running = asyncio.create_task(gateway.looks.run())
    try:
        for _ in range(20):
            await asyncio.sleep(0)
        gateway.ledger.away = False
        await until(lambda: not gateway.upstream.faults)
        gateway.ledger.clock.at += PROBE_INTERVAL
        await until(gateway.is_open)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
