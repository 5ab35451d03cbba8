"""Does the same to the scripts on a real server and to their model, in every order."""

from __future__ import annotations

from typing import TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from service.domain.ledger import Figures, Idempotency, ReservationState, Status
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Purse, TenantPolicy
from service.usecases.ports import Answered
from tests.storage.ledger_moves import LedgerMoves
from tests.storage.ledger_pair import ACCOUNTS, TENANT
from tests.storage.ledger_strategies import (
    Whole,
    account_policies,
    answers,
    closings,
    counts,
    idempotencies,
    kinds,
    likely_outcomes,
    limited,
    moneys,
    numbers,
    orders,
    outcomes,
    series,
    spenders,
    steps,
    tellings,
    tenant_policies,
    ticks,
    unlimited,
)
from tests.storage.ledger_views import is_provisional, is_settled

T = TypeVar("T")

accounts = st.sampled_from(ACCOUNTS)
tenants = st.sampled_from([TENANT] * 5 + [9])
gone = st.sampled_from([""] * 9 + ["t", "a", "b"])
rarely = st.sampled_from([False, False, False, True])
takes = st.sampled_from([1, 700])
ends = st.sampled_from([None, True, True, False])


def newest(items: list[T], number: int) -> T:
    return items[number % len(items)]


class LedgerMachine(LedgerMoves):
    """What can happen to a ledger. The fewer the rules, the more often each is drawn: some do several things."""

    @initialize(late=st.booleans(), now=st.booleans(), count=counts, money=moneys, tenant=unlimited, wholes=series)
    def begin(
        self, count: int, money: int, tenant: TenantPolicy, wholes: list[Whole], *, late: bool, now: bool
    ) -> None:
        """Some submissions that do not overlap teach the ledger most about an account."""
        self.set_upstream(late=late, now=now, count=count, money=money)
        self.write(tenant, AccountPolicy(), AccountPolicy())
        for each in wholes:
            self.whole(ACCOUNTS[0], each, 1)

    @rule(tenant=tenant_policies, first=account_policies, second=account_policies, gone=gone)
    def change_limits(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy, gone: str) -> None:
        self.write(tenant, first, second)
        if gone:
            self.drop(gone)

    @rule(account=accounts, count=counts, money=moneys, opens=rarely)
    def change_balance(self, account: int, count: int, money: int, *, opens: bool) -> None:
        """Somebody else tops the account up, or uses it; an operator may have it looked at."""
        self.upstream.balances[account] = Figures(count, money)
        if opens:
            self.both(self.ledger.reopen(account), self.model.reopen(account))

    @rule(kind=kinds, order=orders, idempotency=idempotencies, after=ticks, times=st.sampled_from([1, 1, 3]))
    def submit(
        self, kind: Kind, order: tuple[int, ...], idempotency: Idempotency | None, after: int, times: int
    ) -> None:
        self.wait(after)
        for _ in range(times):
            self.reserve(kind, order, idempotency)

    @rule(policy=limited, kind=kinds, order=orders, times=st.integers(2, 4), moves=st.booleans())
    def crowd(self, policy: TenantPolicy, kind: Kind, order: tuple[int, ...], times: int, *, moves: bool) -> None:
        """Come up against limits with all at once; what an account does not take is moved to another."""
        self.write_tenant(policy)
        for _ in range(times):
            name = self.reserve(kind, order, None)
            if name and moves:
                left = self.model.reservations[name].account
                self.retarget(name, left, tuple(each for each in ACCOUNTS if each != left), None)

    @rule(account=accounts, kind=kinds, after=ticks)
    def overtake(self, account: int, kind: Kind, after: int) -> None:
        """Whoever must not take money has as many under way as there are uses, and then comes who may."""
        self.write_tenant(TenantPolicy(purse=Purse.COUNT_ONLY))
        for _ in range(3):
            self.reserve(kind, (account,), None)
        self.wait(after)
        self.write_tenant(TenantPolicy())
        self.reserve(kind, (account,), None)

    @rule(account=accounts, wholes=series, after=takes, quiet=ends, policy=st.none() | spenders)
    def submit_and_follow(
        self, account: int, wholes: list[Whole], after: int, quiet: bool | None, policy: TenantPolicy | None
    ) -> None:
        """Submissions to one account that do not overlap, nor (if all is made to end) overlap with others."""
        if quiet is not None:
            self.end_everything(succeeds=quiet)
        if policy:
            self.write_tenant(policy)
        for each in wholes:
            self.whole(account, each, after)

    @rule(number=numbers, order=orders, closes=closings, repeats=st.booleans())
    def move(self, number: int, order: tuple[int, ...], closes: Status | None, *, repeats: bool) -> None:
        name = self.reserved(number, order)
        if name is None:
            return
        left = self.model.reservations[name].account
        others = tuple(each for each in (order if len(order) > 1 else ACCOUNTS) if each != left)
        for _ in range(1 + repeats):
            self.retarget(name, left, others, closes)

    @rule(
        number=numbers,
        outcome=likely_outcomes,
        told=tellings,
        closes=closings,
        after=ticks,
        charged=st.booleans(),
        late=st.booleans(),
        elsewhere=rarely,
    )
    def find_out(
        self,
        number: int,
        outcome: ReservationState,
        told: Figures | None,
        closes: Status | None,
        after: int,
        *,
        charged: bool,
        late: bool,
        elsewhere: bool,
    ) -> None:
        name = self.pick(number, is_provisional) or self.reserved(number, ACCOUNTS)
        self.wait(after)
        if name:
            outcome = ReservationState.REFUSED if closes else outcome
            self.settle(name, outcome, told, closes, charged=charged, late=late, elsewhere=elsewhere)

    @rule(number=numbers, outcome=outcomes, told=tellings, closes=closings, idempotency=idempotencies, lost=rarely)
    def repeat(
        self,
        number: int,
        outcome: ReservationState,
        told: Figures | None,
        closes: Status | None,
        idempotency: Idempotency | None,
        *,
        lost: bool,
    ) -> None:
        """Do all that can be done once more to what has an outcome, or was never heard of."""
        name = self.pick(number, is_settled)
        if name is None or number == 0:
            self.made += 1
            name = f"r{self.made}"
        elif lost:
            self.lose(name)
        self.retarget(name, ACCOUNTS[0], ACCOUNTS, closes)
        self.settle(name, outcome, told, closes, idempotency)
        self.reserve_again(name, Kind.UPSCALE)

    @rule(most=st.integers(0, 3), number=numbers, answered=answers, told=tellings, after=ticks)
    def check(self, most: int, number: int, answered: Answered, told: Figures | None, after: int) -> None:
        """Claim checks that are due, and hear of one that is under way."""
        if most:
            self.claim(most)
        self.wait(after)
        if self.claimed:
            self.record(newest(self.claimed, number), answered, told)

    @rule(number=numbers)
    def attend_one(self, number: int) -> None:
        """Look at a task, whatever became of it."""
        if name := self.pick(number, lambda _: True):
            self.attend(name)

    @rule(account=accounts, count_only=st.booleans(), waits=st.booleans(), number=numbers, told=tellings, after=ticks)
    def look_again(
        self, account: int, number: int, told: Figures | None, after: int, *, count_only: bool, waits: bool
    ) -> None:
        """Claim a look if it is due, and hear of one that is under way."""
        if waits:
            self.wait(60_000)
        self.look(account, count_only=count_only)
        self.wait(after)
        if self.looks and number < len(self.looks):
            self.looked(self.looks[number], told)

    @rule(milliseconds=steps, most=st.integers(0, 3))
    def let_pass(self, milliseconds: int, most: int) -> None:
        """Wait, and expire the leases that have run out."""
        self.wait(milliseconds)
        if most:
            self.both(self.ledger.expire(most), self.model.expire(most))

    @rule(milliseconds=st.sampled_from([1, 700, 1_200_000, 90_000_000]), forth=st.sampled_from([0, 0, 500, 1_200_000]))
    def step_back(self, milliseconds: int, forth: int) -> None:
        """The server's clock steps back, which the calls before and after it see."""
        self.attend("nothing")
        self.wait(-milliseconds)
        self.attend("nothing")
        self.wait(forth)

    @rule(tenants=st.sampled_from([(TENANT,), ()]))
    def reset_clock(self, tenants: tuple[int, ...]) -> None:
        """An operator has the ledger's time be the server's again."""
        self.both(self.ledger.reset_clock(tenants, ACCOUNTS), self.model.reset_clock(tenants, ACCOUNTS))

    @precondition(lambda self: self.model.reservations)
    @rule(number=numbers, tenant=tenants, reason=st.sampled_from(["", "它失败了", "a mistake"]))
    def give_back(self, number: int, tenant: int, reason: str) -> None:
        self.refund(tenant, self.pick(number, is_settled) or "never", reason)
