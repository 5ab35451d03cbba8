"""The Lua scripts on a real server do what the pure functions of the domain say, whatever happens in whatever order."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, multiple, rule, run_state_machine_as_test

from service.domain import windows
from service.domain.balance import AccountState, Figures, Status
from service.domain.errors import LedgerUnavailable
from service.domain.registry import Registry
from service.domain.reservation import Granted, Reservation, ReservationState
from service.domain.task import Artifact, ArtifactName, Kind, TaskError
from service.domain.tenancy import Account, AccountPolicy, Limit, Purse, Tenant, TenantPolicy, Window
from service.domain.windows import TenantState
from service.storage.connect import connect
from service.storage.keys import Keys
from service.storage.ledger import RedisLedger, Spans
from service.storage.registry import RedisRegistry
from service.storage.scripts import Scripts
from service.storage.tasks import RedisTasks
from service.usecases.ports import Answered, Ask, Check, Due, RegistryChange, Settlement, TaskDraft
from tests.fakes import FakeClock, FakeLedger, FakeRegistry
from tests.support.valkey import Valkey

T = TypeVar("T")

TENANT, ACCOUNTS = 1, (2, 3)
LATER = 2_524_607_999_000
"""A second before the year 2050: every window ends in the next second, and the server's own clock is far behind."""

amounts = st.none() | st.integers(0, 6)
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
        self.run(self._open(url))
        self.change_limits(TenantPolicy(), AccountPolicy(), AccountPolicy())

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        scripts = Scripts(self.client)
        self.ledger = RedisLedger(self.client, scripts, self.keys, self.spans)
        self.tasks = RedisTasks(self.client, scripts, self.keys, self.spans)
        self.store = RedisRegistry(self.client, scripts, self.keys)
        await self.client.set(self.keys.clock, LATER)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.runner.close()

    def both(self, real: Coroutine[Any, Any, T], model: Coroutine[Any, Any, T]) -> T | None:
        """What both answered, or None if both refused to."""

        async def outcome(work: Coroutine[Any, Any, T]) -> T | None:
            try:
                return await work
            except LedgerUnavailable:
                return None

        found, expected = self.run(outcome(real)), self.run(outcome(model))
        assert found == expected
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

    @rule(target=reservations, kind=st.sampled_from(Kind), accounts=st.sampled_from([(2,), (3,), (2, 3), (3, 2)]))
    def reserve(self, kind: Kind, accounts: tuple[int, ...]) -> str:
        self.made += 1
        ask = Ask(f"r{self.made}", TENANT, accounts, kind)
        answer = self.both(self.ledger.reserve(ask), self.model.reserve(ask))
        assert answer is not None
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
    )
    def settle(
        self,
        reservation: str,
        outcome: ReservationState,
        told: Figures,
        closes: Status | None,
        *,
        lost: bool,
        late: bool,
    ) -> None:
        known = self.model.reservations.get(reservation)
        if lost and known and known.state is not ReservationState.RESERVED:
            self.lossy = True  # what it was counted as can't be taken back
            self.model.reservations.pop(reservation)
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
            draft=TaskDraft(f"task_{reservation}", msgspec.Raw(b"{}"), msgspec.Raw(b'{"a":"b"}')),
            late=late,
        )
        self.both(self.ledger.settle(settlement), self.model.settle(settlement))

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
        found, expected = self.run(self.tasks.record(due, check)), self.run(self.model.record(due, check))
        if found and expected and found.error and found.error.code in {"task-lost", "result-unusable"}:
            found = msgspec.structs.replace(found, error=TaskError(found.error.code, ""))
        assert plain(found) == plain(expected)

    @rule(most=st.integers(1, 3))
    def expire(self, most: int) -> None:
        self.both(self.ledger.expire(most), self.model.expire(most))

    @rule(account=st.sampled_from(ACCOUNTS))
    def reopen(self, account: int) -> None:
        self.both(self.ledger.reopen(account), self.model.reopen(account))

    @rule(milliseconds=steps)
    def wait(self, milliseconds: int) -> None:
        self.model.clock.at += milliseconds
        self.run(self.client.set(self.keys.clock, self.model.clock.at))

    @invariant()
    def they_hold_the_same(self) -> None:
        snapshot, expected = self.run(self.ledger.counters(TENANT)), self.run(self.model.counters(TENANT))
        assert rolled(snapshot.state, snapshot.now) == rolled(expected.state, expected.now)
        accounts: dict[int, AccountState] = dict(self.run(self.ledger.accounts(ACCOUNTS)))
        assert accounts == self.run(self.model.accounts(ACCOUNTS))
        for name, reservation in self.model.reservations.items():
            packed = self.run(self.client.get(self.keys.reservation(name)))
            assert canonical(msgspec.msgpack.decode(packed, type=Reservation)) == canonical(reservation)

    @invariant()
    def the_books_add_up(self) -> None:
        """What is reserved, used and active follows from the reservations alone, and nothing is ever negative."""
        held = list(self.model.reservations.values())
        state = rolled(self.model.tenants.get(TENANT, TenantState()), self.model.clock.at)
        total = state.windows[Window.TOTAL]
        by_state = {each: sum(1 for one in held if one.state is each) for each in ReservationState}
        running = sum(1 for one in held if one.state is ReservationState.ACCEPTED and not one.ended)
        if not self.lossy:
            assert total.tasks_reserved == by_state[ReservationState.RESERVED]
            assert total.tasks == by_state[ReservationState.ACCEPTED] + by_state[ReservationState.UNKNOWN]
            assert state.active == by_state[ReservationState.RESERVED] + running
        for counter in state.windows.values():
            assert min(counter.tasks_reserved, counter.money_reserved, counter.overrun) >= 0


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


def canonical(reservation: Reservation) -> Reservation:
    """A reservation without what stands for nothing."""
    empty = reservation.after is None or reservation.after == Figures()
    return msgspec.structs.replace(reservation, after=None if empty else reservation.after)


def test_scripts_do_what_the_model_says(valkey: Valkey) -> None:
    """Every sequence of calls gives the same answers and leaves the same state in Redis and in the model."""
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: LedgerMachine(valkey.url)),
        settings=settings(
            max_examples=30,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
