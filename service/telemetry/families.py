"""What a process counts and times, each declared once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, StrEnum

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary, disable_created_metrics
from prometheus_client.metrics import MetricWrapperBase

from service.domain.ledger import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, policy_name
from service.domain.tasks import Basis, Kind, State
from service.domain.tenants import Window
from service.domain.webhooks import DeliveryState

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
