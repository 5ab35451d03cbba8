"""Gauges that are computed when metrics are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.domain.ledger import AccountState, AccountStatus
from service.domain.tasks import Backlog
from service.domain.tenants import AccountPolicy


class GaugeSpec(Struct, frozen=True):
    """A gauge: its name, its text of help, and its labels."""

    name: str
    help_text: str
    labels: tuple[str, ...] = ()


class GaugeName(Enum):
    """The gauges of one process."""

    REQUESTS_IN_PROGRESS = GaugeSpec("gateway_http_requests_in_progress", "Requests under way, by port.", ("port",))
    WAITING_CLIENTS = GaugeSpec("gateway_waiting_clients", "Clients that wait for a task or follow one.")
    UPLOAD_BYTES = GaugeSpec("gateway_upload_bytes", "Bytes of uploads that are held in memory.")
    UPLOAD_LIMIT_BYTES = GaugeSpec("gateway_upload_limit_bytes", "How many bytes of uploads may be held in memory.")
    UPSTREAM_CONNECTIONS = GaugeSpec(
        "gateway_upstream_connections",
        "Connections to the upstream, by operation and state (busy, or idle to be used again).",
        ("operation", "state"),
    )
    UPSTREAM_CONNECTIONS_LIMIT = GaugeSpec(
        "gateway_upstream_connections_limit", "How many connections may be busy at once, by operation.", ("operation",)
    )
    UPSTREAM_WAITING = GaugeSpec(
        "gateway_upstream_waiting", "Requests to the upstream that wait for their turn, by operation.", ("operation",)
    )
    UPSTREAM_BREAKER_OPEN = GaugeSpec(
        "gateway_upstream_breaker_open",
        "1 while requests to an upstream are given up at once, since it could not be reached; by base address.",
        ("upstream",),
    )
    SETTLEMENTS_PENDING = GaugeSpec(
        "gateway_settlements_pending", "Outcomes of submissions that are still to be booked."
    )
    POLL_CHECKS_IN_PROGRESS = GaugeSpec("gateway_poll_checks_in_progress", "Checks of tasks that are under way.")
    POLL_CHECKS_LIMIT = GaugeSpec("gateway_poll_checks_limit", "How many checks may be under way at once.")


ReadGauge = Callable[[], Mapping[tuple[str, ...], float]]
"""Tells the values of a gauge now, by the values of its labels."""


class GaugeCollector(Collector):
    """Shows each gauge as those tell it who know; one that nobody told about is not there."""

    def __init__(self) -> None:
        self._readers: dict[GaugeName, list[ReadGauge]] = {}

    def register(self, gauge: GaugeName, read: ReadGauge) -> None:
        """Ask `read` for values of a gauge at every scrape, from whichever thread."""
        self._readers.setdefault(gauge, []).append(read)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """All gauges, without values."""
        return [_create_family(level) for level in GaugeName]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All gauges that somebody knows of."""
        for level, reads in self._readers.items():
            family = _create_family(level)
            for read in reads:
                for labels, value in read().items():
                    family.add_metric(labels, value)
            yield family


def _create_family(gauge: GaugeName) -> GaugeMetricFamily:
    return GaugeMetricFamily(gauge.value.name, gauge.value.help_text, labels=gauge.value.labels)


_FEN_PER_YUAN = 100


class QuotaSample(Struct, frozen=True):
    """How a policy of a tenant stands, in tasks, yuan, or tasks that are active."""

    tenant: str
    policy: str
    unit: str
    used: float
    reserved: float
    limit: float


class AccountSample(Struct, frozen=True):
    """How an account stands at `now`, in milliseconds of the server's clock."""

    name: str
    policy: AccountPolicy
    state: AccountState
    now_ms: int


class MetricsSnapshot(Struct, frozen=True, kw_only=True):
    """The ledger at one moment. Active tasks by tenant and kind, spent money (fen) by tenant and window.

    `clock_offset` is by how many milliseconds its time is ahead of the server's.
    """

    tenant_count: int
    quotas: Sequence[QuotaSample]
    active_tasks: Mapping[tuple[str, str], int]
    spent_fen: Mapping[tuple[str, str], int]
    accounts: Sequence[AccountSample]
    poll_queue: Backlog
    webhook_queue: Backlog
    failed_webhooks: int
    clock_offset_ms: int


class LedgerCollector(Collector):
    """Shows the ledger as it was last seen; without that it shows that it could not be."""

    def __init__(self) -> None:
        self._snapshot: MetricsSnapshot | None = None

    def set_snapshot(self, snapshot: MetricsSnapshot | None) -> None:
        """Show this from now on; None if the ledger can't be read."""
        self._snapshot = snapshot

    def describe(self) -> Iterable[Metric]:
        """All families, without values."""
        return [
            _redis_up_metric(up=False),
            _clock_offset_metric(0),
            *_tenant_metrics(0, (), {}, {}),
            *_account_metrics(()),
            *_queue_metrics(Backlog(0, 0), Backlog(0, 0), 0),
        ]

    def collect(self) -> Iterable[Metric]:
        """What was seen."""
        seen = self._snapshot
        yield _redis_up_metric(up=seen is not None)
        if seen:
            yield _clock_offset_metric(seen.clock_offset_ms)
            yield from _tenant_metrics(seen.tenant_count, seen.quotas, seen.active_tasks, seen.spent_fen)
            yield from _account_metrics(seen.accounts)
            yield from _queue_metrics(seen.poll_queue, seen.webhook_queue, seen.failed_webhooks)


def _redis_up_metric(*, up: bool) -> Metric:
    text = "1 if the ledger could be read for this scrape; what is read from it is not there otherwise."
    return GaugeMetricFamily("gateway_redis_up", text, value=float(up))


