"""Gauges that are read when Prometheus scrapes: of this process, and of the ledger."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.domain.ledger import SPENT_WINDOWS, AccountState, AccountStatus
from service.domain.tasks import Backlog, Kind
from service.domain.tenants import AccountPolicy
from service.telemetry.exposition import FormattedGauges
from service.telemetry.logging import fen_to_yuan

_SPENT_WINDOWS = [window.value for window in SPENT_WINDOWS]


class GaugeSpec(Struct, frozen=True):
    name: str
    help_text: str
    labels: tuple[str, ...] = ()


class GaugeName(Enum):
    REQUESTS_IN_PROGRESS = GaugeSpec("gateway_http_requests_in_progress", "Requests in progress, by port.", ("port",))
    WAITING_CLIENTS = GaugeSpec("gateway_waiting_clients", "Clients that wait for a task or stream its events.")
    UPLOAD_BYTES = GaugeSpec(
        "gateway_upload_bytes", "Bytes of uploads in memory, by pool: of tenants, or of unknown callers.", ("pool",)
    )
    UPLOAD_LIMIT_BYTES = GaugeSpec(
        "gateway_upload_limit_bytes", "Limit of the bytes of uploads in memory, by pool.", ("pool",)
    )
    UPSTREAM_CONNECTIONS = GaugeSpec(
        "gateway_upstream_connections",
        "Connections to the upstream, by operation and state (busy or idle).",
        ("operation", "state"),
    )
    UPSTREAM_CONNECTIONS_LIMIT = GaugeSpec(
        "gateway_upstream_connections_limit", "Limit of busy connections, by operation.", ("operation",)
    )
    UPSTREAM_WAITING = GaugeSpec(
        "gateway_upstream_waiting", "Requests to the upstream that wait for a connection, by operation.", ("operation",)
    )
    UPSTREAM_BREAKER_OPEN = GaugeSpec(
        "gateway_upstream_breaker_open",
        "1 while requests to an unreachable upstream fail at once, by base address.",
        ("upstream",),
    )
    SETTLEMENTS_PENDING = GaugeSpec("gateway_settlements_pending", "Outcomes of submissions that are not yet settled.")
    POLL_CHECKS_IN_PROGRESS = GaugeSpec("gateway_poll_checks_in_progress", "Checks of tasks in progress.")
    POLL_CHECKS_LIMIT = GaugeSpec("gateway_poll_checks_limit", "Limit of checks in progress.")
    POLL_LOOP_SHARE = GaugeSpec("gateway_poll_loop_share", "Share of the event loop that checks take.")


ReadGauge = Callable[[], Mapping[tuple[str, ...], float]]
"""Returns the current values of a gauge by its label values."""


class GaugeCollector(Collector):
    """A collector of the gauges that have a reader."""

    def __init__(self) -> None:
        self._readers: dict[GaugeName, list[ReadGauge]] = {}

    def register(self, gauge: GaugeName, read: ReadGauge) -> None:
        """Call `read` at every scrape, from any thread."""
        self._readers.setdefault(gauge, []).append(read)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return [_create_family(gauge) for gauge in GaugeName]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        for gauge, readers in self._readers.items():
            family = _create_family(gauge)
            for read in readers:
                for labels, value in read().items():
                    family.add_metric(labels, value)
            yield family


def _create_family(gauge: GaugeName) -> GaugeMetricFamily:
    return GaugeMetricFamily(gauge.value.name, gauge.value.help_text, labels=gauge.value.labels)


class QuotaSample(Struct, frozen=True):
    """The state of one policy of a tenant, in tasks, yuan or active tasks."""

    tenant: str
    policy: str
    unit: str
    used: float
    reserved: float
    limit: float


class AccountSample(Struct, frozen=True):
    """The state of an account at `now_ms`, by the clock of Redis."""

    name: str
    policy: AccountPolicy
    state: AccountState
    now_ms: int


class MetricsSnapshot(Struct, frozen=True, kw_only=True):
    """The ledger at one moment.

    Thresholds by tenant, policy and percentage; active tasks by tenant and kind; uses and fen spent in each of
    SPENT_WINDOWS by tenant and kind.

    `clock_offset_ms` is by how much the ledger clock is ahead of the clock of Redis.
    """

    tenant_count: int = 0
    quotas: Sequence[QuotaSample] = ()
    thresholds: Mapping[tuple[str, str, str], bool] = {}
    active_tasks: Mapping[tuple[str, str], int] = {}
    spent: Mapping[tuple[str, Kind], tuple[Sequence[int], Sequence[int]]] = {}
    accounts: Sequence[AccountSample] = ()
    poll_queue: Backlog = Backlog(0, 0)
    webhook_queue: Backlog = Backlog(0, 0)
    failed_webhooks: int = 0
    clock_offset_ms: int = 0


class LedgerCollector(Collector):
    """A collector of the last snapshot of the ledger; without one only of `gateway_redis_up` 0."""

    def __init__(self) -> None:
        self._snapshot: MetricsSnapshot | None = None

    def set_snapshot(self, snapshot: MetricsSnapshot | None) -> None:
        """Replace the snapshot; None if the ledger can't be read."""
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        return _create_metrics(MetricsSnapshot())

    def collect(self) -> Iterable[Metric]:
        return _create_metrics(self._snapshot)


