"""Looking at the balance of an account without spending any of it.

The upstream has no call for that. But where it tells today's balance with every check of a finished task, checking the
newest such task again is one. The ledger says when that is due, and finds out whether it works.
"""

from __future__ import annotations

import asyncio

import structlog

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import Figures
from service.domain.tasks import TaskIds
from service.domain.tenants import Account, Purse
from service.usecases.ports import Answered, Ledger, Look, RegistryView, Tasks, Upstream
from service.usecases.watch import ask

_log = structlog.get_logger(__name__)

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
