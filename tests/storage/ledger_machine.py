"""Does the same to the scripts on a real server and to their model, and compares what they answer and what they hold.

Beside that it holds both to what the books must obey whatever happens, counted anew from the reservations alone.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule

from service.domain import windows
from service.domain.account import AccountState, Figures, Status
from service.domain.errors import LedgerUnavailable
from service.domain.registry import Registry
from service.domain.reservation import Granted, Idempotency, Reservation, ReservationState
from service.domain.task import Artifact, ArtifactName, Kind, TaskError
from service.domain.tenancy import Account, AccountPolicy, Limit, Purse, Tenant, TenantPolicy, Window
from service.domain.usage import DayUsage, Tally, charged_money, charged_tasks
from service.domain.windows import TenantState
from service.storage.books import RedisBooks
from service.storage.connect import connect
from service.storage.keys import Keys
from service.storage.ledger import DAY, RedisLedger, Spans
from service.storage.registry import RedisRegistry
from service.storage.scripts import Scripts
from service.storage.tasks import RedisTasks
from service.usecases.ports import Answered, Ask, Check, Due, RegistryChange, Settlement, TaskDraft
from tests.fakes import FakeClock, FakeLedger, FakeRegistry

T = TypeVar("T")

TENANT, ACCOUNTS = 1, (2, 3)
LATER = 2_524_607_999_000
"""A second before the year 2050: every window ends in the next second, and the server's own clock is far behind."""

amounts = st.none() | st.integers(0, 6)
idempotencies = st.none() | st.builds(Idempotency, st.sampled_from(["k1", "k2"]), st.sampled_from(["c1", "c2"]))
limits = st.builds(Limit, st.sampled_from(Window), tasks=amounts, money=st.none() | st.integers(0, 600))
tenant_policies = st.builds(
    TenantPolicy,
    limits=st.lists(limits, max_size=3, unique_by=lambda each: each.window).map(tuple),
    max_active=st.none() | st.integers(0, 4),
    purse=st.sampled_from(Purse),
)
account_policies = st.builds(
    AccountPolicy,
    floor_count=st.integers(0, 2),
    floor_money=st.sampled_from([0, 100]),
    max_price=st.dictionaries(st.sampled_from(Kind), st.sampled_from([0, 100, 250]), max_size=2),
)
figures = st.builds(Figures, count=st.none() | st.integers(0, 5), money=st.none() | st.sampled_from([0, 100, 200, 300]))
outcomes = st.sampled_from([each for each in ReservationState if each is not ReservationState.RESERVED])
closings = st.none() | st.sampled_from([Status.EXHAUSTED, Status.INVALID])
steps = st.sampled_from([1, 999, 2_500, 30_000, 60_000, 180_000, 3_600_000, 86_400_000, 31 * 86_400_000])
checks = st.one_of(
    st.just(Check(answered=Answered.RUNNING)),
    st.just(Check(answered=Answered.SILENT)),
    st.just(Check(answered=Answered.NOTHING)),
    st.builds(Check, answered=st.just(Answered.UNUSABLE), figures=figures),
    st.builds(
        Check,
        answered=st.just(Answered.SUCCEEDED),
        artifacts=st.just((Artifact(ArtifactName.IMAGE, "http://up.test/1.png"),)),
        figures=figures,
    ),
    st.builds(
        Check, answered=st.just(Answered.FAILED), error=st.just(TaskError("failed", "It failed.")), figures=figures
    ),
)


