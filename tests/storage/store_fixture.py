"""A tenant with tasks in a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain.ledger import Grant, ReservationState
from service.domain.tasks import Kind, Task
from service.domain.tenants import Account, Tenant, TenantPolicy
from service.storage.connections import Connections, connect
from service.storage.ledger import RedisLedger, Retention
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.usecases.ports import CheckOutcome, CheckResult, NewTask, RegistryChange, ReserveRequest, Settlement
from tests.support.retention import make_retention
from tests.support.server_time import install_server_time, read_ledger_time, set_server_time

KEYS = Keys("gw")


@dataclass
class StoreFixture:
    """Tenant 1 on account 2, and its store."""

    connections: Connections
    ledger: RedisLedger
    tasks: RedisTaskStore
    retention: Retention

    @property
    def client(self) -> Any:
        return self.connections.commands

    async def accept_tasks(self, *names: str) -> None:
        for name in names:
            granted, _ = await self.ledger.reserve(ReserveRequest(name, 1, (2,), Kind.SEAMLESS))
            assert isinstance(granted, Grant)
            await self.ledger.settle(
                Settlement(
                    reservation=name,
                    tenant=1,
                    account=2,
                    kind=Kind.SEAMLESS,
                    created_at=granted.now,
                    outcome=ReservationState.ACCEPTED,
                    new_task=NewTask(f"task_{name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}")),
                )
            )

    async def now(self) -> int:
        """Return the ledger's clock in milliseconds."""
        return await read_ledger_time(self.client, KEYS)

    async def advance(self, milliseconds: int) -> None:
        await set_server_time(self.client, KEYS, await self.now() + milliseconds)

    async def check_due_task(self, *answers: CheckOutcome) -> Task | None:
        """Check the task that is due next, once for each answer, when it is due. Returns the last record."""
        recorded = None
        for answered in answers:
            ((_, at),) = await self.client.zrange(KEYS.poll_due, 0, 0, withscores=True)
            await set_server_time(self.client, KEYS, max(int(at), await self.now()))
            (due,) = await self.tasks.claim_checks(1)
            recorded = await self.tasks.record_check(due, CheckResult(outcome=answered))
        return recorded[0] if recorded else None

    async def next_check_ms(self, name: str) -> int | None:
        """Return the milliseconds until the next check of a task; None if none is scheduled."""
        at = await self.client.zscore(KEYS.poll_due, name)
        return None if at is None else int(at) - await self.now()


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[StoreFixture]:
    """Open an emptied store with the tenant and the account."""
    install_server_time()
    connections, spans = connect(url, timeout=5), make_retention()
    scripts: Any = RedisScripts(connections.commands)
    client: Any = connections.commands
    try:
        await client.flushall()
        change = RegistryChange(
            version=0,
            next_id=3,
            tenants=(Tenant(1, "shop", ("main",), TenantPolicy()),),
            accounts=(Account(2, "main", b"encrypted"),),
        )
        await RedisRegistry(scripts, KEYS).write(change)
        ledger, tasks = RedisLedger(scripts, KEYS, spans), RedisTaskStore(scripts, KEYS, spans)
        yield StoreFixture(connections, ledger, tasks, spans)
    finally:
        await connections.aclose()
