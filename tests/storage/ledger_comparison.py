"""The scripts on Redis beside their model: the same calls must give the same answers and store the same data."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import msgspec
import uvloop
from hypothesis.stateful import RuleBasedStateMachine, invariant

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    Balance,
    DayUsage,
    LedgerClock,
    Reservation,
    ReservationState,
    TenantState,
)
from service.domain.tasks import Task, TaskError
from service.storage.connections import connect
from service.storage.deliveries import RedisDeliveryQueue, _decode_delivery
from service.storage.ledger import RedisLedger, _parse_day_usage
from service.storage.redis import DAY_MS, Keys, RedisScripts, parse_withscores
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore, _decode_task
from tests.model.ledger import (
    counter_key,
    is_charged,
    is_open,
    is_reserved,
    money_in_window,
    roll_windows,
)
from tests.model.tasks import StoreModel
from tests.support.server_time import install_server_time, set_server_time
from tests.support.tasks import make_retention

T = TypeVar("T")
P = ParamSpec("P")

TENANT, ACCOUNTS = 1, (2, 3)
START_MS = 2_524_607_999_000
"""The server's clock at the start, one second before 2050: every window ends within the next second."""


def is_provisional(reservation: Reservation) -> bool:
    """Return whether its outcome can still change."""
    return reservation.state in {ReservationState.RESERVED, ReservationState.UNKNOWN}


def normalize_task(task: Task | None) -> Any:
    """Return a task with comparable raw JSON, and without the detail of a timeout error."""
    if task is None:
        return None
    if task.error and task.error.code in {"task-lost", "result-unusable"}:
        task = msgspec.structs.replace(task, error=TaskError(task.error.code, ""))
    return msgspec.to_builtins(
        msgspec.structs.replace(task, options=bytes(task.options), metadata=bytes(task.metadata))
    )


def normalize(result: Any) -> Any:
    """Drop an empty balance after a reservation, also within an answer."""
    if isinstance(result, tuple):
        return tuple(map(normalize, result))
    if not isinstance(result, Reservation) or result.balance_after != Balance():
        return result
    return msgspec.structs.replace(result, balance_after=None)


def normalize_day(day: DayUsage) -> Any:
    """Drop the zero counters of a day's usage."""
    tallies = {kind: {item: number for item, number in tally.items() if number} for kind, tally in day.tallies.items()}
    return {kind: tally for kind, tally in tallies.items() if tally}, day.unknown, day.refunds


def decode(packed: bytes | None, kind: type[T]) -> T | None:
    return msgspec.msgpack.decode(packed, type=kind) if packed else None