class LedgerMachine(RuleBasedStateMachine):
    """Does the same to both, and compares what they answer and what they hold."""

    reservations: Bundle[str] = Bundle("reservations")
    claims: Bundle[Due] = Bundle("claims")

    def __init__(self, url: str) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.spans = Spans(lost_after=90_000, unusable_after=200_000)
        self.model = FakeLedger(clock=FakeClock(LATER), spans=self.spans)
        self.registry = FakeRegistry(self.model)
        self.keys = Keys("model")
        self.made = 0
        self.lossy = False
        self.final: dict[str, ReservationState] = {}
        self.run(self._open(url))
        self.change_limits(TenantPolicy(), AccountPolicy(), AccountPolicy())

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        scripts = Scripts(self.client)
        self.ledger = RedisLedger(self.client, scripts, self.keys, self.spans)
        self.tasks = RedisTasks(self.client, scripts, self.keys, self.spans)
        self.books = RedisBooks(self.client, scripts, self.keys)
        self.store = RedisRegistry(self.client, scripts, self.keys)
        await self.client.set(self.keys.clock, LATER)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.runner.close()

    def both(
        self,
        real: Coroutine[Any, Any, T],
        model: Coroutine[Any, Any, T],
        plainly: Callable[[T | None], Any] = lambda answer: answer,
    ) -> T | None:
        """What both answered, or None if both refused to."""

        async def outcome(work: Coroutine[Any, Any, T]) -> T | None:
            try:
                return await work
            except LedgerUnavailable:
                return None

        found, expected = self.run(outcome(real)), self.run(outcome(model))
        assert plainly(found) == plainly(expected)
        return found

    @rule(tenant=tenant_policies, first=account_policies, second=account_policies)
    def change_limits(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy) -> None:
        change = RegistryChange(
            version=self.registry.current.version,
            next_id=4,
            tenants=(Tenant(TENANT, "t", ("a", "b"), tenant),),
            accounts=(Account(2, "a", b"sealed", None, first), Account(3, "b", b"sealed", None, second)),
        )
        assert self.both(self.store.write(change), self.registry.write(change))
        loaded: Registry = self.run(self.store.load())
        assert vars(loaded) == vars(self.registry.current)

    @rule(
        target=reservations,
        kind=st.sampled_from(Kind),
        accounts=st.sampled_from([(), (2,), (3,), (2, 3), (3, 2)]),
        idempotency=idempotencies,
    )
    def reserve(self, kind: Kind, accounts: tuple[int, ...], idempotency: Idempotency | None) -> str:
        self.made += 1
        ask = Ask(f"r{self.made}", TENANT, accounts, kind, idempotency)
        before = self.state()
        answer = self.both(self.ledger.reserve(ask), self.model.reserve(ask))
        assert answer is not None
        if isinstance(answer[0], Granted):
            self.within_limits()
        else:
            assert self.state() == before, "a refusal changed something"
        return ask.reservation

    @rule(reservation=reservations, kind=st.sampled_from(Kind))
    def reserve_again(self, reservation: str, kind: Kind) -> None:
        ask = Ask(reservation, TENANT, ACCOUNTS, kind)
        self.both(self.ledger.reserve(ask), self.model.reserve(ask))

    @rule(reservation=reservations, left=st.sampled_from(ACCOUNTS), closes=closings)
    def retarget(self, reservation: str, left: int, closes: Status | None) -> None:
        known = self.model.reservations.get(reservation)
        if known and known.account != left:
            return  # nobody leaves an account the reservation is not on, but for repeating a call: next rule
        ask = Ask(reservation, TENANT, tuple(each for each in ACCOUNTS if each != left), Kind.UPSCALE)
        answer = self.both(self.ledger.retarget(ask, left, closes), self.model.retarget(ask, left, closes))
        if isinstance(answer, Granted):
            again = self.both(self.ledger.retarget(ask, left, closes), self.model.retarget(ask, left, closes))
            assert again == answer

    @rule(
        reservation=reservations,
        outcome=outcomes,
        told=figures,
        closes=closings,
        lost=st.booleans(),
        late=st.booleans(),
        idempotency=idempotencies,
    )
    def settle(
        self,
        reservation: str,
        outcome: ReservationState,
        told: Figures,
        closes: Status | None,
        idempotency: Idempotency | None,
        *,
        lost: bool,
        late: bool,
    ) -> None:
        known = self.model.reservations.get(reservation)
        if lost and known and known.state is not ReservationState.RESERVED:
            self.lossy = True  # what it was counted as can't be taken back
            self.model.reservations.pop(reservation)
            self.final.pop(reservation, None)
            self.run(self.client.delete(self.keys.reservation(reservation)))
            self.model.tasks.pop(reservation, None)
            self.model.due.pop(reservation, None)
            self.run(self._forget_task(reservation))
        settlement = Settlement(
            reservation=reservation,
            tenant=TENANT,
            account=known.account if known else ACCOUNTS[0],
            kind=known.kind if known else Kind.UPSCALE,
            created=known.created if known else self.model.clock.at - 1_000,
            outcome=outcome,
            figures=told,
            closes=closes if outcome is ReservationState.REFUSED else None,
            draft=TaskDraft(
                f"task_{reservation}", msgspec.Raw(b"{}"), msgspec.Raw(b'{"a":"b"}'), self.webhook(reservation)
            ),
            idempotency=idempotency,
            late=late,
        )
        self.both(self.ledger.settle(settlement), self.model.settle(settlement))

    def webhook(self, _reservation: str) -> str | None:
        """Where the end of a submission's task is told."""
        return None

    async def _forget_task(self, reservation: str) -> None:
        await self.client.delete(self.keys.task(reservation))
        await self.client.zrem(self.keys.watch, reservation)

    @rule(target=claims, most=st.integers(1, 3))
    def claim(self, most: int) -> Any:
        found, expected = self.run(self.tasks.claim(most)), self.run(self.model.claim(most))
        assert [(plain(each.task), each.claimed) for each in found] == [
            (plain(each.task), each.claimed) for each in expected
        ]
        return multiple(*found)

    @rule(due=claims, check=checks)
    def record(self, due: Due, check: Check) -> None:
        recorded, expected = self.run(self.tasks.record(due, check)), self.run(self.model.record(due, check))
        found, now = recorded or (None, None)
        if found and expected and found.error and found.error.code in {"task-lost", "result-unusable"}:
            found = msgspec.structs.replace(found, error=TaskError(found.error.code, ""))
        assert (plain(found), now) == ((plain(expected[0]), expected[1]) if expected else (None, None))

    @rule(most=st.integers(1, 3))
    def expire(self, most: int) -> None:
        self.both(self.ledger.expire(most), self.model.expire(most))

    @rule(account=st.sampled_from(ACCOUNTS))
    def reopen(self, account: int) -> None:
        self.both(self.ledger.reopen(account), self.model.reopen(account))

    @rule(reservation=reservations, reason=st.sampled_from(["", "它失败了", "a mistake"]))
    def refund(self, reservation: str, reason: str) -> None:
        self.both(
            self.books.refund(TENANT, reservation, reason), self.model.refund(TENANT, reservation, reason), canonical
        )

    @rule(account=st.sampled_from(ACCOUNTS), told=figures, count_only=st.booleans())
    def look(self, account: int, told: Figures, *, count_only: bool) -> None:
        look = self.both(
            self.ledger.look(account, count_only=count_only), self.model.look(account, count_only=count_only)
        )
        if look:
            self.both(self.ledger.looked(look, told), self.model.looked(look, told))

    @rule(milliseconds=steps)
    def wait(self, milliseconds: int) -> None:
        self.model.clock.at += milliseconds
        self.run(self._wait())

    async def _wait(self) -> None:
        """Move the clock of the scripts, and take away what Redis would have forgotten by then."""
        await self.client.set(self.keys.clock, self.model.clock.at)
        for tenant, key in [each for each, (_, _, until) in self.model.keys.items() if until <= self.model.clock.at]:
            del self.model.keys[tenant, key]
            await self.client.delete(self.keys.idempotency(tenant, key))

    @rule(succeeds=st.booleans())
    def end_everything(self, *, succeeds: bool) -> None:
        """Once all has ended nothing is held any more."""
        self.wait(self.spans.lease)
        while self.both(self.ledger.expire(3), self.model.expire(3)):
            pass
        self.wait(self.spans.claim)
        answered = Answered.SUCCEEDED if succeeds else Answered.FAILED
        while claimed := self.claim_all():
            for due in claimed:
                self.record(due, Check(answered=answered))
        state = self.tenant_state()
        held = [each.tasks_reserved + each.money_reserved for each in state.windows.values()]
        assert self.lossy or (state.active, held) == (0, [0] * len(Window))

    def claim_all(self) -> list[Due]:
        found = list(self.run(self.tasks.claim(10)))
        self.run(self.model.claim(10))
        return found

    def state(self) -> Any:
        """All that a reserve could change."""
        model = self.model
        return copy.deepcopy((self.tenant_state(), model.account_states, model.reservations, model.keys, model.days))

    def tenant_state(self) -> TenantState:
        return rolled(self.model.tenants.get(TENANT, TenantState()), self.model.clock.at)

    def within_limits(self) -> None:
        """Nothing was granted past a limit in force, counted from the reservations of each window alone."""
        policy, now = self.model.tenant_policies[TENANT], self.model.clock.at
        held = [each for each in self.model.reservations.values() if is_charged(each) or is_open(each)]
        if self.lossy:
            return
        assert policy.max_active is None or sum(map(is_open, held)) <= policy.max_active
        for limit in policy.limits:
            start = windows.period_of(limit.window, now)[0]
            mine = [each for each in held if each.created >= start and not each.refund]
            assert limit.tasks is None or len(mine) <= limit.tasks
            if limit.money is not None and sum(charge(each, limit.window) for each in mine) > limit.money:
                newest = max(mine, key=lambda each: (each.created, each.seq))
                assert not newest.holds, "it held money that was not there"

    @invariant()
    def they_hold_the_same(self) -> None:
        snapshot, expected = self.run(self.ledger.counters(TENANT)), self.run(self.model.counters(TENANT))
        assert rolled(snapshot.state, snapshot.now) == rolled(expected.state, expected.now)
        accounts: dict[int, AccountState] = dict(self.run(self.ledger.accounts(ACCOUNTS)))
        assert accounts == self.run(self.model.accounts(ACCOUNTS))
        for name, reservation in self.model.reservations.items():
            found = self.run(self.books.submission(name))
            assert found is not None
            assert canonical(found) == canonical(reservation)
        days = [day for _, day in self.model.days]
        assert [plain_day(each) for each in self.run(self.books.usage(TENANT, days))] == [
            plain_day(each) for each in self.run(self.model.usage(TENANT, days))
        ]
        for (tenant, key), (name, content, _) in self.model.keys.items():
            assert self.run(self.client.get(self.keys.idempotency(tenant, key))) == f"{name} {content}".encode()

    @invariant()
    def an_outcome_is_final(self) -> None:
        """What a reservation became is never undone, but for an unknown that is found out."""
        for name, reservation in self.model.reservations.items():
            assert self.final.get(name, reservation.state) is reservation.state
            if reservation.state not in {ReservationState.RESERVED, ReservationState.UNKNOWN}:
                self.final[name] = reservation.state

    @invariant()
    def the_books_add_up(self) -> None:
        """What is reserved, used and active follows from the reservations alone, and nothing is ever negative."""
        held, state = list(self.model.reservations.values()), self.tenant_state()
        for counter in state.windows.values():
            assert min(counter.tasks_reserved, counter.money_reserved, counter.overrun) >= 0
        if self.lossy:
            return
        assert state.active == sum(map(is_open, held))
        for window, counter in state.windows.items():
            mine = [each for each in held if each.periods.get(window) == counter.period]
            charged = [each for each in mine if is_charged(each) and not each.refund]
            assert counter.tasks_reserved == sum(each.state is ReservationState.RESERVED for each in mine)
            assert counter.tasks == len(charged)
            assert counter.money_reserved == sum(each.holds.get(window, 0) for each in mine if is_open(each))
            assert counter.money == sum(charge(each, window) for each in charged if not is_open(each))
        for account, known in self.model.account_states.items():
            mine = [each for each in held if each.account == account]
            assert known.open == sum(map(is_open, mine))
            assert known.sending == sum(each.state is ReservationState.RESERVED for each in mine)
            assert known.unknown == sum(each.state is ReservationState.UNKNOWN for each in mine)

    @invariant()
    def usage_is_what_the_windows_counted(self) -> None:
        """A day's usage comes to what its window counted, and all days to the total."""
        state, now = self.tenant_state(), self.model.clock.at
        days = {day: usage for (_, day), usage in self.model.days.items()}
        today = days.get(now // DAY, DayUsage())
        counted = state.windows[Window.DAY].tasks, state.windows[Window.DAY].money
        assert counted == (sum_of(charged_tasks, [today]), sum_of(charged_money, [today]))
        assert state.windows[Window.TOTAL].tasks == sum_of(charged_tasks, days.values())


def plain(task: Any) -> Any:
    """A task whose raw JSON can be compared."""
    if task is None:
        return None
    return msgspec.to_builtins(
        msgspec.structs.replace(task, options=bytes(task.options), metadata=bytes(task.metadata))
    )


def rolled(state: TenantState, now: int) -> TenantState:
    """A tenant's state with its windows as they are at a time, which neither side writes down before it has to."""
    state = copy.deepcopy(state)
    windows.roll(state, now)
    return state


def canonical(found: Any) -> Any:
    """A reservation, alone or in an answer, without what stands for nothing."""
    if isinstance(found, tuple):
        return tuple(map(canonical, found))
    if not isinstance(found, Reservation) or found.after != Figures():
        return found
    return msgspec.structs.replace(found, after=None)


def plain_day(day: DayUsage) -> Any:
    """A day's usage without what counts nothing."""
    tallies = {kind: {each: number for each, number in tally.items() if number} for kind, tally in day.tallies.items()}
    return {kind: tally for kind, tally in tallies.items() if tally}, day.unknown, day.refunds


def sum_of(charged: Callable[[Tally], int], days: Iterable[DayUsage]) -> int:
    """What some days come to, over all kinds."""
    return sum(charged(tally) for day in days for tally in day.tallies.values())


def is_open(reservation: Reservation) -> bool:
    """Whether it holds an active place."""
    running = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    return running or reservation.state is ReservationState.RESERVED


def is_charged(reservation: Reservation) -> bool:
    """Whether it counts as used."""
    return reservation.state in {ReservationState.ACCEPTED, ReservationState.UNKNOWN}


def charge(reservation: Reservation, window: Window) -> int:
    """The money it counts for in a window, used or held."""
    return reservation.cost.money if reservation.cost else reservation.holds.get(window, 0)
