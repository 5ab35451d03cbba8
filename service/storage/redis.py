"""Redis keys, script calls and the data version."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from typing import Any, NoReturn

import msgspec
import structlog
from opentelemetry.trace import Tracer
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.client import PubSub
from redis.exceptions import ClusterDownError, DataError, NoScriptError, ReadOnlyError, RedisError, ResponseError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.domain.availability import EXCLUSIVE_RETRY_MS, MAX_FAILED_BALANCE_CHECKS, PROBE_INTERVAL_MS
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import OFFSET_UNITS_PER_MS, SPENT_WINDOWS, ClockReading, LedgerClock
from service.domain.tenants import Window
from service.storage.multiplexer import Multiplexer
from service.telemetry import tracing
from service.telemetry.metrics import Metrics, RedisErrorKind, RedisOutcome

_log = structlog.get_logger(__name__)
Client = Redis | RedisCluster
DAY_MS = 86_400_000
DATA_VERSION = 4
"""Rises with every change after which an older gateway could misread the data, or this one the older data."""
UPGRADABLE_VERSION = 3
"""The data version that the first process of this one converts in place."""
KEEP_USAGE_MS = 400 * DAY_MS
"""13 months at least."""
LATE_CHARGE_MS = 600_000
"""A submission may still be charged this long after its outcome became unknown."""
MAX_CHECK_INTERVAL_MS = 30_000
MAX_CHECK_BACKOFF_MS = 60_000
AGE_PER_CHECK_INTERVAL = 20
"""The older a task is, the less often it is checked: an interval is this part of its age."""
RETRY_AFTER_SECONDS = 2.0
RECONNECT_SECONDS = 1.0
REFRESH_SECONDS = 4.0
"""A process that missed a published change of the registry reads it after at most this long."""
QUIET_SECONDS = 5.0
"""An outage has ended when Redis responds and nothing has failed for this long."""
READ_COMMAND = "read"
"""The metrics label of plain commands, beside the names of the scripts."""
_CONSTANTS: Mapping[str, int | Sequence[str]] = {
    "WINDOWS": tuple(Window),
    "SPENT_WINDOWS": SPENT_WINDOWS,
    "MINUTE_MS": 60_000,
    "HOUR_MS": 3_600_000,
    "DAY_MS": DAY_MS,
    "CLOCK_OFFSET_UNITS": OFFSET_UNITS_PER_MS,
    "PROBE_INTERVAL_MS": PROBE_INTERVAL_MS,
    "MAX_FAILED_BALANCE_CHECKS": MAX_FAILED_BALANCE_CHECKS,
    "EXCLUSIVE_RETRY_MS": EXCLUSIVE_RETRY_MS,
    "LATE_CHARGE_MS": LATE_CHARGE_MS,
    "KEEP_USAGE_MS": KEEP_USAGE_MS,
    "MAX_CHECK_INTERVAL_MS": MAX_CHECK_INTERVAL_MS,
    "MAX_CHECK_BACKOFF_MS": MAX_CHECK_BACKOFF_MS,
    "AGE_PER_CHECK_INTERVAL": AGE_PER_CHECK_INTERVAL,
    "KEEP_DELETED_MS": 60 * DAY_MS,  # longer than any task of a deleted tenant or account runs
}
"""The constants of the scripts: those that a script uses are put before its text."""
_LUA_FOLDER = resources.files("service.storage") / "lua"
_USES = re.compile(r"^-- USES: (.+)$", re.MULTILINE)
_VERSION_ERROR_PREFIX = "DATAVERSION "
_ERROR_KINDS: Sequence[tuple[type[Exception], RedisErrorKind]] = (
    (RedisTimeoutError, RedisErrorKind.TIMEOUT),
    (ReadOnlyError, RedisErrorKind.READONLY),
    (ClusterDownError, RedisErrorKind.CLUSTER),
    (RedisConnectionError, RedisErrorKind.CONNECTION),
    (ResponseError, RedisErrorKind.RESPONSE),
)
SCRIPT_NAMES = tuple(
    sorted(file.name.removesuffix(".lua") for file in _LUA_FOLDER.iterdir() if file.name.endswith(".lua"))
)


class Keys:
    """Builds keys under one prefix, so that several gateways can share a Redis.

    All begin with the prefix in braces, the hash tag of a Cluster: a script may only touch keys of one node. A method
    that takes an id returns the prefix of its keys for an empty one.
    """

    server_time_command: tuple[Any, ...] = ("TIME",)

    def __init__(self, prefix: str) -> None:
        self._root = f"{{{prefix}}}:"
        self.data_version = self._root + "version"
        self.clock = self._root + "clock"
        """The ledger's time when a script last read it, so that a failover can't step it back."""
        self.clock_offset = self._root + "clock:offset"
        """The lead of the ledger's time over the server's (tenths of a millisecond); missing without one."""
        self.registry = self._root + "registry"
        self.registry_channel = self._root + "registry:changed"
        self.leases = self._root + "leases"
        """The reservations without an outcome, by the end of their lease."""
        self.poll_due = self._root + "poll:due"
        """The running tasks by the time of their next check."""
        self.poll_claimed = self._root + "poll:claimed"
        """The running tasks that a process is checking, by the end of its claim."""
        self.poll_awaited = self._root + "poll:awaited"
        """Those of `poll_due` that callers await, by the same time: an index that `touch` writes again and again."""
        self.task_events_channel = self._root + "tasks:changed"
        self.webhook_queues = self._root + "webhook:queues"
        """The queues of deliveries by the time when their next delivery can be claimed."""
        self.failed_deliveries = self._root + "webhook:failed"
        """The failed deliveries by the time of their failure."""

    @property
    def clock_commands(self) -> tuple[tuple[Any, ...], ...]:
        """The commands whose answers `parse_ledger_time` takes."""
        return ("GET", self.clock), ("GET", self.clock_offset), self.server_time_command

    def poll_watched(self, reservation: str) -> str:
        """The mark of a task that a caller has read lately."""
        return f"{self._root}poll:watched:{reservation}"

    def delivery(self, delivery: str) -> str:
        return f"{self._root}webhook:delivery:{delivery}"

    def deliveries_due(self, queue: str) -> str:
        """The deliveries of a queue by the time when they are due."""
        return f"{self._root}webhook:due:{queue}"

    def deliveries_claimed(self, queue: str) -> str:
        """The deliveries of a queue that a process is sending, by the end of its claim."""
        return f"{self._root}webhook:claimed:{queue}"

    def webhook_failing(self, queue: str) -> str:
        """The mark of a queue whose receiver failed lately."""
        return f"{self._root}webhook:failing:{queue}"

    def tenant(self, tenant: int) -> str:
        """The policy and counters of a tenant. Ids are never reused, so neither are counters."""
        return f"{self._root}tenant:{tenant}"

    def account(self, account: int) -> str:
        """The policy and state of an account."""
        return f"{self._root}account:{account}"

    def reservation(self, reservation: str) -> str:
        return f"{self._root}reservation:{reservation}"

    def idempotency(self, tenant: int, key: str) -> str:
        """The submission that first used an idempotency key."""
        return f"{self._root}idempotency:{tenant}:{key}"

    def usage(self, tenant: int, day: int | str) -> str:
        """The usage of a tenant on a day, counted from the epoch."""
        return f"{self._root}usage:{tenant}:{day}"

    def task(self, reservation: str) -> str:
        return f"{self._root}task:{reservation}"

    def tenant_tasks(self, tenant: int) -> str:
        """The tasks of a tenant by the time of their creation."""
        return f"{self._root}tasks:{tenant}"


class DataVersionError(LedgerUnavailable):
    """The store holds data of another version. `reason` is one line for operators."""

    def __init__(self, reason: str) -> None:
        super().__init__("The gateway can't use its store. Nothing was sent; ask its operators.")
        self.reason = reason


class UpgradeRefused(DataVersionError):
    """Data of UPGRADABLE_VERSION can't be converted; it is unchanged."""


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


