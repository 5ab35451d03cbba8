"""The use cases on a real Redis whose calls can fail, with a scripted upstream and scripted webhook receivers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from service.api.admin_schemas import encode_task_event, encode_threshold_event
from service.crypto import Keyring, TaskIdCodec
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, Balance, Reservation
from service.domain.tasks import Artifact, ArtifactName, FaceEnhanceOptions, Options, Task
from service.domain.tenants import Account, Limit, Tenant, TenantPolicy, Webhook, WebhookSecrets, Window
from service.storage.connections import connect
from service.storage.deliveries import RedisDeliveryQueue
from service.storage.ledger import RedisLedger
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor, cancel_and_wait
from service.usecases.caches import CachedRegistry, DurationEstimator, TaskCache
from service.usecases.poller import BalanceRefresher, TaskPoller
from service.usecases.ports import (
    CheckOutcome,
    CheckResult,
    Image,
    RegistryChange,
    SubmitOutcome,
    SubmitResult,
    WebhookResponse,
)
from service.usecases.quota_thresholds import ThresholdReporter
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import Submission, Submitter
from service.usecases.task_status import TaskReader
from service.usecases.webhook_delivery import WebhookDispatcher
from tests.storage.seeded_store import RETENTION
from tests.support.server_time import install_server_time, set_server_time
from tests.support.valkey import Valkey

UNAVAILABLE = LedgerUnavailable("away", retry_after=1)
INTERNAL_ERROR = RuntimeError("a fault of ours")
START_MS = 1_790_000_000_000
TENANT, MAIN, SPARE = 1, 2, 3
URL = "https://hooks.test/ended"
IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
PRICE = 100
"""Price of a task without prepaid uses, in fen."""


async def wait_until(condition: Callable[[], bool]) -> None:
    """Yield to the event loop until a condition holds."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@asynccontextmanager
async def run_job(job: Any) -> AsyncIterator[asyncio.Task[None]]:
    running = asyncio.create_task(job)
    try:
        yield running
    finally:
        await cancel_and_wait([running], retry_seconds=0.05)


@dataclass
class Faults:
    """Errors of the next calls of a name: before they run, or afterwards. All calls fail while `is_unavailable`."""

    is_unavailable: bool = False
    before: dict[str, list[BaseException]] = field(default_factory=dict)
    after: dict[str, list[BaseException]] = field(default_factory=dict)
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)


class FaultyPort:
    """A port whose calls can fail."""

    def __init__(self, port: Any, faults: Faults) -> None:
        self._port = port
        self._faults = faults

    def __getattr__(self, name: str) -> Any:
        method, faults = getattr(self._port, name), self._faults

        async def call(*args: Any, **kwargs: Any) -> Any:
            faults.calls.append((name, args))
            if faults.is_unavailable:
                raise UNAVAILABLE
            if faults.before.get(name):
                raise faults.before[name].pop(0)
            result = await method(*args, **kwargs)
            if faults.after.get(name):
                raise faults.after[name].pop(0)
            return result

        return call


@dataclass
class ScriptedUpstream:
    """Responds when `may_respond` is set, by default with success; `errors` are raised instead of responses."""

    count: int = 10
    money: int = 30_000
    submits: list[str] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    next_submits: list[SubmitResult] = field(default_factory=list)
    next_checks: list[CheckResult] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    may_respond: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.may_respond.set()

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        del options, image, timeout_seconds
        self.submits.append(account.name)
        await self._respond()
        if self.next_submits:
            return self.next_submits.pop(0)
        self.count, self.money = max(self.count - 1, 0), self.money - (0 if self.count else PRICE)
        upstream_id = f"up-{len(self.submits)}"
        balance = Balance(self.count, self.money)
        return SubmitResult(outcome=SubmitOutcome.ACCEPTED, upstream_id=upstream_id, balance=balance)

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        del account
        self.checks.append(upstream_id)
        await self._respond()
        if self.next_checks:
            return self.next_checks.pop(0)
        artifacts = (Artifact(ArtifactName.IMAGE, f"http://upstream.test/{upstream_id}.png"),)
        balance = Balance(self.count, self.money)
        return CheckResult(outcome=CheckOutcome.SUCCEEDED, artifacts=artifacts, balance=balance)

    def queue_checks(self, *outcomes: CheckOutcome) -> None:
        self.next_checks += [CheckResult(outcome=outcome) for outcome in outcomes]

    async def _respond(self) -> None:
        if self.errors:
            raise self.errors.pop(0)
        await self.may_respond.wait()


