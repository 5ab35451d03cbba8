"""Exact accounting under any interleaving of failures."""

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
from service.domain.ledger import AccountState, AccountStatus, Balance, ReservationState
from service.domain.tasks import TaskError
from service.domain.tenants import Account, AccountPolicy, Limit, Registry, SpendingMode, Tenant, TenantPolicy, Window
from service.usecases import submit as submit_module
from service.usecases.caches import CachedTask
from service.usecases.ports import CheckOutcome, CheckResult, SubmitOutcome
from service.usecases.submit import Submission
from tests.fakes import FakeRegistry
from tests.unit.fault_simulation import (
    Caller,
    FaultyUpstream,
    GatewayProcess,
    LoopClock,
    ManualClockLoop,
    SequentialTokens,
)
from tests.unit.faulty_store import CHARGED, CallOutcome, CallQueue, FaultyStore
from tests.unit.submission_audit import check_recorded_state, check_response

T = TypeVar("T")

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

    def __init__(self) -> None:
        super().__init__()
        self.exit_stack = ExitStack()
        self.logs = self.exit_stack.enter_context(capture_logs())
        self.store, self.call_queue = FaultyStore(), CallQueue()
        self.loop = ManualClockLoop(self.store.clock)
        runner = self.exit_stack.enter_context(asyncio.Runner(loop_factory=lambda: self.loop))
        runner.get_loop()
        self.loop.set_exception_handler(lambda _, context: self.store.violations.append(str(context)))
        self.upstream = FaultyUpstream(self.store)
        registry = Registry(1, 20, {tenant.name: tenant for tenant in TENANTS}, ACCOUNTS)
        self.registry = FakeRegistry(self.store, registry)
        self.store.account_policies |= {account.id: account.policy for account in ACCOUNTS.values()}
        self.store.tenant_policies |= {tenant.id: tenant.policy for tenant in TENANTS}
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
                self.run_to_idle(self.call_queue.resolve(self.call_queue.pending[-1], outcome))

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
        self.store.tenant_policies[tenant.id] = policy
        for account in ACCOUNTS.values():
            self.store.states_by_account.get(account.id, AccountState()).status = AccountStatus.OPEN

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
        self.store.clock.now_ms += milliseconds
        self.loop.run_forever()

    def start_process(self) -> None:
        async def started() -> GatewayProcess:
            return GatewayProcess(self.store, self.call_queue, self.upstream, self.registry)

        self.processes.append(self.run_to_idle(started()))

    # What becomes of calls

    @precondition(lambda self: self.call_queue.pending)
    @rule(call=indexes, outcomes=st.lists(call_outcomes, min_size=1, max_size=4))
    def resolve_calls(self, call: int, outcomes: list[CallOutcome]) -> None:
        for outcome in outcomes:
            if self.call_queue.pending:
                self.run_to_idle(self.call_queue.resolve(pick_item(self.call_queue.pending, call), outcome))

    @precondition(lambda self: self.call_queue.delayed)
    @rule(call=indexes)
    def execute_delayed_call(self, call: int) -> None:
        self.run_to_idle(self.call_queue.execute_delayed(pick_item(self.call_queue.delayed, call)))

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
            if self.call_queue.pending:
                self.run_to_idle(self.call_queue.resolve(self.call_queue.pending[-1], call_outcome))

    def complete_everything(self) -> None:
        for _ in range(100):
            if self.call_queue.delayed:
                self.run_to_idle(self.call_queue.execute_delayed(self.call_queue.delayed[0]))
            if self.call_queue.pending:
                self.run_to_idle(self.call_queue.resolve(self.call_queue.pending[0], CallOutcome.DONE))
            if self.upstream.pending:
                self.upstream.respond(self.upstream.pending[0], SubmitOutcome.ACCEPTED)
                self.loop.run_forever()

    @rule(is_unavailable=st.booleans(), outcomes=st.lists(call_outcomes, max_size=3))
    def disturb_store(self, is_unavailable: bool, outcomes: list[CallOutcome]) -> None:
        self.store.is_unavailable, self.call_queue.next_outcomes = is_unavailable, outcomes

    # What has to hold

    @invariant()
    def counters_match_reservations(self) -> None:
        """Counters follow from the reservations alone."""
        for tenant in TENANTS:
            counted = self.store.tenant_counters(tenant.id)
            assert counted.active_tasks == self.store.count_active(tenant.id)
            for window, counter in counted.windows.items():
                outcomes = self.store.count_states(tenant.id, window)
                assert counter.tasks_reserved == outcomes[ReservationState.RESERVED]
                assert counter.tasks == sum(outcomes[item] for item in CHARGED)
                assert min(counter.money_fen, counter.money_reserved_fen) >= 0

    @invariant()
    def no_rule_is_violated(self) -> None:
        assert self.store.violations == []

    def teardown(self) -> None:
        with self.exit_stack:
            self.finish_everything()
            for caller in self.callers:
                check_recorded_state(self.store, caller)
            for caller, submission in self.accepted_submissions:
                if submission.task.reservation not in self.store.tasks:
                    assert caller.process.is_dead
                    self.readers.append(
                        self.loop.create_task(self.accepting_processes[0].read(caller.tenant, submission.task.id))
                    )
            self.finish_everything()
            self.counters_match_reservations()
            self.no_rule_is_violated()
            for caller in self.callers:
                check_response(self.store, caller, self.callers)
            self.assert_nothing_reserved()

    def finish_everything(self) -> None:
        """Let the store return, tasks finish, and all leases and retries expire."""
        self.store.is_unavailable = False
        self.call_queue.next_outcomes.clear()
        for _ in range(10):
            self.complete_everything()
            for upstream_id in self.upstream.accepted_ids:
                if self.upstream.check_results.get(upstream_id) is not FAILED:
                    self.upstream.check_results[upstream_id] = SUCCEEDED
            self.advance_time(30_000)

    def assert_nothing_reserved(self) -> None:
        """Assert that nothing is reserved or running and no error was swallowed."""
        for tenant in TENANTS:
            counted = self.store.tenant_counters(tenant.id)
            assert counted.active_tasks == 0
            assert {(window.tasks_reserved, window.money_reserved_fen) for window in counted.windows.values()} == {
                (0, 0)
            }
        assert {(item.open_submissions, item.unsettled) for item in self.store.states_by_account.values()} <= {(0, 0)}
        assert [stop for stop in (*self.stops, *self.readers) if not stop.done()] == []
        for reader in self.readers:
            assert reader.cancelled() or isinstance(reader.exception(), UpstreamUnavailable | None)
        assert [
            self.run_to_idle(running_process.background.drain(0)) for running_process in self.running_processes
        ] == [0] * len(self.running_processes)
        crashes = {entry["event"] for entry in self.logs if entry["event"].endswith(".error")}
        assert crashes <= {"submission.error"}


def test_accounting_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit_module, "time", LoopClock)
    monkeypatch.setattr(submit_module, "secrets", SequentialTokens())
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