def _clock_offset_metric(offset: int) -> Metric:
    text = "By how much the ledger's time is ahead of the clock of Redis, which has stepped back; 0 if it has not."
    return GaugeMetricFamily("gateway_ledger_clock_offset_seconds", text, value=offset / 1000)


def _tenant_metrics(
    tenants: int,
    quotas: Sequence[QuotaSample],
    active: Mapping[tuple[str, str], int],
    spent: Mapping[tuple[str, str], int],
) -> Iterable[Metric]:
    yield GaugeMetricFamily("gateway_tenants", "Tenants of the gateway.", value=tenants)
    policy = ("tenant", "policy", "unit")
    used = GaugeMetricFamily(
        "gateway_quota_used",
        "What of a limit is used, by tenant, policy and unit (tasks, yuan, active).",
        labels=policy,
    )
    reserved = GaugeMetricFamily(
        "gateway_quota_reserved",
        "What of a limit is held for tasks that run, by tenant, policy and unit.",
        labels=policy,
    )
    limit = GaugeMetricFamily("gateway_quota_limit", "The limits, by tenant, policy and unit.", labels=policy)
    for each in quotas:
        labels = (each.tenant, each.policy, each.unit)
        used.add_metric(labels, each.used)
        reserved.add_metric(labels, each.reserved)
        limit.add_metric(labels, each.limit)
    yield from (used, reserved, limit)
    running = GaugeMetricFamily(
        "gateway_tasks_active",
        "Tasks that were reserved and have not ended, by tenant and kind.",
        labels=("tenant", "kind"),
    )
    for of_kind, tasks in active.items():
        running.add_metric(of_kind, tasks)
    yield running
    money = GaugeMetricFamily(
        "gateway_tenant_spent_yuan",
        "Money spent in the current window (day, month, total), by tenant, refunds taken off.",
        labels=("tenant", "window"),
    )
    for of_window, fen in spent.items():
        money.add_metric(of_window, fen / _FEN_PER_YUAN)
    yield money


def _account_metrics(accounts: Sequence[AccountSample]) -> Iterable[Metric]:
    def gauge(name: str, text: str, values: Iterable[tuple[str, float | None]]) -> Metric:
        family = GaugeMetricFamily(f"gateway_account_{name}", text, labels=("account",))
        for account, value in values:
            if value is not None:
                family.add_metric((account,), value)
        return family

    def total(name: str, text: str, values: Iterable[tuple[str, float]]) -> Metric:
        family = CounterMetricFamily(f"gateway_account_{name}", text, labels=("account",))
        for account, value in values:
            family.add_metric((account,), value)
        return family

    yield gauge("remaining_uses", "Prepaid uses left, as last seen.", ((a.name, _remaining_uses(a)) for a in accounts))
    yield gauge("remaining_yuan", "Money left, as last seen.", ((a.name, _remaining_yuan(a)) for a in accounts))
    yield gauge("floor_uses", "Prepaid uses that shall stay.", ((a.name, a.policy.floor_count) for a in accounts))
    yield gauge(
        "floor_yuan", "Money that shall stay.", ((a.name, a.policy.floor_money_fen / _FEN_PER_YUAN) for a in accounts)
    )
    yield gauge(
        "balance_age_seconds",
        "How long ago the balance was last seen.",
        ((a.name, _balance_age_seconds(a)) for a in accounts),
    )
    yield gauge(
        "open_submissions",
        "Submissions that were reserved and have not ended.",
        ((a.name, a.state.open_submissions) for a in accounts),
    )
    yield gauge(
        "unknown_submissions",
        "Submissions whose outcome is unknown.",
        ((a.name, a.state.unknown_outcomes) for a in accounts),
    )
    yield total(
        "unexplained_uses",
        "Prepaid uses that were taken, but by no task of the gateway.",
        ((a.name, a.state.unexplained_count) for a in accounts),
    )
    yield total(
        "unexplained_yuan",
        "Money that was taken, but by no task of the gateway.",
        ((a.name, a.state.unexplained_money_fen / _FEN_PER_YUAN) for a in accounts),
    )
    states = GaugeMetricFamily(
        "gateway_account_state",
        f"1 for the state an account is in ({', '.join(AccountStatus)}), 0 for the others.",
        labels=("account", "state"),
    )
    for each in accounts:
        for status in AccountStatus:
            states.add_metric((each.name, status.value), float(each.state.status is status))
    yield states


def _queue_metrics(poll_queue: Backlog, webhook_queue: Backlog, failed: int) -> Iterable[Metric]:
    yield GaugeMetricFamily("gateway_poll_tasks", "Tasks that are watched.", value=poll_queue.length)
    yield GaugeMetricFamily(
        "gateway_poll_overdue_seconds",
        "For how long the first check that nobody took has been due; 0 if none is.",
        value=poll_queue.overdue_ms / 1000,
    )
    yield GaugeMetricFamily(
        "gateway_webhook_queues", "Receivers that something is to be delivered to.", value=webhook_queue.length
    )
    yield GaugeMetricFamily(
        "gateway_webhook_overdue_seconds",
        "For how long the first delivery that nobody took has been due; 0 if none is.",
        value=webhook_queue.overdue_ms / 1000,
    )
    yield GaugeMetricFamily(
        "gateway_webhooks_failed", "Deliveries that were given up in the last 30 days.", value=failed
    )


def _remaining_uses(account: AccountSample) -> float | None:
    return account.state.count.value if account.state.count else None


def _remaining_yuan(account: AccountSample) -> float | None:
    return account.state.money.value / _FEN_PER_YUAN if account.state.money else None


def _balance_age_seconds(account: AccountSample) -> float | None:
    received = [each.received_at for each in (account.state.count, account.state.money) if each]
    return max(account.now_ms - max(received), 0) / 1000 if received else None
