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
from service.domain.ledger import MAX_ACTIVE_POLICY, UNIT_MONEY, UNIT_TASKS, policy_name, policy_names
from service.domain.tasks import CostBasis, Kind, State, Task
from service.domain.tenants import Registry, Tenant, Window
from service.domain.webhooks import DeliveryState
from service.telemetry.gauges import GaugeCollector, GaugeName, LedgerCollector

# When a series began is in Prometheus already, and telling it makes every scrape half as large again.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library's own


POLICIES = (
    *(policy_name(window, counted) for window in Window for counted in (UNIT_TASKS, UNIT_MONEY)),
    MAX_ACTIVE_POLICY,
)


FINAL_STATES = tuple(state for state in State if state.is_final)


_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_STREAM_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 600.0)


_UPSTREAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


_TASK_SECONDS = (2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1_800.0, 3_600.0)


_LAG_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


_BATCH_SIZES = (0, 1, 2, 4, 8, 16, 32, 64)


_AGE_SECONDS = (1.0, 5.0, 30.0, 60.0, 300.0, 1_800.0, 3_600.0, 21_600.0, 86_400.0)


_REDIS_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0)


_LOOP_LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)


class Port(StrEnum):
    """Whom a port serves."""

    TENANTS = "tenants"
    OPERATORS = "operators"


class ReadSource(StrEnum):
    """Where a read of a task was answered from."""

    MEMORY = "memory"
    STORE = "store"
    UPSTREAM = "upstream"


class RedisOutcome(StrEnum):
    """What became of a call of the store."""

    OK = "ok"
    UNAVAILABLE = "unavailable"
    ERROR = "fault"
    """A script failed: a fault of the gateway's own."""
    CANCELLED = "abandoned"
    """Nobody waited for the answer any more."""


class RedisErrorKind(StrEnum):
    """What was wrong with the store."""

    CONNECTION = "connection"
    TIMEOUT = "timeout"
    READONLY = "readonly"
    CLUSTER = "cluster"
    RESPONSE = "response"
    OTHER = "other"


def _join_values(enum: type[Enum]) -> str:
    """The values of an enumeration, for a text of help."""
    return ", ".join(str(each.value) for each in enum)


