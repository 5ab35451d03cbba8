"""Exact accounting under any interleaving of failures."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from contextlib import ExitStack
from itertools import count
from types import SimpleNamespace
from typing import Any, TypeVar, cast

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from structlog.testing import capture_logs

from service.domain.errors import (
    AccountMisconfigured,
    BalanceExhausted,
    IdempotencyInFlight,
    LedgerUnavailable,
    QuotaDenied,
    SubmissionUnknown,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.domain.ledger import Balance, ReservationState, WindowCounter
from service.domain.tasks import TaskError
from service.domain.tenants import Account, AccountPolicy, Limit, SpendingMode, Tenant, TenantPolicy, Window
from service.usecases import submit as submit_module
from service.usecases.caches import CachedTask
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome
from service.usecases.submit import Submission
from tests.support.valkey import Valkey
from tests.usecases.fault_simulation import (
    Caller,
    CallOutcome,
    FaultyStore,
    FaultyUpstream,
    GatewayProcess,
    ManualClockLoop,
    StoredState,
)

T = TypeVar("T")
MIN_EXAMPLES = 40
CHARGED = {ReservationState.ACCEPTED, ReservationState.UNKNOWN}

ACCOUNTS = {name: Account(number, name, b"encrypted", None, AccountPolicy()) for number, name in enumerate("abc", 11)}
TENANTS = [Tenant(1, "one", ("a",)), Tenant(2, "two", ("b", "a")), Tenant(3, "three", ("a", "b", "c"))]
SUCCEEDED = CheckResult(outcome=CheckOutcome.SUCCEEDED, balance=Balance(40, 20_000))
FAILED = CheckResult(outcome=CheckOutcome.FAILED, error=TaskError("failed", "It failed."))

tenants = st.sampled_from(TENANTS)
keys = st.sampled_from([None, None, "key"])
indexes = st.integers(0, 7)
call_outcomes = st.sampled_from([*[CallOutcome.DONE] * 5, *CallOutcome])
outcomes = st.sampled_from([SubmitOutcome.ACCEPTED, SubmitOutcome.ACCEPTED, None, *SubmitOutcome])
balances = st.sampled_from(
    [Balance(), Balance(), Balance(), Balance(40, 20_000), Balance(40, 20_000), Balance(0, 300), Balance(0, 0)]
)
responses = st.tuples(outcomes, balances, call_outcomes)
pauses = st.sampled_from([0, 0, 1_000, 50_000])
policies = st.builds(
    TenantPolicy,
    limits=st.lists(
        st.builds(
            Limit, st.sampled_from(Window), tasks=st.none() | st.integers(0, 4), money_fen=st.sampled_from([None, 100])
        ),
        max_size=2,
        unique_by=lambda item: item.window,
    ).map(tuple),
    max_active=st.none() | st.integers(1, 3),
    spending_mode=st.sampled_from(SpendingMode),
)
checks = st.sampled_from(
    [CheckResult(outcome=CheckOutcome.RUNNING), SUCCEEDED, FAILED, CheckResult(outcome=CheckOutcome.NO_RESPONSE)]
)
durations = st.sampled_from([1, 100, 1_000, 5_000, 60_000, 119_999, 120_000, 180_000, 3_600_000, 86_400_000])


def pick_item(items: Sequence[T], index: int) -> T:
    return items[index % len(items)]


class SubmitMachine(RuleBasedStateMachine):
    """Submits, chooses the outcome of every call and kills processes; in the end everything may finish."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.exit_stack = ExitStack()
        self.logs = self.exit_stack.enter_context(capture_logs())
        self.loop = ManualClockLoop()
        runner = self.exit_stack.enter_context(asyncio.Runner(loop_factory=lambda: self.loop))
        runner.get_loop()
        self.store = FaultyStore(url, self.loop, TENANTS, ACCOUNTS)
        self.call_store(self.store.open())
        violations = self.store.ledger.violations
        self.loop.set_exception_handler(lambda _, context: violations.append(str(context)))
        self.upstream = FaultyUpstream(self.store)
        self.callers: list[Caller] = []
        self.readers: list[asyncio.Task[CachedTask]] = []
        self.stops: list[asyncio.Task[None]] = []
        self.processes: list[GatewayProcess] = []
        for _ in range(2):
            self.start_process()

    def run_to_idle(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and everything that follows from it at this time."""
        result = self.loop.run_until_complete(work)
        self.loop.run_forever()
        return result

    def call_store(self, work: Coroutine[Any, Any, T]) -> T:
        """Call the store on behalf of the test."""
        return self.run_to_idle(self.store.execute(lambda: work))

    @property
    def accepting_processes(self) -> list[GatewayProcess]:
        return [process for process in self.processes if not process.is_stopping]

    @property
    def running_processes(self) -> list[GatewayProcess]:
        return [process for process in self.processes if not process.is_dead]

    @property
    def accepted_submissions(self) -> list[tuple[Caller, Submission]]:
        ended = [caller for caller in self.callers if caller.response.done() and not caller.response.cancelled()]
        return [(item, item.response.result()) for item in ended if not item.response.exception()]

    # What people and time do

    @rule(
        process=indexes,
        submissions=st.lists(st.tuples(tenants, keys, st.none() | call_outcomes), min_size=1, max_size=4),
    )
    def submit(self, process: int, submissions: list[tuple[Tenant, str | None, CallOutcome | None]]) -> None:
        """Submit; the reserve calls get their outcome now or later."""
        for tenant, key, outcome in submissions:
            caller = Caller(tenant, pick_item(self.accepting_processes, process), key)
            caller.response = self.loop.create_task(caller.process.submit(caller))
            self.callers.append(caller)
            self.loop.run_forever()
            if outcome:
                self.run_to_idle(self.store.resolve(self.store.pending[-1], outcome))

    @precondition(lambda self: self.callers)
    @rule(caller=indexes)
    def cancel_caller(self, caller: int) -> None:
        pick_item(self.callers, caller).response.cancel()
        self.loop.run_forever()

    @precondition(lambda self: self.accepted_submissions and self.running_processes)
    @rule(task=indexes, process=indexes)
    def read(self, task: int, process: int) -> None:
        caller, submission = pick_item(self.accepted_submissions, task)
        reading = pick_item(self.running_processes, process).read(caller.tenant, submission.task.id)
        self.readers.append(self.loop.create_task(reading))
        self.loop.run_forever()

    @rule(tenant=tenants, policy=policies)
    def change_policy(self, tenant: Tenant, policy: TenantPolicy) -> None:
        self.call_store(self.store.set_policy(tenant, policy))

    @rule(milliseconds=durations, task=indexes, check=checks)
    def advance_time_and_checks(self, milliseconds: int, task: int, check: CheckResult) -> None:
        if self.upstream.accepted_ids:
            self.upstream.check_results[pick_item(self.upstream.accepted_ids, task)] = check
        self.advance_time(milliseconds)

    @rule(process=indexes, seconds=st.sampled_from([None, None, 0, 120]), runs_pending=st.booleans())
    def end_process(self, process: int, seconds: float | None, *, runs_pending: bool) -> None:
        """Kill a process or shut it down, and start another one."""
        ending = pick_item(self.accepting_processes, process)
        if seconds is None:
            ending.kill(runs_pending=runs_pending)
        else:
            self.stops.append(self.loop.create_task(ending.stop(seconds)))
        self.start_process()

    def advance_time(self, milliseconds: int) -> None:
        self.loop.now_ms += milliseconds
        self.call_store(self.store.set_time())

    def start_process(self) -> None:
        async def started() -> GatewayProcess:
            return GatewayProcess(self.store, self.upstream)

        self.processes.append(self.run_to_idle(started()))

    # What becomes of calls

    @precondition(lambda self: self.store.pending)
    @rule(call=indexes, outcomes=st.lists(call_outcomes, min_size=1, max_size=4))
    def resolve_calls(self, call: int, outcomes: list[CallOutcome]) -> None:
        for outcome in outcomes:
            if self.store.pending:
                self.run_to_idle(self.store.resolve(pick_item(self.store.pending, call), outcome))

    @precondition(lambda self: self.store.delayed)
    @rule(call=indexes)
    def execute_delayed_call(self, call: int) -> None:
        self.run_to_idle(self.store.execute_delayed(pick_item(self.store.delayed, call)))

    @precondition(lambda self: self.upstream.pending)
    @rule(request=indexes, milliseconds=pauses, results=st.lists(responses, min_size=1, max_size=4))
    def respond(
        self, request: int, milliseconds: int, results: list[tuple[SubmitOutcome | None, Balance, CallOutcome]]
    ) -> None:
        """Respond to upstream requests, each after a pause, with outcomes for the ledger calls that follow."""
        for outcome, balance, call_outcome in results:
            self.advance_time(milliseconds)
            if self.upstream.pending:
                self.upstream.respond(pick_item(self.upstream.pending, request), outcome, balance)
                self.loop.run_forever()
            if self.store.pending:
                self.run_to_idle(self.store.resolve(self.store.pending[-1], call_outcome))

    def complete_everything(self) -> None:
        for _ in range(100):
            if self.store.delayed:
                self.run_to_idle(self.store.execute_delayed(self.store.delayed[0]))
            if self.store.pending:
                self.run_to_idle(self.store.resolve(self.store.pending[0], CallOutcome.DONE))
            if self.upstream.pending:
                self.upstream.respond(self.upstream.pending[0], SubmitOutcome.ACCEPTED)
                self.loop.run_forever()

    @rule(is_unavailable=st.booleans(), outcomes=st.lists(call_outcomes, max_size=3))
    def disturb_store(self, is_unavailable: bool, outcomes: list[CallOutcome]) -> None:
        self.store.is_unavailable, self.store.next_outcomes = is_unavailable, outcomes

    # What has to hold

    @invariant()
    def no_rule_is_violated(self) -> None:
        assert self.store.ledger.violations == []

    def teardown(self) -> None:
        with self.exit_stack:
            self.finish_everything()
            state = self.call_store(self.store.read_state())
            for caller in self.callers:
                check_recorded_state(state, caller)
            for caller, submission in self.accepted_submissions:
                if submission.task.reservation not in state.tasks:
                    assert caller.process.is_dead
                    reading = self.accepting_processes[0].read(caller.tenant, submission.task.id)
                    self.readers.append(self.loop.create_task(reading))
            self.finish_everything()
            self.no_rule_is_violated()
            state = self.call_store(self.store.read_state())
            for caller in self.callers:
                check_response(state, self.store.ledger.unknown_reservations, caller, self.callers)
            self.check_counters(state)
            self.check_processes()
            self.call_store(self.store.connections.aclose())

    def finish_everything(self) -> None:
        """Let the store return, tasks finish, and all leases and retries expire."""
        self.store.is_unavailable = False
        self.store.next_outcomes.clear()
        for _ in range(10):
            self.complete_everything()
            for upstream_id in self.upstream.accepted_ids:
                if self.upstream.check_results.get(upstream_id) is not FAILED:
                    self.upstream.check_results[upstream_id] = SUCCEEDED
            self.advance_time(30_000)

    def check_counters(self, state: StoredState) -> None:
        """Assert that nothing is reserved or running, and that what is used follows from the reservations."""
        for tenant, counted in state.tenants.items():
            charged = [item for item in state.reservations.values() if item.tenant == tenant and item.state in CHARGED]
            assert counted.active_tasks == 0
            assert counted.windows.get(Window.TOTAL, WindowCounter(0)).tasks == len(charged)
            assert all(item.tasks_reserved == item.money_reserved_fen == 0 for item in counted.windows.values())
        assert {(item.open_submissions, item.unsettled) for item in state.accounts.values()} <= {(0, 0)}

    def check_processes(self) -> None:
        """Assert that no process has work left, and that no error was swallowed."""
        assert [stop for stop in (*self.stops, *self.readers) if not stop.done()] == []
        for reader in self.readers:
            assert reader.cancelled() or isinstance(reader.exception(), UpstreamUnavailable | RuntimeError | None)
        for process in self.running_processes:
            assert self.run_to_idle(process.background.drain(0)) == 0
        crashes = {entry["event"] for entry in self.logs if entry["event"].endswith(".error")}
        assert crashes <= {"submission.error"}


_EXPECTED_STATES = {
    SubmitOutcome.ACCEPTED: ReservationState.ACCEPTED,
    SubmitOutcome.UNKNOWN: ReservationState.UNKNOWN,
    None: ReservationState.UNKNOWN,
    SubmitOutcome.NOT_SENT: ReservationState.NOT_SENT,
    SubmitOutcome.MISCONFIGURED: ReservationState.NOT_SENT,
    SubmitOutcome.REJECTED: ReservationState.REFUSED,
    SubmitOutcome.EXHAUSTED: ReservationState.REFUSED,
    SubmitOutcome.INVALID_ACCOUNT: ReservationState.REFUSED,
    SubmitOutcome.REDIRECTED: ReservationState.REFUSED,
    SubmitOutcome.BUSY: ReservationState.REFUSED,
}
"""The final reservation state for each upstream outcome."""

_OUTCOMES_BY_ERROR: dict[type[BaseException], set[SubmitOutcome | None]] = {
    SubmissionUnknown: {SubmitOutcome.UNKNOWN, None},
    UpstreamRejected: {SubmitOutcome.REJECTED},
    BalanceExhausted: {SubmitOutcome.EXHAUSTED},
    AccountMisconfigured: {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED},
    UpstreamUnavailable: {SubmitOutcome.NOT_SENT, SubmitOutcome.BUSY},
}
"""The upstream outcomes that may lead to each error after a reservation."""


def check_recorded_state(state: StoredState, caller: Caller) -> None:
    """Assert that the stored state matches the outcome; UNKNOWN is allowed only if the process was killed."""
    assert len(caller.reservation_ids) == 1
    booked = state.state_of(caller.reservation_ids[0])
    if caller.was_refused:
        assert booked is None
        assert caller.requests == []
    elif caller.process.is_dead:
        nothing = set() if caller.requests else {None}
        assert booked in {_EXPECTED_STATES[caller.outcome], ReservationState.UNKNOWN} | nothing
    else:
        assert booked is _EXPECTED_STATES[caller.outcome]


def check_response(
    state: StoredState, unknown_reservations: Collection[str], caller: Caller, callers: Sequence[Caller]
) -> None:
    """Assert that the response matches the outcome and the stored state."""
    assert caller.response.done()
    if caller.response.cancelled():
        return
    error, reservation = caller.response.exception(), caller.reservation_ids[0]
    if caller.was_refused:
        same = {item.reservation_ids[0] for item in callers if (item.tenant, item.key) == (caller.tenant, caller.key)}
        _check_refusal(state, unknown_reservations, caller, error, same if caller.key else set())
    elif error is None:
        returned, booked = caller.response.result().task, state.tasks[reservation]
        assert caller.outcome is SubmitOutcome.ACCEPTED
        assert state.state_of(reservation) is ReservationState.ACCEPTED
        assert booked.state.is_final
        assert (booked.id, booked.account) == (returned.id, caller.requests[-1].account.id)
        # One that is booked from its id alone, which is left to do where the process died, has lost its options.
        assert caller.process.is_dead or booked.options == returned.options
    elif isinstance(error, LedgerUnavailable | RuntimeError):
        assert caller.requests == []
    else:
        assert caller.outcome in _OUTCOMES_BY_ERROR[type(error)]
        assert not isinstance(error, SubmissionUnknown) or error.submission_id == reservation


def _check_refusal(
    state: StoredState,
    unknown_reservations: Collection[str],
    caller: Caller,
    error: BaseException | None,
    same: Collection[str],
) -> None:
    """Assert that a refusal has a cause, or replays one of the submissions in `same`."""
    if error is None:
        submission = caller.response.result()
        assert submission.is_replay
        assert submission.task.reservation in same
        assert state.state_of(submission.task.reservation) is ReservationState.ACCEPTED
    elif isinstance(error, SubmissionUnknown):
        assert error.submission_id in set(unknown_reservations) & set(same)
    elif isinstance(error, IdempotencyInFlight | LedgerUnavailable):
        assert set(same) > {caller.reservation_ids[0]}
    else:
        assert isinstance(error, QuotaDenied | BalanceExhausted | AccountMisconfigured)


def test_accounting_is_exact(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = count()
    names = SimpleNamespace(token_hex=lambda _: f"{next(numbers):032x}")
    monkeypatch.setattr(submit_module, "secrets", names)  # for a reproducible order
    clock = SimpleNamespace(monotonic=lambda: asyncio.get_running_loop().time())
    monkeypatch.setattr(submit_module, "time", clock)
    run_state_machine_as_test(
        cast("type[RuleBasedStateMachine]", lambda: SubmitMachine(valkey.url)),
        settings=settings(
            max_examples=max(settings().max_examples, MIN_EXAMPLES), suppress_health_check=list(HealthCheck)
        ),
    )
