"""Cost of a submission in the Redis server while its tenant has many running tasks."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from tests.bench.busy_tenant import BusyTenant, CallCost, open_busy_tenant
from tests.bench.figures import Figure

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
