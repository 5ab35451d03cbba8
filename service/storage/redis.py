"""Redis keys, script calls and the data version."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from typing import Any

import msgspec
import structlog
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import ClusterDownError, DataError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.domain.availability import EXCLUSIVE_RETRY_MS, MAX_FAILED_BALANCE_CHECKS, PROBE_INTERVAL_MS
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import OFFSET_UNITS_PER_MS, ClockReading, LedgerClock
from service.domain.tenants import Window
from service.telemetry.metrics import RedisErrorKind, RedisOutcome
from service.telemetry.tracing import NOOP_TRACER, Tracer

Client = Redis | RedisCluster


class Keys:
    """Builds keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self._root = f"{{{prefix}}}:"

    @property
    def data_version(self) -> str:
        """The version of all that is kept under the other keys."""
        return self._root + "version"

    @property
    def clock(self) -> str:
        """The ledger's time as a script last saw it, so that a failover can't step it back."""
        return self._root + "clock"

    @property
    def clock_offset(self) -> str:
        """By how much it was ahead of the server's time then, in tenths of a millisecond; only there while it is."""
        return self._root + "clock:offset"

    @property
    def server_time_command(self) -> tuple[str, ...]:
        """The command that reads the server's time."""
        return ("TIME",)

    @property
    def clock_commands(self) -> tuple[tuple[str, ...], ...]:
        """The commands that read the ledger's time and the server's."""
        return ("GET", self.clock), ("GET", self.clock_offset), self.server_time_command

    @property
    def registry(self) -> str:
        """Accounts, tenants and tokens, in one hash with their version."""
        return self._root + "registry"

    @property
    def registry_channel(self) -> str:
        """Where a change of the registry is announced."""
        return self._root + "registry:changed"

    @property
    def leases(self) -> str:
        """The open reservations by the end of their lease."""
        return self._root + "leases"

    @property
    def poll_due(self) -> str:
        """The running tasks by the time of their next check."""
        return self._root + "poll:due"

    @property
    def poll_claimed(self) -> str:
        """The running tasks that a process checks just now, by the time when another one may."""
        return self._root + "poll:claimed"

    @property
    def task_events_channel(self) -> str:
        """Where the changes of tasks are announced."""
        return self._root + "tasks:changed"

    def poll_watched(self, reservation: str) -> str:
        """Says that somebody looked at a task lately. Without an id, how all of these keys begin."""
        return f"{self._root}poll:watched:{reservation}"

    @property
    def webhook_queues(self) -> str:
        """The receivers that something is to be delivered to, by the time when it is their turn."""
        return self._root + "webhook:queues"

    @property
    def failed_deliveries(self) -> str:
        """The deliveries that were given up, by the time of that."""
        return self._root + "webhook:failed"

    def delivery(self, reservation: str) -> str:
        """How the end of a task is told to its tenant. Without an id, how all of these keys begin."""
        return f"{self._root}webhook:delivery:{reservation}"

    def deliveries_due(self, queue: str) -> str:
        """What waits to be delivered to a receiver, by when. Without one, how all of these keys begin."""
        return f"{self._root}webhook:due:{queue}"

    def deliveries_claimed(self, queue: str) -> str:
        """What is delivered to a receiver just now, by the time when another process may. Without one, as above."""
        return f"{self._root}webhook:claimed:{queue}"

    def webhook_failing(self, queue: str) -> str:
        """Says that a receiver failed lately. Without one, how all of these keys begin."""
        return f"{self._root}webhook:failing:{queue}"

    def tenant(self, tenant: int) -> str:
        """A tenant's limits and counters. Ids are never reused, so neither are counters."""
        return f"{self._root}tenant:{tenant}"

    def account(self, account: int) -> str:
        """An account's floors, prices and figures."""
        return f"{self._root}account:{account}"

    def reservation(self, reservation: str) -> str:
        """One submission's reservation and outcome. Without an id, how all of these keys begin."""
        return f"{self._root}reservation:{reservation}"

    def idempotency(self, tenant: int, key: str) -> str:
        """What was first submitted under an idempotency key of a tenant. Without a key, how all of these begin."""
        return f"{self._root}idempotency:{tenant}:{key}"

    def usage(self, tenant: int, day: int | str) -> str:
        """What a tenant used on a day, counted from the epoch. With an empty day, how all of these keys begin."""
        return f"{self._root}usage:{tenant}:{day}"

    def task(self, reservation: str) -> str:
        """The task a submission became, by the id of its reservation: there is at most one.

        Without an id, how all of these keys begin.
        """
        return f"{self._root}task:{reservation}"

    def tenant_tasks(self, tenant: int) -> str:
        """A tenant's tasks by the time of their creation."""
        return f"{self._root}tasks:{tenant}"


DATA_VERSION = 2
"""Rises with every change after which an older gateway could misread the data, or this one the older data."""


