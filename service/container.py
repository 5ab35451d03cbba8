"""The composition root: settings, adapters, use cases and jobs."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from service.api.admin_schemas import task_event
from service.api.auth import AdminToken, Tenants
from service.api.health import Health
from service.api.uploads import Uploads
from service.clients.artifacts import ArtifactClient
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import CallbackClient
from service.crypto import Keyring
from service.domain.tasks import Catalogue, TaskIds
from service.settings import Role, Settings
from service.storage.connections import connect
from service.storage.deliveries import RedisAgenda
from service.storage.ledger import DAY, RedisBooks, RedisLedger, Spans
from service.storage.redis import READ, SCRIPTS, DataVersion, DataVersionError, Keys, Outages, Scripts
from service.storage.registry import LiveRegistry, RedisRegistry
from service.storage.tasks import Changes, RedisTasks
from service.telemetry.gauges import Level
from service.telemetry.metrics import LoopLag, Metrics
from service.telemetry.redaction import Learn, Overheard, Redactor, unheard
from service.telemetry.tracing import UNTRACED, Tracer, tracing
from service.usecases.admin import Change, Operators, Reseal, Webhooks
from service.usecases.background import Background, ended
from service.usecases.ledger_snapshot import Survey
from service.usecases.poller import FreeLooks, Watch
from service.usecases.ports import (
    Agenda,
    Answered,
    Artifacts,
    Books,
    Callbacks,
    Clock,
    Ledger,
    RegistryStore,
    RegistryView,
    SubmitOutcome,
    Tasks,
    Upstream,
)
from service.usecases.registry_apply import Apply
from service.usecases.reports import Quota, Submissions, Usage
from service.usecases.settlement import Settle
from service.usecases.submit import Submit
from service.usecases.task_cache import Board, Pace
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


TASK_IDS, USER_KEYS, WEBHOOK_SECRETS = "task-id", "user-key", "webhook-secret"
"""What is sealed, each under keys of its own."""


REDIS_SECONDS = 5.0


class SystemClock:
    """The time of this machine."""

    def now(self) -> float:
        """Seconds since the epoch."""
        return time.time()


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
    ports: Ports,
    settings: Settings,
    metrics: Metrics,
    background: Background,
    jobs: Sequence[Job] = (),
    *,
    learn: Learn = unheard,
    tracer: Tracer = UNTRACED,
) -> Services:
    """The use cases over some ports, and all that stands around them.

    `jobs` is what the ports have to do, and `learn` is told of every secret that is sealed or opened.
    """
    if settings.admin_token is None:
        raise ValueError("the settings are not complete")
    keyring = Keyring(settings.secret_keys)
    user_keys = Overheard(keyring.purpose(USER_KEYS), learn)
    task_ids = TaskIds(keyring.purpose(TASK_IDS))
    watch = Watch(
        tasks=ports.tasks,
        ledger=ports.ledger,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
        board=ports.board,
        metrics=metrics,
        tracer=tracer,
    )
    looks = FreeLooks(
        ledger=ports.ledger,
        tasks=ports.tasks,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
    )
    secrets = Overheard(keyring.purpose(WEBHOOK_SECRETS), learn, lambda plain: base64.b64encode(plain).decode())
    change = Change(ports.store, ports.registry)
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
        tracer=tracer,
    )
    follow = Follow(
        tasks=ports.tasks,
        ledger=ports.ledger,
        upstream=ports.upstream,
        registry=ports.registry,
        task_ids=task_ids,
        board=ports.board,
        clock=ports.clock,
        metrics=metrics,
        interval=settings.poll_seconds,
    )
    survey = Survey(
        ledger=ports.ledger, tasks=ports.tasks, agenda=ports.agenda, registry=ports.registry, metrics=metrics
    )
    settle = Settle(ports.ledger, background, ports.registry)
    uploads = Uploads(max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels)
    uploads.tell(metrics.levels)
    metrics.levels.tell(Level.WAITING, lambda: {(): ports.board.waiting})
    metrics.levels.tell(Level.SETTLEMENTS, lambda: {(): settle.late})
    metrics.name_tenants(lambda: ports.registry.current)
    metrics.expect_submissions(SubmitOutcome, Answered)
    watching: list[Job] = [] if settings.role is Role.API else [watch.run, watch.expire, looks.run, deliver.run]
    answering: list[Job] = [] if settings.role is Role.WORKER else [follow.attend]
    return Services(
        tenants=Tenants(ports.registry, ports.clock),
        admin=AdminToken(settings.admin_token),
        submit=Submit(
            ledger=ports.ledger,
            settle=settle,
            tasks=ports.tasks,
            upstream=ports.upstream,
            registry=ports.registry,
            task_ids=task_ids,
            background=background,
            metrics=metrics,
            tracer=tracer,
        ),
        follow=follow,
        fetch=Fetch(follow=follow, artifacts=ports.artifacts, registry=ports.registry),
        quota=Quota(ledger=ports.ledger, registry=ports.registry),
        survey=survey,
        usage=Usage(books=ports.books, registry=ports.registry),
        submissions=Submissions(books=ports.books, tasks=ports.tasks, registry=ports.registry, task_ids=task_ids),
        operators=Operators(
            change=change,
            registry=ports.registry,
            ledger=ports.ledger,
            user_keys=user_keys,
            webhook_secrets=secrets,
            clock=ports.clock,
        ),
        apply=Apply(
            change=change,
            registry=ports.registry,
            ledger=ports.ledger,
            user_keys=user_keys,
            webhook_secrets=secrets,
            clock=ports.clock,
        ),
        reseal=Reseal(
            change=change,
            registry=ports.registry,
            user_keys=user_keys,
            webhook_secrets=secrets,
            clock=ports.clock,
        ),
        webhooks=webhooks,
        uploads=uploads,
        catalogue=settings.catalogue,
        board=ports.board,
        metrics=metrics,
        tracer=tracer,
        logger=structlog.get_logger("service"),
        lifecycle=Lifecycle(ports.registry, ports.board),
        registry=ports.registry,
        watch=watch,
        looks=looks,
        deliver=deliver,
        jobs=[*jobs, *watching, *answering, LoopLag(metrics).run],
        drain_seconds=settings.lease_seconds,
    )


@asynccontextmanager
async def assembled(
    settings: Settings,
    *,
    learn: Learn = unheard,
    clean: Callable[[str], str] | None = None,
    refused: Callable[[DataVersionError], None] = lambda _: None,
) -> AsyncIterator[Services]:
    """The real gateway, out of settings that leave nothing open. Nothing is connected before it is first used.

    `learn` is told of every secret that comes up, before anything can go wrong with it, and `clean` takes them out of
    what is traced. `refused` is called if the store holds data of another version. At the end, submissions under way
    are finished before anything is closed.
    """
    if settings.redis_url is None or settings.upstream_url is None:
        raise ValueError("the settings are not complete")
    background, keys = Background(), Keys(settings.key_prefix)
    metrics = Metrics(CollectorRegistry(), most_tenants=settings.metrics_tenants)
    metrics.expect_scripts([READ, *SCRIPTS])
    user_keys = Overheard(Keyring(settings.secret_keys).purpose(USER_KEYS), learn)
    spans = Spans(
        lease=settings.lease_seconds * 1000,
        check_after=int(settings.poll_seconds * 1000),
        keep_ended=settings.task_retention_days * DAY,
    )
    async with AsyncExitStack() as opened:
        # First, so that it ends last, and what was under way until then is sent too.
        traced = tracing(settings.traces_url, settings.traces_share, clean or Redactor().text)
        tracer = await opened.enter_async_context(traced)
        connections = connect(settings.redis_url, timeout=REDIS_SECONDS)
        opened.push_async_callback(connections.aclose)
        version = DataVersion(keys.data_version, refused)
        outages = Outages(metrics.ledger, metrics.store_error)
        scripts = Scripts(
            connections.commands,
            version=version,
            observe=outages.observe,
            failed=outages.failed,
            tracer=tracer,
        )
        store = RedisRegistry(scripts, keys)
        registry = LiveRegistry(store, connections.subscriber, keys.registry_channel, failed=outages.failed)
        board = Board(Pace(settings.poll_seconds))
        changes = Changes(connections.subscriber, keys.changes_channel, board, failed=outages.failed)
        upstream = await opened.enter_async_context(
            UpstreamClient(
                settings.upstream_url, user_keys, settings.catalogue, observe=metrics.upstream, tracer=tracer
            )
        )
        upstream.tell(metrics)
        artifacts = ArtifactClient(
            settings.upstream_url,
            max_bytes=settings.max_artifact_bytes,
            observe=metrics.upstream,
            user_keys=user_keys,
            tracer=tracer,
        )
        artifacts.tell(metrics)

        async def drain() -> None:
            # In a store that is refused nothing can be booked, however long that is tried.
            await background.drain(0 if version.is_refused else settings.lease_seconds)

        opened.push_async_callback(drain)
        ports = Ports(
            ledger=RedisLedger(scripts, keys, spans),
            books=RedisBooks(scripts, keys),
            tasks=RedisTasks(scripts, keys, spans),
            board=board,
            store=store,
            registry=registry,
            upstream=upstream,
            artifacts=artifacts,
            agenda=RedisAgenda(scripts, keys),
            callbacks=CallbackClient(tracer=tracer),
            clock=SystemClock(),
        )
        jobs = [registry.follow, changes.follow]
        yield furnished(ports, settings, metrics, background, jobs, learn=learn, tracer=tracer)
