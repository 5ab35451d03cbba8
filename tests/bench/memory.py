"""Memory of a finished task in the Redis server."""

from __future__ import annotations

from collections.abc import Sequence

from tests.bench.busy_tenant import BusyTenant, open_busy_tenant
from tests.bench.figures import Figure

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
