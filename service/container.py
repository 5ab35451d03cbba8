"""The composition root: settings in, adapters, use cases and jobs out; closed in reverse order."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from service.api.admin_schemas import encode_task_event, log_fields
from service.api.auth import AdminAuth, TenantAuth
from service.api.health import Health
from service.api.uploads import UploadReader
from service.clients.artifacts import ArtifactClient
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import WebhookClient
from service.crypto import Keyring, TaskIdCodec
from service.domain.tasks import Catalogue, Kind
from service.settings import Role, Settings
from service.storage.connections import connect
from service.storage.deliveries import RedisDeliveryQueue
from service.storage.ledger import RedisLedger, Retention
from service.storage.redis import (
    DAY_MS,
    READ_COMMAND,
    SCRIPT_NAMES,
    DataVersionError,
    DataVersionGuard,
    Keys,
    RedisMonitor,
    RedisScripts,
    Subscriber,
)
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore, put_task_event
from service.telemetry.gauges import GaugeName
from service.telemetry.metrics import Metrics, RedisOutcome, preregister
from service.telemetry.redaction import Redactor, RegisterSecret, noop
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.admin import RegistryAdmin, RegistryUpdater, WebhookAdmin
from service.usecases.background import TaskSupervisor, cancel_and_wait
from service.usecases.caches import CachedRegistry, DurationEstimator, TaskCache
from service.usecases.ledger_snapshot import LedgerSnapshot
from service.usecases.poller import BalanceRefresher, TaskPoller
from service.usecases.ports import (
    CheckOutcome,
    DeliveryQueue,
    Ledger,
    RegistryStore,
    SubmitOutcome,
    TaskStore,
    Upstream,
)
from service.usecases.registry_apply import RegistryApply
from service.usecases.reports import QuotaReports, SubmissionReports, UsageReports
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import Submitter
from service.usecases.task_status import FetchArtifact, TaskReader
from service.usecases.webhook_delivery import PostWebhook, WebhookDispatcher

Job = Callable[[], Coroutine[Any, Any, None]]
"""A task that runs as long as the process."""
JOB_RESTART_SECONDS = 1.0


class Lifecycle:
    """The state of the process between start and shutdown."""

    def __init__(self, registry: CachedRegistry, task_cache: TaskCache) -> None:
        self._registry = registry
        self._task_cache = task_cache
        self._is_draining = False

    def start_draining(self) -> None:
        """Become unready, so that no new requests arrive, and end all waits for tasks."""
        self._is_draining = True
        self._task_cache.close()

    def health(self) -> Health:
        if self._is_draining:
            return Health.DRAINING
        return Health.OK if self._registry.is_ready else Health.STARTING


@dataclass(frozen=True, kw_only=True)
class Container:
    """The parts of the two applications.

    `drain_seconds` is how long shutdown waits for work in progress: as long as a submission may take.
    """

    tenant_auth: TenantAuth
    admin_auth: AdminAuth
    submitter: Submitter
    task_reader: TaskReader
    quota: QuotaReports
    usage: UsageReports
    ledger_snapshot: LedgerSnapshot
    submissions: SubmissionReports
    registry_admin: RegistryAdmin
    registry_apply: RegistryApply
    webhook_admin: WebhookAdmin
    uploads: UploadReader
    catalogue: Catalogue
    task_cache: TaskCache
    metrics: Metrics
    tracer: Tracer
    logger: FilteringBoundLogger
    lifecycle: Lifecycle
    registry: CachedRegistry
    task_poller: TaskPoller
    balance_refresher: BalanceRefresher
    webhook_dispatcher: WebhookDispatcher
    jobs: Sequence[Job]
    drain_seconds: int

    @asynccontextmanager
    async def run_jobs(self) -> AsyncIterator[None]:
        """Run the jobs of this process within the block."""
        running = [asyncio.create_task(self._restart_on_error(job)) for job in self.jobs]
        try:
            yield
        finally:
            await cancel_and_wait(running)

    async def _restart_on_error(self, job: Job) -> None:
        """Restart a job after an error, so that a bug does not end it silently."""
        while True:
            try:
                await job()
            except Exception as error:
                self.logger.exception("background_task.error", job=job.__qualname__, exc_info=error)
            await asyncio.sleep(JOB_RESTART_SECONDS)


TASK_ID_PURPOSE, USER_KEY_PURPOSE, WEBHOOK_SECRET_PURPOSE = "task-id", "user-key", "webhook-secret"
"""Purposes of encryption, each with derived keys of its own."""
REDIS_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """An implementation of each port."""

    ledger: Ledger
    task_store: TaskStore
    task_cache: TaskCache
    registry_store: RegistryStore
    registry: CachedRegistry
    upstream: Upstream
    fetch_artifact: FetchArtifact
    delivery_queue: DeliveryQueue
    post_webhook: PostWebhook
    now: Callable[[], float]


def build_services(
    adapters: Adapters,
    settings: Settings,
    metrics: Metrics,
    background: TaskSupervisor,
    jobs: Sequence[Job] = (),
    *,
    register_secret: RegisterSecret = noop,
    tracer: Tracer = NOOP_TRACER,
) -> Container:
    """Build the use cases over the adapters.

    `jobs` are the adapters' own; `register_secret` is called with every secret that is encrypted or decrypted.
    """
    if settings.admin_token is None:
        raise ValueError("the settings are not complete")
    keyring = Keyring(settings.secret_keys)
    user_keys = keyring.derive(USER_KEY_PURPOSE, lambda key: register_secret(key.decode()))
    task_ids = TaskIdCodec(keyring.derive(TASK_ID_PURPOSE))
    poller = TaskPoller(
        tasks=adapters.task_store,
        ledger=adapters.ledger,
        upstream=adapters.upstream,
        registry=adapters.registry,
        task_ids=task_ids,
        cache=adapters.task_cache,
        metrics=metrics,
        tracer=tracer,
    )
    balance_refresher = BalanceRefresher(
        ledger=adapters.ledger,
        tasks=adapters.task_store,
        upstream=adapters.upstream,
        registry=adapters.registry,
        task_ids=task_ids,
    )
    webhook_cipher = keyring.derive(
        WEBHOOK_SECRET_PURPOSE, lambda secret: register_secret(base64.b64encode(secret).decode())
    )
    updater = RegistryUpdater(adapters.registry_store, adapters.registry)
    webhooks = WebhookAdmin(
        updater=updater,
        registry=adapters.registry,
        deliveries=adapters.delivery_queue,
        cipher=webhook_cipher,
        now=adapters.now,
    )
    dispatcher = WebhookDispatcher(
        deliveries=adapters.delivery_queue,
        tasks=adapters.task_store,
        post_webhook=adapters.post_webhook,
        registry=adapters.registry,
        cipher=webhook_cipher,
        disable_url=webhooks.disable_url,
        encode_task_event=encode_task_event,
        now=adapters.now,
        metrics=metrics,
        tracer=tracer,
    )
    reader = TaskReader(
        tasks=adapters.task_store,
        ledger=adapters.ledger,
        upstream=adapters.upstream,
        fetch_artifact=adapters.fetch_artifact,
        registry=adapters.registry,
        task_ids=task_ids,
        cache=adapters.task_cache,
        now=adapters.now,
        metrics=metrics,
        interval_seconds=settings.poll_seconds,
    )
    snapshot = LedgerSnapshot(
        ledger=adapters.ledger,
        tasks=adapters.task_store,
        deliveries=adapters.delivery_queue,
        registry=adapters.registry,
        metrics=metrics,
    )
    settlements = SettlementQueue(adapters.ledger, background, adapters.registry)
    uploads = UploadReader(max_image_bytes=settings.max_image_bytes, max_image_pixels=settings.max_image_pixels)
    uploads.register_metrics(metrics.gauges)
    metrics.gauges.register(GaugeName.WAITING_CLIENTS, lambda: {(): adapters.task_cache.subscription_count})
    metrics.gauges.register(GaugeName.SETTLEMENTS_PENDING, lambda: {(): settlements.pending_count})
    metrics.label_names.read_registry = lambda: adapters.registry.current
    preregister(metrics.submissions, Kind, SubmitOutcome)
    preregister(metrics.poll_checks, CheckOutcome)
    worker_jobs: list[Job] = (
        [] if settings.role is Role.API else [poller.run, poller.expire_leases, balance_refresher.run, dispatcher.run]
    )
    api_jobs: list[Job] = [] if settings.role is Role.WORKER else [reader.touch_watched]
    return Container(
        tenant_auth=TenantAuth(adapters.registry, adapters.now),
        admin_auth=AdminAuth(settings.admin_token),
        submitter=Submitter(
            ledger=adapters.ledger,
            settlements=settlements,
            tasks=adapters.task_store,
            upstream=adapters.upstream,
            registry=adapters.registry,
            task_ids=task_ids,
            supervisor=background,
            metrics=metrics,
            tracer=tracer,
        ),
        task_reader=reader,
        quota=QuotaReports(ledger=adapters.ledger, registry=adapters.registry),
        ledger_snapshot=snapshot,
        usage=UsageReports(ledger=adapters.ledger, registry=adapters.registry),
        submissions=SubmissionReports(
            ledger=adapters.ledger, tasks=adapters.task_store, registry=adapters.registry, task_ids=task_ids
        ),
        registry_admin=RegistryAdmin(
            updater=updater,
            registry=adapters.registry,
            ledger=adapters.ledger,
            user_key_cipher=user_keys,
            webhook_cipher=webhook_cipher,
            now=adapters.now,
            log_fields=log_fields,
        ),
        registry_apply=RegistryApply(
            updater=updater,
            registry=adapters.registry,
            ledger=adapters.ledger,
            user_key_cipher=user_keys,
            webhook_cipher=webhook_cipher,
            now=adapters.now,
            log_fields=log_fields,
        ),
        webhook_admin=webhooks,
        uploads=uploads,
        catalogue=settings.catalogue,
        task_cache=adapters.task_cache,
        metrics=metrics,
        tracer=tracer,
        logger=structlog.get_logger("service"),
        lifecycle=Lifecycle(adapters.registry, adapters.task_cache),
        registry=adapters.registry,
        task_poller=poller,
        balance_refresher=balance_refresher,
        webhook_dispatcher=dispatcher,
        jobs=[*jobs, *worker_jobs, *api_jobs, metrics.measure_event_loop_lag],
        drain_seconds=settings.lease_seconds,
    )


@asynccontextmanager
async def open_tracer(url: str | None, sample_ratio: float, redact: Callable[[str], str]) -> AsyncIterator[Tracer]:
    """Open a tracer that exports to a collector at `url`, or the no-op tracer without one.

    Traces of clients are always sampled, others by `sample_ratio`. `redact` cleans values of clients. The remaining
    spans are sent as the block ends.
    """
    if url is None:
        yield NOOP_TRACER
        return
    from service.telemetry.tracing_otel import open_exporting_tracer  # noqa: PLC0415 - optional and slow to import

    async with open_exporting_tracer(url, sample_ratio, redact) as tracer:
        yield tracer


@asynccontextmanager
async def open_container(
    settings: Settings,
    *,
    register_secret: RegisterSecret = noop,
    redact: Callable[[str], str] | None = None,
    on_version_error: Callable[[DataVersionError], None] = lambda _: None,
) -> AsyncIterator[Container]:
    """Open the gateway for complete settings; connections are made at first use.

    `register_secret` is called with every secret before it is used, `redact` removes them from traces, and
    `on_version_error` is called if Redis holds data of another version. On exit, submissions in progress finish before
    anything is closed.
    """
    if settings.redis_url is None or settings.upstream_url is None:
        raise ValueError("the settings are not complete")
    background, keys = TaskSupervisor(), Keys(settings.key_prefix)
    metrics = Metrics(CollectorRegistry(), max_named_tenants=settings.metrics_tenants)
    preregister(metrics.redis_calls, [READ_COMMAND, *SCRIPT_NAMES], RedisOutcome)
    user_keys = Keyring(settings.secret_keys).derive(USER_KEY_PURPOSE, lambda key: register_secret(key.decode()))
    retention = Retention(
        lease_ms=settings.lease_seconds * 1000,
        check_interval_ms=int(settings.poll_seconds * 1000),
        claim_lease_ms=30_000,
        watched_ms=30_000,
        lost_after_ms=1_800_000,
        unusable_after_ms=DAY_MS,
        keep_finished_ms=settings.task_retention_days * DAY_MS,
    )
    async with AsyncExitStack() as exit_stack:
        # Opened first, so that it closes last and sends the spans of the shutdown.
        tracer_context = open_tracer(settings.traces_url, settings.traces_share, redact or Redactor().redact_text)
        tracer = await exit_stack.enter_async_context(tracer_context)
        connections = connect(settings.redis_url, timeout=REDIS_TIMEOUT_SECONDS)
        exit_stack.push_async_callback(connections.aclose)
        version_guard = DataVersionGuard(keys, on_version_error)
        monitor = RedisMonitor(metrics)
        scripts = RedisScripts(
            connections.commands,
            version_guard=version_guard,
            monitor=monitor,
            tracer=tracer,
        )
        registry_store = RedisRegistry(scripts, keys)
        registry = CachedRegistry(registry_store)
        task_cache = TaskCache(DurationEstimator(settings.poll_seconds))
        subscribe = partial(Subscriber, connections.open_pubsub, monitor=monitor)
        subscribers = [
            subscribe(keys.registry_channel, lambda _: registry.refresh()),
            subscribe(keys.task_events_channel, partial(put_task_event, task_cache)),
        ]
        upstream = await exit_stack.enter_async_context(
            UpstreamClient(
                settings.upstream_url,
                user_keys,
                settings.catalogue,
                on_call=metrics.record_upstream_call,
                tracer=tracer,
            )
        )
        upstream.register_metrics(metrics)
        artifact_client = ArtifactClient(
            settings.upstream_url,
            max_bytes=settings.max_artifact_bytes,
            on_call=metrics.record_upstream_call,
            user_keys=user_keys,
            tracer=tracer,
        )
        artifact_client.register_metrics(metrics)

        async def drain() -> None:
            # With a mismatched data version no settlement can succeed.
            await background.drain(0 if version_guard.is_mismatched else settings.lease_seconds)

        exit_stack.push_async_callback(drain)
        adapters = Adapters(
            ledger=RedisLedger(scripts, keys, retention),
            task_store=RedisTaskStore(scripts, keys, retention),
            task_cache=task_cache,
            registry_store=registry_store,
            registry=registry,
            upstream=upstream,
            fetch_artifact=artifact_client.fetch,
            delivery_queue=RedisDeliveryQueue(scripts, keys),
            post_webhook=WebhookClient(tracer=tracer).post,
            now=time.time,
        )
        jobs = [subscriber.run for subscriber in subscribers]
        yield build_services(
            adapters, settings, metrics, background, jobs, register_secret=register_secret, tracer=tracer
        )
