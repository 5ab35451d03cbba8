"""An upstream that keeps real accounts, as unwilling to explain itself as the vendor's. Money is in fen."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from service.domain.ledger import Figures
from service.domain.tasks import Kind

UNTOLD = Figures()
"""No figures."""


class Progress(StrEnum):
    """How far a task is."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass
class Holding:
    """What an account really holds."""

    count: int
    money: int

    def figures(self) -> Figures:
        return Figures(self.count, self.money)


@dataclass
class Job:
    """A task of the upstream; `then` is what its account held when it ended."""

    account: int
    kind: Kind
    progress: Progress = Progress.RUNNING
    charged: bool = False
    then: Figures = UNTOLD


@dataclass
class Vendor:
    """Charges at the submit or (`late`) at the end, and tells with a check the balance of `now` or of then."""

    late: bool
    now: bool
    prices: dict[Kind, int]
    holdings: dict[int, Holding]
    jobs: dict[str, Job] = field(default_factory=dict)

    def submit(self, name: str, account: int, kind: Kind) -> bool:
        """Take a submission; False if the account can't pay."""
        holding = self.holdings[account]
        if holding.count == 0 and holding.money < self.prices[kind]:
            return False
        self.jobs[name] = Job(account, kind)
        if not self.late:
            self._charge(self.jobs[name])
        return True

    def finish(self, name: str, *, succeeds: bool) -> None:
        """End a task."""
        job = self.jobs[name]
        if succeeds and self.late:
            self._charge(job)
        job.progress = Progress.COMPLETED if succeeds else Progress.FAILED
        job.then = self.holdings[job.account].figures()

    def check(self, name: str) -> tuple[Progress, Figures]:
        """Ask about a task: only one that was completed tells figures."""
        job = self.jobs[name]
        if job.progress is not Progress.COMPLETED:
            return job.progress, UNTOLD
        return job.progress, self.holdings[job.account].figures() if self.now else job.then

    def _charge(self, job: Job) -> None:
        """Take a use, else the price; an account that ran dry meanwhile keeps the little it has."""
        holding, price = self.holdings[job.account], self.prices[job.kind]
        job.charged = holding.count > 0 or holding.money >= price
        if holding.count:
            holding.count -= 1
        elif holding.money >= price:
            holding.money -= price
