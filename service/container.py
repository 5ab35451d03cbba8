"""The composition root: settings in, adapters, use cases and jobs out; closed in reverse order."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import structlog
from opentelemetry.trace import Tracer
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from service.api.admin_schemas import encode_task_event, encode_threshold_event, log_fields
from service.api.auth import AdminAuth, TenantAuth
from service.api.guides import Limits
from service.api.health import Health
from service.api.uploads import UploadReader
from service.clients.artifacts import ArtifactClient
from service.clients.http import MAX_REQUESTS
from service.clients.images import ImageClient
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import WebhookClient
from service.crypto import Keyring, TaskIdCodec, UserKeyCipher
from service.domain.tasks import Kind
from service.setting_types import Role, Switch
from service.settings import Settings
from service.storage.connections import connect
from service.storage.deliveries import RedisDeliveryQueue
from service.storage.ledger import RedisLedger, Retention
from service.storage.redis import (
    DAY_MS,
    READ_COMMAND,
    SCRIPT_NAMES,
    UPGRADABLE_VERSION,
    DataVersionError,
    DataVersionGuard,
    Keys,
    RedisMonitor,
    RedisScripts,
    Subscriber,
)
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore, put_task_event
from service.telemetry import tracing
from service.telemetry.gauges import GaugeName
from service.telemetry.metrics import Metrics, RedisOutcome, preregister
from service.telemetry.redaction import Redactor
from service.usecases.admin import RegistryAdmin
from service.usecases.background import TaskSupervisor, cancel_and_wait
from service.usecases.caches import CachedRegistry, DurationEstimator, TaskCache
from service.usecases.ledger_snapshot import LedgerSnapshot
from service.usecases.poller import BalanceRefresher, TaskPoller
from service.usecases.ports import (
    CheckOutcome,
    DeliveryQueue,
    FetchImage,
    Ledger,
    SubmitOutcome,
    TaskStore,
    Upstream,
)
from service.usecases.quota_thresholds import ThresholdReporter
from service.usecases.reports import QuotaReports, SubmissionReports, UsageReports
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import Submitter
from service.usecases.task_status import MAX_DOWNLOADS, MAX_WAITS, FetchArtifact, TaskReader, TenantSlots
from service.usecases.webhook_delivery import PostWebhook, WebhookAdmin, WebhookDispatcher

Job = Callable[[], Coroutine[Any, Any, None]]
"""A task that runs as long as the process."""
JOB_RESTART_SECONDS = 1.0


TASK_ID_PURPOSE, WEBHOOK_SECRET_PURPOSE, LINK_PURPOSE = "task-id", "webhook-secret", "artifact-link"
"""Purposes of encryption, each with derived keys of its own, beside that of UserKeyCipher."""
REDIS_TIMEOUT_SECONDS = 5.0
MAX_IMAGE_FETCHES = 64
"""Images that a process fetches at once from their URLs."""


class Container:
    """The parts of the two applications, over an implementation of each port.

    `jobs` are those of the implementations; every secret is registered with `redactor` before it is used.
    `drain_seconds` is how long shutdown waits for work in progress: as long as a submission may take.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        background: TaskSupervisor,
        *,
        ledger: Ledger,
        tasks: TaskStore,
        deliveries: DeliveryQueue,
        upstream: Upstream,
        user_keys: UserKeyCipher,
        registry: CachedRegistry,
        task_cache: TaskCache,
        fetch_artifact: FetchArtifact,
        fetch_image: FetchImage,
        post_webhook: PostWebhook,
        now: Callable[[], float] = time.time,
        jobs: Sequence[Job] = (),
        redactor: Redactor | None = None,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        if not settings.has_admin:
            raise ValueError("the settings are not complete")
        self.metrics = metrics
        self.tracer = tracer
        self.logger: FilteringBoundLogger = structlog.get_logger("service")
        self.registry = registry
        self.task_cache = task_cache
        self.catalogue = settings.catalogue
        self.has_playground = settings.playground is Switch.ON
        self.limits = Limits(**{name: getattr(settings, name) for name in Limits.__struct_fields__})
        self.trusted_proxies = settings.trusted_proxies
        self.fetch_image = fetch_image
        self.image_fetches = TenantSlots(MAX_IMAGE_FETCHES, settings.tenant_share)
        self.metrics_token = settings.metrics_token
        self.drain_seconds = settings.lease_seconds
        self._is_draining = False
        keyring, redactor = Keyring(settings.secret_keys), redactor or Redactor()
        webhook_cipher = keyring.derive(
            WEBHOOK_SECRET_PURPOSE, lambda secret: redactor.register_secrets(base64.b64encode(secret).decode())
        )
        task_ids = TaskIdCodec(keyring.derive(TASK_ID_PURPOSE))
        settlements = SettlementQueue(ledger, background, registry)
        self.tenant_auth = TenantAuth(registry, now, settings.reads_per_second)
        self.admin_auth = None if settings.role is Role.WORKER else AdminAuth(settings.all_operators)
        self.uploads = UploadReader(
            max_image_bytes=settings.max_image_bytes,
            max_image_pixels=settings.max_image_pixels,
            tenant_share=settings.tenant_share,
            max_submissions=MAX_REQUESTS,
        )
        self.submitter = Submitter(
            ledger=ledger,
            settlements=settlements,
            tasks=tasks,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            supervisor=background,
            metrics=metrics,
        )
        self.task_reader = TaskReader(
            tasks=tasks,
            ledger=ledger,
            upstream=upstream,
            fetch_artifact=fetch_artifact,
            registry=registry,
            task_ids=task_ids,
            cache=task_cache,
            now=now,
            metrics=metrics,
            interval_seconds=settings.poll_seconds,
            waits=TenantSlots(MAX_WAITS, settings.tenant_share),
            downloads=TenantSlots(MAX_DOWNLOADS, settings.tenant_share),
        )
        self.quota = QuotaReports(ledger=ledger, registry=registry)
        self.usage = UsageReports(ledger=ledger, registry=registry)
        self.submissions = SubmissionReports(ledger=ledger, tasks=tasks, registry=registry, task_ids=task_ids)
        self.ledger_snapshot = LedgerSnapshot(
            ledger=ledger, tasks=tasks, deliveries=deliveries, registry=registry, metrics=metrics
        )
        self.registry_admin = RegistryAdmin(
            registry=registry,
            ledger=ledger,
            user_key_cipher=user_keys,
            webhook_cipher=webhook_cipher,
            now=now,
            log_fields=log_fields,
            base_url_error=settings.base_url_error,
        )
        self.webhook_admin = WebhookAdmin(registry=registry, deliveries=deliveries, cipher=webhook_cipher, now=now)
        self.task_poller = TaskPoller(
            tasks=tasks,
            ledger=ledger,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            cache=task_cache,
            metrics=metrics,
            tracer=tracer,
        )
        self.balance_refresher = BalanceRefresher(
            ledger=ledger, tasks=tasks, upstream=upstream, registry=registry, task_ids=task_ids
        )
        self.webhook_dispatcher = WebhookDispatcher(
            deliveries=deliveries,
            tasks=tasks,
            post_webhook=post_webhook,
            registry=registry,
            cipher=webhook_cipher,
            encode_task_event=encode_task_event,
            now=now,
            metrics=metrics,
            tracer=tracer,
        )
        self.threshold_reporter = ThresholdReporter(
            ledger=ledger, deliveries=deliveries, registry=registry, encode_event=encode_threshold_event
        )
        self.uploads.register_metrics(metrics.gauges)
        metrics.gauges.register(GaugeName.WAITING_CLIENTS, lambda: {(): task_cache.subscription_count})
        metrics.gauges.register(GaugeName.SETTLEMENTS_PENDING, lambda: {(): settlements.pending_count})
        metrics.label_names.read_registry = lambda: registry.current
        preregister(metrics.submissions, Kind, SubmitOutcome)
        preregister(metrics.poll_checks, CheckOutcome)
        self.jobs = [*jobs, metrics.measure_event_loop_lag]
        if settings.role is not Role.API:
            poller = self.task_poller
            self.jobs += [poller.run, poller.expire_leases, self.balance_refresher.run, self.webhook_dispatcher.run]
            self.jobs.append(self.threshold_reporter.run)
        if settings.role is not Role.WORKER:
            self.jobs.append(self.task_reader.touch_watched)

    def start_draining(self) -> None:
        """Become unready, so that no new requests arrive, and end all waits for tasks."""
        self._is_draining = True
        self.task_cache.close()

    def health(self) -> Health:
        if self._is_draining:
            return Health.DRAINING
        return Health.OK if self.registry.is_ready else Health.STARTING

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


