"""Tasks in Redis, and the events of their changes."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
import structlog
from msgspec import MsgspecError, Struct
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from service.domain.errors import MalformedRequest
from service.domain.tasks import Artifact, Backlog, Cost, CostBasis, Kind, State, Task, TaskError
from service.storage.deliveries import delivery_arguments
from service.storage.ledger import KEEP_USAGE_MS, Retention, pack_balance
from service.storage.redis import (
    Keys,
    OnError,
    RedisScripts,
    classify_error,
    overdue_ms,
    parse_ledger_time,
    parse_server_time,
    parse_withscores,
)
from service.usecases.ports import CheckResult, ClaimedCheck, TaskPage
from service.usecases.task_cache import TaskCache

_BATCH_SIZE = 100
_MAX_SCANNED = 2_000
_LOST_ERROR = TaskError("task-lost", "The upstream no longer knows this task. It may have been charged.")
_UNUSABLE_ERROR = TaskError(
    "result-unusable", "The upstream told nothing of this task that can be used. It may have been charged."
)


class _StoredTask(Struct):
    """A task as the scripts keep it, in which JSON is text: Lua does not tell an empty list from an empty map."""

    id: str
    tenant: int
    account: int
    kind: Kind
    state: State
    created_at: int
    updated_at: int
    last_checked_at: int
    version: int
    options: str
    metadata: str
    finished_at: int | None = None
    artifacts: str = "[]"
    error: str | None = None
    cost: Cost = Cost(0, 0, CostBasis.UNKNOWN)
    webhook_url: str | None = None
    trace_context: str | None = None


class RedisTaskStore:
    """Reads tasks, lists them, and hands out those whose check is due."""

    def __init__(self, scripts: RedisScripts, keys: Keys, retention: Retention) -> None:
        self._scripts = scripts
        self._keys = keys
        self._retention = retention

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """A task and the time now, in one round trip."""
        packed, time = await self._scripts.read(("GET", self._keys.task(reservation)), self._keys.server_time_command)
        return (_decode_task(reservation, packed), parse_server_time(time)) if packed else None

    async def touch(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        """Tasks that somebody looks at or waits for, each with the time now; these are checked often for a while."""
        keys = self._keys
        now, *found = await self._scripts.call(
            "touch_tasks",
            [keys.clock, keys.poll_due, keys.poll_claimed],
            {
                "reservations": reservations,
                "task_prefix": keys.task(""),
                "watched_prefix": keys.poll_watched(""),
                "watched_ms": self._retention.watched_ms,
                "check_interval_ms": self._retention.check_interval_ms,
            },
        )
        return [
            (_decode_task(reservation, packed), now) if packed else None
            for reservation, packed in zip(reservations, found, strict=True)
        ]

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        """A tenant's tasks, newest first.

        Where few of many tasks match, a page may hold fewer than `limit` and still have a cursor: what one request
        reads is bounded.
        """
        position = _decode_cursor(cursor, tenant) if cursor else None
        found: list[Task] = []
        read = 0
        while len(found) <= limit and read < _MAX_SCANNED:
            ids = await self._read_ids_after(tenant, position)
            if not ids:
                return TaskPage(tuple(found), None)
            for task in await self._get_many([each for each, _ in ids]):
                if task and state in {None, task.state} and kind in {None, task.kind}:
                    found.append(task)
                    if len(found) > limit:
                        break
            read += len(ids)
            position = ids[-1]
        kept = tuple(found[:limit])
        last = (kept[-1].reservation, kept[-1].created_at) if len(found) > limit else position
        return TaskPage(kept, _encode_cursor(last, tenant) if last else None)

    async def _read_ids_after(self, tenant: int, position: tuple[str, int] | None) -> list[tuple[str, int]]:
        """The next batch of ids with their times, after a position in the order newest first, larger id first."""
        top: int | str = position[1] if position else "+inf"
        offset = 0
        while True:
            page = ("LIMIT", offset, _BATCH_SIZE)
            (rows,) = await self._scripts.read(
                ("ZREVRANGEBYSCORE", self._keys.tenant_tasks(tenant), top, "-inf", "WITHSCORES", *page)
            )
            ids = parse_withscores(rows)
            fresh = [each for each in ids if not position or (each[1], each[0]) < (position[1], position[0])]
            if fresh or len(ids) < _BATCH_SIZE:
                return fresh
            offset += _BATCH_SIZE

    async def _get_many(self, reservations: Sequence[str]) -> list[Task | None]:
        rows = await self._scripts.read(*(("GET", self._keys.task(each)) for each in reservations))
        return [_decode_task(each, packed) if packed else None for each, packed in zip(reservations, rows, strict=True)]

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        """Up to `most` tasks whose check is due."""
        now, *rows = await self._scripts.call(
            "claim_checks",
            [self._keys.clock, self._keys.poll_due, self._keys.poll_claimed],
            {"limit": limit, "lease_ms": self._retention.claim_lease_ms, "task_prefix": self._keys.task("")},
        )
        return [ClaimedCheck(_decode_task(str(member, "ascii"), packed), now, due) for member, packed, due in rows]

    async def backlog(self) -> Backlog:
        """How many tasks are watched, and how late the first check is that nobody has claimed."""
        *time, waiting, claimed, first = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZCARD", self._keys.poll_due),
            ("ZCARD", self._keys.poll_claimed),
            ("ZRANGE", self._keys.poll_due, 0, 0, "WITHSCORES"),
        )
        return Backlog(waiting + claimed, overdue_ms(parse_withscores(first), parse_ledger_time(*time).ledger_ms))

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        """Write what a check said, and when to check again; None if the task had ended or is gone."""
        task, keys = claimed.task, self._keys
        ask: dict[str, Any] = {
            "reservation": task.reservation,
            "account": task.account,
            "claimed_at": claimed.claimed_at,
            "outcome": result.outcome,
            "artifacts": msgspec.json.encode(result.artifacts).decode(),
            "lost_error": msgspec.json.encode(_LOST_ERROR).decode(),
            "unusable_error": msgspec.json.encode(_UNUSABLE_ERROR).decode(),
            "balance": pack_balance(result.balance),
            "check_interval_ms": self._retention.check_interval_ms,
            "lost_after_ms": self._retention.lost_after_ms,
            "unusable_after_ms": self._retention.unusable_after_ms,
            "keep_reservation_ms": self._retention.keep_ms,
            "keep_running_ms": self._retention.keep_ms,
            "keep_finished_ms": self._retention.keep_finished_ms,
            "usage_prefix": keys.usage(task.tenant, ""),
            "keep_usage_ms": KEEP_USAGE_MS,
            "reservation_prefix": keys.reservation(""),
            "channel": keys.task_events_channel,
            "deliveries": delivery_arguments(keys),
        }
        if result.error:
            ask["error"] = msgspec.json.encode(result.error).decode()
        status, now, *rest = await self._scripts.call(
            "record_check",
            [
                keys.clock,
                keys.tenant(task.tenant),
                keys.reservation(task.reservation),
                keys.account(task.account),
                keys.task(task.reservation),
                keys.poll_due,
                keys.poll_claimed,
                keys.poll_watched(task.reservation),
            ],
            ask,
        )
        return (_decode_task(task.reservation, rest[0]), now) if status == b"recorded" else None


def decode_task_event(message: bytes) -> tuple[Task, int]:
    """A task and the server's time when it became so, as changes are announced."""
    reservation, now, stored = msgspec.msgpack.decode(message, type=tuple[str, int, _StoredTask])
    return _to_task(reservation, stored), now


