"""Prometheus metrics of one process.

Label values come from enums, route templates and the names of policies, tenants and accounts, never from a client, so
that their number is bounded. Counters and histograms add up over all processes; see `gauges` for current values.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from itertools import product
from platform import python_version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, disable_created_metrics
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.process_collector import ProcessCollector

from service import __version__
from service.domain.errors import UnreachableReason
from service.domain.ledger import MAX_ACTIVE_POLICY, UNIT_MONEY, UNIT_TASKS, policy_name, policy_names
from service.domain.tasks import CostBasis, Kind, State, Task
from service.domain.tenants import Registry, Tenant, Window
from service.domain.webhooks import DeliveryState
from service.telemetry.exposition import FormattedCounter, format_exposition
from service.telemetry.gauges import GaugeCollector, GaugeName, LedgerCollector
from service.telemetry.logging import fen_to_yuan

# Prometheus knows when a series began; `_created` samples would make every scrape half as large again.
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
    TENANTS = "tenants"
    OPERATORS = "operators"


class ReadSource(StrEnum):
    """Where a task was read from."""

    MEMORY = "memory"
    STORE = "store"
    UPSTREAM = "upstream"


class ImageFetchOutcome(StrEnum):
    """Outcome of fetching an image from its URL: also those of UnreachableReason."""

    DONE = "done"
    REFUSED = "refused"
    """Too large, or no image."""
    CANCELLED = "cancelled"
    """The caller left, or lost its access."""
    OVERLOADED = "overloaded"
    NO_CONNECTION = UnreachableReason.NO_CONNECTION.value
    TIMEOUT = UnreachableReason.TIMEOUT.value
    HTTP_STATUS = UnreachableReason.HTTP_STATUS.value
    REDIRECT = UnreachableReason.REDIRECT.value
    INTERRUPTED = UnreachableReason.INTERRUPTED.value


class RedisOutcome(StrEnum):
    OK = "ok"
    UNAVAILABLE = "unavailable"
    ERROR = "fault"
    """A script failed: a bug of the gateway."""
    CANCELLED = "abandoned"
    """The caller was cancelled."""


class RedisErrorKind(StrEnum):
    CONNECTION = "connection"
    TIMEOUT = "timeout"
    READONLY = "readonly"
    CLUSTER = "cluster"
    RESPONSE = "response"
    OTHER = "other"


OTHER_LABEL = "other"
"""Label of unknown methods, and of all tenants beyond those with metrics of their own."""
UNMATCHED_ROUTE = "unmatched"
"""Label of requests that match no route."""
MAX_NAMED_TENANTS = 200
"""Default number of tenants with metrics of their own."""
_KNOWN_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOOP_SAMPLE_SECONDS = 1.0


def preregister(family: Counter | Histogram, *labels: Iterable[object]) -> None:
    """Start the series of all combinations of label values at zero: `increase()` misses the first event otherwise."""
    for values in product(*labels):
        family.labels(*values)


class Metrics:
    """The metrics of one process, on a registry of its own."""

    def __init__(self, registry: CollectorRegistry, *, max_named_tenants: int = MAX_NAMED_TENANTS) -> None:
        self.registry = registry
        self.gauges = GaugeCollector()
        self.ledger_collector = LedgerCollector()
        self.families_by_label: defaultdict[str, list[MetricWrapperBase]] = defaultdict(list)
        self._create_request_metrics()
        self._create_task_metrics()
        self._create_job_metrics()
        self.label_names = LabelNames(self, max_named_tenants)
        self.requests_in_progress = {port.value: 0 for port in Port}
        self.gauges.register(
            GaugeName.REQUESTS_IN_PROGRESS, lambda: {(port,): n for port, n in self.requests_in_progress.items()}
        )
        registry.register(self.gauges)
        registry.register(self.ledger_collector)
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        build = Gauge("gateway_build_info", "The running version; always 1.", ("version", "python"), registry=registry)
        build.labels(__version__, python_version()).set(1)
        # `labels()` costs more than counting, and these are counted for every request or check.
        self._request_children: dict[tuple[str, str, str, int, bool], tuple[Counter, Histogram]] = {}
        self._upstream_children: dict[tuple[StrEnum, StrEnum], tuple[Counter, Histogram]] = {}
        self._call_children: dict[tuple[str, RedisOutcome], tuple[Counter, Histogram]] = {}

    def _create_request_metrics(self) -> None:
        counter, histogram = self._create_counter, self._create_histogram
        route = ("port", "method", "route")
        self.http_requests = counter(
            "gateway_http_requests",
            f"HTTP requests, by port ({', '.join(Port)}), method, route template and status;"
            " 499 if the client disconnected before the response.",
            *route,
            "status",
        )
        self.http_request_duration_seconds = histogram(
            "gateway_http_request_duration_seconds",
            "Duration of requests other than streams and waits, by port, method and route template.",
            _REQUEST_SECONDS,
            *route,
        )
        self.http_stream_duration_seconds = histogram(
            "gateway_http_stream_duration_seconds",
            "Duration of streams and of waits for the end of a task, by port, method and route template.",
            _STREAM_SECONDS,
            *route,
        )
        self.authentication_failures = counter(
            "gateway_authentication_failures", "Requests without a valid token, by port.", "port"
        )
        preregister(self.authentication_failures, Port)
        call = ("operation", "outcome")
        self.upstream_requests = counter(
            "gateway_upstream_requests", "Requests to the upstream, by operation and outcome.", *call
        )
        self.upstream_request_duration_seconds = histogram(
            "gateway_upstream_request_duration_seconds",
            "Duration of requests to the upstream, by operation and outcome.",
            _UPSTREAM_SECONDS,
            *call,
        )
        results = ", ".join(ImageFetchOutcome)
        self.image_fetches = counter(
            "gateway_image_fetches", f"Images fetched from their `image_url`, by outcome ({results}).", "outcome"
        )
        self.image_fetch_duration_seconds = histogram(
            "gateway_image_fetch_duration_seconds", "Duration of the fetches of images.", _UPSTREAM_SECONDS
        )
        preregister(self.image_fetches, ImageFetchOutcome)
        outcomes, errors = ", ".join(RedisOutcome), ", ".join(RedisErrorKind)
        self.redis_calls = counter(
            "gateway_redis_calls",
            f"Redis calls, by script (or plain reads) and outcome ({outcomes}).",
            "command",
            "outcome",
        )
        self.redis_call_duration_seconds = histogram(
            "gateway_redis_call_duration_seconds",
            "Duration of Redis calls, by script (or plain reads).",
            _REDIS_SECONDS,
            "command",
        )
        self.redis_errors = counter(
            "gateway_redis_errors", f"Errors of Redis or of the connection to it ({errors}).", "error"
        )
        preregister(self.redis_errors, RedisErrorKind)

    def _create_task_metrics(self) -> None:
        counter, kinds, states = self._create_counter, f"kind ({', '.join(Kind)})", ", ".join(FINAL_STATES)
        self.submissions = counter(
            "gateway_submissions", f"Submissions with a reservation, by {kinds} and outcome.", "kind", "outcome"
        )
        self.idempotent_replays = counter(
            "gateway_idempotent_replays", "Submissions answered from an earlier one with the same idempotency key."
        )
        self.tasks_submitted = counter(
            "gateway_tasks_submitted", f"Tasks accepted, by tenant and {kinds}.", "tenant", "kind"
        )
        self.tasks_finished = counter(
            "gateway_tasks_finished",
            f"Finished tasks, by tenant, {kinds} and state ({states}).",
            "tenant",
            "kind",
            "state",
        )
        self.task_duration_seconds = self._create_histogram(
            "gateway_task_duration_seconds",
            f"Time from submit to end of a task, by {kinds} and state.",
            _TASK_SECONDS,
            "kind",
            "state",
        )
        self.tenant_task_duration_seconds = Summary(
            "gateway_tenant_task_duration_seconds",
            f"Time from submit to end of a task, by tenant and {kinds}.",
            ("tenant", "kind"),
            registry=self.registry,
        )
        self.families_by_label["tenant"].append(self.tenant_task_duration_seconds)
        self.quota_denials = counter(
            "gateway_quota_denials",
            f"Submissions refused by a quota, by tenant and policy ({', '.join(POLICIES)}).",
            "tenant",
            "policy",
        )
        self.balance_denials = counter(
            "gateway_balance_denials", "Submissions refused because no account could pay, by tenant.", "tenant"
        )
        self.spent_uses = counter(
            "gateway_spent_uses", f"Prepaid uses spent by finished tasks, by tenant and {kinds}.", "tenant", "kind"
        )
        self.spent_yuan = counter(
            "gateway_spent_yuan", f"Money spent by finished tasks, by tenant and {kinds}.", "tenant", "kind"
        )
        self.account_spent_uses = counter(
            "gateway_account_spent_uses", "Prepaid uses spent by finished tasks, by account.", "account"
        )
        self.account_spent_yuan = counter(
            "gateway_account_spent_yuan", "Money spent by finished tasks, by account.", "account"
        )
        bases = ", ".join(CostBasis)
        self.task_costs = counter(
            "gateway_task_costs", f"Costs of finished tasks, by {kinds} and basis ({bases}).", "kind", "basis"
        )
        self.task_reads = counter(
            "gateway_task_reads", f"Reads of tasks, by source ({', '.join(ReadSource)}).", "source"
        )
        self.reads_by_source = {source: self.task_reads.labels(source) for source in ReadSource}
        preregister(self.task_duration_seconds, Kind, FINAL_STATES)
        preregister(self.task_costs, Kind, CostBasis)

    def _create_job_metrics(self) -> None:
        counter, histogram = self._create_counter, self._create_histogram
        self.reservations_expired = counter(
            "gateway_reservations_expired", "Submissions whose process died before their outcome was known."
        )
        self.poll_checks = counter("gateway_poll_checks", "Checks of tasks at the upstream, by outcome.", "outcome")
        self.poll_lag_seconds = histogram(
            "gateway_poll_lag_seconds", "Delay of checks after they were due.", _LAG_SECONDS
        )
        self.poll_batch_size = histogram("gateway_poll_batch_size", "Checks claimed in one call.", _BATCH_SIZES)
        self.webhook_attempts = counter(
            "gateway_webhook_attempts",
            f"Attempts to deliver a webhook, by the state of the delivery after it ({', '.join(DeliveryState)}).",
            "state",
        )
        self.webhook_age_seconds = histogram(
            "gateway_webhook_age_seconds",
            "Time from the end of a task to the end of its delivery, by state.",
            _AGE_SECONDS,
            "state",
        )
        self.event_loop_lag_seconds = histogram(
            "gateway_event_loop_lag_seconds", "Delay of the event loop.", _LOOP_LAG_SECONDS
        )
        preregister(self.webhook_attempts, DeliveryState)
        preregister(self.webhook_age_seconds, (state for state in DeliveryState if state is not DeliveryState.PENDING))

    def _create_counter(self, name: str, text: str, *labels: str) -> Counter:
        family = FormattedCounter(name, text, labels, registry=self.registry)
        for label in labels:
            self.families_by_label[label].append(family)
        return family

    def _create_histogram(self, name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(name, text, labels, buckets=tuple(buckets), registry=self.registry)

    def record_request(
        self, port: str, method: str, route: str, status: int, seconds: float, *, is_stream: bool = False
    ) -> None:
        """Record the end of a request; `route` is its route template or UNMATCHED_ROUTE."""
        key = port, method if method in _KNOWN_METHODS else OTHER_LABEL, route, status, is_stream
        children = self._request_children.get(key)
        if children is None:
            duration = self.http_stream_duration_seconds if is_stream else self.http_request_duration_seconds
            children = self._request_children[key] = (
                self.http_requests.labels(port, key[1], route, str(status)),
                duration.labels(port, key[1], route),
            )
        children[0].inc()
        children[1].observe(seconds)

    def record_upstream_call(self, operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        children = self._upstream_children.get((operation, outcome))
        if children is None:
            labels = operation.value, outcome.value
            children = self._upstream_children[operation, outcome] = (
                self.upstream_requests.labels(*labels),
                self.upstream_request_duration_seconds.labels(*labels),
            )
        children[0].inc()
        children[1].observe(seconds)

    def record_redis_call(self, call: str, outcome: RedisOutcome, seconds: float) -> None:
        """Record a call: a script by its name, or plain reads."""
        children = self._call_children.get((call, outcome))
        if children is None:
            children = self._call_children[call, outcome] = (
                self.redis_calls.labels(call, outcome.value),
                self.redis_call_duration_seconds.labels(call),
            )
        children[0].inc()
        children[1].observe(seconds)

    def record_finished_task(self, task: Task) -> None:
        tenant, kind = self.label_names.of_tenant(task.tenant), task.kind.value
        seconds = (task.updated_at - task.created_at) / 1000
        self.tasks_finished.labels(tenant, kind, task.state.value).inc()
        self.task_duration_seconds.labels(kind, task.state.value).observe(seconds)
        self.tenant_task_duration_seconds.labels(tenant, kind).observe(seconds)
        self.task_costs.labels(kind, task.cost.basis.value).inc()
        self.spent_uses.labels(tenant, kind).inc(task.cost.count)
        self.spent_yuan.labels(tenant, kind).inc(fen_to_yuan(task.cost.money_fen))
        account = self.label_names.of_account(task.account)
        if account:
            self.account_spent_uses.labels(account).inc(task.cost.count)
            self.account_spent_yuan.labels(account).inc(fen_to_yuan(task.cost.money_fen))

    def record_delivery(self, state: DeliveryState, age_seconds: float) -> None:
        """Record the state after an attempt; `age_seconds` is the time since the event."""
        self.webhook_attempts.labels(state.value).inc()
        if state is not DeliveryState.PENDING:
            self.webhook_age_seconds.labels(state.value).observe(age_seconds)

    async def measure_event_loop_lag(self) -> None:
        """Measure the delay of the event loop once a second, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LOOP_SAMPLE_SECONDS
            await asyncio.sleep(_LOOP_SAMPLE_SECONDS)
            self.event_loop_lag_seconds.observe(max(loop.time() - due, 0.0))

    def render(self) -> str:
        """Return the text format."""
        return "".join(format_exposition(self.registry))


