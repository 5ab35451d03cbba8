"""The scripts on Redis beside their model: the same calls must give the same answers and state."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import uvloop
from hypothesis.stateful import RuleBasedStateMachine, invariant

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, LedgerClock, Reservation, TenantState
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import Keys, RedisScripts, parse_withscores
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from tests.fakes import FakeClock, FakeLedger, FakeRegistry
from tests.storage.ledger_views import is_reserved, normalize_day, normalize_reservation, normalize_task, roll_state
from tests.support.server_time import install_server_time, set_server_time
from tests.support.tasks import make_retention

T = TypeVar("T")

TENANT, ACCOUNTS = 1, (2, 3)
START_MS = 2_524_607_999_000
"""The server's clock at the start, one second before 2050: every window ends within the next second."""


class LedgerComparison(RuleBasedStateMachine):
    """Calls Redis and the model and compares answers and stored data."""

    def __init__(self, url: str) -> None:
        super().__init__()
        install_server_time()
        self.loop = uvloop.new_event_loop()
        self.retention = make_retention(lost_after_ms=90_000, unusable_after_ms=200_000)
        self.model = FakeLedger(clock=FakeClock(START_MS), retention=self.retention)
        self.model_registry = FakeRegistry(self.model)
        self.latest_ms = START_MS
        self.keys = Keys("model")
        self.run(self._open(url))

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        self.scripts = scripts = RedisScripts(self.client)
        self.ledger = RedisLedger(scripts, self.keys, self.retention)
        self.tasks = RedisTaskStore(scripts, self.keys, self.retention)
        self.registry_store = RedisRegistry(scripts, self.keys)
        await set_server_time(self.client, self.keys, START_MS)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.loop.close()

    def compare_calls(
        self,
        real: Coroutine[Any, Any, T],
        model: Coroutine[Any, Any, T],
        normalize: Callable[[T | None], Any] = lambda answer: answer,
    ) -> T | None:
        """Return the answer of both, or None if both raised LedgerUnavailable."""

        async def outcome(work: Coroutine[Any, Any, T]) -> T | None:
            try:
                return await work
            except LedgerUnavailable:
                return None

        actual, expected = self.run(outcome(real)), self.run(outcome(model))
        assert normalize(actual) == normalize(expected)
        return actual

    def advance_clock(self, milliseconds: int) -> None:
        """Move the server's clock, in either direction, and delete the keys that Redis would have expired."""
        if milliseconds:
            self.model.clock.now_ms += milliseconds
            self.latest_ms = max(self.latest_ms, self.model.clock.now_ms)
            self.run(self._expire_keys())

    async def _expire_keys(self) -> None:
        await set_server_time(self.client, self.keys, self.model.clock.now_ms)
        for tenant, key in [
            idempotency_key
            for idempotency_key, (_, _, until) in self.model.idempotency_keys.items()
            if until <= self.model.clock.now_ms
        ]:
            del self.model.idempotency_keys[tenant, key]
            await self.client.delete(self.keys.idempotency(tenant, key))
        for name in [item for item, until in self.model.watched_until.items() if until <= self.model.clock.now_ms]:
            del self.model.watched_until[name]
            await self.client.delete(self.keys.poll_watched(name))

    @invariant()
    def stored_data_matches(self) -> None:
        self.run(self._compare())

    async def _compare(self) -> None:
        model, keys = self.model, self.keys
        last, offset = await self.client.mget(keys.clock, keys.clock_offset)
        clock = LedgerClock(int(last or 0), int(offset or 0))
        assert clock.advance(model.clock.now_ms) == model.clock.ledger_clock.advance(model.clock.now_ms)
        names, days = list(model.reservations), [day for _, day in model.usage_days]
        tenant, *accounts = await self.scripts.read(
            *(("HGET", item, "state") for item in (keys.tenant(TENANT), *map(keys.account, ACCOUNTS)))
        )
        state = decode(tenant, TenantState) or TenantState()
        assert roll_state(state, model.clock.now_ms) == roll_state(
            model.tenants.get(TENANT, TenantState()), model.clock.now_ms
        )
        for account, packed in zip(ACCOUNTS, accounts, strict=True):
            known = decode(packed, AccountState) or AccountState()
            assert known == model.states_by_account.get(account, AccountState()), account
        stored = await self.scripts.read(*(("GET", keys.reservation(item)) for item in names))
        for name, packed in zip(names, stored, strict=True):
            assert normalize_reservation(decode(packed, Reservation)) == normalize_reservation(
                model.reservations[name]
            ), name
        usage, expected = await self.ledger.get_usage(TENANT, days), await model.get_usage(TENANT, days)
        assert list(map(normalize_day, usage)) == list(map(normalize_day, expected))
        await self._compare_tasks()
        await self._compare_indexes()

    async def _compare_tasks(self) -> None:
        oldest = self.latest_ms - self.retention.keep_ms
        pages = [
            await item.list_page(TENANT, state=None, kind=None, limit=99, cursor=None)
            for item in (self.tasks, self.model)
        ]
        actual, expected = ([normalize_task(task) for task in page.tasks if task.created_at > oldest] for page in pages)
        assert actual == expected

    async def _compare_indexes(self) -> None:
        """Require that no lease, check or key is kept longer than its purpose."""
        model, keys = self.model, self.keys
        leases, watch, claims, names = await self.scripts.read(
            ("ZRANGE", keys.leases, 0, -1, "WITHSCORES"),
            ("ZRANGE", keys.poll_due, 0, -1, "WITHSCORES"),
            ("ZRANGE", keys.poll_claimed, 0, -1, "WITHSCORES"),
            ("KEYS", keys.idempotency(TENANT, "*").replace("{", "\\{")),
        )
        assert dict(parse_withscores(leases)) == {
            name: reservation.lease_expires_at
            for name, reservation in model.reservations.items()
            if is_reserved(reservation)
        }
        assert dict(parse_withscores(watch)) == model.due_checks
        assert dict(parse_withscores(claims)) == model.claimed_checks
        kept = {
            keys.idempotency(TENANT, key): f"{name} {content}"
            for (_, key), (name, content, _) in model.idempotency_keys.items()
        }
        texts = await self.scripts.read(*(("GET", name) for name in names))
        assert {str(name, "utf-8"): str(text, "utf-8") for name, text in zip(names, texts, strict=True)} == kept


def decode(packed: bytes | None, kind: type[T]) -> T | None:
    return msgspec.msgpack.decode(packed, type=kind) if packed else None
