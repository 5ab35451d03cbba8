"""Checks of running tasks and of account balances at the upstream."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field

import structlog
from opentelemetry.trace import Tracer

from service.crypto import TaskIdCodec
from service.domain.errors import LedgerUnavailable, NotFound
from service.domain.ledger import Balance
from service.domain.tasks import Task
from service.domain.tenants import Account, Registry, SpendingMode
from service.telemetry import tracing
from service.telemetry.gauges import GaugeName
from service.telemetry.logging import fen_to_yuan
from service.telemetry.metrics import Metrics
from service.usecases.background import cancel_and_wait, run_periodically
from service.usecases.caches import CachedRegistry, TaskCache
from service.usecases.loop_share import LoopShare
from service.usecases.ports import (
    BalanceCheck,
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    Ledger,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import EXPIRY, log_settlement

_log = structlog.get_logger(__name__)

CLAIM_SECONDS = 0.01
"""Time from one claim to the next while more may be due: each takes what has become free meanwhile."""
RECORD_SECONDS = 0.02
"""Time for which checks of running tasks are collected, to be recorded in one call."""
_MAX_BATCH = 50
"""Checks claimed or recorded in one call: a script delays all other calls of Redis."""
_LOOP_OVERHEAD = 1.4
"""Time that a check takes of the event loop, as a multiple of its own: its connection to the upstream and to Redis."""
EXPIRY_INTERVAL_SECONDS = 5.0
BALANCE_REFRESH_SECONDS = 5.0


@dataclass(kw_only=True, eq=False, repr=False)
class TaskPoller:
    """Checks due tasks, and settles reservations whose process died.

    At most `max_concurrent` checks are in progress, and they take a share of the event loop: see `LoopShare`.
    """

    tasks: TaskStore
    ledger: Ledger
    upstream: Upstream
    registry: CachedRegistry
    task_ids: TaskIdCodec
    cache: TaskCache
    metrics: Metrics
    tracer: Tracer = tracing.NOOP_TRACER
    max_concurrent: int = 64
    _checks: dict[asyncio.Task[None], ClaimedCheck] = field(default_factory=dict, init=False)
    _still_running: list[ClaimedCheck] = field(default_factory=list, init=False)
    _has_running: asyncio.Event = field(default_factory=asyncio.Event, init=False)

    def __post_init__(self) -> None:
        self._share = LoopShare(_LOOP_OVERHEAD)
        self._outcomes = {outcome: self.metrics.poll_checks.labels(outcome) for outcome in CheckOutcome}
        gauges = self.metrics.gauges
        gauges.register(GaugeName.POLL_CHECKS_IN_PROGRESS, lambda: {(): len(self._checks)})
        gauges.register(GaugeName.POLL_CHECKS_LIMIT, lambda: {(): self.max_concurrent})
        gauges.register(GaugeName.POLL_LOOP_SHARE, lambda: {(): self._share.used_share})

    async def run(self) -> None:
        """Poll until cancelled. What was checked is recorded then, and other processes repeat the other checks."""
        recorder = asyncio.create_task(self._share.measure(self._record_periodically()))
        try:
            await run_periodically("poll", self.start_due)
        finally:
            unfinished = list(self._checks.values())
            await cancel_and_wait([*self._checks, recorder])
            await self._record_running()
            if unfinished:
                with suppress(LedgerUnavailable):  # then the claims expire
                    await self.tasks.release_checks(unfinished)

    async def start_due(self) -> bool:
        """Claim due tasks and start to check them; return whether more may be due.

        Waits for the registry: without it, accounts would look deleted.
        """
        if not self.registry.is_ready:
            return False
        capacity = min(self.max_concurrent - len(self._checks), _MAX_BATCH)
        delay = self._share.delay_seconds()
        if capacity > 0 and not delay:
            due = await self.tasks.claim_checks(capacity)
            self.metrics.poll_batch_size.observe(len(due))
            for claimed in due:
                self.metrics.poll_lag_seconds.observe((claimed.claimed_at - claimed.due_at) / 1000)
                check = asyncio.create_task(self._share.measure(self._check_safely(claimed)))
                self._checks[check] = claimed
                check.add_done_callback(self._checks.pop)
            if len(due) < capacity:
                return False
        await asyncio.sleep(max(CLAIM_SECONDS, delay))
        return True

    async def wait_idle(self) -> None:
        """Wait until no check is in progress or to be recorded."""
        while self._checks or self._still_running:
            if self._checks:
                await asyncio.wait(self._checks)
            await self._record_running()

    async def expire_leases(self) -> None:
        """Settle reservations with expired leases, for ever."""
        while True:
            try:
                settled = await self.ledger.settle_expired(100)
            except LedgerUnavailable:
                settled = ()
            except Exception:  # noqa: BLE001 - one error must not leave all other places held
                _log.exception("expiry.error")
                settled = ()
            self.metrics.reservations_expired.inc(len(settled))
            for settlement in settled:
                log_settlement(self.registry.current, settlement, source=EXPIRY, booked=True)
            await asyncio.sleep(EXPIRY_INTERVAL_SECONDS)

    async def _check_safely(self, claimed: ClaimedCheck) -> None:
        task = claimed.task
        try:
            if task.trace_context is None:
                await self._check_and_record(claimed)
                return
            with tracing.start_linked_span(self.tracer, "check task", task.trace_context, task.reservation):
                await self._check_and_record(claimed)
        except Exception:  # noqa: BLE001 - the task is not awaited; it is due again when its claim expires
            _log.exception("check.error", reservation=task.reservation)

    async def _check_and_record(self, claimed: ClaimedCheck) -> None:
        check = await check_task(claimed.task, self.registry, self.task_ids, self.upstream)
        self._outcomes[check.outcome].inc()
        if check.outcome is CheckOutcome.RUNNING:  # as most are: these are recorded together
            self._still_running.append(claimed)
            self._has_running.set()
            return
        try:
            recorded = await self.tasks.record_check(claimed, check)
        except LedgerUnavailable:
            return
        if recorded is None:
            return
        task, now = recorded
        self.cache.on_recorded(task, now)  # readers of this process need not wait for the publication
        if task.state.is_final:
            report_end(task, self.registry.current, self.metrics)

    async def _record_periodically(self) -> None:
        while True:
            await self._has_running.wait()
            await asyncio.sleep(RECORD_SECONDS)
            await self._record_running()

    async def _record_running(self) -> None:
        """Record that the upstream still works on tasks."""
        self._has_running.clear()
        batch, self._still_running = self._still_running, []
        try:
            for start in range(0, len(batch), _MAX_BATCH):
                for task, now in await self.tasks.record_running(batch[start : start + _MAX_BATCH]):
                    self.cache.on_recorded(task, now)
        except LedgerUnavailable:
            pass  # these tasks are due again when their claims expire
        except asyncio.CancelledError:
            self._still_running += batch  # recorded before the process ends
            raise
        except Exception:  # noqa: BLE001 - an error must not end the recording; as above
            _log.exception("check.error", reservation=[claimed.task.reservation for claimed in batch])


def report_end(task: Task, registry: Registry, metrics: Metrics) -> None:
    """Count and log the recorded end of a task."""
    metrics.record_finished_task(task)
    _log.info(
        "task.finished",
        reservation=task.reservation,
        tenant=registry.tenant_name(task.tenant),
        account=registry.account_name(task.account),
        kind=task.kind,
        state=task.state,
        seconds=(task.updated_at - task.created_at) / 1000,
        uses=task.cost.count,
        yuan=fen_to_yuan(task.cost.money_fen),
        basis=task.cost.basis,
        error=task.error and task.error.code,
    )


async def check_task(task: Task, registry: CachedRegistry, task_ids: TaskIdCodec, upstream: Upstream) -> CheckResult:
    """Query the upstream about a task."""
    account = registry.current.account_by_id(task.account)
    if account is None:
        return CheckResult(outcome=CheckOutcome.NOT_FOUND)  # its account was deleted
    try:
        upstream_id = task_ids.decode(task.id).upstream_id
    except NotFound:  # its key was removed, and may be restored
        detail = "None of the secret keys decrypts its id."
        _log.error("task.decryption_failed", reservation=task.reservation, detail=detail)
        return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
    return await upstream.check(account, upstream_id)


@dataclass(kw_only=True, eq=False, repr=False)
class BalanceRefresher:
    """Reads balances at no cost.

    The vendor has no call for that. Where checks of a finished task return the current balance, checking the latest one
    again is one; the ledger decides when, and finds out whether it works.
    """

    ledger: Ledger
    tasks: TaskStore
    upstream: Upstream
    registry: CachedRegistry
    task_ids: TaskIdCodec

    async def run(self) -> None:
        while True:
            try:
                await self.refresh_due()
            except LedgerUnavailable:
                pass  # retried below
            except Exception:  # noqa: BLE001 - one error must not end the job
                _log.exception("balance_check.error")
            await asyncio.sleep(BALANCE_REFRESH_SECONDS)

    async def refresh_due(self) -> None:
        """Check the balance of each account for which that is due. Raises LedgerUnavailable."""
        registry = self.registry.current
        count_only_accounts = {
            name
            for tenant in registry.tenants.values()
            if tenant.policy.spending_mode is SpendingMode.COUNT_ONLY
            for name in tenant.accounts
        }
        for account in registry.accounts.values():
            check = await self.ledger.claim_balance_check(account.id, count_only=account.name in count_only_accounts)
            if check:
                await self._check_balance(account, check)

    async def _check_balance(self, account: Account, balance_check: BalanceCheck) -> None:
        stored = await self.tasks.get(balance_check.reservation)
        if stored is None:
            await self.ledger.record_balance_check(balance_check, Balance())
            return
        check = await check_task(stored[0], self.registry, self.task_ids, self.upstream)
        if check.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID}:
            return  # retried in the next interval
        await self.ledger.record_balance_check(balance_check, check.balance)
        _log.info("balance_check.done", account=account.name, answered=check.outcome)
