"""Tasks in Redis, and the events of their changes."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence

import msgspec
import structlog
from msgspec import MsgspecError, Struct

from service.domain.errors import MalformedRequest
from service.domain.tasks import Artifact, Backlog, Cost, CostBasis, Kind, State, Task, TaskError
from service.storage.deliveries import delivery_arguments
from service.storage.ledger import Retention
from service.storage.redis import Keys, RedisScripts, overdue_ms, parse_server_time
from service.usecases.caches import TaskCache
from service.usecases.ports import CheckOutcome, CheckResult, ClaimedCheck, TaskPage

_log = structlog.get_logger(__name__)
_FILTERED_BATCH_SIZE = 100
"""The tasks that a list with a filter reads first; each later batch has as many as were read before."""
_MAX_SCANNED = 800
"""The tasks that one request reads at most: 2 ms of a process's CPU."""
_UNRESOLVED_OUTCOMES = frozenset({CheckOutcome.NOT_FOUND, CheckOutcome.INVALID})
_LOST_ERROR, _UNUSABLE_ERROR = (
    msgspec.json.encode(error).decode()
    for error in (
        TaskError("task-lost", "The upstream no longer knows this task. It may have been charged."),
        TaskError("result-unusable", "The upstream returned no usable status of this task. It may have been charged."),
    )
)


class _StoredTask(Struct):
    """A task in Redis. Its JSON is text, since Lua does not distinguish an empty list from an empty map."""

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


class _TaskLabels(Struct):
    """The part of a task in Redis that lists select by."""

    kind: Kind
    state: State


