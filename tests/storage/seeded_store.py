"""A store with a tenant and two accounts, a clock that tests set, and the ports on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from service.domain.ledger import Balance, Grant, Idempotency, ReservationState
from service.domain.tasks import Kind, Task
from service.domain.tenants import Account, Tenant
from service.storage.connections import connect
from service.storage.ledger import RedisLedger, Retention
from service.storage.redis import DAY_MS, Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.usecases.ports import CheckResult, NewTask, RegistryChange, ReserveRequest, Settlement
from tests.support.server_time import install_server_time, set_server_time

START_MS = 2_524_607_999_000
"""The server's time at first: a second before the year 2050."""
TENANT, FIRST, SECOND = 1, 2, 3
TENANTS = (Tenant(TENANT, "t", ("a", "b")),)
ACCOUNTS = (Account(FIRST, "a", b"encrypted"), Account(SECOND, "b", b"encrypted"))
RETENTION = Retention(
    lease_ms=180_000,
    check_interval_ms=2_500,
    claim_lease_ms=30_000,
    watched_ms=30_000,
    lost_after_ms=1_800_000,
    unusable_after_ms=DAY_MS,
    keep_finished_ms=30 * DAY_MS,
)


class SeededStore:
    """A store with a tenant and two accounts, and the ports on it."""

    def __init__(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        self.scripts, self.keys, self.now = RedisScripts(self.client), Keys("plain"), START_MS
        self.ledger = RedisLedger(self.scripts, self.keys, RETENTION)
        self.tasks = RedisTaskStore(self.scripts, self.keys, RETENTION)
        self.registry = RedisRegistry(self.scripts, self.keys)

    async def advance_clock(self, milliseconds: int) -> None:
        """Move the server's clock. Key expiry is not affected."""
        self.now += milliseconds
        await set_server_time(self.client, self.keys, self.now)

    async def write_registry(self, version: int, **changes: Any) -> None:
        assert await self.registry.write(RegistryChange(version=version, next_id=4, **changes))

    async def reserve(self, name: str, idempotency: Idempotency | None = None) -> None:
        verdict, _ = await self.ledger.reserve(ReserveRequest(name, TENANT, (FIRST,), Kind.UPSCALE, idempotency))
        assert isinstance(verdict, Grant)

    async def settle(
        self,
        name: str,
        outcome: ReservationState,
        count: int | None = None,
        idempotency: Idempotency | None = None,
        created: int | None = None,
        webhook: str | None = None,
    ) -> None:
        """Settle, with a remaining count if given; `created` if not now."""
        settlement = Settlement(
            reservation=name,
            tenant=TENANT,
            account=FIRST,
            kind=Kind.UPSCALE,
            created_at=self.now if created is None else created,
            outcome=outcome,
            balance=Balance() if count is None else Balance(count, 0),
            new_task=NewTask(f"task-{name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}"), webhook),
            idempotency=idempotency,
        )
        assert await self.ledger.settle(settlement)

    async def accept(self, *names: str, idempotency: Idempotency | None = None, webhook: str | None = None) -> None:
        for name in names:
            await self.reserve(name, idempotency)
            await self.settle(name, ReservationState.ACCEPTED, webhook=webhook)

    async def record_check(self, check: CheckResult) -> Task:
        """Check the task that is due next, when any check is due that was claimed before."""
        await self.advance_clock(RETENTION.claim_lease_ms)
        (due,) = await self.tasks.claim_checks(1)
        recorded = await self.tasks.record_check(due, check)
        assert recorded
        return recorded[0]


@asynccontextmanager
async def open_seeded_store(url: str) -> AsyncIterator[SeededStore]:
    """Open an emptied server with the seed data."""
    install_server_time()
    store = SeededStore(url)
    try:
        await store.client.flushall()
        await store.advance_clock(0)
        await store.write_registry(0, tenants=TENANTS, accounts=ACCOUNTS)
        yield store
    finally:
        await store.connections.aclose()
