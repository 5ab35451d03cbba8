"""Money is exact, whatever fails in whatever order between a caller, the processes, the store and the upstream."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from service.domain.errors import (
    UpstreamUnavailable,
)
from service.domain.ledger import AccountState, Figures, ReservationState, Status
from service.domain.tasks import TaskError
from service.domain.tenants import Account, AccountPolicy, Limit, Purse, Registry, Tenant, TenantPolicy, Window
from service.usecases import submit as submit_module
from service.usecases.ports import Answered, Check, SubmitOutcome
from service.usecases.submit import Submission
from service.usecases.task_cache import Seen
from tests.fakes import FakeRegistry
from tests.unit.agreement import check_answer, check_booking
from tests.unit.faulty_store import CHARGED, Fate, Post, Store
from tests.unit.faulty_world import Caller, FaultyUpstream, LoopTime, Numbers, Process, StandingLoop

T = TypeVar("T")

ACCOUNTS = {name: Account(number, name, b"sealed", None, AccountPolicy()) for number, name in enumerate("abc", 11)}
TENANTS = [Tenant(1, "one", ("a",)), Tenant(2, "two", ("b", "a")), Tenant(3, "three", ("a", "b", "c"))]
SUCCEEDED = Check(answered=Answered.SUCCEEDED, figures=Figures(40, 20_000))
FAILED = Check(answered=Answered.FAILED, error=TaskError("failed", "It failed."))

tenants = st.sampled_from(TENANTS)
keys = st.sampled_from([None, None, "key"])
which = st.integers(0, 7)
fates = st.sampled_from([*[Fate.DONE] * 5, *Fate])
outcomes = st.sampled_from([SubmitOutcome.ACCEPTED, SubmitOutcome.ACCEPTED, None, *SubmitOutcome])
figures = st.sampled_from(
    [Figures(), Figures(), Figures(), Figures(40, 20_000), Figures(40, 20_000), Figures(0, 300), Figures(0, 0)]
)
answers = st.tuples(outcomes, figures, fates)
pauses = st.sampled_from([0, 0, 1_000, 50_000])
policies = st.builds(
    TenantPolicy,
    limits=st.lists(
        st.builds(
            Limit, st.sampled_from(Window), tasks=st.none() | st.integers(0, 4), money=st.sampled_from([None, 100])
        ),
        max_size=2,
        unique_by=lambda each: each.window,
    ).map(tuple),
    max_active=st.none() | st.integers(1, 3),
    purse=st.sampled_from(Purse),
)
checks = st.sampled_from([Check(answered=Answered.RUNNING), SUCCEEDED, FAILED, Check(answered=Answered.NOTHING)])
spans = st.sampled_from([1, 100, 1_000, 5_000, 60_000, 119_999, 120_000, 180_000, 3_600_000, 86_400_000])


def chosen(items: Sequence[T], index: int) -> T:
    return items[index % len(items)]


class SubmitMachine(RuleBasedStateMachine):
    """Submits, decides what becomes of each call, and lets processes die; in the end everything has time to end."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = ExitStack()
        self.logs = self.opened.enter_context(capture_logs())
        self.store, self.post = Store(), Post()
        self.loop = StandingLoop(self.store.clock)
        runner = self.opened.enter_context(asyncio.Runner(loop_factory=lambda: self.loop))
        runner.get_loop()
        self.loop.set_exception_handler(lambda _, context: self.store.breaches.append(str(context)))
        self.upstream = FaultyUpstream(self.store)
        known = Registry(1, 20, {each.name: each for each in TENANTS}, ACCOUNTS)
        self.registry = FakeRegistry(self.store, known)
        self.store.account_policies |= {each.id: each.policy for each in ACCOUNTS.values()}
        self.store.tenant_policies |= {each.id: each.policy for each in TENANTS}
        self.callers: list[Caller] = []
        self.readers: list[asyncio.Task[Seen]] = []
        self.stops: list[asyncio.Task[None]] = []
        self.processes: list[Process] = []
        for _ in range(2):
            self.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something, and all that follows from it at this time."""
        result = self.loop.run_until_complete(work)
        self.loop.run_forever()
        return result

    @property
    def serving(self) -> list[Process]:
        """The processes that take submissions."""
        return [each for each in self.processes if not each.stopping]

    @property
    def living(self) -> list[Process]:
        """The processes that serve, or have not come to their end."""
        return [each for each in self.processes if not each.gone]

    @property
    def taken(self) -> list[tuple[Caller, Submission]]:
        """The callers that were told of their task."""
        ended = [each for each in self.callers if each.answer.done() and not each.answer.cancelled()]
        return [(each, each.answer.result()) for each in ended if not each.answer.exception()]

    # What people and time do

    @rule(process=which, submissions=st.lists(st.tuples(tenants, keys, st.none() | fates), min_size=1, max_size=4))
    def submit(self, process: int, submissions: list[tuple[Tenant, str | None, Fate | None]]) -> None:
        """Callers submit, and the calls to reserve have their fate now or later."""
        for tenant, key, fate in submissions:
            caller = Caller(tenant, chosen(self.serving, process), key)
            caller.answer = self.loop.create_task(caller.process.submit(caller))
            self.callers.append(caller)
            self.loop.run_forever()
            if fate:
                self.run(self.post.deliver(self.post.letters[-1], fate))

    @precondition(lambda self: self.callers)
    @rule(caller=which)
    def leave(self, caller: int) -> None:
        chosen(self.callers, caller).answer.cancel()
        self.loop.run_forever()

    @precondition(lambda self: self.taken and self.living)
    @rule(task=which, process=which)
    def read(self, task: int, process: int) -> None:
        caller, submission = chosen(self.taken, task)
        reading = chosen(self.living, process).read(caller.tenant, submission.task.id)
        self.readers.append(self.loop.create_task(reading))
        self.loop.run_forever()

    @rule(tenant=tenants, policy=policies)
    def operate(self, tenant: Tenant, policy: TenantPolicy) -> None:
        """An operator changes limits, and has accounts looked at again."""
        self.store.tenant_policies[tenant.id] = policy
        for account in ACCOUNTS.values():
            self.store.account_states.get(account.id, AccountState()).status = Status.OPEN

    @rule(milliseconds=spans, task=which, check=checks)
    def wait(self, milliseconds: int, task: int, check: Check) -> None:
        """Time passes, in which tasks go on."""
        if self.upstream.accepted:
            self.upstream.ends[chosen(self.upstream.accepted, task)] = check
        self.pass_time(milliseconds)

    @rule(process=which, seconds=st.sampled_from([None, None, 0, 120]), heard=st.booleans())
    def end_process(self, process: int, seconds: float | None, *, heard: bool) -> None:
        """A process dies, and its last words may be heard, or it is given some seconds to stop; another one starts."""
        ending = chosen(self.serving, process)
        if seconds is None:
            ending.die(heard=heard)
        else:
            self.stops.append(self.loop.create_task(ending.stop(seconds)))
        self.start()

    def pass_time(self, milliseconds: int) -> None:
        self.store.clock.at += milliseconds
        self.loop.run_forever()

    def start(self) -> None:
        async def started() -> Process:
            return Process(self.store, self.post, self.upstream, self.registry)

        self.processes.append(self.run(started()))

    # What becomes of calls

    @precondition(lambda self: self.post.letters)
    @rule(letter=which, fates=st.lists(fates, min_size=1, max_size=4))
    def deliver(self, letter: int, fates: list[Fate]) -> None:
        for fate in fates:
            if self.post.letters:
                self.run(self.post.deliver(chosen(self.post.letters, letter), fate))

    @precondition(lambda self: self.post.strays)
    @rule(letter=which)
    def arrive(self, letter: int) -> None:
        self.run(self.post.arrive(chosen(self.post.strays, letter)))

    @precondition(lambda self: self.upstream.pending)
    @rule(request=which, milliseconds=pauses, answers=st.lists(answers, min_size=1, max_size=4))
    def answer(
        self, request: int, milliseconds: int, answers: list[tuple[SubmitOutcome | None, Figures, Fate]]
    ) -> None:
        """The upstream answers, each time after a pause, and what the gateway then asks of its store has its fate."""
        for outcome, told, fate in answers:
            self.pass_time(milliseconds)
            if self.upstream.pending:
                self.upstream.tell(chosen(self.upstream.pending, request), outcome, told)
                self.loop.run_forever()
            if self.post.letters:
                self.run(self.post.deliver(self.post.letters[-1], fate))

    def all_goes_well(self) -> None:
        """Whatever is on its way arrives and is answered, and so is what follows from it."""
        for _ in range(100):
            if self.post.strays:
                self.run(self.post.arrive(self.post.strays[0]))
            if self.post.letters:
                self.run(self.post.deliver(self.post.letters[0], Fate.DONE))
            if self.upstream.pending:
                self.upstream.tell(self.upstream.pending[0], SubmitOutcome.ACCEPTED)
                self.loop.run_forever()

    @rule(away=st.booleans(), upsets=st.lists(fates, max_size=3))
    def trouble_the_store(self, away: bool, upsets: list[Fate]) -> None:
        """The store goes away or comes back, and what is asked of it at once next has these fates."""
        self.store.away, self.post.upsets = away, upsets

    # What has to hold

    @invariant()
    def the_books_add_up(self) -> None:
        """What is reserved, used and active follows from the reservations alone."""
        for tenant in TENANTS:
            counted = self.store.counted(tenant.id)
            assert counted.active == self.store.active(tenant.id)
            for window, counter in counted.windows.items():
                outcomes = self.store.outcomes(tenant.id, window)
                assert counter.tasks_reserved == outcomes[ReservationState.RESERVED]
                assert counter.tasks == sum(outcomes[each] for each in CHARGED)
                assert min(counter.money, counter.money_reserved) >= 0

    @invariant()
    def no_rule_was_broken(self) -> None:
        assert self.store.breaches == []

    def teardown(self) -> None:
        with self.opened:
            self.everything_ends()
            for caller in self.callers:
                check_booking(self.store, caller)
            for caller, submission in self.taken:
                if submission.task.reservation not in self.store.tasks:
                    assert caller.process.gone
                    self.readers.append(self.loop.create_task(self.serving[0].read(caller.tenant, submission.task.id)))
            self.everything_ends()
            self.the_books_add_up()
            self.no_rule_was_broken()
            for caller in self.callers:
                check_answer(self.store, caller, self.callers)
            self.nothing_is_held()

    def everything_ends(self) -> None:
        """The store is back, tasks end, and time passes until all leases have run out and all retries are due."""
        self.store.away = False
        self.post.upsets.clear()
        for _ in range(10):
            self.all_goes_well()
            for upstream_id in self.upstream.accepted:
                if self.upstream.ends.get(upstream_id) is not FAILED:
                    self.upstream.ends[upstream_id] = SUCCEEDED
            self.pass_time(30_000)

    def nothing_is_held(self) -> None:
        """No place is held, no task is under way, nothing waits, and no fault was swallowed."""
        for tenant in TENANTS:
            counted = self.store.counted(tenant.id)
            assert counted.active == 0
            assert {(each.tasks_reserved, each.money_reserved) for each in counted.windows.values()} == {(0, 0)}
        assert {(each.open, each.sending) for each in self.store.account_states.values()} <= {(0, 0)}
        assert [each for each in (*self.stops, *self.readers) if not each.done()] == []
        for reader in self.readers:
            assert reader.cancelled() or isinstance(reader.exception(), UpstreamUnavailable | None)
        assert [self.run(each.background.drain(0)) for each in self.living] == [0] * len(self.living)
        crashes = {entry["event"] for entry in self.logs if entry["event"].endswith(".crashed")}
        assert crashes <= {"submission.crashed"}


def test_money_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, and whoever dies or leaves, what was asked, sent, booked and told of each submission agree."""
    monkeypatch.setattr(submit_module, "time", LoopTime)
    monkeypatch.setattr(submit_module, "secrets", Numbers())
    run_state_machine_as_test(
        SubmitMachine,
        settings=settings(
            max_examples=200,
            stateful_step_count=40,
            phases=(Phase.reuse, Phase.generate, Phase.shrink),
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