class DataVersionError(LedgerUnavailable):
    """The store holds data of another version. `reason` is one line for operators."""

    def __init__(self, reason: str) -> None:
        super().__init__("The gateway can't use its store. Nothing was sent; ask its operators.")
        self.reason = reason


def find_version_error(stored: bytes | None, version: int = DATA_VERSION) -> DataVersionError | None:
    """Return the error for the version that is stored; None if that is this version, or the store is empty."""
    if stored is None or stored == str(version).encode():
        return None
    shown = stored[:20].decode("ascii", "replace")
    return DataVersionError(
        f"the data in Redis under GATEWAY_KEY_PREFIX has version {shown}, and this gateway uses version {version}: "
        "run `gateway export` with the gateway that wrote it, and `gateway apply` with this one under another "
        'GATEWAY_KEY_PREFIX (see "Upgrade to another data version" in deploy/OPERATIONS.md)'
    )


async def read_data_version(client: Client, keys: Keys) -> bytes | None:
    """Return the version of the stored data; None if there is none. Data without a mark is of version 1."""
    # In this order, since a gateway marks a store before it writes the registry.
    has_registry = await client.execute_command("EXISTS", keys.registry)
    stored: bytes | None = await client.execute_command("GET", keys.data_version)
    return b"1" if stored is None and has_registry else stored


class DataVersionGuard:
    """Refuses a store that holds data of another version. `on_mismatch` is called once when that is noticed."""

    def __init__(
        self,
        keys: Keys,
        on_mismatch: Callable[[DataVersionError], None] = lambda _: None,
        *,
        version: int = DATA_VERSION,
    ) -> None:
        self.keys = keys
        self.version = version
        self._on_mismatch = on_mismatch
        self._error: DataVersionError | None = None
        self.is_checked = False

    @property
    def is_mismatched(self) -> bool:
        """Whether the store is not to be used any more."""
        return self._error is not None

    async def check(self, client: Client) -> None:
        """Compare the version, and mark a store without one; needed until `is_checked`. Raises DataVersionError."""
        if self._error:
            raise self._error
        stored = await read_data_version(client, self.keys)
        if stored is None:
            # Of several processes that start on an empty store the first one decides. Where nothing can be written, the
            # data can be read all the same, and the first script marks it.
            with suppress(RedisError):
                await client.set(self.keys.data_version, self.version, nx=True)
            stored = await client.execute_command("GET", self.keys.data_version)
        self.compare(stored)

    def compare(self, stored: bytes | None) -> None:
        """Take in the version as it was just read. Raises DataVersionError, from now on with every `check`."""
        error = find_version_error(stored, self.version)
        if error:
            self.is_checked = False
            if self._error is None:
                self._error = error
                self._on_mismatch(error)
            raise self._error
        self.is_checked = stored is not None


_log = structlog.get_logger(__name__)


RETRY_AFTER_SECONDS = 2.0


_LUA_FOLDER = resources.files("service.storage") / "lua"


SCRIPT_NAMES = tuple(
    sorted(each.name.removesuffix(".lua") for each in _LUA_FOLDER.iterdir() if each.name.endswith(".lua"))
)
"""All scripts, by the names of their files."""


_ERROR_KINDS: Sequence[tuple[tuple[type[Exception], ...], RedisErrorKind]] = (
    ((RedisTimeoutError,), RedisErrorKind.TIMEOUT),
    ((ReadOnlyError,), RedisErrorKind.READONLY),
    ((ClusterDownError,), RedisErrorKind.CLUSTER),
    ((RedisConnectionError,), RedisErrorKind.CONNECTION),
    ((ResponseError,), RedisErrorKind.RESPONSE),
)


_VERSION_ERROR_PREFIX = "DATAVERSION "


_USES = re.compile(r"^-- USES: (.+)$", re.MULTILINE)
LATE_CHARGE_MS = 600_000
"""How long after its outcome became unknown a submission may still be charged."""
MAX_CHECK_INTERVAL_MS = 30_000
"""The longest time between two checks of a task that is not watched."""
MAX_CHECK_BACKOFF_MS = 60_000
"""The longest time between two checks after checks that failed."""
AGE_PER_CHECK_INTERVAL = 20
"""A task that is not watched is checked again after this part of its age."""
_DAY_MS = 86_400_000
_CONSTANTS: Mapping[str, int | Sequence[str]] = {
    "WINDOWS": tuple(Window),
    "MINUTE_MS": 60_000,
    "HOUR_MS": 3_600_000,
    "DAY_MS": _DAY_MS,
    "CLOCK_OFFSET_UNITS": OFFSET_UNITS_PER_MS,
    "PROBE_INTERVAL_MS": PROBE_INTERVAL_MS,
    "MAX_FAILED_BALANCE_CHECKS": MAX_FAILED_BALANCE_CHECKS,
    "EXCLUSIVE_RETRY_MS": EXCLUSIVE_RETRY_MS,
    "LATE_CHARGE_MS": LATE_CHARGE_MS,
    "MAX_CHECK_INTERVAL_MS": MAX_CHECK_INTERVAL_MS,
    "MAX_CHECK_BACKOFF_MS": MAX_CHECK_BACKOFF_MS,
    "AGE_PER_CHECK_INTERVAL": AGE_PER_CHECK_INTERVAL,
    "KEEP_DELETED_MS": 60 * _DAY_MS,  # longer than any task of a deleted tenant or account runs
}
"""What the scripts may use by these names; each is written before a script that does."""