class RedisTaskStore:
    def __init__(self, scripts: RedisScripts, keys: Keys, retention: Retention) -> None:
        self._scripts = scripts
        self._keys = keys
        self._retention = retention

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        packed, time = await self._scripts.read(("GET", self._keys.task(reservation)), self._keys.server_time_command)
        return (_decode_task(reservation, packed), parse_server_time(time)) if packed else None

    async def touch(
        self, reservations: Sequence[str], *, is_awaited: bool = False
    ) -> Sequence[tuple[Task, int] | None]:
        keys = self._keys
        now, *rows = await self._scripts.call(
            "touch_tasks",
            [keys.clock, keys.poll_due, keys.poll_claimed, keys.poll_awaited],
            reservations=reservations,
            task_prefix=keys.task(""),
            watched_prefix=keys.poll_watched(""),
            watched_ms=self._retention.watched_ms,
            check_interval_ms=self._retention.check_interval_ms,
            is_awaited=is_awaited,
        )
        return [
            (_decode_task(reservation, packed), now) if packed else None
            for reservation, packed in zip(reservations, rows, strict=True)
        ]

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        """List a tenant's tasks, newest first. Raises MalformedRequest for an invalid cursor.

        If few of many tasks match, a page may have fewer than `limit` and still a cursor: what a request reads is
        bounded.
        """
        position = _decode_cursor(cursor, tenant) if cursor else None
        matches: list[tuple[str, bytes]] = []
        is_filtered = not (state is None and kind is None)
        scanned, first_batch = 0, max(limit + 1, _FILTERED_BATCH_SIZE) if is_filtered else limit + 1
        while len(matches) <= limit and scanned < _MAX_SCANNED:
            # Doubles, since tasks that have expired may be in the index for long.
            count = min(max(first_batch, scanned), _MAX_SCANNED - scanned)
            ids, position = await self._read_ids_after(tenant, position, count)
            rows = (await self._scripts.read(("MGET", *map(self._keys.task, ids))))[0] if ids else []
            matches += [
                (reservation, packed)
                for reservation, packed in zip(ids, rows, strict=True)
                if packed and (not is_filtered or _has_labels(packed, state, kind))
            ]
            scanned += len(ids)
            if position is None:
                break
        page = tuple(_decode_task(*match) for match in matches[:limit])
        if len(matches) > limit:
            position = page[-1].reservation, page[-1].created_at
        return TaskPage(page, _encode_cursor(position, tenant) if position else None)

    async def _read_ids_after(
        self, tenant: int, position: tuple[str, int] | None, count: int
    ) -> tuple[list[str], tuple[str, int] | None]:
        """Read up to `count` ids, newest first and larger id first.

        Returns also the position of the last one, None at the end of the list.
        """
        newest: int | str = position[1] if position else "+inf"
        offset = 0
        while True:
            page = ("LIMIT", offset, count)
            (rows,) = await self._scripts.read(
                ("ZREVRANGEBYSCORE", self._keys.tenant_tasks(tenant), newest, "-inf", "WITHSCORES", *page)
            )
            members, scores = rows[::2], rows[1::2]
            if position:
                # Many tasks may have the same time: those up to the position are skipped by their ids.
                reservation, created_at = position[0].encode(), position[1]
                skipped = 0
                while (
                    skipped < len(members) and members[skipped] >= reservation and float(scores[skipped]) == created_at
                ):
                    skipped += 1
                members = members[skipped:]
            ids = [str(member, "ascii") for member in members]
            if len(scores) < count:
                return ids, None
            if ids:
                return ids, (ids[-1], int(float(scores[-1])))
            offset += count

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        now, *rows = await self._scripts.call(
            "claim_checks",
            [self._keys.clock, self._keys.poll_due, self._keys.poll_claimed, self._keys.poll_awaited],
            limit=limit,
            lease_ms=self._retention.claim_lease_ms,
            task_prefix=self._keys.task(""),
        )
        return [ClaimedCheck(_decode_task(str(member, "ascii"), packed), now, due) for member, packed, due in rows]

    async def backlog(self) -> Backlog:
        *time, waiting, claimed, first = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZCARD", self._keys.poll_due),
            ("ZCARD", self._keys.poll_claimed),
            ("ZRANGE", self._keys.poll_due, 0, 0, "WITHSCORES"),
        )
        return Backlog(waiting + claimed, overdue_ms(first, *time))

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        task, keys, retention = claimed.task, self._keys, self._retention
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
            reservation=task.reservation,
            account=task.account,
            claimed_at=claimed.claimed_at,
            outcome=result.outcome,
            artifacts=msgspec.json.encode(result.artifacts).decode(),
            error=msgspec.json.encode(result.error).decode() if result.error else None,
            balance=result.balance,
            check_interval_ms=retention.check_interval_ms,
            keep_ms=retention.keep_ms,
            keep_finished_ms=retention.keep_finished_ms,
            usage_prefix=keys.usage(task.tenant, ""),
            reservation_prefix=keys.reservation(""),
            channel=keys.task_events_channel,
            # Only passed where the script uses them: it decodes all arguments at every call.
            unresolved={
                "lost_after_ms": retention.lost_after_ms,
                "lost_error": _LOST_ERROR,
                "unusable_after_ms": retention.unusable_after_ms,
                "unusable_error": _UNUSABLE_ERROR,
            }
            if result.outcome in _UNRESOLVED_OUTCOMES
            else None,
            deliveries=delivery_arguments(keys) if task.webhook_url else None,
        )
        return (_decode_task(task.reservation, rest[0]), now) if status == b"recorded" else None

    async def record_running(self, claimed: Sequence[ClaimedCheck]) -> Sequence[tuple[Task, int]]:
        keys = self._keys
        now, *rows = await self._scripts.call(
            "record_running",
            [keys.clock, keys.poll_due, keys.poll_claimed],
            reservations=[check.task.reservation for check in claimed],
            task_prefix=keys.task(""),
            watched_prefix=keys.poll_watched(""),
            check_interval_ms=self._retention.check_interval_ms,
            keep_running_ms=self._retention.keep_ms,
            channel=keys.task_events_channel,
        )
        return [(_decode_task(str(member, "ascii"), packed), now) for member, packed in rows]

    async def release_checks(self, claimed: Sequence[ClaimedCheck]) -> None:
        keys = self._keys
        reservations = [check.task.reservation for check in claimed]
        await self._scripts.call(
            "release_checks", [keys.clock, keys.poll_due, keys.poll_claimed], reservations=reservations
        )


def _has_labels(packed: bytes, state: State | None, kind: Kind | None) -> bool:
    labels = msgspec.msgpack.decode(packed, type=_TaskLabels)
    return state in {None, labels.state} and kind in {None, labels.kind}


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
        raise MalformedRequest("The cursor is not one of this list. Take it from `next_cursor` of the previous page.")
    return reservation, created


async def put_task_event(cache: TaskCache, message: bytes | None) -> None:
    """Put a published change into the cache; clients that wait read by themselves what was missed."""
    if message is None:
        return
    try:
        reservation, now, stored = msgspec.msgpack.decode(message, type=tuple[str, int, _StoredTask])
        task = _to_task(reservation, stored)
    except MsgspecError:  # of another version of the gateway
        _log.warning("pubsub.invalid_message")
    else:
        cache.on_published(task, now)