class MetricFamilies:
    """The collectors of one process, on a registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._create_request_metrics()
        self._create_task_metrics()
        self._create_job_metrics()
        self.tenant_families: Sequence[MetricWrapperBase] = (
            self.tasks_submitted,
            self.tasks_finished,
            self.tenant_task_duration,
            self.quota_denials,
            self.balance_denials,
            self.spent_uses,
            self.spent_yuan,
        )
        self.account_families = (self.account_spent_uses, self.account_spent_yuan)
        self._preregister_labels()

    def _create_request_metrics(self) -> None:
        counter, histogram = self._create_counter, self._create_histogram
        route = ("port", "method", "route")
        self.http_requests = counter(
            "gateway_http_requests",
            f"Requests answered, by port ({_join_values(Port)}), method, template of the route and status;"
            " 499 if the client left before its answer.",
            *route,
            "status",
        )
        self.http_request_duration = histogram(
            "gateway_http_request_duration_seconds",
            "How long requests took that were not held open, by port, method and template of the route.",
            _REQUEST_SECONDS,
            *route,
        )
        self.http_stream_duration = histogram(
            "gateway_http_stream_duration_seconds",
            "How long requests were held open, as streams or to wait for the end of a task, by port, method and"
            " template of the route.",
            _STREAM_SECONDS,
            *route,
        )
        call = ("operation", "outcome")
        self.upstream_requests = counter(
            "gateway_upstream_requests", "Requests to the upstream, by operation and outcome.", *call
        )
        self.upstream_request_duration = histogram(
            "gateway_upstream_request_duration_seconds",
            "How long requests to the upstream took, by operation and outcome.",
            _UPSTREAM_SECONDS,
            *call,
        )
        self.redis_calls = counter(
            "gateway_redis_calls",
            f"Calls of the store, by script (or plain reads) and outcome ({_join_values(RedisOutcome)}).",
            "command",
            "outcome",
        )
        self.redis_call_duration = histogram(
            "gateway_redis_call_duration_seconds",
            "How long calls of the store took, by script (or plain reads).",
            _REDIS_SECONDS,
            "command",
        )
        self.redis_errors = counter(
            "gateway_redis_errors", f"Errors of Redis or on the way to it ({_join_values(RedisErrorKind)}).", "error"
        )

    def _create_task_metrics(self) -> None:
        counter, kinds = self._create_counter, f"kind ({_join_values(Kind)})"
        self.submissions = counter(
            "gateway_submissions",
            f"Submissions that were sent or should have been, by {kinds} and outcome.",
            "kind",
            "outcome",
        )
        self.idempotent_replays = counter(
            "gateway_idempotent_replays",
            "Submissions that were answered with what an earlier one under the same key became.",
        )
        self.tasks_submitted = counter(
            "gateway_tasks_submitted", f"Tasks accepted, by tenant and {kinds}.", "tenant", "kind"
        )
        self.tasks_finished = counter(
            "gateway_tasks_finished",
            f"Tasks that ended, by tenant, {kinds} and state ({', '.join(FINAL_STATES)}).",
            "tenant",
            "kind",
            "state",
        )
        self.task_duration = self._create_histogram(
            "gateway_task_duration_seconds",
            f"How long tasks took from submit to end, by {kinds} and state.",
            _TASK_SECONDS,
            "kind",
            "state",
        )
        self.tenant_task_duration = Summary(
            "gateway_tenant_task_duration_seconds",
            f"How long tasks took from submit to end, by tenant and {kinds}.",
            ("tenant", "kind"),
            registry=self._registry,
        )
        self.quota_denials = counter(
            "gateway_quota_denials",
            f"Submissions refused, by tenant and the policy that refused ({', '.join(POLICIES)}).",
            "tenant",
            "policy",
        )
        self.balance_denials = counter(
            "gateway_balance_denials", "Submissions refused since no account could pay, by tenant.", "tenant"
        )
        self.spent_uses = counter(
            "gateway_spent_uses", f"Prepaid uses that ended tasks took, by tenant and {kinds}.", "tenant", "kind"
        )
        self.spent_yuan = counter(
            "gateway_spent_yuan", f"Money that ended tasks took, by tenant and {kinds}.", "tenant", "kind"
        )
        self.account_spent_uses = counter(
            "gateway_account_spent_uses", "Prepaid uses that ended tasks took, by account.", "account"
        )
        self.account_spent_yuan = counter(
            "gateway_account_spent_yuan", "Money that ended tasks took, by account.", "account"
        )
        self.task_costs = counter(
            "gateway_task_costs",
            f"Receipts of ended tasks, by {kinds} and how their cost is known ({_join_values(CostBasis)}).",
            "kind",
            "basis",
        )
        self.task_reads = counter(
            "gateway_task_reads",
            f"Reads of tasks, by where they were answered from ({_join_values(ReadSource)}).",
            "source",
        )

    def _create_job_metrics(self) -> None:
        counter, histogram = self._create_counter, self._create_histogram
        self.reservations_expired = counter(
            "gateway_reservations_expired", "Submissions whose process died before it knew what became of them."
        )
        self.poll_checks = counter(
            "gateway_poll_checks", "Checks of tasks at the upstream, by what was answered.", "outcome"
        )
        self.poll_lag = histogram(
            "gateway_poll_lag_seconds", "How late checks began after they were due.", _LAG_SECONDS
        )
        self.poll_batch_size = histogram(
            "gateway_poll_batch_size", "How many checks were claimed in one call.", _BATCH_SIZES
        )
        self.webhook_attempts = counter(
            "gateway_webhook_attempts",
            f"Attempts to deliver a webhook, by the state of the delivery after it ({_join_values(DeliveryState)}).",
            "state",
        )
        self.webhook_age = histogram(
            "gateway_webhook_age_seconds",
            "How long after the end of its task a delivery came to its own end, by state.",
            _AGE_SECONDS,
            "state",
        )
        self.event_loop_lag = histogram(
            "gateway_event_loop_lag_seconds", "How late the process gets to what it wanted to do.", _LOOP_LAG_SECONDS
        )

    def _preregister_labels(self) -> None:
        """Have what is known beforehand begin at zero: an increase would miss the first event otherwise."""
        for state in DeliveryState:
            self.webhook_attempts.labels(state.value)
            if state is not DeliveryState.PENDING:
                self.webhook_age.labels(state.value)
        for source in ReadSource:
            self.task_reads.labels(source.value)
        for error in RedisErrorKind:
            self.redis_errors.labels(error.value)
        for kind in Kind:
            for end in FINAL_STATES:
                self.task_duration.labels(kind.value, end.value)
            for basis in CostBasis:
                self.task_costs.labels(kind.value, basis.value)

    def _create_counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _create_histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self._registry)


CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


_NAME_SUFFIXES = {"counter": "_total", "info": "_info"}


_TEXT_TYPES = {"info": "gauge", "stateset": "gauge", "gaugehistogram": "histogram", "unknown": "untyped"}


def format_exposition(registry: CollectorRegistry) -> bytes:
    """Everything on a registry."""
    return "".join(line for metric in registry.collect() for line in _format_metric(metric)).encode()


def _format_metric(metric: Metric) -> Iterator[str]:
    name = metric.name + _NAME_SUFFIXES.get(metric.type, "")
    documentation = metric.documentation.replace("\\", r"\\").replace("\n", r"\n")
    yield f"# HELP {name} {documentation}\n# TYPE {name} {_TEXT_TYPES.get(metric.type, metric.type)}\n"
    for sample in metric.samples:
        labels = ""
        if sample.labels:
            labels = (
                "{"
                + ",".join([f'{label}="{_escape_label(sample.labels[label])}"' for label in sorted(sample.labels)])
                + "}"
            )
        value = floatToGoString(sample.value)  # type: ignore[no-untyped-call] # the library's own
        yield f"{sample.name}{labels} {value}\n"


def _escape_label(value: str) -> str:
    if "\\" in value or '"' in value or "\n" in value:
        return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return value


OTHER_LABEL = "other"
"""Stands for a method that is not known, and for all tenants beyond those that have metrics of their own."""


UNMATCHED_ROUTE = "unmatched"
"""Stands for the route of a request that fits none."""


MAX_NAMED_TENANTS = 200
"""So many tenants have metrics of their own, unless the settings say otherwise."""


_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


_SERVER_ERRORS = (500, 502, 503, 504)


class Metrics:
    """The metrics of one process, on a registry of its own."""

    def __init__(
        self, registry: CollectorRegistry, *, version: str = __version__, max_named_tenants: int = MAX_NAMED_TENANTS
    ) -> None:
        self.registry = registry
        self.gauges = GaugeCollector()
        self.ledger_collector = LedgerCollector()
        self._families = MetricFamilies(registry)
        self._label_names = _LabelNames(self._families, max_named_tenants)
        self._requests_in_progress = dict.fromkeys(Port, 0)
        self.gauges.register(
            GaugeName.REQUESTS_IN_PROGRESS, lambda: {(port.value,): n for port, n in self._requests_in_progress.items()}
        )
        registry.register(self.gauges)
        registry.register(self.ledger_collector)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        build = Gauge("gateway_build_info", "What runs; always 1.", ("version", "python"), registry=registry)
        build.labels(version, python_version()).set(1)
        # Looking a child up by its labels costs more than counting, and these are counted for every request.
        self._request_children: dict[tuple[Port, str, str, int, bool], tuple[Counter, Histogram]] = {}
        self._call_children: dict[tuple[str, RedisOutcome], tuple[Counter, Histogram]] = {}

    def preregister_routes(self, port: Port, routes: Iterable[tuple[str, str]]) -> None:
        """Begin the faults of these routes (method and template) at zero, so that a rate of them is never missing."""
        for method, route in routes:
            for status in _SERVER_ERRORS:
                self._families.http_requests.labels(port.value, method, route, str(status))

    def preregister_upstream_calls(self, operations: Mapping[StrEnum, type[StrEnum]]) -> None:
        """Begin the outcomes of these operations of the upstream at zero."""
        for operation, outcomes in operations.items():
            for outcome in outcomes:
                self._families.upstream_requests.labels(operation.value, outcome.value)

    def preregister_submissions(self, outcomes: type[StrEnum], check_outcomes: type[StrEnum]) -> None:
        """Begin these outcomes of submissions, and these answers to checks, at zero."""
        for outcome in outcomes:
            for kind in Kind:
                self._families.submissions.labels(kind.value, outcome.value)
        for answer in check_outcomes:
            self._families.poll_checks.labels(answer.value)

    def preregister_scripts(self, names: Iterable[str]) -> None:
        """Begin the outcomes of these calls of the store at zero."""
        for name in names:
            for outcome in RedisOutcome:
                self._families.redis_calls.labels(name, outcome.value)

    def set_registry_source(self, read_registry: Callable[[], Registry]) -> None:
        """Take the names of tenants and accounts from here."""
        self._label_names.read_registry = read_registry

    def tenant_label(self, tenant_id: int) -> str:
        """The name under which a tenant is counted."""
        return self._label_names.tenant_label(tenant_id)

    @contextmanager
    def track_request(self, port: Port) -> Iterator[None]:
        """Count a request as under way within the block."""
        self._requests_in_progress[port] += 1
        try:
            yield
        finally:
            self._requests_in_progress[port] -= 1

    def record_request(
        self, port: Port, method: str, route: str, status: int, seconds: float, *, is_stream: bool = False
    ) -> None:
        """A request ended; `route` is the template of its route, or UNMATCHED; it was `held` open on purpose or not."""
        key = port, method if method in _KNOWN_METHODS else OTHER_LABEL, route, status, is_stream
        children = self._request_children.get(key)
        if children is None:
            timed = self._families.http_stream_duration if is_stream else self._families.http_request_duration
            children = self._request_children[key] = (
                self._families.http_requests.labels(port.value, key[1], route, str(status)),
                timed.labels(port.value, key[1], route),
            )
        children[0].inc()
        children[1].observe(seconds)

    def record_upstream_call(self, operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        """A request to the upstream ended, in whatever way."""
        self._families.upstream_requests.labels(operation.value, outcome.value).inc()
        self._families.upstream_request_duration.labels(operation.value, outcome.value).observe(seconds)

    def record_redis_call(self, call: str, outcome: RedisOutcome, seconds: float) -> None:
        """A call of the store ended: a script by its name, or plain reads."""
        children = self._call_children.get((call, outcome))
        if children is None:
            children = self._call_children[call, outcome] = (
                self._families.redis_calls.labels(call, outcome.value),
                self._families.redis_call_duration.labels(call),
            )
        children[0].inc()
        children[1].observe(seconds)

    def record_redis_error(self, error: RedisErrorKind) -> None:
        """Redis failed, or the way to it."""
        self._families.redis_errors.labels(error.value).inc()

    def record_submission(self, kind: Kind, outcome: StrEnum) -> None:
        """A submission that had its place was sent, or could not be."""
        self._families.submissions.labels(kind.value, outcome.value).inc()

    def record_submitted_task(self, tenant: int, kind: Kind) -> None:
        """A submission became a task."""
        self._families.tasks_submitted.labels(self.tenant_label(tenant), kind.value).inc()

    def record_quota_denial(self, tenant: int, policy: str) -> None:
        """A policy of a tenant refused a submission."""
        self._families.quota_denials.labels(self.tenant_label(tenant), policy).inc()

    def record_balance_denial(self, tenant: int) -> None:
        """No account could pay for a submission."""
        self._families.balance_denials.labels(self.tenant_label(tenant)).inc()

    def record_finished_task(self, task: Task) -> None:
        """A task ended, and took what its receipt says."""
        families, tenant, kind = self._families, self.tenant_label(task.tenant), task.kind.value
        seconds = (task.updated_at - task.created_at) / 1000
        families.tasks_finished.labels(tenant, kind, task.state.value).inc()
        families.task_duration.labels(kind, task.state.value).observe(seconds)
        families.tenant_task_duration.labels(tenant, kind).observe(seconds)
        families.task_costs.labels(kind, task.cost.basis.value).inc()
        families.spent_uses.labels(tenant, kind).inc(task.cost.count)
        families.spent_yuan.labels(tenant, kind).inc(task.cost.money_fen / 100)
        account = self._label_names.account_label(task.account)
        if account:
            families.account_spent_uses.labels(account).inc(task.cost.count)
            families.account_spent_yuan.labels(account).inc(task.cost.money_fen / 100)

    def record_task_read(self, source: ReadSource) -> None:
        """A task was read."""
        self._families.task_reads.labels(source.value).inc()

    def record_replay(self) -> None:
        """A submission was answered with what an earlier one under the same idempotency key became."""
        self._families.idempotent_replays.inc()

    def record_expired_reservations(self, count: int) -> None:
        """So many submissions were given up whose process had died."""
        self._families.reservations_expired.inc(count)

    def record_claimed_checks(self, lags: Iterable[float]) -> None:
        """Checks were claimed; `lags` tells for each how many seconds it was late."""
        batch = 0
        for lag in lags:
            self._families.poll_lag.observe(lag)
            batch += 1
        self._families.poll_batch_size.observe(batch)

    def record_check(self, outcome: StrEnum) -> None:
        """The watch asked the upstream about a task."""
        self._families.poll_checks.labels(outcome.value).inc()

    def record_delivery(self, state: DeliveryState, age_seconds: float) -> None:
        """An attempt to tell a tenant of an end left its delivery in a state, `age` seconds after that end."""
        self._families.webhook_attempts.labels(state.value).inc()
        if state is not DeliveryState.PENDING:
            self._families.webhook_age.labels(state.value).observe(age_seconds)

    def record_loop_lag(self, seconds: float) -> None:
        """The process got to something so late."""
        self._families.event_loop_lag.observe(seconds)

    def refresh_labels(self) -> None:
        """Have the metrics of new tenants and accounts begin at zero, and let go of those that are gone."""
        self._label_names.refresh_labels()

    def render(self) -> tuple[bytes, str]:
        """Everything on the registry, in Prometheus' text format, and the content type of that; from any thread."""
        return format_exposition(self.registry), CONTENT_TYPE