@dataclass
class Receivers:
    """Webhook receivers; those at `silent_urls` never respond, the others as scripted, then with 204."""

    sent: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    responses: list[WebhookResponse | Exception] = field(default_factory=list)
    silent_urls: set[str] = field(default_factory=set)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        del webhook
        if url in self.silent_urls:
            await asyncio.Event().wait()
        response = self.responses.pop(0) if self.responses else WebhookResponse(status=204)
        if isinstance(response, Exception):
            raise response
        self.sent.append((url, headers, body))
        return response


class UseCases:
    """The use cases with tenant `shop` on the accounts `main` and `spare`."""

    def __init__(self, client: Any) -> None:
        self.client, self.keys, self.retention = client, Keys("gw"), RETENTION
        self.now_ms = START_MS
        scripts, self.faults = RedisScripts(client), Faults()
        self.store = RedisTaskStore(scripts, self.keys, self.retention)
        self.redis_ledger = RedisLedger(scripts, self.keys, self.retention)
        self.ledger: Any = FaultyPort(self.redis_ledger, self.faults)
        self.tasks: Any = FaultyPort(self.store, self.faults)
        self.queue = RedisDeliveryQueue(scripts, self.keys)
        self.deliveries: Any = FaultyPort(self.queue, self.faults)
        self.upstream, self.receivers = ScriptedUpstream(), Receivers()
        self.registry = CachedRegistry(RedisRegistry(scripts, self.keys))
        self.background, self.cache = TaskSupervisor(), TaskCache(DurationEstimator(2.5))
        keyring = Keyring([b"k" * 32])
        self.task_ids, self.cipher = TaskIdCodec(keyring.derive("task-id")), keyring.derive("webhook-secret")
        self.metrics = Metrics(CollectorRegistry())
        self._shared: dict[str, Any] = {
            "tasks": self.tasks,
            "ledger": self.ledger,
            "upstream": self.upstream,
            "registry": self.registry,
            "task_ids": self.task_ids,
        }
        settlements = SettlementQueue(self.ledger, self.background, self.registry)
        self.submitter = Submitter(
            settlements=settlements, supervisor=self.background, metrics=self.metrics, **self._shared
        )
        self.poller = TaskPoller(cache=self.cache, metrics=self.metrics, max_concurrent=2, **self._shared)
        self.refresher = BalanceRefresher(**self._shared)
        self.dispatcher = WebhookDispatcher(
            deliveries=self.deliveries,
            tasks=self.tasks,
            post_webhook=self.receivers.post,
            registry=self.registry,
            cipher=self.cipher,
            encode_task_event=encode_task_event,
            now=lambda: self.now_ms / 1000,
            metrics=self.metrics,
            max_concurrent=8,
            jitter=lambda: 0.0,
        )

        self.reporter = self.make_reporter()

    async def open(self) -> None:
        await self.client.flushall()
        await set_server_time(self.client, self.keys, self.now_ms)
        webhook = Webhook(secrets=WebhookSecrets(self.cipher.encrypt(b"s" * 32)))
        await self.change_registry(
            tenants=(Tenant(TENANT, "shop", ("main", "spare"), TenantPolicy(), webhook=webhook),),
            accounts=(Account(MAIN, "main", b"encrypted"), Account(SPARE, "spare", b"encrypted")),
        )

    @property
    def tenant(self) -> Tenant:
        return self.registry.current.tenants["shop"]

    async def change_registry(self, **changes: Any) -> None:
        version = await self.registry.store.read_version()
        assert await self.registry.store.write(RegistryChange(version=version, next_id=9, **changes))
        await self.registry.refresh()

    async def set_webhook(self, **changes: Any) -> None:
        tenant = self.tenant
        await self.change_registry(tenants=(replace(tenant, webhook=replace(tenant.webhook, **changes)),))

    async def advance(self, milliseconds: int) -> None:
        self.now_ms += milliseconds
        await set_server_time(self.client, self.keys, self.now_ms)

    async def set_limits(self, *limits: Limit) -> None:
        await self.change_registry(tenants=(replace(self.tenant, policy=TenantPolicy(limits)),))

    def make_reporter(self) -> ThresholdReporter:
        return ThresholdReporter(
            ledger=self.ledger,
            deliveries=self.deliveries,
            registry=self.registry,
            encode_event=encode_threshold_event,
        )

    def make_reader(self, *, interval: float) -> TaskReader:
        no_artifacts: Any = None
        return TaskReader(
            fetch_artifact=no_artifacts,
            cache=self.cache,
            now=lambda: self.now_ms / 1000,
            metrics=self.metrics,
            interval_seconds=interval,
            **self._shared,
        )

    async def submit(self) -> Submission:
        return await self.submitter.submit(self.tenant, FaceEnhanceOptions(), {"order": "17"}, IMAGE)

    async def submit_task(self, *, lost: bool = False) -> Task:
        """Submit a task; `lost` deletes it from the store."""
        task = (await self.submit()).task
        if lost:
            await self.lose_tasks()
        return task

    async def lose_tasks(self) -> None:
        """Lose all tasks and reservations, and the tenant's counters."""
        for pattern in ("task*", "reservation*", "poll*", "leases"):
            async for key in self.client.scan_iter("{gw}:" + pattern):
                await self.client.delete(key)
        await self.client.hdel(self.keys.tenant(TENANT), "state")

    async def poll(self, advance_ms: int | None = None) -> None:
        """Advance, by one check interval unless given, and run all checks that are due."""
        await self.advance(self.retention.check_interval_ms if advance_ms is None else advance_ms)
        while await self.poller.start_due():
            pass
        await self.poller.wait_idle()

    async def deliver(self, advance_ms: int = 0) -> None:
        """Advance, and send all webhooks that are due."""
        await self.advance(advance_ms)
        while await self.dispatcher.start_due():
            await self.dispatcher.wait_idle()

    async def stored(self, task: Task) -> Task | None:
        found = await self.store.get(task.reservation)
        return found[0] if found else None

    async def reservations(self) -> dict[str, Reservation]:
        prefix = self.keys.reservation("")
        names = [key.decode().removeprefix(prefix) async for key in self.client.scan_iter(prefix + "*")]
        found = {name: await self.redis_ledger.get_reservation(name) for name in names}
        return {name: item for name, item in found.items() if item}

    async def account(self, account: int = MAIN) -> AccountState:
        return (await self.redis_ledger.account_states([account]))[account]

    async def task_counts(self) -> tuple[int, int, int]:
        """Return used, reserved and active tasks of the tenant."""
        state = (await self.redis_ledger.tenant_snapshot(TENANT)).state
        counter = state.windows[Window.TOTAL]
        return counter.tasks, counter.tasks_reserved, state.active_tasks


@asynccontextmanager
async def open_use_cases(valkey: Valkey) -> AsyncIterator[UseCases]:
    """Open the use cases on an emptied server."""
    install_server_time()
    connections = connect(valkey.url, timeout=5)
    use_cases = UseCases(connections.commands)
    try:
        await use_cases.open()
        yield use_cases
        await use_cases.background.drain(0)
    finally:
        await connections.aclose()
