"""Accounts at an upstream, as far as a ledger hears of them. Money is in fen."""

from __future__ import annotations

from dataclasses import dataclass, field

from service.domain.ledger import Figures
from service.domain.tasks import Kind


@dataclass
class Upstream:
    """Charges at the submit or (`late`) at the end of a task, and tells with a check the balance of `now` or of then.

    What it took is in `charged`, by name; what it told with the end of a task in `told`.
    """

    late: bool
    now: bool
    prices: dict[Kind, int]
    balances: dict[int, Figures]
    charged: set[str] = field(default_factory=set)
    told: dict[str, Figures] = field(default_factory=dict)

    def can_pay(self, account: int, kind: Kind) -> bool:
        balance = self.balances[account]
        return bool(balance.count) or (balance.money or 0) >= self.prices[kind]

    def submit(self, name: str, account: int, kind: Kind) -> None:
        """Take a submission."""
        if not self.late:
            self._charge(name, account, kind)

    def end(self, name: str, account: int, kind: Kind, *, succeeds: bool) -> Figures:
        """End a task, or ask about one that has ended; one that failed takes nothing then, and tells nothing."""
        if not succeeds:
            return Figures()
        if self.late:
            self._charge(name, account, kind)
        told = self.told.setdefault(name, self.balances[account])
        return self.balances[account] if self.now else told

    def _charge(self, name: str, account: int, kind: Kind) -> None:
        """Take a use, else the price, once."""
        balance, price = self.balances[account], self.prices[kind]
        count, money = balance.count or 0, balance.money or 0
        if name in self.charged:
            return
        self.charged.add(name)
        if count:
            self.balances[account] = Figures(count - 1, money)
        else:
            self.balances[account] = Figures(0, max(money - price, 0))
