"""Checks of running tasks and of account balances at the upstream."""

from __future__ import annotations

import asyncio

import structlog

from service.domain.errors import LedgerUnavailable, NotFound
from service.domain.ledger import Figures
from service.domain.tasks import Task, TaskIds
from service.domain.tenants import Account, Purse, Registry
from service.telemetry.gauges import Level
from service.telemetry.logging import yuan
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.background import ended, rounds
from service.usecases.ports import Answered, Check, Due, Ledger, Look, RegistryView, Tasks, Upstream
from service.usecases.settlement import EXPIRY, tell
from service.usecases.task_cache import Board

_log = structlog.get_logger(__name__)


EXPIRE_SECONDS = 5.0


_KEY_LOST = "None of the secret keys opens its id."


class Watch:
    """Checks the tasks that are due and books reservations whose process died."""

    def __init__(
        self,
        *,
        tasks: Tasks,
        ledger: Ledger,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIds,
        board: Board,
        metrics: Metrics,
        tracer: Tracer = UNTRACED,
        at_once: int = 64,
    ) -> None:
        self._tasks = tasks
        self._ledger = ledger
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._board = board
        self._metrics = metrics
        self._tracer = tracer
        self._at_once = at_once
        self._checking: set[asyncio.Task[None]] = set()
        metrics.levels.tell(Level.CHECKS, lambda: {(): len(self._checking)})
        metrics.levels.tell(Level.CHECKS_LIMIT, lambda: {(): at_once})

    async def run(self) -> None:
        """Watch until cancelled; a check under way is then finished by another process once its claim runs out."""
        try:
            await rounds("watch", self.tick)
        finally:
            await ended(self._checking)

    async def tick(self) -> bool:
        """Claim as many due tasks as there is room for and begin to check them; whether more may be due.

        None before the registry is there: a task whose account is not known would look as if it had been removed.
        """
        if not self._registry.ready:
            return False
        room = self._at_once - len(self._checking)
        if room <= 0:
            await asyncio.wait(self._checking, return_when=asyncio.FIRST_COMPLETED)
            return True
        due = await self._tasks.claim(room)
        self._metrics.claimed((each.claimed - each.due) / 1000 for each in due)
        for each in due:
            check = asyncio.create_task(self._guarded_check(each))
            self._checking.add(check)
            check.add_done_callback(self._checking.discard)
        return len(due) == room

    async def settled(self) -> None:
        """Wait until no check is under way."""
        while self._checking:
            await asyncio.wait(self._checking)

    async def expire(self) -> None:
        """Book for ever what died between reserving and settling."""
        while True:
            try:
                settled = await self._ledger.expire(100)
            except LedgerUnavailable:
                settled = ()
            except Exception:  # noqa: BLE001 - one fault must not leave all other places held for ever
                _log.exception("expiry.crashed")
                settled = ()
            self._metrics.expired(len(settled))
            for each in settled:
                tell(self._registry.current, each, by=EXPIRY, booked=True)
            await asyncio.sleep(EXPIRE_SECONDS)

    async def _guarded_check(self, due: Due) -> None:
        """Check one task; after a fault of ours it is due again when its claim runs out."""
        try:
            with self._tracer.follow_up("check task", due.task.trace, due.task.reservation):
                await self._check(due)
        except Exception:  # noqa: BLE001 - nobody awaits it
            _log.exception("check.crashed", reservation=due.task.reservation)

    async def _check(self, due: Due) -> None:
        """Ask about one task and record the answer; without a record it is due again when the claim runs out."""
        check = await ask(due.task, self._registry, self._task_ids, self._upstream)
        self._metrics.checked(check.answered)
        try:
            recorded = await self._tasks.record(due, check)
        except LedgerUnavailable:
            return
        if recorded is None:
            return
        task, now = recorded
        self._board.recorded(task, now)  # whoever waits in this process is spared the way over the store
        if task.state.ended:
            report_end(task, self._registry.current, self._metrics)


def report_end(task: Task, registry: Registry, metrics: Metrics) -> None:
    """Count and log the end of a task, which was recorded just now."""
    metrics.finished(task)
    account = registry.account(task.account)
    _log.info(
        "task.ended",
        reservation=task.reservation,
        tenant=registry.tenant_name(task.tenant),
        account=account and account.name,
        kind=task.kind,
        state=task.state,
        seconds=(task.updated - task.created) / 1000,
        uses=task.cost.count,
        yuan=yuan(task.cost.money),
        basis=task.cost.basis,
        error=task.error and task.error.code,
    )


async def ask(task: Task, registry: RegistryView, task_ids: TaskIds, upstream: Upstream) -> Check:
    """Ask the upstream about a task of an account of ours."""
    account = registry.current.account(task.account)
    if account is None:
        return Check(answered=Answered.SILENT)  # its account was removed: nobody can tell any more
    try:
        upstream_id = task_ids.open(task.id).upstream_id
    except NotFound:  # the key that sealed it was taken away, and may come back
        _log.error("task.key-lost", reservation=task.reservation, detail=_KEY_LOST)
        return Check(answered=Answered.NOTHING)
    return await upstream.check(account, upstream_id)


LOOK_SECONDS = 5.0
"""How often it is asked whether a look is due: it comes late by at most this."""


class FreeLooks:
    """Looks at the accounts whose balance somebody waits for."""

    def __init__(
        self, *, ledger: Ledger, tasks: Tasks, upstream: Upstream, registry: RegistryView, task_ids: TaskIds
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
                await self.tick()
            except LedgerUnavailable:
                pass  # there is time
            except Exception:  # noqa: BLE001 - one fault must not leave the accounts unseen for ever
                _log.exception("look.crashed")
            await asyncio.sleep(LOOK_SECONDS)

    async def tick(self) -> None:
        """Look at each account for which that is due. Raises LedgerUnavailable."""
        registry = self._registry.current
        starving = {
            name
            for tenant in registry.tenants.values()
            if tenant.policy.purse is Purse.COUNT_ONLY
            for name in tenant.accounts
        }
        for account in registry.accounts.values():
            look = await self._ledger.look(account.id, count_only=account.name in starving)
            if look:
                await self._look(account, look)

    async def _look(self, account: Account, look: Look) -> None:
        found = await self._tasks.get(look.reservation)
        if found is None:
            await self._ledger.looked(look, Figures())
            return
        check = await ask(found[0], self._registry, self._task_ids, self._upstream)
        if check.answered in {Answered.NOTHING, Answered.UNUSABLE}:
            return  # the next look may tell
        await self._ledger.looked(look, check.figures)
        _log.info("account.looked-at", account=account.name, answered=check.answered)
