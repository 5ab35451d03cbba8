"""The cost of a submission and of a finished task in the Redis server, with a tenant at its limits."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, TypeVar

import msgspec
from redis.asyncio import Redis

from service.crypto import KEY_BYTES, Keyring, TaskIdCodec
from service.domain.ledger import Balance, Grant, ReservationState
from service.domain.tasks import Artifact, ArtifactName, Kind, TaskReference, UpscaleOptions
from service.domain.tenants import Account, AccountPolicy, Limit, Tenant, TenantPolicy, Window
from service.storage.connections import connect
from service.storage.ledger import RedisLedger
from service.storage.redis import DAY_MS, Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.usecases.ports import (
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    Ledger,
    NewTask,
    RegistryChange,
    ReserveRequest,
    Settlement,
    TaskStore,
)
from tests.bench.report import Figure
from tests.support.tasks import make_retention
from tests.support.valkey import run_valkey

T = TypeVar("T")

_TENANT, _ACCOUNT, _KIND = 1, 2, Kind.UPSCALE
_UNLIMITED = 10**9
_POLICY = TenantPolicy(tuple(Limit(window, _UNLIMITED, _UNLIMITED) for window in Window), max_active=_UNLIMITED)
_PRICES = AccountPolicy(floor_money_fen=10_000, max_price=dict.fromkeys(Kind, 300))
_OPTIONS = msgspec.json.encode(UpscaleOptions(scale=4.0, prompt="a lighthouse at dusk, film grain", vector=True))
_METADATA = msgspec.json.encode({"order": "2026-004217", "customer": "north-sea-prints"})
_UPSTREAM_ID = "4f1c9e7a-53d8-4b02-9a6e-0c2d7be81f34"
_RESULT_URL = f"https://results.example.com/output/2026/11/22/{_UPSTREAM_ID}"
_BALANCE = Balance(count=0, money_fen=_UNLIMITED)
_SUCCEEDED_CHECK = CheckResult(
    outcome=CheckOutcome.SUCCEEDED,
    artifacts=(
        Artifact(ArtifactName.IMAGE, f"{_RESULT_URL}_upscale.png"),
        Artifact(ArtifactName.VECTOR, f"{_RESULT_URL}_vector.svg"),
    ),
    balance=_BALANCE,
)


@dataclass(frozen=True)
class CallCost:
    """The average cost of a call: microseconds of the server in scripts, and round trips."""

    micros: float
    round_trips: float


class MeasuredServer:
    """Statistics of a server, read on a separate connection."""

    def __init__(self, client: Redis) -> None:
        self.client = client

    async def measure(self, calls: int, work: Coroutine[Any, Any, T]) -> tuple[T, CallCost]:
        """Await work that makes so many calls; returns its result and the cost of a call."""
        await self.client.config_resetstat()
        done = await work
        result = await self.client.info("stats", "commandstats")
        reads = result["total_reads_processed"] - 1  # without this command itself
        return done, CallCost(result["cmdstat_evalsha"]["usec"] / calls, reads / calls)

    async def run_noop(self, times: int) -> None:
        """Run an empty script so many times."""
        script = await self.client.script_load("return 1")
        for _ in range(times):
            await self.client.evalsha(script, 0)

    async def memory(self) -> int:
        """Return the bytes in use."""
        return int((await self.client.info("memory"))["used_memory"])

    async def memory_by_kind(self) -> dict[str, int]:
        """Return the bytes in use by kind of key, the word after the prefix."""
        results: dict[str, int] = {}
        async for key in self.client.scan_iter(count=1_000):
            kind = str(key, "ascii").split(":")[1]
            results[kind] = results.get(kind, 0) + (await self.client.memory_usage(key, samples=0) or 0)
        return results


class BusyTenant:
    """A tenant with limits on tasks, money and active tasks, and operations on many submissions, one by one."""

    def __init__(self, ledger: Ledger, tasks: TaskStore, server: MeasuredServer) -> None:
        self.server = server
        self._ledger = ledger
        self._tasks = tasks
        self._ids = TaskIdCodec(Keyring([bytes(KEY_BYTES)]).derive("bench"))

    async def reserve(self, times: int) -> list[tuple[ReserveRequest, Grant]]:
        """Reserve so many submissions."""
        held = []
        for _ in range(times):
            ask = ReserveRequest(secrets.token_hex(16), _TENANT, (_ACCOUNT,), _KIND)
            verdict, _ = await self._ledger.reserve(ask)
            if not isinstance(verdict, Grant):
                raise TypeError(verdict)
            held.append((ask, verdict))
        return held

    async def accept(self, held: list[tuple[ReserveRequest, Grant]]) -> None:
        """Settle reservations as accepted tasks."""
        for ask, verdict in held:
            reference = TaskReference(_TENANT, _ACCOUNT, _KIND, verdict.now, ask.reservation, _UPSTREAM_ID)
            await self._ledger.settle(
                Settlement(
                    reservation=ask.reservation,
                    tenant=_TENANT,
                    account=_ACCOUNT,
                    kind=_KIND,
                    created_at=verdict.now,
                    outcome=ReservationState.ACCEPTED,
                    balance=_BALANCE,
                    new_task=NewTask(self._ids.encode(reference), msgspec.Raw(_OPTIONS), msgspec.Raw(_METADATA)),
                )
            )

    async def claim(self, most: int) -> list[ClaimedCheck]:
        """Claim checks; their lease lasts for a day."""
        return list(await self._tasks.claim_checks(most))

    async def finish(self, due: list[ClaimedCheck]) -> None:
        """Record the tasks as succeeded."""
        for item in due:
            await self._tasks.record_check(item, _SUCCEEDED_CHECK)


@asynccontextmanager
async def open_busy_tenant() -> AsyncIterator[BusyTenant]:
    """Yield a tenant on an empty server whose tasks are due for a check at once."""
    spans, keys = make_retention(check_interval_ms=0, claim_lease_ms=DAY_MS), Keys("bench")
    with run_valkey() as store:
        connections = connect(store.url, timeout=60)
        scripts = RedisScripts(connections.commands)
        try:
            await RedisRegistry(scripts, keys).write(
                RegistryChange(
                    version=0,
                    next_id=3,
                    tenants=(Tenant(_TENANT, "shop", ("main",), _POLICY),),
                    accounts=(Account(_ACCOUNT, "main", b"", policy=_PRICES),),
                )
            )
            async with Redis(unix_socket_path=str(store.socket_path)) as apart:
                ledger, tasks = RedisLedger(scripts, keys, spans), RedisTaskStore(scripts, keys, spans)
                yield BusyTenant(ledger, tasks, MeasuredServer(apart))
        finally:
            await connections.aclose()


ACTIVE = 1_000
BATCH = 250
ROUNDS = 9
MAX_MICROS = 100


async def ledger() -> Sequence[Figure]:
    """Time in each script, and round trips of the two that clients wait for."""
    async with open_busy_tenant() as tenant:
        await tenant.accept(await tenant.reserve(ACTIVE))
        await tenant.claim(ACTIVE)
        await _measure_round(tenant)  # not counted, since it loads the scripts
        rounds = [await _measure_round(tenant) for _ in range(ROUNDS)]
        nothing = [(await tenant.server.measure(BATCH, tenant.server.run_noop(BATCH)))[1] for _ in range(ROUNDS)]
    reserve, accept, claim, end = ([item[step] for item in rounds] for step in range(4))
    return [
        Figure("a script that does nothing, to compare machines", _micros(nothing), "us"),
        Figure("reserve: time of the server", _micros(reserve), "us", target=MAX_MICROS),
        Figure("reserve: round trips", _round_trips(reserve), "", target=1),
        Figure("settle as accepted: time of the server", _micros(accept), "us", target=MAX_MICROS),
        Figure("settle as accepted: round trips", _round_trips(accept), "", target=1),
        Figure("claim a task for a check: time of the server", _micros(claim), "us"),
        Figure("record its end: time of the server", _micros(end), "us"),
        Figure("record its end: round trips", _round_trips(end), "", target=1),
    ]


async def _measure_round(tenant: BusyTenant) -> tuple[CallCost, CallCost, CallCost, CallCost]:
    """Return the cost of each step for a batch of submissions, all of which end."""
    watch = tenant.server.measure
    held, reserve = await watch(BATCH, tenant.reserve(BATCH))
    _, accept = await watch(BATCH, tenant.accept(held))
    due, claim = await watch(BATCH, tenant.claim(BATCH))
    _, end = await watch(BATCH, tenant.finish(due))
    return reserve, accept, claim, end


def _micros(batches: Sequence[CallCost]) -> float:
    """Return the median, which ignores a batch that was disturbed."""
    return median(batch.micros for batch in batches)


def _round_trips(batches: Sequence[CallCost]) -> float:
    return max(batch.round_trips for batch in batches)


FIRST = 200
TASKS = 2_000
MAX_BYTES = 2_048


async def memory() -> Sequence[Figure]:
    """Bytes of each of many finished tasks, in total and by kind of key."""
    async with open_busy_tenant() as tenant:
        server = tenant.server
        await _finish_tasks(tenant, FIRST)  # not counted: one-time allocations
        before, kinds_before = await server.memory(), await server.memory_by_kind()
        await _finish_tasks(tenant, TASKS)
        after, kinds_after = await server.memory(), await server.memory_by_kind()
    grown = {kind: (size - kinds_before.get(kind, 0)) / TASKS for kind, size in kinds_after.items()}
    by_kind = sorted(((size, kind) for kind, size in grown.items() if size >= 1), reverse=True)
    return [
        Figure("a finished task: all", (after - before) / TASKS, "bytes", target=MAX_BYTES),
        *(Figure(f"a finished task: key {kind}", size, "bytes") for size, kind in by_kind),
    ]


async def _finish_tasks(tenant: BusyTenant, tasks: int) -> None:
    await tenant.accept(await tenant.reserve(tasks))
    await tenant.finish(await tenant.claim(tasks))