def _decode_task(reservation: str, packed: bytes) -> Task:
    return _to_task(reservation, msgspec.msgpack.decode(packed, type=_StoredTask))


def _to_task(reservation: str, stored: _StoredTask) -> Task:
    return Task(
        id=stored.id,
        reservation=reservation,
        tenant=stored.tenant,
        account=stored.account,
        kind=stored.kind,
        state=stored.state,
        created_at=stored.created_at,
        updated_at=stored.updated_at,
        finished_at=stored.finished_at,
        last_checked_at=stored.last_checked_at,
        options=msgspec.Raw(stored.options.encode()),
        metadata=msgspec.Raw(stored.metadata.encode()),
        artifacts=msgspec.json.decode(stored.artifacts, type=tuple[Artifact, ...]),
        error=msgspec.json.decode(stored.error, type=TaskError) if stored.error else None,
        cost=stored.cost,
        version=stored.version,
        webhook_url=stored.webhook_url,
        trace_context=stored.trace_context,
    )


def _encode_cursor(position: tuple[str, int], tenant: int) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((tenant, *position))).rstrip(b"=").decode()


def _decode_cursor(cursor: str, tenant: int) -> tuple[str, int]:
    try:
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        owner, reservation, created = msgspec.msgpack.decode(packed, type=tuple[int, str, int])
    except (binascii.Error, msgspec.DecodeError, ValueError):
        owner, reservation, created = 0, "", 0
    if owner != tenant:
        raise MalformedRequest("The cursor is none of this list. Take it from `next_cursor` of the page before.")
    return reservation, created


_log = structlog.get_logger(__name__)
RECONNECT_SECONDS = 1.0
_MESSAGE_WAIT_SECONDS = 5.0


class TaskEventSubscriber:
    """Posts announced changes on the board of this process."""

    def __init__(
        self,
        open_pubsub: Callable[[], Awaitable[PubSub]],
        channel: str,
        cache: TaskCache,
        *,
        on_error: OnError | None = None,
    ) -> None:
        self._on_error = on_error
        self._open_pubsub = open_pubsub
        self._channel = channel
        self._cache = cache

    async def run(self) -> None:
        """Listen for ever, through any loss of the connection; what is missed meanwhile, waiters read by themselves."""
        while True:
            try:
                await self._listen()
            except RedisError as error:
                if self._on_error:
                    self._on_error(classify_error(error))
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _listen(self) -> None:
        async with await self._open_pubsub() as channel:
            await channel.subscribe(self._channel)
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=_MESSAGE_WAIT_SECONDS)
                if message:
                    self._handle_message(message["data"])

    def _handle_message(self, message: bytes) -> None:
        try:
            change = decode_task_event(message)
        except MsgspecError:  # of another version of the gateway; waiters read by themselves
            _log.warning("pubsub.invalid_message")
        else:
            self._cache.on_published(*change)