def is_upgradable(stored: bytes | None) -> bool:
    return stored == str(UPGRADABLE_VERSION).encode()


async def read_data_version(client: Client, keys: Keys) -> bytes | None:
    """Return the version of the stored data; None if there is none. Data without a mark is of version 1."""
    # In this order, since a gateway marks a store before it writes the registry.
    has_registry = await client.execute_command("EXISTS", keys.registry)
    stored: bytes | None = await client.execute_command("GET", keys.data_version)
    return b"1" if stored is None and has_registry else stored


class DataVersionGuard:
    """Refuses a store that holds data of another version. `on_mismatch` is called once when that is noticed.

    `upgrade` converts data of UPGRADABLE_VERSION. It raises UpgradeRefused, and DataVersionError if another process has
    converted it.
    """

    def __init__(
        self,
        keys: Keys,
        on_mismatch: Callable[[DataVersionError], None],
        *,
        version: int = DATA_VERSION,
        upgrade: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self.keys = keys
        self.version = version
        self._on_mismatch = on_mismatch
        self._upgrade = upgrade
        self._error: DataVersionError | None = None
        self.is_checked = False

    @property
    def is_mismatched(self) -> bool:
        return self._error is not None

    async def check(self, client: Client) -> None:
        """Compare the version, after an upgrade, and mark an empty store; needed until `is_checked`.

        Raises DataVersionError.
        """
        if self._error:
            raise self._error
        stored = await read_data_version(client, self.keys)
        if self._upgrade and is_upgradable(stored):
            try:
                await self._upgrade()
            except UpgradeRefused as error:
                self._refuse(error)
            except DataVersionError:
                pass
            stored = await read_data_version(client, self.keys)
        if stored is None:
            # The first of several processes that start on an empty store decides. Data can be read even if nothing
            # can be written: the first script marks it then.
            with suppress(RedisError):
                await client.set(self.keys.data_version, self.version, nx=True)
            stored = await client.execute_command("GET", self.keys.data_version)
        self.compare(stored)

    def compare(self, stored: bytes | None) -> None:
        """Compare the version that was just read. Raises DataVersionError, then and with every later `check`."""
        error = find_version_error(stored, self.version)
        if error:
            self._refuse(error)
        self.is_checked = stored is not None

    def _refuse(self, error: DataVersionError) -> NoReturn:
        self.is_checked = False
        if self._error is None:
            self._error = error
            self._on_mismatch(error)
        raise self._error


class RedisMonitor:
    """Counts calls and errors; logs one line when Redis becomes unavailable and one when it is back."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started_at: float | None = None
        self._last_failure_at = 0.0
        self._failure_count = 0

    def record_call(self, call: str, outcome: RedisOutcome, seconds: float) -> None:
        """Record a call of a script, or of READ_COMMAND."""
        self._metrics.record_redis_call(call, outcome, seconds)
        is_quiet = time.monotonic() - self._last_failure_at >= QUIET_SECONDS
        if outcome is RedisOutcome.UNAVAILABLE:
            self._failure_count += 1
            self._mark_unavailable(RedisErrorKind.RESPONSE)
        elif self._started_at is not None and outcome is RedisOutcome.OK and is_quiet:
            duration = round(self._last_failure_at - self._started_at, 3)
            _log.info("redis.available", seconds=duration, failed_calls=self._failure_count)
            self._started_at, self._failure_count = None, 0

    def record_error(self, error: RedisErrorKind) -> None:
        self._metrics.redis_errors.labels(error).inc()
        if error is not RedisErrorKind.RESPONSE:  # which may be an error in a script
            self._mark_unavailable(error)

    def _mark_unavailable(self, error: RedisErrorKind) -> None:
        self._last_failure_at = time.monotonic()
        if self._started_at is None:
            self._started_at = self._last_failure_at
            _log.warning("redis.unavailable", error=error)


class RedisScripts:
    """Calls the scripts over a client that never retries: a call without an answer may have moved money.

    With a `version_guard` nothing is read or written before the data version was compared, and no script writes to data
    of another version.
    """

    def __init__(
        self,
        client: Client,
        *,
        version_guard: DataVersionGuard | None = None,
        monitor: RedisMonitor | None = None,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self._client = client
        self._version_guard = version_guard
        self._monitor = monitor
        self._tracer = tracer
        # In a Cluster redis-py follows the redirections to other nodes.
        self._multiplexer = Multiplexer(client) if isinstance(client, Redis) else None
        self._scripts: dict[str, tuple[str, str]] = {}

    async def call(self, name: str, keys: Sequence[str], /, *extra: bytes | str, **arguments: Any) -> list[Any]:
        """Run a script. `extra` are arguments that MessagePack in Lua can't hold; None is nil there.

        Raises LedgerUnavailable if Redis did not answer: the script may have run or not.
        """
        values = (msgspec.msgpack.encode(arguments), *extra)
        if self._version_guard:
            guarded = self._version_guard.keys
            keys = (*keys, guarded.registry, guarded.data_version)
            values = (*values, str(self._version_guard.version))
        with self._observe_call(name), tracing.start_redis_span(self._tracer, "EVALSHA", script=name):
            if self._version_guard and not self._version_guard.is_checked:
                await self._version_guard.check(self._client)
            if name not in self._scripts:
                source = _assemble(name, has_version=self._version_guard is not None)
                self._scripts[name] = source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()
            source, digest = self._scripts[name]
            try:
                answer = await self._run("EVALSHA", digest, len(keys), *keys, *values)
            except NoScriptError:  # it has not run
                answer = await self._run("EVAL", source, len(keys), *keys, *values)
            return list(answer)

    async def read(self, *commands: tuple[Any, ...]) -> list[Any]:
        """Run plain commands in one round trip. Raises LedgerUnavailable."""
        count = len(commands)
        operation = str(commands[0][0]) if count == 1 else "PIPELINE"
        with self._observe_call(READ_COMMAND), tracing.start_redis_span(self._tracer, operation, batch_size=count):
            if self._version_guard and not self._version_guard.is_checked:
                await self._version_guard.check(self._client)
            return await self._run_all(commands)

    async def _run(self, *command: Any) -> Any:
        if self._multiplexer:
            return (await self._multiplexer.execute(command))[0]
        return await self._client.execute_command(*command)

    async def _run_all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        if self._multiplexer:
            return await self._multiplexer.execute(*commands)
        pipeline = self._client.pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        return await pipeline.execute()

    def compare_version(self, stored: bytes | None) -> None:
        """Compare the data version that a `read` returned. Raises DataVersionError."""
        if self._version_guard:
            self._version_guard.compare(stored)

    @contextmanager
    def _observe_call(self, call: str) -> Iterator[None]:
        outcome, started_at = RedisOutcome.ERROR, time.perf_counter()
        try:
            yield
            outcome = RedisOutcome.OK
        except RedisError as error:
            if self._monitor:
                self._monitor.record_error(classify_error(error))
            if isinstance(error, DataError) or (type(error) is ResponseError and str(error).startswith("user_script")):
                raise  # an error of the gateway's own: Redis is not away
            if type(error) is ResponseError and str(error).startswith(_VERSION_ERROR_PREFIX):
                self.compare_version(str(error).removeprefix(_VERSION_ERROR_PREFIX).encode())
            outcome = RedisOutcome.UNAVAILABLE
            raise LedgerUnavailable(
                "The gateway can't reach its store just now. Nothing was sent; try again in a moment.",
                retry_after=RETRY_AFTER_SECONDS,
            ) from error
        except asyncio.CancelledError:
            outcome = RedisOutcome.CANCELLED
            raise
        finally:
            if self._monitor:
                self._monitor.record_call(call, outcome, time.perf_counter() - started_at)


def _assemble(name: str, *, has_version: bool) -> str:
    """Return a script after what it uses: constants, the check of the data version, shared parts."""
    parts: dict[str, str] = {}
    if has_version:
        _add_parts(["version"], parts)
    script = (_LUA_FOLDER / f"{name}.lua").read_text(encoding="utf-8")
    _add_parts(_used_parts(script), parts)
    text = "\n".join([*parts.values(), script])
    constants = [
        f"local {constant} = {_to_lua(value)}\n"
        for constant, value in _CONSTANTS.items()
        if re.search(rf"\b{constant}\b", text)
    ]
    return "".join(constants) + text


def _add_parts(names: Iterable[str], parts: dict[str, str]) -> None:
    for name in names:
        if name not in parts:
            text = (_LUA_FOLDER / "shared" / f"{name}.lua").read_text(encoding="utf-8")
            _add_parts(_used_parts(text), parts)
            parts[name] = text


def _used_parts(text: str) -> Sequence[str]:
    uses = _USES.search(text)
    return uses[1].split(", ") if uses else ()


def _to_lua(value: int | Sequence[str]) -> str:
    return str(value) if isinstance(value, int) else "{" + ", ".join(f"'{item}'" for item in value) + "}"


def classify_error(error: RedisError) -> RedisErrorKind:
    return next((kind for error_type, kind in _ERROR_KINDS if isinstance(error, error_type)), RedisErrorKind.OTHER)


class Subscriber:
    """Passes the messages of a channel on.

    Calls `handle` with None after each (re)connection, when messages may have been missed, and every REFRESH_SECONDS.
    """

    def __init__(
        self,
        open_pubsub: Callable[[], Awaitable[PubSub]],
        channel: str,
        handle: Callable[[bytes | None], Awaitable[None]],
        monitor: RedisMonitor | None = None,
    ) -> None:
        self._open_pubsub = open_pubsub
        self._channel = channel
        self._handle = handle
        self._monitor = monitor

    async def run(self) -> None:
        """Receive for ever; reconnect after each error."""
        while True:
            try:
                await self._receive()
            except (RedisError, LedgerUnavailable) as error:
                if self._monitor and isinstance(error, RedisError):  # a LedgerUnavailable was counted before
                    self._monitor.record_error(classify_error(error))
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _receive(self) -> None:
        await self._handle(None)  # also if no subscription succeeds
        async with await self._open_pubsub() as pubsub:
            await pubsub.subscribe(self._channel)
            message = None
            while True:
                await self._handle(message["data"] if message else None)
                message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=REFRESH_SECONDS)


def parse_withscores(rows: Sequence[bytes]) -> list[tuple[str, int]]:
    """Return the members of a sorted set and their scores, from an answer WITHSCORES."""
    return [(str(member, "ascii"), int(float(score))) for member, score in zip(rows[::2], rows[1::2], strict=True)]


def parse_server_time(time: tuple[int, int]) -> int:
    """Return the server's time (ms) from the answer to TIME."""
    seconds, micros = time
    return seconds * 1000 + micros // 1000


def parse_ledger_time(last: bytes | None, offset: bytes | None, time: tuple[int, int]) -> ClockReading:
    """Return the time now from the answers to `Keys.clock_commands`."""
    server_ms = parse_server_time(time)
    return ClockReading(LedgerClock(int(last or 0), int(offset or 0)).advance(server_ms).last_ms, server_ms)


def overdue_ms(first: Sequence[bytes], *clock: Any) -> int:
    """Return for how long the first member of a queue has been due; 0 if it is not, or there is none.

    Takes the answers to `ZRANGE key 0 0 WITHSCORES` and `Keys.clock_commands`.
    """
    rows = parse_withscores(first)
    return max(parse_ledger_time(*clock).ledger_ms - rows[0][1], 0) if rows else 0
