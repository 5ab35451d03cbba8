"""A store with a tenant and two accounts, whose clock the tests move, and the ports over it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from service.domain.ledger import Figures, Granted, Idempotency, ReservationState
from service.domain.tasks import Kind
from service.domain.tenants import Account, Tenant
from service.storage.connections import connect
from service.storage.ledger import RedisBooks, RedisLedger, Spans
from service.storage.redis import Keys, Scripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTasks
from service.usecases.ports import Ask, Check, RegistryChange, Settlement, TaskDraft
from tests.support.server_time import install, set_time
from tests.support.valkey import Valkey

LATER = 2_524_607_999_000
"""The server's time at first: a second before the year 2050."""
SPANS = Spans()
TENANT, FIRST, SECOND = 1, 2, 3
TENANTS = (Tenant(TENANT, "t", ("a", "b")),)
ACCOUNTS = (Account(FIRST, "a", b"sealed"), Account(SECOND, "b", b"sealed"))


@dataclass
class Store:
    """A store with a tenant and two accounts, and the ports over it."""

    client: Any
    scripts: Scripts
    keys: Keys
    ledger: RedisLedger
    tasks: RedisTasks
    books: RedisBooks
    registry: RedisRegistry
    now: int = LATER

    async def wait(self, milliseconds: int) -> None:
        """Move the server's clock, but not that by which it forgets."""
        self.now += milliseconds
        await set_time(self.client, self.keys, self.now)

    async def change(self, version: int, **changes: Any) -> None:
        assert await self.registry.write(RegistryChange(version=version, next_id=4, **changes))

    async def reserve(self, name: str, idempotency: Idempotency | None = None) -> None:
        verdict, _ = await self.ledger.reserve(Ask(name, TENANT, (FIRST,), Kind.UPSCALE, idempotency))
        assert isinstance(verdict, Granted)

    async def settle(
        self,
        name: str,
        outcome: ReservationState,
        count: int | None = None,
        idempotency: Idempotency | None = None,
        created: int | None = None,
        webhook: str | None = None,
    ) -> None:
        """Settle with a count of uses that is left, if it is told; `created` if it was before now."""
        settlement = Settlement(
            reservation=name,
            tenant=TENANT,
            account=FIRST,
            kind=Kind.UPSCALE,
            created=self.now if created is None else created,
            outcome=outcome,
            figures=Figures() if count is None else Figures(count, 0),
            draft=TaskDraft(f"task-{name}", msgspec.Raw(b"{}"), msgspec.Raw(b"{}"), webhook),
            idempotency=idempotency,
        )
        assert await self.ledger.settle(settlement)

    async def accept(self, name: str, idempotency: Idempotency | None = None, webhook: str | None = None) -> None:
        await self.reserve(name, idempotency)
        await self.settle(name, ReservationState.ACCEPTED, webhook=webhook)

    async def check(self, check: Check) -> None:
        await self.wait(SPANS.claim)
        (due,) = await self.tasks.claim(1)
        assert await self.tasks.record(due, check)

    async def left(self, key: str) -> int | None:
        """For how long a key is still kept, to the minute; None if for ever."""
        found = int(await self.client.pttl(key))
        assert found != -2, f"{key} is gone"
        return None if found < 0 else -(-found // 60_000) * 60_000

    async def shorten(self, key: str) -> None:
        """Let a key be kept for a minute only, as if the rest had passed."""
        assert await self.client.pexpire(key, 60_000)


@asynccontextmanager
async def fresh(valkey: Valkey) -> AsyncIterator[Store]:
    """The store of a server, of which nothing else is left."""
    install()
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    scripts, keys = Scripts(client), Keys("plain")
    store = Store(
        client,
        scripts,
        keys,
        RedisLedger(scripts, keys, SPANS),
        RedisTasks(scripts, keys, SPANS),
        RedisBooks(scripts, keys),
        RedisRegistry(scripts, keys),
    )
    await client.flushall()
    await store.wait(0)
    await store.change(0, tenants=TENANTS, accounts=ACCOUNTS)
    yield store
    await connections.aclose()