@asynccontextmanager
async def open_tracer(url: str | None, sample_ratio: float, redact: Callable[[str], str]) -> AsyncIterator[Tracer]:
    """Open a tracer that exports to a collector at `url`, or the no-op tracer without one.

    Traces of clients are always sampled, others by `sample_ratio`. `redact` cleans values of clients. The remaining
    spans are sent as the block ends.
    """
    if url is None:
        yield tracing.NOOP_TRACER
        return
    from service.telemetry.tracing_otel import open_exporting_tracer  # noqa: PLC0415 - optional and slow to import

    async with open_exporting_tracer(url, sample_ratio, redact) as tracer:
        yield tracer


@asynccontextmanager
async def open_container(
    settings: Settings,
    *,
    redactor: Redactor | None = None,
    on_version_error: Callable[[DataVersionError], None] = lambda _: None,
) -> AsyncIterator[Container]:
    """Open the gateway for complete settings; connections are made at first use.

    Secrets are registered with `redactor`, which removes them from traces; `on_version_error` is called if Redis holds
    data of another version. On exit, submissions in progress finish before anything is closed.
    """
    if settings.redis_url is None or settings.upstream_url is None:
        raise ValueError("the settings are not complete")
    background, keys = TaskSupervisor(), Keys(settings.key_prefix)
    metrics = Metrics(CollectorRegistry(), max_named_tenants=settings.metrics_tenants)
    preregister(metrics.redis_calls, [READ_COMMAND, *SCRIPT_NAMES], RedisOutcome)
    redactor = redactor or Redactor()
    keyring = Keyring(settings.secret_keys)
    user_keys = UserKeyCipher(keyring, settings.upstream_url, lambda key: redactor.register_secrets(key.decode()))
    links = keyring.derive(LINK_PURPOSE)
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
        tracer_context = open_tracer(settings.traces_url, settings.traces_share, redactor.redact_text)
        tracer = await exit_stack.enter_async_context(tracer_context)
        connections = connect(settings.redis_url, timeout=REDIS_TIMEOUT_SECONDS)
        exit_stack.push_async_callback(connections.aclose)

        async def upgrade() -> None:
            former_guard = DataVersionGuard(keys, lambda _: None, version=UPGRADABLE_VERSION)
            former_scripts = RedisScripts(connections.commands, version_guard=former_guard)
            await RedisRegistry(former_scripts, keys).upgrade(user_keys.bind)

        version_guard = DataVersionGuard(keys, on_version_error, upgrade=upgrade)
        monitor = RedisMonitor(metrics)
        scripts = RedisScripts(connections.commands, version_guard=version_guard, monitor=monitor, tracer=tracer)
        registry = CachedRegistry(RedisRegistry(scripts, keys))
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
                links=links,
                tracer=tracer,
            )
        )
        upstream.register_metrics(metrics)
        artifact_client = ArtifactClient(
            settings.upstream_url,
            max_bytes=settings.max_artifact_bytes,
            private_domains=settings.private_domains,
            on_call=metrics.record_upstream_call,
            user_keys=user_keys,
            links=links,
            tracer=tracer,
        )
        artifact_client.register_metrics(metrics)

        async def drain() -> None:
            # With a mismatched data version no settlement can succeed.
            await background.drain(0 if version_guard.is_mismatched else settings.lease_seconds)

        exit_stack.push_async_callback(drain)
        yield Container(
            settings,
            metrics,
            background,
            ledger=RedisLedger(scripts, keys, retention),
            tasks=RedisTaskStore(scripts, keys, retention),
            deliveries=RedisDeliveryQueue(scripts, keys),
            upstream=upstream,
            user_keys=user_keys,
            registry=registry,
            task_cache=task_cache,
            fetch_artifact=artifact_client.fetch,
            fetch_image=ImageClient(metrics, seconds=settings.image_url_seconds, tracer=tracer).fetch,
            post_webhook=WebhookClient(tracer=tracer).post,
            jobs=[subscriber.run for subscriber in subscribers],
            redactor=redactor,
            tracer=tracer,
        )