def _create_metrics(snapshot: MetricsSnapshot | None) -> Iterable[Metric]:
    yield GaugeMetricFamily(
        "gateway_redis_up",
        "1 if the ledger could be read for this scrape; otherwise its metrics are absent.",
        value=float(snapshot is not None),
    )
    if snapshot:
        yield GaugeMetricFamily(
            "gateway_ledger_clock_offset_seconds",
            "How far the ledger clock is ahead of the clock of Redis after that stepped back; 0 if it did not.",
            value=snapshot.clock_offset_ms / 1000,
        )
        yield from _tenant_metrics(snapshot)
        yield from _account_metrics(snapshot.accounts)
        yield from _queue_metrics(snapshot)


def _tenant_metrics(snapshot: MetricsSnapshot) -> Iterable[Metric]:
    yield GaugeMetricFamily("gateway_tenants", "Tenants of the gateway.", value=snapshot.tenant_count)
    policy = ("tenant", "policy", "unit")
    used = FormattedGauges(
        "gateway_quota_used",
        "Used part of a limit, by tenant, policy and unit (tasks, yuan, active).",
        labels=policy,
    )
    reserved = FormattedGauges(
        "gateway_quota_reserved",
        "Part of a limit reserved for running tasks, by tenant, policy and unit.",
        labels=policy,
    )
    limit = FormattedGauges("gateway_quota_limit", "The limits, by tenant, policy and unit.", labels=policy)
    for quota in snapshot.quotas:
        labels = (quota.tenant, quota.policy, quota.unit)
        used.add_metric(labels, quota.used)
        reserved.add_metric(labels, quota.reserved)
        limit.add_metric(labels, quota.limit)
    yield from (used, reserved, limit)
    thresholds = FormattedGauges(
        "gateway_quota_threshold_reached",
        "1 if so much of the limit is used in the current window, by tenant, policy and threshold (percent).",
        labels=("tenant", "policy", "threshold"),
    )
    for threshold, is_reached in snapshot.thresholds.items():
        thresholds.add_metric(threshold, float(is_reached))
    yield thresholds
    running = FormattedGauges(
        "gateway_tasks_active",
        "Reserved tasks that have not finished, by tenant and kind.",
        labels=("tenant", "kind"),
    )
    for tenant_kind, tasks in snapshot.active_tasks.items():
        running.add_metric(tenant_kind, tasks)
    yield running
    uses, money = (
        FormattedGauges(
            f"gateway_tenant_spent_{unit}",
            f"{text} charged in the current window (day, month, total), less refunds, by tenant and kind.",
            labels=("tenant", "kind", "window"),
        )
        for unit, text in (("uses", "Prepaid uses"), ("yuan", "Money"))
    )
    for (tenant, kind), amounts in snapshot.spent.items():
        for window, spent_uses, spent_fen in zip(_SPENT_WINDOWS, *amounts, strict=True):
            labels = tenant, kind.value, window
            uses.add_metric(labels, spent_uses)
            money.add_metric(labels, fen_to_yuan(spent_fen))
    yield from (uses, money)