class LedgerComparison(RuleBasedStateMachine):
    """Calls Redis and the model and compares answers and stored data."""

    def __init__(self, url: str) -> None:
        super().__init__()
        install_server_time()
        self.loop = uvloop.new_event_loop()
        self.retention = make_retention(lost_after_ms=90_000, unusable_after_ms=200_000)
        self.model = StoreModel(START_MS, self.retention)
        self.latest_ms = START_MS
        self.final_states: dict[str, ReservationState] = {}
        self.keys = Keys("model")
        self.run(self._open(url))

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        self.scripts = scripts = RedisScripts(self.client)
        self.ledger = RedisLedger(scripts, self.keys, self.retention)
        self.tasks = RedisTaskStore(scripts, self.keys, self.retention)
        self.deliveries = RedisDeliveryQueue(scripts, self.keys)
        self.registry_store = RedisRegistry(scripts, self.keys)
        await set_server_time(self.client, self.keys, START_MS)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.loop.close()

    def compare(
        self, real: Coroutine[Any, Any, T], model_call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Return the answer of both, or None if both raised LedgerUnavailable."""
        actual = expected = None
        with suppress(LedgerUnavailable):
            expected = model_call(*args, **kwargs)
        with suppress(LedgerUnavailable):
            actual = self.run(real)
        assert normalize(actual) == normalize(expected)
        return actual

    def advance_clock(self, milliseconds: int) -> None:
        """Move the server's clock, in either direction, and delete the keys that Redis would have expired."""
        if milliseconds:
            self.model.now_ms += milliseconds
            self.latest_ms = max(self.latest_ms, self.model.now_ms)
            self.run(self._expire_keys())

    async def _expire_keys(self) -> None:
        model, now = self.model, self.model.now_ms
        await set_server_time(self.client, self.keys, now)
        for tenant, key in [item for item, (_, _, until) in model.idempotency_keys.items() if until <= now]:
            del model.idempotency_keys[tenant, key]
            await self.client.delete(self.keys.idempotency(tenant, key))
        for name in [item for item, until in model.watched_until.items() if until <= now]:
            del model.watched_until[name]
            await self.client.delete(self.keys.poll_watched(name))

    def tenant_state(self) -> TenantState:
        return self.model.tenant_state(TENANT)

    def take_snapshot(self) -> Any:
        """Return everything that a call could change."""
        model = self.model
        kept = [model.accounts.get(account, AccountState()) for account in ACCOUNTS], model.reservations, model.tasks
        return self.tenant_state(), dict(model.idempotency_keys), msgspec.msgpack.encode((kept, model.due_checks))

    @invariant()
    def stored_data_matches(self) -> None:
        """Require that both stored the same, and that no lease, check, queue or key is kept longer than its purpose."""
        self.run(self._compare_state())
        self.run(self._compare_values())

    async def _compare_state(self) -> None:
        model, keys = self.model, self.keys
        days = sorted({item.created_at // DAY_MS for item in (*model.deleted, *model.reservations.values())})
        times = {
            keys.leases: {
                name: item.lease_expires_at for name, item in model.reservations.items() if is_reserved(item)
            },
            keys.poll_due: model.due_checks,
            keys.poll_claimed: model.claimed_checks,
            keys.webhook_queues: model.queue_turns,
            keys.failed_deliveries: model.failed_at,
        }
        (last, offset), listed, *rows = await self.scripts.read(
            ("MGET", keys.clock, keys.clock_offset),
            ("ZRANGE", keys.tenant_tasks(TENANT), 0, -1, "WITHSCORES"),
            *(("HGET", key, "state") for key in (keys.tenant(TENANT), *map(keys.account, ACCOUNTS))),
            *(("ZRANGE", key, 0, -1, "WITHSCORES") for key in times),
            *(("HGETALL", keys.usage(TENANT, day)) for day in days),
        )
        clock = LedgerClock(int(last or 0), int(offset or 0))
        assert clock.advance(model.now_ms) == model.clock.advance(model.now_ms)
        oldest = self.latest_ms - self.retention.keep_ms
        new_tasks = {name: task.created_at for name, task in model.tasks.items() if task.created_at > oldest}
        assert {name: at for name, at in parse_withscores(listed) if name in new_tasks} == new_tasks
        state = decode(rows.pop(0), TenantState) or TenantState()
        roll_windows(state, model.now_ms)
        assert state == self.tenant_state()
        for account in ACCOUNTS:
            known = decode(rows.pop(0), AccountState) or AccountState()
            assert known == model.accounts.get(account, AccountState()), account
        for key, expected in times.items():
            assert dict(parse_withscores(rows.pop(0))) == expected, key
        for day in days:
            usage, expected_usage = (
                normalize_day(_parse_day_usage(rows.pop(0))),
                normalize_day(model.usage(TENANT, day)),
            )
            assert usage[0] == expected_usage[0]
            assert model.deleted or usage == expected_usage

    async def _compare_values(self) -> None:
        model, keys = self.model, self.keys
        reservations, tasks, deliveries = list(model.reservations), list(model.tasks), list(model.deliveries)
        kept = {
            keys.idempotency(TENANT, key): f"{name} {content}"
            for (_, key), (name, content, _) in model.idempotency_keys.items()
        }
        names = await self.scripts.read(
            ("KEYS", keys.idempotency(TENANT, "*").replace("{", "\\{")),
            *(("GET", key) for key in kept),
            *(("GET", keys.reservation(name)) for name in reservations),
            *(("GET", keys.task(name)) for name in tasks),
            *(("GET", keys.delivery(name)) for name in deliveries),
        )
        stored = iter(names[1:])
        assert {str(name, "utf-8") for name in names[0]} == kept.keys()
        assert [str(next(stored), "utf-8") for _ in kept] == list(kept.values())
        for name in reservations:
            assert normalize(decode(next(stored), Reservation)) == normalize(model.reservations[name]), name
        for name in tasks:
            assert normalize_task(_decode_task(name, next(stored))) == normalize_task(model.tasks[name])
        for name in deliveries:
            assert _decode_delivery(name, next(stored)) == model.deliveries[name]

    def check_limits(self) -> None:
        """Require that no limit in force is exceeded, counted from the reservations of each window."""
        policy, state = self.model.tenant_policies[TENANT], self.tenant_state()
        held = [item for item in self.model.reservations.values() if is_charged(item) or is_open(item)]
        assert policy.max_active is None or sum(map(is_open, held)) <= policy.max_active
        for limit in policy.limits:
            key = counter_key(state.windows[limit.window])
            mine = [item for item in held if item.window_starts.get(limit.window) == key and not item.refund]
            assert limit.tasks is None or len(mine) <= limit.tasks
            money_fen = sum(money_in_window(item, limit.window) for item in mine)
            if limit.money_fen is not None and money_fen > limit.money_fen:
                newest = max(mine, key=lambda item: (item.lease_expires_at, item.submission_seq))
                assert not newest.money_holds, "it held money that was not there"

    @invariant()
    def outcomes_are_final(self) -> None:
        """Require that an outcome never changes, except an unknown one that is resolved."""
        for name, reservation in self.model.reservations.items():
            assert self.final_states.get(name, reservation.state) is reservation.state
            if not is_provisional(reservation):
                self.final_states[name] = reservation.state

    @invariant()
    def account_counters_add_up(self) -> None:
        """Require that the counters of the accounts follow from the reservations."""
        for account, known in self.model.accounts.items():
            mine = [item for item in self.model.reservations.values() if item.account == account]
            if self.model.deleted:
                continue
            assert known.open_submissions == sum(map(is_open, mine))
            assert known.unsettled == sum(map(is_reserved, mine))
            assert known.unknown_outcomes == sum(item.state is ReservationState.UNKNOWN for item in mine)
            assert known.pending_prepaid_only == sum(item.prepaid_only for item in mine)
            assert known.pending_charges == sum(item.charge_pending for item in mine if is_open(item))
            assert 0 <= known.untracked_charges <= sum(item.charge_pending for item in mine if not is_open(item))
