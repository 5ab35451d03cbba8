"""A gateway's ledger and an upstream between which answers get lost, come late, tell nothing, and overtake each other.

Nobody else uses the accounts. What the ledger concludes from the answers is held against what the upstream really has.
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant

from service.domain.availability import PROBE_INTERVAL
from service.domain.ledger import AccountState, Figures, Granted, ReservationState, Status, Suggestion, Verdict
from service.domain.tasks import Kind
from service.domain.tenants import AccountPolicy, Purse, TenantPolicy
from service.usecases.ports import Ask, Check, Due, Look, Settlement, TaskDraft
from tests.fakes import FakeLedger
from tests.model.ledger_model import UNKNOWN_SETTLES
from tests.unit.vendor import UNTOLD, Holding, Progress, Vendor

T = TypeVar("T")

FREE, THRIFTY = 1, 2
"""A tenant that may go on to money, and one that may not."""
ACCOUNTS = (3, 4)
PRICES = {Kind.UPSCALE: 300, Kind.SEAMLESS: 100}

floors = st.sampled_from([0, 0, 2])


@dataclass
class Sent:
    """A submission under way: `arrived` once the upstream had it, with its answer, `deadline` if that was given up.

    `bound` says that the ledger knew enough to keep it from the floors, `thrifty` that it must not take money.
    """

    name: str
    tenant: int
    account: int
    kind: Kind
    created: int
    bound: bool
    thrifty: bool
    arrived: bool = False
    accepted: bool = False
    figures: Figures = UNTOLD
    deadline: int | None = None
    settled: bool = False


def pick(items: list[T], number: int) -> T | None:
    """One of some items, if there are any."""
    return items[number % len(items)] if items else None


class MoneyWorld(RuleBasedStateMachine):
    """What becomes of a submission, and what must hold whatever does."""

    @initialize(
        late=st.booleans(),
        now=st.booleans(),
        count=st.integers(0, 5),
        money=st.integers(0, 10),
        floor_count=floors,
        floor_money=floors,
        priced=st.booleans(),
    )
    def begin(
        self, count: int, money: int, floor_count: int, floor_money: int, *, late: bool, now: bool, priced: bool
    ) -> None:
        self.vendor = Vendor(late, now, PRICES, {each: Holding(count, money * 100) for each in ACCOUNTS})
        self.ledger = FakeLedger()
        self.ledger.tenant_policies = {FREE: TenantPolicy(), THRIFTY: TenantPolicy(purse=Purse.COUNT_ONLY)}
        self.policy = AccountPolicy(floor_count, floor_money * 100, PRICES if priced else {})
        self.ledger.account_policies = dict.fromkeys(ACCOUNTS, self.policy)
        self.sent: dict[str, Sent] = {}
        self.dues: list[tuple[Due, Check | None]] = []
        self.looks: list[tuple[Look, Figures | None]] = []
        self.blurred: set[int] = set()
        self.topped_up: set[int] = set()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """What a call of the ledger in memory answers, which never waits; time goes on."""
        self.ledger.clock.at += 1
        try:
            work.send(None)
        except StopIteration as done:
            answer: T = done.value
            return answer
        raise AssertionError("it waited")

    def state(self, account: int) -> AccountState:
        return self.ledger.account_states.get(account, AccountState())

    def some(self, number: int, **wanted: bool) -> Sent | None:
        """One of the submissions that are so."""
        found = [each for each in self.sent.values() if all(getattr(each, k) == v for k, v in wanted.items())]
        return pick(found, number)

    def is_aimed(self, name: str, tenant: int, kind: Kind, verdict: Verdict) -> None:
        if isinstance(verdict, Granted):
            state = self.state(verdict.account)
            probes = state.probe_at == self.ledger.clock.at + PROBE_INTERVAL
            bound = bool(state.count and state.money) and not probes and verdict.account not in self.blurred
            created = self.ledger.reservations[name].created
            self.sent[name] = Sent(name, tenant, verdict.account, kind, created, bound, tenant == THRIFTY)

    def arrives(self, sent: Sent, tells: tuple[bool, bool] = (True, True)) -> None:
        self.ledger.clock.at += 1
        with self.nothing_that_shall_stay_is_taken(sent):
            accepted = self.vendor.submit(sent.name, sent.account, sent.kind)
        told = self.vendor.holdings[sent.account].figures() if accepted else Figures()
        sent.arrived, sent.accepted = True, accepted
        sent.figures = Figures(told.count if tells[0] else None, told.money if tells[1] else None)

    def is_answered(self, sent: Sent) -> None:
        if sent.accepted:
            draft = TaskDraft(f"task_{sent.name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}"))
            self.settle(sent, ReservationState.ACCEPTED, figures=sent.figures, draft=draft)
        elif sent.deadline or not self.goes_on(sent, Status.EXHAUSTED):
            self.settle(sent, ReservationState.REFUSED, closes=Status.EXHAUSTED)

    def goes_on(self, sent: Sent, closes: Status | None) -> bool:
        """Whether the submission was taken to the other account."""
        other = tuple(each for each in ACCOUNTS if each != sent.account)
        verdict = self.run(self.ledger.retarget(Ask(sent.name, sent.tenant, other, sent.kind), sent.account, closes))
        self.is_aimed(sent.name, sent.tenant, sent.kind, verdict)
        return isinstance(verdict, Granted)

    def is_given_up(self, sent: Sent) -> None:
        """A submission has arrived by now, or never does: it was sent minutes ago, over a connection that is gone.

        One that must not take money is no longer waited for by those that may, and might be overtaken.
        """
        sent.arrived = True
        self.settle(sent, ReservationState.UNKNOWN)
        sent.settled, sent.deadline = False, self.ledger.clock.at + UNKNOWN_SETTLES
        sent.thrifty = False

    def settle(self, sent: Sent, outcome: ReservationState, **more: Any) -> None:
        settlement = Settlement(
            reservation=sent.name,
            tenant=sent.tenant,
            account=sent.account,
            kind=sent.kind,
            created=sent.created,
            outcome=outcome,
            **more,
        )
        assert self.run(self.ledger.settle(settlement))
        sent.settled = True
        if not sent.arrived and outcome is ReservationState.NOT_SENT:
            del self.sent[sent.name]

    def ends(self, name: str, *, succeeds: bool) -> None:
        self.ledger.clock.at += 1
        with self.nothing_that_shall_stay_is_taken(self.sent[name]):
            self.vendor.finish(name, succeeds=succeeds)

    def comes_to_an_end(self, sent: Sent) -> None:
        job = self.vendor.jobs.get(sent.name)
        if not sent.settled and job and job.progress is Progress.RUNNING:
            self.ends(sent.name, succeeds=True)

    @contextmanager
    def nothing_that_shall_stay_is_taken(self, sent: Sent) -> Iterator[None]:
        """See that a submission which is charged in the block keeps to the floors and to its purse."""
        holding = self.vendor.holdings[sent.account]
        before = holding.figures()
        yield
        if not sent.bound:
            return
        assert holding.count == before.count or holding.count >= self.policy.floor_count
        if holding.money != before.money:
            assert not sent.thrifty
            assert holding.money >= self.policy.floor_money or not self.policy.max_price

    @invariant()
    def nobody_else_is_suspected(self) -> None:
        """All that the balances dropped by is known to be the gateway's own."""
        for account in ACCOUNTS:
            state = self.state(account)
            assert (state.unexplained_count, state.unexplained_money) == (0, 0)

    @invariant()
    def figures_are_possible(self) -> None:
        """The accounts hold what is known of them, less what the submissions may have taken that the figures lack."""
        for account in ACCOUNTS:
            state, holding = self.state(account), self.vendor.holdings[account]
            assert min(state.open, state.sending, state.uncharged, state.thrifty, state.astray, state.unknown) >= 0
            if account in self.blurred and state.missing:
                continue
            self.blurred.discard(account)
            assert state.count is None or state.count.value - state.missing <= holding.count
            assert state.money is None or state.money.value - max(PRICES.values()) * state.missing <= holding.money

    @invariant()
    def suggestions_are_right(self) -> None:
        """What is suggested of a submission in doubt is what became of it, unless a top-up looked like its opposite."""
        for name, sent in self.sent.items():
            suggests, job = self.ledger.reservations[name].suggests, self.vendor.jobs.get(name)
            if suggests and sent.account not in self.topped_up:
                assert suggests is (Suggestion.CHARGED if job and job.charged else Suggestion.NOT_CHARGED)
