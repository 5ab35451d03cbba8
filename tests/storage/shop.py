"""A tenant with tasks on a real store."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain.ledger import Granted, ReservationState
from service.domain.tasks import Kind, Task
from service.domain.tenants import Account, Tenant, TenantPolicy
from service.storage.connections import Connections, connect
from service.storage.ledger import RedisLedger, Spans
from service.storage.redis import Keys, Scripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTasks
from service.usecases.ports import Answered, Ask, Check, RegistryChange, Settlement, TaskDraft
from tests.support.server_time import install, ledger_time, set_time

KEYS = Keys("gw")


@dataclass
class Shop:
    """The tenant 1 on the account 2, and the store it is kept in."""

    connections: Connections
    ledger: RedisLedger
    tasks: RedisTasks
    spans: Spans

    @property
    def client(self) -> Any:
        """The store itself."""
        return self.connections.commands

    async def accept(self, *names: str) -> None:
        """Make these tasks."""
        for name in names:
            granted, _ = await self.ledger.reserve(Ask(name, 1, (2,), Kind.SEAMLESS))
            assert isinstance(granted, Granted)
            await self.ledger.settle(
                Settlement(
                    reservation=name,
                    tenant=1,
                    account=2,
                    kind=Kind.SEAMLESS,
                    created=granted.now,
                    outcome=ReservationState.ACCEPTED,
                    draft=TaskDraft(f"task_{name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}")),
                )
            )

    async def now(self) -> int:
        """The ledger's time."""
        return await ledger_time(self.client, KEYS)

    async def advance(self, milliseconds: int) -> None:
        """Let time pass for the ledger."""
        await set_time(self.client, KEYS, await self.now() + milliseconds)

    async def check(self, *answers: Answered) -> Task | None:
        """Check the task that is due next, again and again, each time when it is due; the last record."""
        recorded = None
        for answered in answers:
            ((_, at),) = await self.client.zrange(KEYS.watch, 0, 0, withscores=True)
            await set_time(self.client, KEYS, max(int(at), await self.now()))
            (due,) = await self.tasks.claim(1)
            recorded = await self.tasks.record(due, Check(answered=answered))
        return recorded[0] if recorded else None

    async def due_in(self, name: str) -> int | None:
        """In how many milliseconds the next check of a task is due; None if it does not wait for one."""
        at = await self.client.zscore(KEYS.watch, name)
        return None if at is None else int(at) - await self.now()


@asynccontextmanager
async def shop(url: str) -> AsyncIterator[Shop]:
    """A shop on an emptied store."""
    install()
    connections, spans = connect(url, timeout=5), Spans()
    scripts: Any = Scripts(connections.commands)
    client: Any = connections.commands
    try:
        await client.flushall()
        change = RegistryChange(
            version=0,
            next_id=3,
            tenants=(Tenant(1, "shop", ("main",), TenantPolicy()),),
            accounts=(Account(2, "main", b"sealed"),),
        )
        await RedisRegistry(scripts, KEYS).write(change)
        ledger, tasks = RedisLedger(scripts, KEYS, spans), RedisTasks(scripts, KEYS, spans)
        yield Shop(connections, ledger, tasks, spans)
    finally:
        await connections.aclose()
