"""Prometheus metrics and their exposition."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum, StrEnum
from platform import python_version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.utils import floatToGoString

from service import __version__
from service.domain.ledger import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, policy_name, policy_names
from service.domain.tasks import Basis, Kind, State, Task
from service.domain.tenants import Registry, Tenant, Window
from service.domain.webhooks import DeliveryState
from service.telemetry.gauges import Level, Levels, Standing

# When a series began is in Prometheus already, and telling it makes every scrape half as large again.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library's own


BALANCE = "balance"
"""Stands for the policy that refused where none did, but no account could pay."""


POLICIES = (
    *(policy_name(window, counted) for window in Window for counted in (COUNTED_TASKS, COUNTED_MONEY)),
    MAX_ACTIVE,
    BALANCE,
)


ENDS = tuple(state for state in State if state.ended)


_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_HELD_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 600.0)


_UPSTREAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


_TASK_SECONDS = (2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0)


_LAG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


_BATCHES = (0, 1, 2, 4, 8, 16, 32, 64)


_AGES = (1.0, 5.0, 30.0, 60.0, 300.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0)


_LEDGER_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


_LOOP_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Port(StrEnum):
    """Whom a port serves."""

    TENANTS = "tenants"
    OPERATORS = "operators"


class Source(StrEnum):
    """Where a read of a task was answered from."""

    MEMORY = "memory"
    STORE = "store"
    UPSTREAM = "upstream"


class LedgerOutcome(StrEnum):
    """What became of a call of the store."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    FAULT = "fault"
    """A script failed: a fault of the gateway's own."""
    GIVEN_UP = "given-up"
    """Nobody waited for the answer any more."""


