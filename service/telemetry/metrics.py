"""Every metric of the gateway, in the words of those who report to it.

Label values come from enums, from the templates of routes, and from the names of policies, tenants and accounts, never
from what a client sent, so that their number is bounded. Durations are in seconds, money is in yuan.

What a process counts itself (`service.telemetry.families`) adds up over all processes. What it has just now is shown
by `levels`, and what it shows of the ledger by `standing`: that is the same in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from platform import python_version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

from service import __version__
from service.domain.ledger import policy_names
from service.domain.tasks import Kind, Task
from service.domain.tenants import Registry, Tenant
from service.domain.webhooks import DeliveryState
from service.telemetry import exposition
from service.telemetry.families import BALANCE, ENDS, Families, LedgerOutcome, Port, Source, StoreError
from service.telemetry.levels import Level, Levels
from service.telemetry.standing import Standing

OTHER = "other"
"""Stands for a method that is not known, and for all tenants beyond those that have metrics of their own."""
UNMATCHED = "unmatched"
"""Stands for the route of a request that fits none."""
MOST_TENANTS = 200
"""So many tenants have metrics of their own, unless the settings say otherwise."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FAULTS = (500, 502, 503, 504)


class Metrics:
    """The metrics of one process, on a registry of its own."""

    def __init__(
        self, registry: CollectorRegistry, *, version: str = __version__, most_tenants: int = MOST_TENANTS
    ) -> None:
        self.registry = registry
        self.levels = Levels()
        self.standing = Standing()
        self._families = Families(registry)
        self._named = _Named(self._families, most_tenants)
        self._under_way = dict.fromkeys(Port, 0)
        self.levels.tell(Level.IN_PROGRESS, lambda: {(port.value,): n for port, n in self._under_way.items()})
        registry.register(self.levels)
        registry.register(self.standing)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        build = Gauge("gateway_build_info", "What runs; always 1.", ("version", "python"), registry=registry)
        build.labels(version, python_version()).set(1)
        # Looking a child up by its labels costs more than counting, and these are counted for every request.
        self._request_children: dict[tuple[Port, str, str, int, bool], tuple[Counter, Histogram]] = {}
        self._call_children: dict[tuple[str, LedgerOutcome], tuple[Counter, Histogram]] = {}

    def expect_routes(self, port: Port, routes: Iterable[tuple[str, str]]) -> None:
        """Begin the faults of these routes (method and template) at zero, so that a rate of them is never missing."""
        for method, route in routes:
            for status in _FAULTS:
                self._families.requests.labels(port.value, method, route, str(status))

    def expect_calls(self, operations: Mapping[StrEnum, type[StrEnum]]) -> None:
        """Begin the outcomes of these operations of the upstream at zero."""
        for operation, outcomes in operations.items():
            for outcome in outcomes:
                self._families.upstream.labels(operation.value, outcome.value)

    def expect_submissions(self, outcomes: type[StrEnum], answers: type[StrEnum]) -> None:
        """Begin these outcomes of submissions, and these answers to checks, at zero."""
        for outcome in outcomes:
            for kind in Kind:
                self._families.submissions.labels(kind.value, outcome.value)
        for answer in answers:
            self._families.checks.labels(answer.value)

    def expect_scripts(self, names: Iterable[str]) -> None:
        """Begin the outcomes of these calls of the store at zero."""
        for name in names:
            for outcome in LedgerOutcome:
                self._families.calls.labels(name, outcome.value)

    def name_tenants(self, registry: Callable[[], Registry]) -> None:
        """Take the names of tenants and accounts from here."""
        self._named.registry = registry

    def tenant(self, tenant_id: int) -> str:
        """The name under which a tenant is counted."""
        return self._named.tenant(tenant_id)

    @contextmanager
    def in_progress(self, port: Port) -> Iterator[None]:
        """Count a request as under way within the block."""
        self._under_way[port] += 1
        try:
            yield
        finally:
            self._under_way[port] -= 1

    def request(self, port: Port, method: str, route: str, status: int, seconds: float, *, held: bool = False) -> None:
        """A request ended; `route` is the template of its route, or UNMATCHED; it was `held` open on purpose or not."""
        key = port, method if method in _METHODS else OTHER, route, status, held
        children = self._request_children.get(key)
        if children is None:
            timed = self._families.held_seconds if held else self._families.request_seconds
            children = self._request_children[key] = (
                self._families.requests.labels(port.value, key[1], route, str(status)),
                timed.labels(port.value, key[1], route),
            )
        children[0].inc()
        children[1].observe(seconds)

    def upstream(self, operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        """A request to the upstream ended, in whatever way."""
        self._families.upstream.labels(operation.value, outcome.value).inc()
        self._families.upstream_seconds.labels(operation.value, outcome.value).observe(seconds)

    def ledger(self, call: str, outcome: LedgerOutcome, seconds: float) -> None:
        """A call of the store ended: a script by its name, or plain reads."""
        children = self._call_children.get((call, outcome))
        if children is None:
            children = self._call_children[call, outcome] = (
                self._families.calls.labels(call, outcome.value),
                self._families.call_seconds.labels(call),
            )
        children[0].inc()
        children[1].observe(seconds)

    def store_error(self, error: StoreError) -> None:
        """Redis failed, or the way to it."""
        self._families.store_errors.labels(error.value).inc()

    def submission(self, kind: Kind, outcome: StrEnum) -> None:
        """A submission that had its place was sent, or could not be."""
        self._families.submissions.labels(kind.value, outcome.value).inc()

    def submitted(self, tenant: int, kind: Kind) -> None:
        """A submission became a task."""
        self._families.submitted.labels(self.tenant(tenant), kind.value).inc()

    def denied(self, tenant: int, policy: str) -> None:
        """A policy of a tenant refused a submission."""
        self._families.denied.labels(self.tenant(tenant), policy).inc()

    def unpaid(self, tenant: int) -> None:
        """No account could pay for a submission."""
        self.denied(tenant, BALANCE)

    def finished(self, task: Task) -> None:
        """A task ended, and took what its receipt says."""
        families, tenant, kind = self._families, self.tenant(task.tenant), task.kind.value
        seconds = (task.updated - task.created) / 1000
        families.finished.labels(tenant, kind, task.state.value).inc()
        families.task_seconds.labels(kind, task.state.value).observe(seconds)
        families.tenant_seconds.labels(tenant, kind).observe(seconds)
        families.receipts.labels(kind, task.cost.basis.value).inc()
        families.spent_uses.labels(tenant, kind).inc(task.cost.count)
        families.spent_money.labels(tenant, kind).inc(task.cost.money / 100)
        account = self._named.account(task.account)
        if account:
            families.account_uses.labels(account).inc(task.cost.count)
            families.account_money.labels(account).inc(task.cost.money / 100)

    def read(self, source: Source) -> None:
        """A task was read."""
        self._families.reads.labels(source.value).inc()

    def replayed(self) -> None:
        """A submission was answered with what an earlier one under the same idempotency key became."""
        self._families.replays.inc()

    def expired(self, count: int) -> None:
        """So many submissions were given up whose process had died."""
        self._families.expired.inc(count)

    def claimed(self, lags: Iterable[float]) -> None:
        """Checks were claimed; `lags` tells for each how many seconds it was late."""
        batch = 0
        for lag in lags:
            self._families.lag.observe(lag)
            batch += 1
        self._families.batch.observe(batch)

    def checked(self, answered: StrEnum) -> None:
        """The watch asked the upstream about a task."""
        self._families.checks.labels(answered.value).inc()

    def delivered(self, state: DeliveryState, age: float) -> None:
        """An attempt to tell a tenant of an end left its delivery in a state, `age` seconds after that end."""
        self._families.deliveries.labels(state.value).inc()
        if state is not DeliveryState.PENDING:
            self._families.delivery_age.labels(state.value).observe(age)

    def loop_lag(self, seconds: float) -> None:
        """The process got to something so late."""
        self._families.loop.observe(seconds)

    def refresh(self) -> None:
        """Have the metrics of new tenants and accounts begin at zero, and let go of those that are gone."""
        self._named.refresh()

    def render(self) -> tuple[bytes, str]:
        """Everything on the registry, in Prometheus' text format, and the content type of that; from any thread."""
        return exposition.text(self.registry), exposition.CONTENT_TYPE


class _Named:
    """The tenants and accounts that have metrics of their own.

    Tenants are taken in the order in which they were made, so that every process names the same ones. Those that are
    gone lose their metrics: with them, the number of names would only grow.
    """

    def __init__(self, families: Families, most_tenants: int) -> None:
        self.registry: Callable[[], Registry] = Registry
        self._families = families
        self._most_tenants = most_tenants
        self._known: Registry | None = None
        self._tenants: Mapping[int, str] = {}
        self._accounts: Mapping[int, str] = {}

    def tenant(self, tenant_id: int) -> str:
        self.refresh()
        return self._tenants.get(tenant_id, OTHER)

    def account(self, account_id: int) -> str | None:
        self.refresh()
        return self._accounts.get(account_id)

    def refresh(self) -> None:
        """Name the tenants and accounts that there are now, and have their metrics begin at zero."""
        registry = self.registry()
        if registry is self._known:
            return
        oldest = sorted(registry.tenants.values(), key=lambda tenant: tenant.id)[: self._most_tenants]
        before = {"tenant": set(self._tenants.values()), "account": set(self._accounts.values())}
        self._known = registry
        self._tenants = {tenant.id: tenant.name for tenant in oldest}
        self._accounts = {account.id: account.name for account in registry.accounts.values()}
        for name in before["tenant"] - set(self._tenants.values()):
            for family in self._families.by_tenant:
                family.remove_by_labels({"tenant": name})
        for name in before["account"] - set(self._accounts.values()):
            for family in self._families.by_account:
                family.remove_by_labels({"account": name})
        for tenant in oldest:
            self._prepare(tenant)
        for name in self._accounts.values():
            for family in self._families.by_account:
                family.labels(name)

    def _prepare(self, tenant: Tenant) -> None:
        families = self._families
        for policy in (*policy_names(tenant.policy), BALANCE):
            families.denied.labels(tenant.name, policy)
        for kind in filter(tenant.may_submit, Kind):
            for family in (families.submitted, families.spent_uses, families.spent_money):
                family.labels(tenant.name, kind.value)
            for end in ENDS:
                families.finished.labels(tenant.name, kind.value, end.value)
