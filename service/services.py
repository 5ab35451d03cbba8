"""What the applications are made of, and what a process does in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from structlog.typing import FilteringBoundLogger

from service.api.auth import AdminToken, Tenants
from service.api.health import Health
from service.api.uploads import Uploads
from service.domain.tasks import Catalogue
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import Tracer
from service.usecases.admin import Operators, Reseal, Webhooks
from service.usecases.background import ended
from service.usecases.ledger_snapshot import Survey
from service.usecases.poller import FreeLooks, Watch
from service.usecases.ports import RegistryView
from service.usecases.registry_apply import Apply
from service.usecases.reports import Quota, Submissions, Usage
from service.usecases.submit import Submit
from service.usecases.task_cache import Board
from service.usecases.task_status import Fetch, Follow
from service.usecases.webhook_delivery import Deliver

Job = Callable[[], Coroutine[Any, Any, None]]
"""What a process does in the background for as long as it lives."""

JOB_RESTART_SECONDS = 1.0


class Lifecycle:
    """Where the process stands between its start and its end."""

    def __init__(self, registry: RegistryView, board: Board) -> None:
        self._registry = registry
        self._board = board
        self._draining = False

    def drain(self) -> None:
        """From now on the process is not ready, so that no new requests come, and nobody waits for a task."""
        self._draining = True
        self._board.close()

    def health(self) -> Health:
        """Whether the process takes requests."""
        if self._draining:
            return Health.DRAINING
        return Health.OK if self._registry.ready else Health.STARTING


@dataclass(frozen=True, kw_only=True)
class Services:
    """What the two applications are made of.

    `drain_seconds` is how long a process that ends waits for what is under way: as long as a submission may take.
    """

    tenants: Tenants
    admin: AdminToken
    submit: Submit
    follow: Follow
    fetch: Fetch
    quota: Quota
    usage: Usage
    survey: Survey
    submissions: Submissions
    operators: Operators
    apply: Apply
    reseal: Reseal
    webhooks: Webhooks
    uploads: Uploads
    catalogue: Catalogue
    board: Board
    metrics: Metrics
    tracer: Tracer
    logger: FilteringBoundLogger
    lifecycle: Lifecycle
    registry: RegistryView
    watch: Watch
    looks: FreeLooks
    deliver: Deliver
    jobs: Sequence[Job]
    drain_seconds: int

    @asynccontextmanager
    async def working(self) -> AsyncIterator[None]:
        """Do the jobs of this process within the block."""
        running = [asyncio.create_task(self._keep(job)) for job in self.jobs]
        try:
            yield
        finally:
            await ended(running)

    async def _keep(self, job: Job) -> None:
        """Begin a job again whenever it fails: a fault of ours must not end it silently."""
        while True:
            try:
                await job()
            except Exception as error:
                self.logger.exception("job.crashed", job=job.__qualname__, exc_info=error)
            await asyncio.sleep(JOB_RESTART_SECONDS)