class LabelNames:
    """The tenants and accounts with metrics of their own, out of what `read_registry` returns.

    The oldest tenants come first, so that every process selects the same ones. The series of deleted ones are removed:
    otherwise the number of names would only grow.
    """

    def __init__(self, metrics: Metrics, max_named_tenants: int) -> None:
        self.read_registry: Callable[[], Registry] = Registry
        self._metrics = metrics
        self._max_named_tenants = max_named_tenants
        self._current: Registry | None = None
        self._tenants: Mapping[int, Tenant] = {}
        self._accounts: Mapping[int, str] = {}

    def of_tenant(self, tenant_id: int) -> str:
        self.refresh()
        tenant = self._tenants.get(tenant_id)
        return tenant.name if tenant else OTHER_LABEL

    def of_account(self, account_id: int) -> str | None:
        self.refresh()
        return self._accounts.get(account_id)

    def refresh(self) -> None:
        """Follow a change of the registry: remove the series of deleted names, start those of new ones."""
        registry = self.read_registry()
        if registry is self._current:
            return
        oldest = sorted(registry.tenants.values(), key=lambda tenant: tenant.id)[: self._max_named_tenants]
        self._current = registry
        former_tenants, self._tenants = self._tenants, {tenant.id: tenant for tenant in oldest}
        former_accounts, self._accounts = self._accounts, {item.id: item.name for item in registry.accounts.values()}
        former_names, names = ({item.name for item in items.values()} for items in (former_tenants, self._tenants))
        self._remove_series("tenant", former_names - names)
        self._remove_series("account", {*former_accounts.values()} - {*self._accounts.values()})
        for tenant in oldest:
            if former_tenants.get(tenant.id) != tenant:  # the series of the others began before
                self._preregister_tenant(tenant)
        for counter in (self._metrics.account_spent_uses, self._metrics.account_spent_yuan):
            preregister(counter, self._accounts.values())

    def _remove_series(self, label: str, names: Iterable[str]) -> None:
        for name in names:
            for family in self._metrics.families_by_label[label]:
                family.remove_by_labels({label: name})

    def _preregister_tenant(self, tenant: Tenant) -> None:
        metrics, names, kinds = self._metrics, [tenant.name], list(filter(tenant.can_submit, Kind))
        preregister(metrics.quota_denials, names, policy_names(tenant.policy))
        preregister(metrics.balance_denials, names)
        for counter in (metrics.tasks_submitted, metrics.spent_uses, metrics.spent_yuan):
            preregister(counter, names, kinds)
        preregister(metrics.tasks_finished, names, kinds, FINAL_STATES)
