"""An upstream that keeps real accounts, as unwilling to explain itself as the vendor's. Money is in fen."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from service.domain.ledger import Balance
from service.domain.tasks import Kind

NO_BALANCE = Balance()
"""No figures."""


class Progress(StrEnum):
    """How far a task is."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass
class VendorAccount:
    """What an account really holds."""

    count: int
    money: int

    def balance(self) -> Balance:
        return Balance(self.count, self.money)


@dataclass
class VendorTask:
    """A task of the upstream; `then` is what its account held when it ended."""

    account: int
    kind: Kind
    progress: Progress = Progress.RUNNING
    was_charged: bool = False
    balance_at_end: Balance = NO_BALANCE


@dataclass
class VendorModel:
    """Charges at the submit or (`late`) at the end, and tells with a check the balance of `now` or of then."""

    charges_on_completion: bool
    reports_current_balance: bool
    prices: dict[Kind, int]
    accounts: dict[int, VendorAccount]
    tasks: dict[str, VendorTask] = field(default_factory=dict)

    def submit(self, name: str, account: int, kind: Kind) -> bool:
        """Take a submission; False if the account can't pay."""
        holding = self.accounts[account]
        if holding.count == 0 and holding.money < self.prices[kind]:
            return False
        self.tasks[name] = VendorTask(account, kind)
        if not self.charges_on_completion:
            self._charge(self.tasks[name])
        return True

    def finish(self, name: str, *, succeeds: bool) -> None:
        """End a task."""
        job = self.tasks[name]
        if succeeds and self.charges_on_completion:
            self._charge(job)
        job.progress = Progress.COMPLETED if succeeds else Progress.FAILED
        job.balance_at_end = self.accounts[job.account].balance()

    def check(self, name: str) -> tuple[Progress, Balance]:
        """Ask about a task: only one that was completed tells figures."""
        job = self.tasks[name]
        if job.progress is not Progress.COMPLETED:
            return job.progress, NO_BALANCE
        return job.progress, self.accounts[
            job.account
        ].balance() if self.reports_current_balance else job.balance_at_end

    def _charge(self, job: VendorTask) -> None:
        """Take a use, else the price; an account that ran dry meanwhile keeps the little it has."""
        holding, price = self.accounts[job.account], self.prices[job.kind]
        job.was_charged = holding.count > 0 or holding.money >= price
        if holding.count:
            holding.count -= 1
        elif holding.money >= price:
            holding.money -= price
