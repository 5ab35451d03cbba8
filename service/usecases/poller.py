"""Checks of running tasks and of account balances at the upstream."""

from __future__ import annotations

import asyncio

import structlog

from service.domain.errors import LedgerUnavailable, NotFound
from service.domain.ledger import Balance
from service.domain.tasks import Task, TaskIdCodec
from service.domain.tenants import Account, Registry, SpendingMode
from service.telemetry.gauges import GaugeName
from service.telemetry.logging import fen_to_yuan
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.background import cancel_and_wait, run_periodically
from service.usecases.ports import (
    BalanceCheck,
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    Ledger,
    RegistryView,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import EXPIRY, log_settlement
from service.usecases.task_cache import TaskCache

_log = structlog.get_logger(__name__)


EXPIRY_INTERVAL_SECONDS = 5.0


_DECRYPTION_FAILED = "None of the secret keys opens its id."


class TaskPoller:
    """Checks the tasks that are due and books reservations whose process died."""

    def __init__(
        self,
        *,
        tasks: TaskStore,
        ledger: Ledger,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIdCodec,
        cache: TaskCache,
        metrics: Metrics,
        tracer: Tracer = NOOP_TRACER,
        max_concurrent: int = 64,
    ) -> None:
        self._tasks = tasks
        self._ledger = ledger
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._cache = cache
        self._metrics = metrics
        self._tracer = tracer
        self._max_concurrent = max_concurrent
        self._checks: set[asyncio.Task[None]] = set()
        metrics.gauges.register(GaugeName.POLL_CHECKS_IN_PROGRESS, lambda: {(): len(self._checks)})
        metrics.gauges.register(GaugeName.POLL_CHECKS_LIMIT, lambda: {(): max_concurrent})

    async def run(self) -> None:
        """Watch until cancelled; a check under way is then finished by another process once its claim runs out."""
        try:
            await run_periodically("watch", self.start_due)
        finally:
            await cancel_and_wait(self._checks)

    async def start_due(self) -> bool:
        """Claim as many due tasks as there is room for and begin to check them; whether more may be due.

        None before the registry is there: a task whose account is not known would look as if it had been removed.
        """
        if not self._registry.is_ready:
            return False
        room = self._max_concurrent - len(self._checks)
        if room <= 0:
            await asyncio.wait(self._checks, return_when=asyncio.FIRST_COMPLETED)
            return True
        due = await self._tasks.claim_checks(room)
        self._metrics.record_claimed_checks((each.claimed_at - each.due_at) / 1000 for each in due)
        for each in due:
            check = asyncio.create_task(self._check_safely(each))
            self._checks.add(check)
            check.add_done_callback(self._checks.discard)
        return len(due) == room

    async def wait_idle(self) -> None:
        """Wait until no check is under way."""
        while self._checks:
            await asyncio.wait(self._checks)

    async def expire_leases(self) -> None:
        """Book for ever what died between reserving and settling."""
        while True:
            try:
                settled = await self._ledger.settle_expired(100)
            except LedgerUnavailable:
                settled = ()
            except Exception:  # noqa: BLE001 - one fault must not leave all other places held for ever
                _log.exception("expiry.error")
                settled = ()
            self._metrics.record_expired_reservations(len(settled))
            for each in settled:
                log_settlement(self._registry.current, each, source=EXPIRY, booked=True)
            await asyncio.sleep(EXPIRY_INTERVAL_SECONDS)

    async def _check_safely(self, due: ClaimedCheck) -> None:
        """Check one task; after a fault of ours it is due again when its claim runs out."""
        try:
            with self._tracer.start_linked_span("check task", due.task.trace_context, due.task.reservation):
                await self._check_and_record(due)
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("check.error", reservation=due.task.reservation)

    async def _check_and_record(self, due: ClaimedCheck) -> None:
        """Ask about one task and record the answer; without a record it is due again when the claim runs out."""
        check = await check_task(due.task, self._registry, self._task_ids, self._upstream)
        self._metrics.record_check(check.outcome)
        try:
            recorded = await self._tasks.record_check(due, check)
        except LedgerUnavailable:
            return
        if recorded is None:
            return
        task, now = recorded
        self._cache.on_recorded(task, now)  # whoever waits in this process is spared the way over the store
        if task.state.is_final:
            report_end(task, self._registry.current, self._metrics)


def report_end(task: Task, registry: Registry, metrics: Metrics) -> None:
    """Count and log the end of a task, which was recorded just now."""
    metrics.record_finished_task(task)
    account = registry.account_by_id(task.account)
    _log.info(
        "task.finished",
        reservation=task.reservation,
        tenant=registry.tenant_name(task.tenant),
        account=account and account.name,
        kind=task.kind,
        state=task.state,
        seconds=(task.updated_at - task.created_at) / 1000,
        uses=task.cost.count,
        yuan=fen_to_yuan(task.cost.money_fen),
        basis=task.cost.basis,
        error=task.error and task.error.code,
    )


async def check_task(task: Task, registry: RegistryView, task_ids: TaskIdCodec, upstream: Upstream) -> CheckResult:
    """Ask the upstream about a task of an account of ours."""
    account = registry.current.account_by_id(task.account)
    if account is None:
        return CheckResult(outcome=CheckOutcome.NOT_FOUND)  # its account was removed: nobody can tell any more
    try:
        upstream_id = task_ids.decode(task.id).upstream_id
    except NotFound:  # the key that sealed it was taken away, and may come back
        _log.error("task.decryption_failed", reservation=task.reservation, detail=_DECRYPTION_FAILED)
        return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
    return await upstream.check(account, upstream_id)


BALANCE_REFRESH_SECONDS = 5.0
"""How often it is asked whether a look is due: it comes late by at most this."""


class BalanceRefresher:
    """Looks at the accounts whose balance somebody waits for."""

    def __init__(
        self, *, ledger: Ledger, tasks: TaskStore, upstream: Upstream, registry: RegistryView, task_ids: TaskIdCodec
    ) -> None:
        self._ledger = ledger
        self._tasks = tasks
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                await self.refresh_due()
            except LedgerUnavailable:
                pass  # there is time
            except Exception:  # noqa: BLE001 - one fault must not leave the accounts unseen for ever
                _log.exception("balance_check.error")
            await asyncio.sleep(BALANCE_REFRESH_SECONDS)

    async def refresh_due(self) -> None:
        """Look at each account for which that is due. Raises LedgerUnavailable."""
        registry = self._registry.current
        starving = {
            name
            for tenant in registry.tenants.values()
            if tenant.policy.spending_mode is SpendingMode.COUNT_ONLY
            for name in tenant.accounts
        }
        for account in registry.accounts.values():
            look = await self._ledger.claim_balance_check(account.id, count_only=account.name in starving)
            if look:
                await self._check_balance(account, look)

    async def _check_balance(self, account: Account, look: BalanceCheck) -> None:
        found = await self._tasks.get(look.reservation)
        if found is None:
            await self._ledger.record_balance_check(look, Balance())
            return
        check = await check_task(found[0], self._registry, self._task_ids, self._upstream)
        if check.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID}:
            return  # the next look may tell
        await self._ledger.record_balance_check(look, check.balance)
        _log.info("balance_check.done", account=account.name, answered=check.outcome)
