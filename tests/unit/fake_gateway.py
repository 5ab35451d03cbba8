"""The use cases over in-memory ports with injected failures."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from service.crypto import Keyring, TaskIdCodec
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountStatus, Verdict, WindowCounter
from service.domain.tasks import FaceEnhanceOptions, Options, Task
from service.domain.tenants import Account, AccountPolicy, Registry, Tenant, TenantPolicy, Window
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor
from service.usecases.poller import TaskPoller
from service.usecases.ports import (
    CheckResult,
    ClaimedCheck,
    Image,
    ReserveRequest,
    Settlement,
    SubmitResult,
    TenantSnapshot,
)
from service.usecases.settlement import SettlementQueue
from service.usecases.submit import Submission, Submitter
from service.usecases.task_status import TaskReader
from tests.fakes import FakeLedger, FakeRegistry, FakeUpstream
from tests.fakes.artifacts import FakeArtifacts

UNAVAILABLE = LedgerUnavailable("away", retry_after=1)
IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
ACCOUNTS: Mapping[str, Account] = {
    name: Account(number, name, b"encrypted", None, AccountPolicy()) for number, name in ((2, "main"), (3, "spare"))
}


async def wait_until(condition: Callable[[], bool]) -> None:
    """Yield to the event loop until a condition holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@dataclass
class FaultyLedger(FakeLedger):
    """A ledger whose calls fail once each: before they run, or afterwards."""

    errors_before: dict[str, list[BaseException]] = field(default_factory=dict)
    errors_after: dict[str, list[BaseException]] = field(default_factory=dict)

    @asynccontextmanager
    async def _inject_errors(self, call: str) -> AsyncIterator[None]:
        if self.errors_before.get(call):
            raise self.errors_before[call].pop(0)
        yield
        if self.errors_after.get(call):
            raise self.errors_after[call].pop(0)

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        async with self._inject_errors("reserve"):
            return await super().reserve(request)

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
        async with self._inject_errors("change_account"):
            return await super().change_account(request, previous, account_status)

    async def settle(self, settlement: Settlement) -> bool:
        async with self._inject_errors("settle"):
            return await super().settle(settlement)

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        async with self._inject_errors("settle_expired"):
            return await super().settle_expired(limit)

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        async with self._inject_errors("claim_checks"):
            return await super().claim_checks(limit)

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        async with self._inject_errors("record_check"):
            return await super().record_check(claimed, result)


@dataclass
class SlowUpstream(FakeUpstream):
    """Responds when `may_respond` is set; `errors` are raised instead of responses."""

    may_respond: asyncio.Event = field(default_factory=asyncio.Event)
    errors: list[Exception] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.may_respond.set()

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        self.timeouts.append(timeout_seconds)
        result = await super().submit(account, options, image, timeout_seconds=timeout_seconds)
        if self.errors:
            raise self.errors.pop(0)
        await self.may_respond.wait()
        return result

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        result = await super().check(account, upstream_id)
        if self.errors:
            raise self.errors.pop(0)
        await self.may_respond.wait()
        return result


class FakeGateway:
    """The use cases with one tenant and two accounts."""

    def __init__(self, policy: TenantPolicy | None = None) -> None:
        self.ledger, self.upstream, self.background = FaultyLedger(), SlowUpstream(), TaskSupervisor()
        self.tenant = Tenant(id=1, name="shop", accounts=("main", "spare"), policy=policy or TenantPolicy())
        registry = Registry(version=1, next_id=4, tenants={"shop": self.tenant}, accounts=dict(ACCOUNTS), tokens={})
        self.registry = FakeRegistry(self.ledger, registry)
        self.ledger.tenant_policies[1] = self.tenant.policy
        self.ledger.account_policies |= {account.id: account.policy for account in ACCOUNTS.values()}
        self.task_ids = TaskIdCodec(Keyring([b"k" * 32]).derive("task-id"))
        self.metrics = metrics = Metrics(CollectorRegistry())
        metrics.label_names.read_registry = lambda: self.registry.current
        self.submitter = Submitter(
            ledger=self.ledger,
            settlements=SettlementQueue(self.ledger, self.background, self.registry),
            tasks=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
            supervisor=self.background,
            metrics=metrics,
        )
        self.poller = TaskPoller(
            tasks=self.ledger,
            ledger=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
            cache=self.ledger.cache,
            metrics=metrics,
            max_concurrent=2,
        )

    def make_reader(self, *, interval: float) -> TaskReader:
        return TaskReader(
            tasks=self.ledger,
            ledger=self.ledger,
            upstream=self.upstream,
            fetch_artifact=FakeArtifacts().fetch,
            registry=self.registry,
            task_ids=self.task_ids,
            cache=self.ledger.cache,
            now=self.ledger.clock.now,
            metrics=self.metrics,
            interval_seconds=interval,
        )

    async def submit_image(self) -> Submission:
        return await self.submitter.submit(self.tenant, FaceEnhanceOptions(), {"order": "17"}, IMAGE)

    def remove_accounts(self) -> None:
        self.registry.current = Registry(tenants=self.registry.current.tenants)

    @property
    def month_counter(self) -> WindowCounter:
        return self.ledger.tenants[1].windows[Window.MONTH]

    @property
    def task_counts(self) -> tuple[int, int, int]:
        """Used, reserved and active tasks of the tenant."""
        return self.month_counter.tasks, self.month_counter.tasks_reserved, self.ledger.tenants[1].active_tasks