class StoreError(StrEnum):
    """What was wrong with the store."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    READONLY = "readonly"
    CLUSTER = "cluster"
    RESPONSE = "response"
    OTHER = "other"


def _values(enum: type[Enum]) -> str:
    """The values of an enumeration, for a text of help."""
    return ", ".join(str(each.value) for each in enum)


class Families:
    """The collectors of one process, on a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._of_requests()
        self._of_tasks()
        self._of_jobs()
        self.by_tenant: Sequence[MetricWrapperBase] = (
            self.submitted,
            self.finished,
            self.tenant_seconds,
            self.denied,
            self.spent_uses,
            self.spent_money,
        )
        self.by_account = (self.account_uses, self.account_money)
        self._prepare()

    def _of_requests(self) -> None:
        counter, histogram = self._counter, self._histogram
        route = ("port", "method", "route")
        self.requests = counter(
            "gateway_http_requests",
            f"Requests answered, by port ({_values(Port)}), method, template of the route and status;"
            " 499 if the client left before its answer.",
            *route,
            "status",
        )
        self.request_seconds = histogram(
            "gateway_http_request_duration_seconds",
            "How long requests took that were not held open, by port, method and template of the route.",
            _REQUEST_SECONDS,
            *route,
        )
        self.held_seconds = histogram(
            "gateway_http_held_duration_seconds",
            "How long requests were held open, as streams or to wait for the end of a task, by port, method and"
            " template of the route.",
            _HELD_SECONDS,
            *route,
        )
        call = ("operation", "outcome")
        self.upstream = counter(
            "gateway_upstream_requests", "Requests to the upstream, by operation and outcome.", *call
        )
        self.upstream_seconds = histogram(
            "gateway_upstream_request_duration_seconds",
            "How long requests to the upstream took, by operation and outcome.",
            _UPSTREAM_SECONDS,
            *call,
        )
        self.calls = counter(
            "gateway_ledger_calls",
            f"Calls of the store, by script (or plain reads) and outcome ({_values(LedgerOutcome)}).",
            "call",
            "outcome",
        )
        self.call_seconds = histogram(
            "gateway_ledger_call_duration_seconds",
            "How long calls of the store took, by script (or plain reads).",
            _LEDGER_SECONDS,
            "call",
        )
        self.store_errors = counter(
            "gateway_redis_errors", f"Errors of Redis or on the way to it ({_values(StoreError)}).", "error"
        )

    def _of_tasks(self) -> None:
        counter, kinds = self._counter, f"kind ({_values(Kind)})"
        self.submissions = counter(
            "gateway_submissions",
            f"Submissions that were sent or should have been, by {kinds} and outcome.",
            "kind",
            "outcome",
        )
        self.replays = counter(
            "gateway_idempotent_replays",
            "Submissions that were answered with what an earlier one under the same key became.",
        )
        self.submitted = counter("gateway_tasks_submitted", f"Tasks accepted, by tenant and {kinds}.", "tenant", "kind")
        self.finished = counter(
            "gateway_tasks_finished",
            f"Tasks that ended, by tenant, {kinds} and state ({', '.join(ENDS)}).",
            "tenant",
            "kind",
            "state",
        )
        self.task_seconds = self._histogram(
            "gateway_task_duration_seconds",
            f"How long tasks took from submit to end, by {kinds} and state.",
            _TASK_SECONDS,
            "kind",
            "state",
        )
        self.tenant_seconds = Summary(
            "gateway_tenant_task_duration_seconds",
            f"How long tasks took from submit to end, by tenant and {kinds}.",
            ("tenant", "kind"),
            registry=self._registry,
        )
        self.denied = counter(
            "gateway_quota_denials",
            f"Submissions refused, by tenant and the policy that refused ({', '.join(POLICIES)}).",
            "tenant",
            "policy",
        )
        self.spent_uses = counter(
            "gateway_spent_uses", f"Prepaid uses that ended tasks took, by tenant and {kinds}.", "tenant", "kind"
        )
        self.spent_money = counter(
            "gateway_spent_yuan", f"Money that ended tasks took, by tenant and {kinds}.", "tenant", "kind"
        )
        self.account_uses = counter(
            "gateway_account_spent_uses", "Prepaid uses that ended tasks took, by account.", "account"
        )
        self.account_money = counter(
            "gateway_account_spent_yuan", "Money that ended tasks took, by account.", "account"
        )
        self.receipts = counter(
            "gateway_receipts",
            f"Receipts of ended tasks, by {kinds} and how their cost is known ({_values(Basis)}).",
            "kind",
            "basis",
        )
        self.reads = counter(
            "gateway_task_reads", f"Reads of tasks, by where they were answered from ({_values(Source)}).", "source"
        )

    def _of_jobs(self) -> None:
        counter, histogram = self._counter, self._histogram
        self.expired = counter(
            "gateway_reservations_expired", "Submissions whose process died before it knew what became of them."
        )
        self.checks = counter(
            "gateway_watch_checks", "Checks of tasks at the upstream, by what was answered.", "answer"
        )
        self.lag = histogram("gateway_watch_lag_seconds", "How late checks began after they were due.", _LAG_SECONDS)
        self.batch = histogram("gateway_watch_batch_size", "How many checks were claimed in one call.", _BATCHES)
        self.deliveries = counter(
            "gateway_webhook_attempts",
            f"Attempts to tell of the end of a task, by where its delivery stands then ({_values(DeliveryState)}).",
            "state",
        )
        self.delivery_age = histogram(
            "gateway_webhook_age_seconds",
            "How long after the end of its task a delivery came to its own end, by state.",
            _AGES,
            "state",
        )
        self.loop = histogram(
            "gateway_event_loop_lag_seconds", "How late the process gets to what it wanted to do.", _LOOP_SECONDS
        )

    def _prepare(self) -> None:
        """Have what is known beforehand begin at zero: an increase would miss the first event otherwise."""
        for state in DeliveryState:
            self.deliveries.labels(state.value)
            if state is not DeliveryState.PENDING:
                self.delivery_age.labels(state.value)
        for source in Source:
            self.reads.labels(source.value)
        for error in StoreError:
            self.store_errors.labels(error.value)
        for kind in Kind:
            for end in ENDS:
                self.task_seconds.labels(kind.value, end.value)
            for basis in Basis:
                self.receipts.labels(kind.value, basis.value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self._registry)


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


_SUFFIXES = {"counter": "_total", "info": "_info"}


_TYPES = {"info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram", "unknown": "untyped"}


def text(registry: CollectorRegistry) -> bytes:
    """Everything on a registry."""
    return "".join(line for metric in registry.collect() for line in _lines(metric)).encode()


def _lines(metric: Metric) -> Iterator[str]:
    name = metric.name + _SUFFIXES.get(metric.type, "")
    documentation = metric.documentation.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {name} {documentation}\n# TYPE {name} {_TYPES.get(metric.type, metric.type)}\n"
    for sample in metric.samples:
        labels = ""
        if sample.labels:
            labels = (
                "{" + ",".join([f'{label}="{_escaped(sample.labels[label])}"' for label in sorted(sample.labels)]) + "}"
            )
        value = floatToGoString(sample.value)  # type: ignore[no-untyped-call] # the library's own
        yield f"{sample.name}{labels} {value}\n"


def _escaped(value: str) -> str:
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


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
        return text(self.registry), CONTENT_TYPE


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


INTERVAL = 1.0


class LoopLag:
    """Measures it once a second: a sample that is seldom but by nothing else than the clock."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + INTERVAL
            await asyncio.sleep(INTERVAL)
            self._metrics.loop_lag(max(loop.time() - due, 0.0))
