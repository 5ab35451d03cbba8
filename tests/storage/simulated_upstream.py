"""A simulated upstream with accounts. Money is in fen."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.domain.ledger import Balance
from service.domain.tasks import Kind


@dataclass
class SimulatedUpstream:
    """Charges at submit, or at the end if `charges_at_end`.

    A check reports the current balance if `reports_current_balance`, otherwise that at the task's end.
    `charged_tasks` and `final_balances` are keyed by task name.
    """

    charges_at_end: bool
    reports_current_balance: bool
    prices: dict[Kind, int]
    balances: dict[int, Balance]
    charged_tasks: set[str] = field(default_factory=set)
    final_balances: dict[str, Balance] = field(default_factory=dict)

    def can_pay(self, account: int, kind: Kind) -> bool:
        balance = self.balances[account]
        return bool(balance.count) or (balance.money_fen or 0) >= self.prices[kind]

    def submit(self, name: str, account: int, kind: Kind) -> None:
        if not self.charges_at_end:
            self._charge(name, account, kind)

    def finish_task(self, name: str, account: int, kind: Kind, *, succeeds: bool) -> Balance:
        """End a task, or check one that has ended. A failed task charges nothing and reports nothing."""
        if not succeeds:
            return Balance()
        if self.charges_at_end:
            self._charge(name, account, kind)
        reported = self.final_balances.setdefault(name, self.balances[account])
        return self.balances[account] if self.reports_current_balance else reported

    def _charge(self, name: str, account: int, kind: Kind) -> None:
        """Charge a prepaid use, otherwise the price, once."""
        balance, price = self.balances[account], self.prices[kind]
        count, money = balance.count or 0, balance.money_fen or 0
        if name in self.charged_tasks:
            return
        self.charged_tasks.add(name)
        if count:
            self.balances[account] = Balance(count - 1, money)
        else:
            self.balances[account] = Balance(0, max(money - price, 0))