def _remaining_uses(account: AccountSample) -> float | None:
    return account.state.count.value if account.state.count else None


def _remaining_yuan(account: AccountSample) -> float | None:
    return fen_to_yuan(account.state.money.value) if account.state.money else None


def _balance_age_seconds(account: AccountSample) -> float | None:
    received_times = [reading.received_at for reading in (account.state.count, account.state.money) if reading]
    return max(account.now_ms - max(received_times), 0) / 1000 if received_times else None


_ACCOUNT_GAUGES: Sequence[tuple[str, str, Callable[[AccountSample], float | None]]] = (
    ("remaining_uses", "Prepaid uses left at the last reading.", _remaining_uses),
    ("remaining_yuan", "Money left at the last reading.", _remaining_yuan),
    ("floor_uses", "Prepaid uses kept in reserve.", lambda account: account.policy.floor_count),
    ("floor_yuan", "Money kept in reserve.", lambda account: fen_to_yuan(account.policy.floor_money_fen)),
    ("balance_age_seconds", "Age of the last reading of the balance.", _balance_age_seconds),
    (
        "open_submissions",
        "Reserved submissions that have not finished.",
        lambda account: account.state.open_submissions,
    ),
    ("unknown_submissions", "Submissions with an unknown outcome.", lambda account: account.state.unknown_outcomes),
)
_ACCOUNT_COUNTERS: Sequence[tuple[str, str, Callable[[AccountSample], float]]] = (
    (
        "unexplained_uses",
        "Prepaid uses spent by no task of the gateway.",
        lambda account: account.state.unexplained_count,
    ),
    (
        "unexplained_yuan",
        "Money spent by no task of the gateway.",
        lambda account: fen_to_yuan(account.state.unexplained_money_fen),
    ),
)


def _account_metrics(accounts: Sequence[AccountSample]) -> Iterable[Metric]:
    for create_family, table in ((GaugeMetricFamily, _ACCOUNT_GAUGES), (CounterMetricFamily, _ACCOUNT_COUNTERS)):
        for name, help_text, read in table:
            family = create_family(f"gateway_account_{name}", help_text, labels=("account",))
            for account in accounts:
                if (value := read(account)) is not None:
                    family.add_metric((account.name,), value)
            yield family
    states = GaugeMetricFamily(
        "gateway_account_state",
        f"1 for the state of the account ({', '.join(AccountStatus)}), 0 for the others.",
        labels=("account", "state"),
    )
    for account in accounts:
        for status in AccountStatus:
            states.add_metric((account.name, status.value), float(account.state.status is status))
    yield states


def _queue_metrics(snapshot: MetricsSnapshot) -> Iterable[Metric]:
    poll_queue, webhook_queue = snapshot.poll_queue, snapshot.webhook_queue
    yield GaugeMetricFamily("gateway_poll_tasks", "Tasks that are polled.", value=poll_queue.length)
    yield GaugeMetricFamily(
        "gateway_poll_overdue_seconds",
        "How long the oldest unclaimed check has been due; 0 if there is none.",
        value=poll_queue.overdue_ms / 1000,
    )
    yield GaugeMetricFamily("gateway_webhook_queues", "Receivers with pending deliveries.", value=webhook_queue.length)
    yield GaugeMetricFamily(
        "gateway_webhook_overdue_seconds",
        "How long the oldest unclaimed delivery has been due; 0 if there is none.",
        value=webhook_queue.overdue_ms / 1000,
    )
    yield GaugeMetricFamily(
        "gateway_webhooks_failed", "Deliveries abandoned in the last 30 days.", value=snapshot.failed_webhooks
    )