READ_COMMAND = "read"
"""What plain commands are called where calls are counted."""


OnCall = Callable[[str, RedisOutcome, float], None]
"""Is told of every call: its script (or READ), its outcome, and the seconds it took."""


OnError = Callable[[RedisErrorKind], None]
"""Is told of every error of Redis."""


QUIET_SECONDS = 5.0
"""An outage has ended when Redis answers and nothing has failed for so long."""


class OutageLogger:
    """Logs one line when Redis goes away and one when it is back, whatever fails meanwhile in this process.

    It passes on to `observe` and `failed` what it is called with.
    """

    def __init__(self, on_call: OnCall, on_error: OnError) -> None:
        self._on_call = on_call
        self._on_error = on_error
        self._started_at: float | None = None
        self._last_failure_at = 0.0
        self._failure_count = 0

    def on_call(self, call: str, outcome: RedisOutcome, seconds: float) -> None:
        """Take in a call."""
        self._on_call(call, outcome, seconds)
        if outcome is RedisOutcome.UNAVAILABLE:
            self._failure_count += 1
            self._mark_unavailable(RedisErrorKind.RESPONSE)
        elif self._started_at is not None and outcome is RedisOutcome.OK:
            self._mark_available()

    def on_error(self, error: RedisErrorKind) -> None:
        """Take in an error of a call or of a subscription."""
        self._on_error(error)
        if error is not RedisErrorKind.RESPONSE:  # which may be a fault of a script
            self._mark_unavailable(error)

    def _mark_unavailable(self, error: RedisErrorKind) -> None:
        self._last_failure_at = time.monotonic()
        if self._started_at is None:
            self._started_at = self._last_failure_at
            _log.warning("redis.unavailable", error=error)

    def _mark_available(self) -> None:
        if self._started_at is not None and time.monotonic() - self._last_failure_at >= QUIET_SECONDS:
            _log.info(
                "redis.available",
                seconds=round(self._last_failure_at - self._started_at, 3),
                failed_calls=self._failure_count,
            )
            self._started_at, self._failure_count = None, 0


class RedisScripts:
    """Calls the scripts over a client that never retries: an unanswered call may have moved money.

    Where `version` is given, nothing is read or written before the store was found to hold data of that version, and
    no script writes to any other.
    """

    def __init__(
        self,
        client: Client,
        *,
        version_guard: DataVersionGuard | None = None,
        on_call: OnCall | None = None,
        on_error: OnError | None = None,
        tracer: Tracer = NOOP_TRACER,
    ) -> None:
        self._client = client
        self._version_guard = version_guard
        self._on_call = on_call
        self._on_error = on_error
        self._tracer = tracer
        self._sources: dict[str, str] = {}
        self._hashes: dict[str, str] = {}

    async def call(self, name: str, keys: Sequence[str], arguments: Mapping[str, Any], *more: bytes | str) -> list[Any]:
        """Run the script `name`; `more` are arguments that MessagePack in Lua can't hold.

        Raises LedgerUnavailable if Redis did not answer: it may have run or not.
        """
        values = (msgspec.msgpack.encode(arguments), *more)
        if self._version_guard:
            guarded = self._version_guard.keys
            keys = (*keys, guarded.registry, guarded.data_version)
            values = (*values, str(self._version_guard.version))
        with self._observe_call(name), self._tracer.start_redis_span("EVALSHA", script=name):
            await self._check_version()
            if name not in self._hashes:
                await self._load(name)
            try:
                return await self._run(name, keys, values)
            except NoScriptError:  # Redis was restarted, and ran nothing
                await self._load(name)
                return await self._run(name, keys, values)

    async def read(self, *commands: tuple[Any, ...]) -> list[Any]:
        """The answers to some plain commands, in one round trip. Raises LedgerUnavailable if Redis does not answer."""
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        operation = str(commands[0][0]) if len(commands) == 1 else "PIPELINE"
        with self._observe_call(READ_COMMAND), self._tracer.start_redis_span(operation, batch_size=len(commands)):
            await self._check_version()
            return await pipeline.execute()

    def compare_version(self, stored: bytes | None) -> None:
        """Take in the data version, as one of the commands of a `read` returned it. Raises DataVersionError."""
        if self._version_guard:
            self._version_guard.compare(stored)

    async def _check_version(self) -> None:
        if self._version_guard and not self._version_guard.is_checked:
            await self._version_guard.check(self._client)

    @contextmanager
    def _observe_call(self, call: str) -> Iterator[None]:
        """Tell of a call, and turn the errors of Redis into LedgerUnavailable."""
        outcome, begun = RedisOutcome.ERROR, time.perf_counter()
        try:
            yield
            outcome = RedisOutcome.OK
        except RedisError as error:
            if self._on_error:
                self._on_error(classify_error(error))
            if isinstance(error, DataError) or (type(error) is ResponseError and str(error).startswith("user_script")):
                raise  # a fault of ours, not Redis being away
            if type(error) is ResponseError and str(error).startswith(_VERSION_ERROR_PREFIX):
                self.compare_version(str(error).removeprefix(_VERSION_ERROR_PREFIX).encode())
            outcome = RedisOutcome.UNAVAILABLE
            raise make_unavailable_error() from error
        except asyncio.CancelledError:
            outcome = RedisOutcome.CANCELLED
            raise
        finally:
            if self._on_call:
                self._on_call(call, outcome, time.perf_counter() - begun)

    async def _run(self, name: str, keys: Sequence[str], values: Sequence[bytes | str]) -> list[Any]:
        result = await self._client.evalsha(self._hashes[name], len(keys), *keys, *values)
        return list(result)

    async def _load(self, name: str) -> None:
        if name not in self._sources:
            self._sources[name] = _assemble(name, has_version=self._version_guard is not None)
        self._hashes[name] = await self._client.script_load(self._sources[name])


