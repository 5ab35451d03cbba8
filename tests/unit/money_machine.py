"""All that can happen between a gateway and its upstream, in any order."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule

from service.domain.ledger import ReservationState
from service.domain.tasks import Kind, TaskError
from service.usecases.ports import Answered, Ask, Check
from tests.unit.money_world import ACCOUNTS, FREE, PRICES, THRIFTY, MoneyWorld, pick
from tests.unit.vendor import UNTOLD, Progress

ENDS = {Progress.RUNNING: Answered.RUNNING, Progress.COMPLETED: Answered.SUCCEEDED, Progress.FAILED: Answered.FAILED}
FAILED = TaskError("failed", "It failed.")

numbers = st.integers(0, 5)
kinds = st.sampled_from(sorted(PRICES))
accounts = st.sampled_from(ACCOUNTS)
mostly = st.sampled_from([True, True, True, False])


class MoneyMachine(MoneyWorld):
    """Does what can happen to submissions, in any order."""

    @rule(thrifty=st.booleans(), kind=kinds, accounts=st.sampled_from([(3,), (4,), (3, 4)]))
    def reserve(self, kind: Kind, accounts: tuple[int, ...], *, thrifty: bool) -> None:
        name, tenant = f"r{len(self.ledger.reservations)}", THRIFTY if thrifty else FREE
        self.is_aimed(name, tenant, kind, self.run(self.ledger.reserve(Ask(name, tenant, accounts, kind)))[0])

    @rule(number=numbers, tells=st.sampled_from([(True, True)] * 3 + [(True, False), (False, True), (False, False)]))
    def arrive(self, number: int, tells: tuple[bool, bool]) -> None:
        sent = self.some(number, arrived=False)
        if sent:
            self.arrives(sent, tells)

    @rule(number=numbers)
    def answer(self, number: int) -> None:
        sent = self.some(number, arrived=True, settled=False)
        if sent:
            self.is_answered(sent)

    @rule(number=numbers)
    def serve(self, number: int) -> None:
        """A submission is taken and answered at once."""
        sent = self.some(number, arrived=False, settled=False)
        if sent and sent.deadline is None:
            self.arrives(sent)
            self.is_answered(sent)

    @rule(succeeds=mostly)
    def watch(self, *, succeeds: bool) -> None:
        """All that runs ends, and is checked."""
        for name in [name for name, job in self.vendor.jobs.items() if job.progress is Progress.RUNNING]:
            self.ends(name, succeeds=succeeds)
        self.ledger.clock.at += 3_000
        while claimed := self.run(self.ledger.claim(9)):
            self.dues += [(each, None) for each in claimed]
        for _ in range(len(self.dues)):
            self.check(0, tells=True)
            self.record(0, lost=False)

    @rule(kind=kinds, thrifty=st.booleans(), pause=st.sampled_from([3, 60]))
    def spend(self, kind: Kind, pause: int, *, thrifty: bool) -> None:
        """A task is done from beginning to end, by itself if nothing else is under way, after a pause."""
        self.wait(pause)
        known = set(self.sent)
        self.reserve(kind, ACCOUNTS[:1], thrifty=thrifty)
        for name in self.sent.keys() - known:
            self.arrives(self.sent[name])
            self.is_answered(self.sent[name])
            self.watch(succeeds=True)

    @rule(number=numbers)
    def no_connection(self, number: int) -> None:
        sent = self.some(number, arrived=False, settled=False)
        if sent and sent.deadline is None and not self.goes_on(sent, None):
            self.settle(sent, ReservationState.NOT_SENT)

    @rule(number=numbers, arrives=st.booleans())
    def lose(self, number: int, *, arrives: bool) -> None:
        """The answer to a submission does not come, or only after it was given up."""
        sent = self.some(number, settled=False)
        if sent and sent.deadline is None:
            if arrives and not sent.arrived:
                self.arrives(sent)
            self.is_given_up(sent)

    @rule(number=numbers, succeeds=mostly)
    def finish(self, number: int, *, succeeds: bool) -> None:
        running = [name for name, job in self.vendor.jobs.items() if job.progress is Progress.RUNNING]
        name = pick(running, number)
        if name:
            self.ends(name, succeeds=succeeds)

    @rule()
    def claim(self) -> None:
        self.dues += [(each, None) for each in self.run(self.ledger.claim(1))]

    @rule(number=numbers, tells=mostly)
    def check(self, number: int, *, tells: bool) -> None:
        asked = pick([index for index, (_, check) in enumerate(self.dues) if check is None], number)
        if asked is None:
            return
        due = self.dues[asked][0]
        progress, figures = self.vendor.check(due.task.reservation)
        check = Check(
            answered=ENDS[progress],
            error=FAILED if progress is Progress.FAILED else None,
            figures=figures if tells else UNTOLD,
        )
        self.ledger.clock.at += 1
        self.dues[asked] = (due, check)

    @rule(number=numbers, lost=st.booleans())
    def record(self, number: int, *, lost: bool) -> None:
        answered = pick([index for index, (_, check) in enumerate(self.dues) if check], number)
        if answered is not None:
            due, check = self.dues.pop(answered)
            if check and not lost:
                self.run(self.ledger.record(due, check))

    @rule(account=accounts)
    def look(self, account: int) -> None:
        look = self.run(self.ledger.look(account, count_only=True))
        if look:
            self.looks.append((look, None))

    @rule(number=numbers)
    def see(self, number: int) -> None:
        asked = pick([index for index, (_, told) in enumerate(self.looks) if told is None], number)
        if asked is not None:
            self.ledger.clock.at += 1
            look = self.looks[asked][0]
            self.looks[asked] = look, self.vendor.check(look.reservation)[1]

    @rule(number=numbers)
    def seen(self, number: int) -> None:
        told = pick([index for index, (_, told) in enumerate(self.looks) if told], number)
        if told is not None:
            look, figures = self.looks.pop(told)
            self.run(self.ledger.looked(look, figures or UNTOLD))

    @rule(account=accounts, count=st.integers(0, 3), money=st.integers(0, 6))
    def top_up(self, account: int, count: int, money: int) -> None:
        self.ledger.clock.at += 1
        holding = self.vendor.holdings[account]
        if holding.count >= self.policy.floor_count:  # uses that nobody can know of would be taken from below the floor
            holding.count += count
        holding.money += money * 100
        self.topped_up.add(account)
        if self.state(account).open:
            self.blurred.add(account)

    @rule(account=accounts)
    def reopen(self, account: int) -> None:
        """An operator has the account tried, whatever runs on it."""
        self.run(self.ledger.reopen(account))
        for sent in self.sent.values():
            sent.bound = sent.bound and sent.account != account

    @rule(seconds=st.sampled_from([3, 60, 700]))
    def wait(self, seconds: int) -> None:
        """Time passes, in which what was given up becomes of something, and what nobody settled is given up."""
        for _ in range(seconds // 60 + 1):
            self.ledger.clock.at += min(seconds, 60) * 1000
            for sent in [*self.sent.values()]:
                if sent.deadline and sent.deadline < self.ledger.clock.at + 60_000:
                    self.comes_to_an_end(sent)
                elif not sent.settled and sent.deadline is None:
                    lease = self.ledger.reservations[sent.name].lease
                    if lease < self.ledger.clock.at + 60_000:
                        self.is_given_up(sent)
