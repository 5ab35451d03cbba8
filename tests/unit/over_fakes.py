"""The use cases over the ports in memory, whose calls can be made to fail in every way a call can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from service.crypto import Keyring
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import Status, Verdict, WindowCounter
from service.domain.tasks import FaceEnhanceOptions, Options, Task, TaskIds
from service.domain.tenants import Account, AccountPolicy, Registry, Tenant, TenantPolicy, Window
from service.telemetry.metrics import Metrics
from service.usecases.background import Background
from service.usecases.poller import Watch
from service.usecases.ports import Ask, Check, Due, Image, Settlement, Snapshot, Submitted
from service.usecases.settlement import Settle
from service.usecases.submit import Submission, Submit
from service.usecases.task_status import Follow
from tests.fakes import FakeLedger, FakeRegistry, FakeUpstream

AWAY = LedgerUnavailable("away", retry_after=1)
IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
ACCOUNTS: Mapping[str, Account] = {
    name: Account(number, name, b"sealed", None, AccountPolicy()) for number, name in ((2, "main"), (3, "spare"))
}


async def until(condition: Callable[[], bool]) -> None:
    """Let everything else run until something holds."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@dataclass
class FaultyLedger(FakeLedger):
    """Calls fail as told, each once: before they were carried out, or after, so that only the answer is lost."""

    before: dict[str, list[BaseException]] = field(default_factory=dict)
    after: dict[str, list[BaseException]] = field(default_factory=dict)

    @asynccontextmanager
    async def _fails(self, call: str) -> AsyncIterator[None]:
        if self.before.get(call):
            raise self.before[call].pop(0)
        yield
        if self.after.get(call):
            raise self.after[call].pop(0)

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        async with self._fails("reserve"):
            return await super().reserve(ask)

    async def retarget(self, ask: Ask, left: int, closes: Status | None) -> Verdict:
        async with self._fails("retarget"):
            return await super().retarget(ask, left, closes)

    async def settle(self, settlement: Settlement) -> bool:
        async with self._fails("settle"):
            return await super().settle(settlement)

    async def expire(self, most: int) -> Sequence[Settlement]:
        async with self._fails("expire"):
            return await super().expire(most)

    async def claim(self, most: int) -> Sequence[Due]:
        async with self._fails("claim"):
            return await super().claim(most)

    async def record(self, due: Due, check: Check) -> tuple[Task, int] | None:
        async with self._fails("record"):
            return await super().record(due, check)


@dataclass
class SlowUpstream(FakeUpstream):
    """Answers when `go` is set, if at all; `faults` are raised instead of answers, as only a fault of ours would."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    faults: list[Exception] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.go.set()

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        self.seconds.append(seconds)
        answer = await super().submit(account, options, image, seconds=seconds)
        if self.faults:
            raise self.faults.pop(0)
        await self.go.wait()
        return answer

    async def check(self, account: Account, upstream_id: str) -> Check:
        answer = await super().check(account, upstream_id)
        if self.faults:
            raise self.faults.pop(0)
        await self.go.wait()
        return answer


class Gateway:
    """The use cases with a tenant that has two accounts."""

    def __init__(self, policy: TenantPolicy | None = None) -> None:
        self.ledger, self.upstream, self.background = FaultyLedger(), SlowUpstream(), Background()
        self.tenant = Tenant(id=1, name="shop", accounts=("main", "spare"), policy=policy or TenantPolicy())
        known = Registry(version=1, next_id=4, tenants={"shop": self.tenant}, accounts=dict(ACCOUNTS), tokens={})
        self.registry = FakeRegistry(self.ledger, known)
        self.ledger.tenant_policies[1] = self.tenant.policy
        self.ledger.account_policies |= {each.id: each.policy for each in ACCOUNTS.values()}
        self.task_ids = TaskIds(Keyring([b"k" * 32]).purpose("task-id"))
        self.metrics = metrics = Metrics(CollectorRegistry())
        metrics.name_tenants(lambda: self.registry.current)
        self.submit = Submit(
            ledger=self.ledger,
            settle=Settle(self.ledger, self.background, self.registry),
            tasks=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
            background=self.background,
            metrics=metrics,
        )
        self.watch = Watch(
            tasks=self.ledger,
            ledger=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
            board=self.ledger.board,
            metrics=metrics,
            at_once=2,
        )

    def follow(self, *, interval: float) -> Follow:
        """Reads of a process that begins."""
        return Follow(
            tasks=self.ledger,
            ledger=self.ledger,
            upstream=self.upstream,
            registry=self.registry,
            task_ids=self.task_ids,
            board=self.ledger.board,
            clock=self.ledger.clock,
            metrics=self.metrics,
            interval=interval,
        )

    async def submitted(self) -> Submission:
        """Submit an image."""
        return await self.submit(self.tenant, FaceEnhanceOptions(), {"order": "17"}, IMAGE)

    def forget_accounts(self) -> None:
        """Take all accounts out of the registry."""
        self.registry.current = Registry(tenants=self.registry.current.tenants)

    @property
    def counter(self) -> WindowCounter:
        """What the tenant has used and holds of the current month."""
        return self.ledger.tenants[1].windows[Window.MONTH]

    @property
    def places(self) -> tuple[int, int, int]:
        """The tenant's used and reserved tasks, and the active ones."""
        return self.counter.tasks, self.counter.tasks_reserved, self.ledger.tenants[1].active
