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
from service.domain.tasks import Artifact, Backlog, Basis, Cost, Kind, State, Task, TaskError
from service.storage.deliveries import agenda_of
from service.storage.ledger import KEEP_USAGE, Spans, packed_figures
from service.storage.redis import Fault, Keys, Scripts, moment, overdue, scored, server_time, sort_of
from service.usecases.ports import Check, Due, Page
from service.usecases.task_cache import Board

_BATCH = 100


_MOST_READ = 2_000


_LOST = TaskError("task-lost", "The upstream no longer knows this task. It may have been charged.")


_UNUSABLE = TaskError(
    "result-unusable", "The upstream told nothing of this task that can be used. It may have been charged."
)


class _Stored(Struct):
    """A task as the scripts keep it, in which JSON is text: Lua does not tell an empty list from an empty map."""

    id: str
    tenant: int
    account: int
    kind: Kind
    state: State
    created: int
    updated: int
    checked: int
    version: int
    options: str
    metadata: str
    finished: int | None = None
    artifacts: str = "[]"
    error: str | None = None
    cost: Cost = Cost(0, 0, Basis.UNKNOWN)
    webhook: str | None = None
    trace: str | None = None


class RedisTasks:
    """Reads tasks, lists them, and hands out those whose check is due."""

    def __init__(self, scripts: Scripts, keys: Keys, spans: Spans) -> None:
        self._scripts = scripts
        self._keys = keys
        self._spans = spans

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        """A task and the time now, in one round trip."""
        packed, time = await self._scripts.read(("GET", self._keys.task(reservation)), self._keys.time)
        return (_read(reservation, packed), server_time(time)) if packed else None

    async def attend(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        """Tasks that somebody looks at or waits for, each with the time now; these are checked often for a while."""
        keys = self._keys
        now, *found = await self._scripts.call(
            "attend",
            [keys.clock, keys.watch, keys.claims],
            {
                "reservations": reservations,
                "task": keys.task(""),
                "interest": keys.interest(""),
                "interested": self._spans.interest,
                "check_after": self._spans.check_after,
            },
        )
        return [
            (_read(reservation, packed), now) if packed else None
            for reservation, packed in zip(reservations, found, strict=True)
        ]

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        """A tenant's tasks, newest first.

        Where few of many tasks match, a page may hold fewer than `limit` and still have a cursor: what one request
        reads is bounded.
        """
        position = _read_cursor(cursor, tenant) if cursor else None
        found: list[Task] = []
        read = 0
        while len(found) <= limit and read < _MOST_READ:
            ids = await self._ids_after(tenant, position)
            if not ids:
                return Page(tuple(found), None)
            for task in await self._get_many([each for each, _ in ids]):
                if task and state in {None, task.state} and kind in {None, task.kind}:
                    found.append(task)
                    if len(found) > limit:
                        break
            read += len(ids)
            position = ids[-1]
        kept = tuple(found[:limit])
        last = (kept[-1].reservation, kept[-1].created) if len(found) > limit else position
        return Page(kept, _write_cursor(last, tenant) if last else None)

    async def _ids_after(self, tenant: int, position: tuple[str, int] | None) -> list[tuple[str, int]]:
        """The next batch of ids with their times, after a position in the order newest first, larger id first."""
        top: int | str = position[1] if position else "+inf"
        offset = 0
        while True:
            page = ("LIMIT", offset, _BATCH)
            (rows,) = await self._scripts.read(
                ("ZREVRANGEBYSCORE", self._keys.tasks(tenant), top, "-inf", "WITHSCORES", *page)
            )
            ids = scored(rows)
            fresh = [each for each in ids if not position or (each[1], each[0]) < (position[1], position[0])]
            if fresh or len(ids) < _BATCH:
                return fresh
            offset += _BATCH

    async def _get_many(self, reservations: Sequence[str]) -> list[Task | None]:
        rows = await self._scripts.read(*(("GET", self._keys.task(each)) for each in reservations))
        return [_read(each, packed) if packed else None for each, packed in zip(reservations, rows, strict=True)]

    async def claim(self, most: int) -> Sequence[Due]:
        """Up to `most` tasks whose check is due."""
        now, *rows = await self._scripts.call(
            "claim",
            [self._keys.clock, self._keys.watch, self._keys.claims],
            {"most": most, "lease": self._spans.claim, "task": self._keys.task("")},
        )
        return [Due(_read(str(member, "ascii"), packed), now, due) for member, packed, due in rows]

    async def backlog(self) -> Backlog:
        """How many tasks are watched, and how late the first check is that nobody has claimed."""
        *time, waiting, claimed, first = await self._scripts.read(
            *self._keys.moment,
            ("ZCARD", self._keys.watch),
            ("ZCARD", self._keys.claims),
            ("ZRANGE", self._keys.watch, 0, 0, "WITHSCORES"),
        )
        return Backlog(waiting + claimed, overdue(scored(first), moment(*time).now))

    async def record(self, due: Due, check: Check) -> tuple[Task, int] | None:
        """Write what a check said, and when to check again; None if the task had ended or is gone."""
        task, keys = due.task, self._keys
        ask: dict[str, Any] = {
            "reservation": task.reservation,
            "account": task.account,
            "claimed": due.claimed,
            "answered": check.answered,
            "artifacts": msgspec.json.encode(check.artifacts).decode(),
            "lost_error": msgspec.json.encode(_LOST).decode(),
            "unusable_error": msgspec.json.encode(_UNUSABLE).decode(),
            "figures": packed_figures(check.figures),
            "check_after": self._spans.check_after,
            "lost_after": self._spans.lost_after,
            "unusable_after": self._spans.unusable_after,
            "keep_reservation": self._spans.keep,
            "keep_running": self._spans.keep,
            "keep_ended": self._spans.keep_ended,
            "usage": keys.usage(task.tenant, ""),
            "keep_usage": KEEP_USAGE,
            "reservations": keys.reservation(""),
            "channel": keys.changes_channel,
            "agenda": agenda_of(keys),
        }
        if check.error:
            ask["error"] = msgspec.json.encode(check.error).decode()
        status, now, *rest = await self._scripts.call(
            "record",
            [
                keys.clock,
                keys.tenant(task.tenant),
                keys.reservation(task.reservation),
                keys.account(task.account),
                keys.task(task.reservation),
                keys.watch,
                keys.claims,
                keys.interest(task.reservation),
            ],
            ask,
        )
        return (_read(task.reservation, rest[0]), now) if status == b"recorded" else None


def unpacked_change(message: bytes) -> tuple[Task, int]:
    """A task and the server's time when it became so, as changes are announced."""
    reservation, now, stored = msgspec.msgpack.decode(message, type=tuple[str, int, _Stored])
    return _task(reservation, stored), now


def _read(reservation: str, packed: bytes) -> Task:
    return _task(reservation, msgspec.msgpack.decode(packed, type=_Stored))


def _task(reservation: str, stored: _Stored) -> Task:
    return Task(
        id=stored.id,
        reservation=reservation,
        tenant=stored.tenant,
        account=stored.account,
        kind=stored.kind,
        state=stored.state,
        created=stored.created,
        updated=stored.updated,
        finished=stored.finished,
        checked=stored.checked,
        options=msgspec.Raw(stored.options.encode()),
        metadata=msgspec.Raw(stored.metadata.encode()),
        artifacts=msgspec.json.decode(stored.artifacts, type=tuple[Artifact, ...]),
        error=msgspec.json.decode(stored.error, type=TaskError) if stored.error else None,
        cost=stored.cost,
        version=stored.version,
        webhook=stored.webhook,
        trace=stored.trace,
    )


def _write_cursor(position: tuple[str, int], tenant: int) -> str:
    return base64.urlsafe_b64encode(msgspec.msgpack.encode((tenant, *position))).rstrip(b"=").decode()


def _read_cursor(cursor: str, tenant: int) -> tuple[str, int]:
    try:
        packed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        owner, reservation, created = msgspec.msgpack.decode(packed, type=tuple[int, str, int])
    except (binascii.Error, msgspec.DecodeError, ValueError):
        owner, reservation, created = 0, "", 0
    if owner != tenant:
        raise MalformedRequest("The cursor is none of this list. Take it from `next_cursor` of the page before.")
    return reservation, created


_log = structlog.get_logger(__name__)


AWAY_SECONDS = 1.0


_LISTEN_SECONDS = 5.0


class Changes:
    """Posts announced changes on the board of this process."""

    def __init__(
        self, subscribe: Callable[[], Awaitable[PubSub]], channel: str, board: Board, *, failed: Fault | None = None
    ) -> None:
        self._failed = failed
        self._subscribe = subscribe
        self._channel = channel
        self._board = board

    async def follow(self) -> None:
        """Listen for ever, through any loss of the connection; what is missed meanwhile, waiters read by themselves."""
        while True:
            try:
                await self._listen()
            except RedisError as error:
                if self._failed:
                    self._failed(sort_of(error))
                await asyncio.sleep(AWAY_SECONDS)

    async def _listen(self) -> None:
        async with await self._subscribe() as channel:
            await channel.subscribe(self._channel)
            while True:
                message = await channel.get_message(ignore_subscribe_messages=True, timeout=_LISTEN_SECONDS)
                if message:
                    self._take_in(message["data"])

    def _take_in(self, message: bytes) -> None:
        try:
            change = unpacked_change(message)
        except MsgspecError:  # of another version of the gateway; waiters read by themselves
            _log.warning("change.garbled")
        else:
            self._board.announced(*change)
