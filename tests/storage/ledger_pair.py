"""The scripts on a real server beside their model, which is asked the same and has to answer and hold the same."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import uvloop
from hypothesis.stateful import RuleBasedStateMachine, invariant

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, LedgerClock, Reservation, TenantState
from service.storage.connections import connect
from service.storage.ledger import RedisBooks, RedisLedger, Spans
from service.storage.redis import Keys, Scripts, scored
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTasks
from tests.fakes import FakeClock, FakeLedger, FakeRegistry
from tests.storage.ledger_views import canonical, is_reserved, plain, plain_day, rolled
from tests.support.server_time import install, set_time

T = TypeVar("T")

TENANT, ACCOUNTS = 1, (2, 3)
LATER = 2_524_607_999_000
"""The server's time at first, a second before the year 2050: every window ends in the next second."""


class LedgerPair(RuleBasedStateMachine):
    """Asks both, and compares what they answer and what they hold."""

    def __init__(self, url: str) -> None:
        super().__init__()
        install()
        self.loop = uvloop.new_event_loop()
        self.spans = Spans(lost_after=90_000, unusable_after=200_000)
        self.model = FakeLedger(clock=FakeClock(LATER), spans=self.spans)
        self.registry = FakeRegistry(self.model)
        self.latest = LATER
        self.keys = Keys("model")
        self.run(self._open(url))

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        self.scripts = scripts = Scripts(self.client)
        self.ledger = RedisLedger(scripts, self.keys, self.spans)
        self.tasks = RedisTasks(scripts, self.keys, self.spans)
        self.books = RedisBooks(scripts, self.keys)
        self.store = RedisRegistry(scripts, self.keys)
        await set_time(self.client, self.keys, LATER)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.loop.close()

    def both(
        self,
        real: Coroutine[Any, Any, T],
        model: Coroutine[Any, Any, T],
        plainly: Callable[[T | None], Any] = lambda answer: answer,
    ) -> T | None:
        """What both answered, or None if both refused to."""

        async def outcome(work: Coroutine[Any, Any, T]) -> T | None:
            try:
                return await work
            except LedgerUnavailable:
                return None

        found, expected = self.run(outcome(real)), self.run(outcome(model))
        assert plainly(found) == plainly(expected)
        return found

    def wait(self, milliseconds: int) -> None:
        """Move the server's clock, back too, and take away what Redis would have forgotten by then."""
        if milliseconds:
            self.model.clock.at += milliseconds
            self.latest = max(self.latest, self.model.clock.at)
            self.run(self._wait())

    async def _wait(self) -> None:
        await set_time(self.client, self.keys, self.model.clock.at)
        for tenant, key in [each for each, (_, _, until) in self.model.keys.items() if until <= self.model.clock.at]:
            del self.model.keys[tenant, key]
            await self.client.delete(self.keys.idempotency(tenant, key))
        for name in [each for each, until in self.model.interest.items() if until <= self.model.clock.at]:
            del self.model.interest[name]
            await self.client.delete(self.keys.interest(name))

    @invariant()
    def they_hold_the_same(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        model, keys = self.model, self.keys
        last, offset = await self.client.mget(keys.clock, keys.clock_offset)
        clock = LedgerClock(int(last or 0), int(offset or 0))
        assert clock.advance(model.clock.at) == model.clock.kept.advance(model.clock.at)
        names, days = list(model.reservations), [day for _, day in model.days]
        tenant, *accounts = await self.scripts.read(
            *(("HGET", each, "state") for each in (keys.tenant(TENANT), *map(keys.account, ACCOUNTS)))
        )
        state = decoded(tenant, TenantState) or TenantState()
        assert rolled(state, model.clock.at) == rolled(model.tenants.get(TENANT, TenantState()), model.clock.at)
        for account, packed in zip(ACCOUNTS, accounts, strict=True):
            known = decoded(packed, AccountState) or AccountState()
            assert known == model.account_states.get(account, AccountState()), account
        stored = await self.scripts.read(*(("GET", keys.reservation(each)) for each in names))
        for name, packed in zip(names, stored, strict=True):
            assert canonical(decoded(packed, Reservation)) == canonical(model.reservations[name]), name
        usage, expected = await self.books.usage(TENANT, days), await model.usage(TENANT, days)
        assert list(map(plain_day, usage)) == list(map(plain_day, expected))
        await self._compare_tasks()
        await self._compare_indexes()

    async def _compare_tasks(self) -> None:
        oldest = self.latest - self.spans.keep
        pages = [
            await each.page(TENANT, state=None, kind=None, limit=99, cursor=None) for each in (self.tasks, self.model)
        ]
        found, expected = ([plain(task) for task in page.tasks if task.created > oldest] for page in pages)
        assert found == expected

    async def _compare_indexes(self) -> None:
        """Neither a lease, a check to come nor a key is kept for longer than for what it stands."""
        model, keys = self.model, self.keys
        leases, watch, claims, names = await self.scripts.read(
            ("ZRANGE", keys.leases, 0, -1, "WITHSCORES"),
            ("ZRANGE", keys.watch, 0, -1, "WITHSCORES"),
            ("ZRANGE", keys.claims, 0, -1, "WITHSCORES"),
            ("KEYS", keys.idempotency(TENANT, "*").replace("{", "\\{")),
        )
        assert dict(scored(leases)) == {
            name: each.lease for name, each in model.reservations.items() if is_reserved(each)
        }
        assert dict(scored(watch)) == model.due
        assert dict(scored(claims)) == model.claims
        kept = {
            keys.idempotency(TENANT, key): f"{name} {content}" for (_, key), (name, content, _) in model.keys.items()
        }
        texts = await self.scripts.read(*(("GET", each) for each in names))
        assert {str(name, "utf-8"): str(text, "utf-8") for name, text in zip(names, texts, strict=True)} == kept


def decoded(packed: bytes | None, kind: type[T]) -> T | None:
    return msgspec.msgpack.decode(packed, type=kind) if packed else None