def _assemble(name: str, *, has_version: bool) -> str:
    """Return the text of a script, after the constants and the shared parts that it uses.

    First of all comes the check of the version, if there is one.
    """
    parts: dict[str, str] = {}
    if has_version:
        _add_part("version", parts)
    script = (_LUA_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    _add_parts_of(script, parts)
    text = "\n".join([*parts.values(), script])
    return "".join(_constants_of(text)) + text


def _constants_of(text: str) -> Iterator[str]:
    for name, value in _CONSTANTS.items():
        if re.search(rf"\b{name}\b", text):
            yield f"local {name} = {_literal(value)}\n"


def _literal(value: int | Sequence[str]) -> str:
    return str(value) if isinstance(value, int) else "{" + ", ".join(f"'{each}'" for each in value) + "}"


def _add_part(name: str, parts: dict[str, str]) -> None:
    if name not in parts:
        text = (_LUA_FOLDER / "shared" / f"{name}.lua").read_text(encoding="utf-8")
        _add_parts_of(text, parts)
        parts[name] = text


def _add_parts_of(text: str, parts: dict[str, str]) -> None:
    """Add the shared parts that a text names as used, each after those that it uses itself."""
    uses = _USES.search(text)
    for name in uses[1].split(", ") if uses else ():
        _add_part(name, parts)


def classify_error(error: RedisError) -> RedisErrorKind:
    """Which of the errors this is that are counted apart."""
    for kinds, sort in _ERROR_KINDS:
        if isinstance(error, kinds):
            return sort
    return RedisErrorKind.OTHER


def drop_none(**values: Any) -> dict[str, Any]:
    """Arguments of a script, in which what is not known is not there."""
    return {name: value for name, value in values.items() if value is not None}


def parse_withscores(rows: Sequence[bytes]) -> list[tuple[str, int]]:
    """The members of a sorted set with their scores, out of an answer WITHSCORES."""
    return [(str(member, "ascii"), int(float(score))) for member, score in zip(rows[::2], rows[1::2], strict=True)]


def overdue_ms(first: Sequence[tuple[str, int]], now: int) -> int:
    """For how many milliseconds the first of a queue has been due at `now`; 0 if it is not, or there is none."""
    return max(now - first[0][1], 0) if first else 0


def parse_server_time(time: tuple[int, int]) -> int:
    """The server's time in milliseconds, out of the answer to TIME."""
    seconds, micros = time
    return seconds * 1000 + micros // 1000


def parse_ledger_time(last: bytes | None, offset: bytes | None, time: tuple[int, int]) -> ClockReading:
    """The time now, out of the answers to `Keys.moment`."""
    wall = parse_server_time(time)
    return ClockReading(LedgerClock(int(last or 0), int(offset or 0)).advance(wall).last_ms, wall)


def make_unavailable_error() -> LedgerUnavailable:
    """What a caller is told when Redis does not answer."""
    return LedgerUnavailable(
        "The gateway can't reach its store just now. Nothing was sent; try again in a moment.",
        retry_after=RETRY_AFTER_SECONDS,
    )
