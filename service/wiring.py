"""The one composition root: settings in, a running gateway's parts out, closed in reverse order.

Everything else takes values and ports; only this module knows which implementation stands behind a port.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from service.api.auth import AdminToken, Tenants
from service.api.ops import Health
from service.api.uploads import Uploads
from service.api.webhook_views import task_event
from service.clients.artifacts import ArtifactClient
from service.clients.callbacks import CallbackClient
from service.clients.upstream import UpstreamClient
from service.domain.task import Catalogue
from service.domain.taskid import TaskIds
from service.keyring import Keyring
from service.settings import Role, Settings
from service.storage.agenda import RedisAgenda
from service.storage.books import RedisBooks
from service.storage.changes import Changes
from service.storage.connect import connect
from service.storage.keys import Keys
from service.storage.ledger import DAY, RedisLedger, Spans
from service.storage.registry import LiveRegistry, RedisRegistry
from service.storage.scripts import Scripts
from service.storage.tasks import RedisTasks
from service.telemetry.metrics import Metrics
from service.usecases.apply import Apply
from service.usecases.background import Background, ended
from service.usecases.board import Board
from service.usecases.change import Change
from service.usecases.deliver import Deliver
from service.usecases.fetch import Fetch
from service.usecases.follow import Follow
from service.usecases.look import FreeLooks
from service.usecases.pace import Pace
from service.usecases.ports import Agenda, Books, Callbacks, Clock, Ledger, RegistryStore, RegistryView, Tasks, Upstream
from service.usecases.ports.artifacts import Artifacts
from service.usecases.quota import Quota
from service.usecases.registry import Operators
from service.usecases.settle import Settle
from service.usecases.submissions import Submissions
from service.usecases.submit import Submit
from service.usecases.usage import Usage
from service.usecases.watch import Watch
from service.usecases.webhooks import Webhooks

Job = Callable[[], Coroutine[Any, Any, None]]
"""What a process does in the background for as long as it lives."""

TASK_IDS, USER_KEYS, WEBHOOK_SECRETS = "task-id", "user-key", "webhook-secret"
"""What is sealed, each under keys of its own."""

REDIS_SECONDS = 5.0
JOB_RESTART_SECONDS = 1.0


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()


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
    submissions: Submissions
    operators: Operators
    apply: Apply
    webhooks: Webhooks
    uploads: Uploads
    catalogue: Catalogue
    board: Board
    metrics: Metrics
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
                self.logger.exception("job.failed", job=job.__qualname__, exc_info=error)
            await asyncio.sleep(JOB_RESTART_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """An implementation of each port."""

    ledger: Ledger
    books: Books
    tasks: Tasks
    board: Board
    store: RegistryStore
    registry: RegistryView
    upstream: Upstream
    artifacts: Artifacts
    agenda: Agenda
    callbacks: Callbacks
    clock: Clock


def furnished(
    ports: Ports, settings: Settings, metrics: Metrics, background: Background, jobs: Sequence[Job] = ()
) -> Services:
    """The use cases over some ports, and all that stands around them. `jobs` is what the ports have to do."""
    if settings.admin_token is None:
        raise ValueError("the settings are not complete")
    keyring = Keyring(settings.secret_keys)
    task_ids = TaskIds(keyring.purpose(TASK_IDS))
    watch = Watch(
        tasks=ports.tasks,
        ledger=ports.ledger,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
        board=ports.board,
        metrics=metrics,
    )
    looks = FreeLooks(
        ledger=ports.ledger,
        tasks=ports.tasks,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
    )
    secrets, change = keyring.purpose(WEBHOOK_SECRETS), Change(ports.store, ports.registry)
    webhooks = Webhooks(change=change, registry=ports.registry, agenda=ports.agenda, secrets=secrets, clock=ports.clock)
    deliver = Deliver(
        agenda=ports.agenda,
        tasks=ports.tasks,
        callbacks=ports.callbacks,
        registry=ports.registry,
        secrets=secrets,
        switch_off=webhooks.switch_off,
        render=task_event,
        clock=ports.clock,
        metrics=metrics,
    )
    follow = Follow(
        tasks=ports.tasks,
        ledger=ports.ledger,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
        board=ports.board,
        clock=ports.clock,
        interval=settings.poll_seconds,
    )
    metrics.waiting(lambda: ports.board.waiting)
    watching: list[Job] = [] if settings.role is Role.API else [watch.run, watch.expire, looks.run, deliver.run]
    answering: list[Job] = [] if settings.role is Role.WORKER else [follow.attend]
    return Services(
        tenants=Tenants(ports.registry, ports.clock),
        admin=AdminToken(settings.admin_token),
        submit=Submit(
            ledger=ports.ledger,
            settle=Settle(ports.ledger, background),
            tasks=ports.tasks,
            upstream=ports.upstream,
            registry=ports.registry,
            task_ids=task_ids,
            background=background,
            metrics=metrics,
        ),
        follow=follow,
        fetch=Fetch(follow=follow, artifacts=ports.artifacts, registry=ports.registry),
        quota=Quota(ledger=ports.ledger, registry=ports.registry),
        usage=Usage(books=ports.books, registry=ports.registry),
        submissions=Submissions(books=ports.books, tasks=ports.tasks, registry=ports.registry, task_ids=task_ids),
        operators=Operators(
            change=change,
            registry=ports.registry,
            ledger=ports.ledger,
            user_keys=keyring.purpose(USER_KEYS),
            webhook_secrets=secrets,
            clock=ports.clock,
        ),
        apply=Apply(
            change=change,
            registry=ports.registry,
            ledger=ports.ledger,
            user_keys=keyring.purpose(USER_KEYS),
            webhook_secrets=secrets,
            clock=ports.clock,
        ),
        webhooks=webhooks,
        uploads=Uploads(max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels),
        catalogue=settings.catalogue,
        board=ports.board,
        metrics=metrics,
        logger=structlog.get_logger("service"),
        lifecycle=Lifecycle(ports.registry, ports.board),
        registry=ports.registry,
        watch=watch,
        looks=looks,
        deliver=deliver,
        jobs=[*jobs, *watching, *answering],
        drain_seconds=settings.lease_seconds,
    )


@asynccontextmanager
async def assembled(settings: Settings) -> AsyncIterator[Services]:
    """The real gateway, out of settings that leave nothing open. Nothing is connected before it is first used.

    At the end, submissions under way are finished before anything is closed.
    """
    if settings.redis_url is None or settings.upstream_url is None:
        raise ValueError("the settings are not complete")
    background, metrics, keys = Background(), Metrics(CollectorRegistry()), Keys(settings.key_prefix)
    user_keys = Keyring(settings.secret_keys).purpose(USER_KEYS)
    spans = Spans(
        lease=settings.lease_seconds * 1000,
        check_after=int(settings.poll_seconds * 1000),
        keep_ended=settings.task_retention_days * DAY,
    )
    async with AsyncExitStack() as opened:
        connections = connect(settings.redis_url, timeout=REDIS_SECONDS)
        opened.push_async_callback(connections.aclose)
        client, scripts = connections.commands, Scripts(connections.commands)
        store = RedisRegistry(client, scripts, keys)
        registry = LiveRegistry(store, connections.subscriber, keys.registry_channel)
        board = Board(Pace(settings.poll_seconds))
        changes = Changes(connections.subscriber, keys.changes_channel, board)
        upstream = await opened.enter_async_context(
            UpstreamClient(settings.upstream_url, user_keys, settings.catalogue, observe=metrics.upstream)
        )
        opened.push_async_callback(background.drain, settings.lease_seconds)
        ports = Ports(
            ledger=RedisLedger(client, scripts, keys, spans),
            books=RedisBooks(client, scripts, keys),
            tasks=RedisTasks(client, scripts, keys, spans),
            board=board,
            store=store,
            registry=registry,
            upstream=upstream,
            artifacts=ArtifactClient(
                settings.upstream_url, max_bytes=settings.max_artifact_bytes, observe=metrics.upstream
            ),
            agenda=RedisAgenda(client, scripts, keys),
            callbacks=CallbackClient(),
            clock=SystemClock(),
        )
        yield furnished(ports, settings, metrics, background, jobs=[registry.follow, changes.follow])