class _LabelNames:
    """The tenants and accounts that have metrics of their own.

    Tenants are taken in the order in which they were made, so that every process names the same ones. Those that are
    gone lose their metrics: with them, the number of names would only grow.
    """

    def __init__(self, families: MetricFamilies, max_named_tenants: int) -> None:
        self.read_registry: Callable[[], Registry] = Registry
        self._families = families
        self._max_named_tenants = max_named_tenants
        self._current: Registry | None = None
        self._tenants: Mapping[int, str] = {}
        self._accounts: Mapping[int, str] = {}

    def tenant_label(self, tenant_id: int) -> str:
        self.refresh_labels()
        return self._tenants.get(tenant_id, OTHER_LABEL)

    def account_label(self, account_id: int) -> str | None:
        self.refresh_labels()
        return self._accounts.get(account_id)

    def refresh_labels(self) -> None:
        """Name the tenants and accounts that there are now, and have their metrics begin at zero."""
        registry = self.read_registry()
        if registry is self._current:
            return
        oldest = sorted(registry.tenants.values(), key=lambda tenant: tenant.id)[: self._max_named_tenants]
        before = {"tenant": set(self._tenants.values()), "account": set(self._accounts.values())}
        self._current = registry
        self._tenants = {tenant.id: tenant.name for tenant in oldest}
        self._accounts = {account.id: account.name for account in registry.accounts.values()}
        for name in before["tenant"] - set(self._tenants.values()):
            for family in self._families.tenant_families:
                family.remove_by_labels({"tenant": name})
        for name in before["account"] - set(self._accounts.values()):
            for family in self._families.account_families:
                family.remove_by_labels({"account": name})
        for tenant in oldest:
            self._preregister_tenant(tenant)
        for name in self._accounts.values():
            for family in self._families.account_families:
                family.labels(name)

    def _preregister_tenant(self, tenant: Tenant) -> None:
        families = self._families
        for policy in policy_names(tenant.policy):
            families.quota_denials.labels(tenant.name, policy)
        families.balance_denials.labels(tenant.name)
        for kind in filter(tenant.can_submit, Kind):
            for family in (families.tasks_submitted, families.spent_uses, families.spent_yuan):
                family.labels(tenant.name, kind.value)
            for end in FINAL_STATES:
                families.tasks_finished.labels(tenant.name, kind.value, end.value)


LOOP_SAMPLE_SECONDS = 1.0


class EventLoopMonitor:
    """Measures it once a second: a sample that is seldom but by nothing else than the clock."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    async def run(self) -> None:
        """Measure until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOP_SAMPLE_SECONDS
            await asyncio.sleep(LOOP_SAMPLE_SECONDS)
            self._metrics.record_loop_lag(max(loop.time() - due, 0.0))
