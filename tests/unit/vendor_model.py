"""A vendor with real accounts that reveals as little as the real one. Money is in fen."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from service.domain.ledger import Balance
from service.domain.tasks import Kind

NO_BALANCE = Balance()


class Progress(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass
class VendorAccount:
    count: int
    money: int

    def balance(self) -> Balance:
        return Balance(self.count, self.money)


@dataclass
class VendorTask:
    account: int
    kind: Kind
    progress: Progress = Progress.RUNNING
    was_charged: bool = False
    balance_at_end: Balance = NO_BALANCE


@dataclass
class VendorModel:
    """Charges at the submit or on completion, and reports the current balance or that of the task's end."""

    charges_on_completion: bool
    reports_current_balance: bool
    prices: dict[Kind, int]
    accounts: dict[int, VendorAccount]
    tasks: dict[str, VendorTask] = field(default_factory=dict)

    def submit(self, name: str, account: int, kind: Kind) -> bool:
        """Accept a submission; return False if the account cannot pay."""
        holding = self.accounts[account]
        if holding.count == 0 and holding.money < self.prices[kind]:
            return False
        self.tasks[name] = VendorTask(account, kind)
        if not self.charges_on_completion:
            self._charge(self.tasks[name])
        return True

    def finish(self, name: str, *, succeeds: bool) -> None:
        job = self.tasks[name]
        if succeeds and self.charges_on_completion:
            self._charge(job)
        job.progress = Progress.COMPLETED if succeeds else Progress.FAILED
        job.balance_at_end = self.accounts[job.account].balance()

    def check(self, name: str) -> tuple[Progress, Balance]:
        """Return progress and, only of a completed task, a balance."""
        job = self.tasks[name]
        if job.progress is not Progress.COMPLETED:
            return job.progress, NO_BALANCE
        return job.progress, self.accounts[
            job.account
        ].balance() if self.reports_current_balance else job.balance_at_end

    def _charge(self, job: VendorTask) -> None:
        """Take a use, else the price; an account that is short keeps its balance."""
        holding, price = self.accounts[job.account], self.prices[job.kind]
        job.was_charged = holding.count > 0 or holding.money >= price
        if holding.count:
            holding.count -= 1
        elif holding.money >= price:
            holding.money -= price
