"""A store with a tenant and two accounts, a clock that tests set, and the ports on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain.ledger import Balance, Grant, Idempotency, ReservationState
from service.domain.tasks import Kind, Task
from service.domain.tenants import Account, Tenant
from service.storage.connections import Connections, connect
from service.storage.ledger import RedisLedger
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.usecases.ports import CheckOutcome, CheckResult, NewTask, RegistryChange, ReserveRequest, Settlement
from tests.support.server_time import install_server_time, set_server_time
from tests.support.tasks import make_retention

START_MS = 2_524_607_999_000
"""The server's time at first: a second before the year 2050."""
RETENTION = make_retention()
TENANT, FIRST, SECOND = 1, 2, 3
HOUR_MS = 3_600_000
TENANTS = (Tenant(TENANT, "t", ("a", "b")),)
ACCOUNTS = (Account(FIRST, "a", b"encrypted"), Account(SECOND, "b", b"encrypted"))


@dataclass
class SeededStore:
    """A store with a tenant and two accounts, and the ports on it."""

    connections: Connections
    scripts: RedisScripts
    keys: Keys
    ledger: RedisLedger
    tasks: RedisTaskStore
    registry: RedisRegistry
    now: int = START_MS

    @property
    def client(self) -> Any:
        return self.connections.commands

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

    async def record_check(self, check: CheckResult) -> None:
        await self.advance_clock(RETENTION.claim_lease_ms)
        (due,) = await self.tasks.claim_checks(1)
        assert await self.tasks.record_check(due, check)

    async def check_due_task(self, *outcomes: CheckOutcome) -> Task | None:
        """Check the task that is due next, once for each outcome, when it is due. Returns the last record."""
        recorded = None
        for outcome in outcomes:
            ((_, due_at),) = await self.client.zrange(self.keys.poll_due, 0, 0, withscores=True)
            await self.advance_clock(max(int(due_at) - self.now, 0))
            (due,) = await self.tasks.claim_checks(1)
            recorded = await self.tasks.record_check(due, CheckResult(outcome=outcome))
        return recorded[0] if recorded else None

    async def next_check_ms(self, name: str) -> int | None:
        """Return the milliseconds until the next check of a task; None if none is scheduled."""
        due_at = await self.client.zscore(self.keys.poll_due, name)
        return None if due_at is None else int(due_at) - self.now

    async def ttl_ms(self, key: str) -> int | None:
        """Return the time to live of a key, rounded up to minutes; None without expiry."""
        result = int(await self.client.pttl(key))
        assert result != -2, f"{key} is gone"
        return None if result < 0 else -(-result // 60_000) * 60_000

    async def shorten_ttl(self, key: str) -> None:
        """Reduce the time to live of a key to one minute."""
        assert await self.client.pexpire(key, 60_000)


@asynccontextmanager
async def open_seeded_store(url: str) -> AsyncIterator[SeededStore]:
    """Open an emptied server with the seed data."""
    install_server_time()
    connections = connect(url, timeout=5)
    client: Any = connections.commands
    scripts, keys = RedisScripts(client), Keys("plain")
    store = SeededStore(
        connections,
        scripts,
        keys,
        RedisLedger(scripts, keys, RETENTION),
        RedisTaskStore(scripts, keys, RETENTION),
        RedisRegistry(scripts, keys),
    )
    try:
        await client.flushall()
        await store.advance_clock(0)
        await store.write_registry(0, tenants=TENANTS, accounts=ACCOUNTS)
        yield store
    finally:
        await connections.aclose()
