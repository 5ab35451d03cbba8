"""Gauges that are computed when metrics are collected."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum

from msgspec import Struct
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from service.domain.ledger import AccountState, Status
from service.domain.tasks import Backlog
from service.domain.tenants import AccountPolicy


class Family(Struct, frozen=True):
    """A gauge: its name, its text of help, and its labels."""

    name: str
    text: str
    labels: tuple[str, ...] = ()


class Level(Enum):
    """The gauges of one process."""

    IN_PROGRESS = Family("gateway_http_requests_in_progress", "Requests under way, by port.", ("port",))
    WAITING = Family("gateway_waiting_clients", "Clients that wait for a task or follow one.")
    UPLOADS = Family("gateway_upload_bytes", "Bytes of uploads that are held in memory.")
    UPLOADS_LIMIT = Family("gateway_upload_limit_bytes", "How many bytes of uploads may be held in memory.")
    CONNECTIONS = Family(
        "gateway_upstream_connections",
        "Connections to the upstream, by operation and state (busy, or idle to be used again).",
        ("operation", "state"),
    )
    CONNECTIONS_LIMIT = Family(
        "gateway_upstream_connections_limit", "How many connections may be busy at once, by operation.", ("operation",)
    )
    CONNECTIONS_WAITING = Family(
        "gateway_upstream_waiting", "Requests to the upstream that wait for their turn, by operation.", ("operation",)
    )
    BREAKER = Family(
        "gateway_upstream_breaker_open",
        "1 while requests to an upstream are given up at once, since it could not be reached; by base address.",
        ("upstream",),
    )
    SETTLEMENTS = Family("gateway_settlements_waiting", "Outcomes of submissions that are still to be booked.")
    CHECKS = Family("gateway_watch_checks_in_progress", "Checks of tasks that are under way.")
    CHECKS_LIMIT = Family("gateway_watch_checks_limit", "How many checks may be under way at once.")


Read = Callable[[], Mapping[tuple[str, ...], float]]
"""Tells the values of a gauge now, by the values of its labels."""


class Levels(Collector):
    """Shows each gauge as those tell it who know; one that nobody told about is not there."""

    def __init__(self) -> None:
        self._reads: dict[Level, list[Read]] = {}

    def tell(self, level: Level, read: Read) -> None:
        """Ask `read` for values of a gauge at every scrape, from whichever thread."""
        self._reads.setdefault(level, []).append(read)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """All gauges, without values."""
        return [_family(level) for level in Level]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All gauges that somebody knows of."""
        for level, reads in self._reads.items():
            family = _family(level)
            for read in reads:
                for labels, value in read().items():
                    family.add_metric(labels, value)
            yield family


def _family(level: Level) -> GaugeMetricFamily:
    return GaugeMetricFamily(level.value.name, level.value.text, labels=level.value.labels)


_FEN = 100


class QuotaStanding(Struct, frozen=True):
    """How a policy of a tenant stands, in tasks, yuan, or tasks that are active."""

    tenant: str
    policy: str
    unit: str
    used: float
    reserved: float
    limit: float


class AccountStanding(Struct, frozen=True):
    """How an account stands at `now`, in milliseconds of the server's clock."""

    name: str
    policy: AccountPolicy
    state: AccountState
    now: int


class Seen(Struct, frozen=True, kw_only=True):
    """The ledger at one moment. Active tasks by tenant and kind, spent money (fen) by tenant and window.

    `clock_offset` is by how many milliseconds its time is ahead of the server's.
    """

    tenants: int
    quotas: Sequence[QuotaStanding]
    active: Mapping[tuple[str, str], int]
    spent: Mapping[tuple[str, str], int]
    accounts: Sequence[AccountStanding]
    watch: Backlog
    webhooks: Backlog
    webhooks_failed: int
    clock_offset: int


class Standing(Collector):
    """Shows the ledger as it was last seen; without that it shows that it could not be."""

    def __init__(self) -> None:
        self._seen: Seen | None = None

    def show(self, seen: Seen | None) -> None:
        """Show this from now on; None if the ledger can't be read."""
        self._seen = seen

    def describe(self) -> Iterable[Metric]:
        """All families, without values."""
        return [
            _up(up=False),
            _clock(0),
            *_of_tenants(0, (), {}, {}),
            *_of_accounts(()),
            *_of_queues(Backlog(0, 0), Backlog(0, 0), 0),
        ]

    def collect(self) -> Iterable[Metric]:
        """What was seen."""
        seen = self._seen
        yield _up(up=seen is not None)
        if seen:
            yield _clock(seen.clock_offset)
            yield from _of_tenants(seen.tenants, seen.quotas, seen.active, seen.spent)
            yield from _of_accounts(seen.accounts)
            yield from _of_queues(seen.watch, seen.webhooks, seen.webhooks_failed)


def _up(*, up: bool) -> Metric:
    text = "1 if the ledger could be read for this scrape; what is read from it is not there otherwise."
    return GaugeMetricFamily("gateway_ledger_up", text, value=float(up))


def _clock(offset: int) -> Metric:
    text = "By how much the ledger's time is ahead of the clock of Redis, which has stepped back; 0 if it has not."
    return GaugeMetricFamily("gateway_ledger_clock_offset_seconds", text, value=offset / 1000)


def _of_tenants(
    tenants: int,
    quotas: Sequence[QuotaStanding],
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
        money.add_metric(of_window, fen / _FEN)
    yield money


def _of_accounts(accounts: Sequence[AccountStanding]) -> Iterable[Metric]:
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

    yield gauge("remaining_uses", "Prepaid uses left, as last seen.", ((a.name, _uses(a)) for a in accounts))
    yield gauge("remaining_yuan", "Money left, as last seen.", ((a.name, _money(a)) for a in accounts))
    yield gauge("floor_uses", "Prepaid uses that shall stay.", ((a.name, a.policy.floor_count) for a in accounts))
    yield gauge("floor_yuan", "Money that shall stay.", ((a.name, a.policy.floor_money / _FEN) for a in accounts))
    yield gauge(
        "since_seen_seconds", "How long ago the balance was last seen.", ((a.name, _since_seen(a)) for a in accounts)
    )
    yield gauge(
        "open_submissions",
        "Submissions that were reserved and have not ended.",
        ((a.name, a.state.open) for a in accounts),
    )
    yield gauge(
        "unknown_submissions", "Submissions whose outcome is unknown.", ((a.name, a.state.unknown) for a in accounts)
    )
    yield total(
        "unexplained_uses",
        "Prepaid uses that were taken, but by no task of the gateway.",
        ((a.name, a.state.unexplained_count) for a in accounts),
    )
    yield total(
        "unexplained_yuan",
        "Money that was taken, but by no task of the gateway.",
        ((a.name, a.state.unexplained_money / _FEN) for a in accounts),
    )
    states = GaugeMetricFamily(
        "gateway_account_state",
        f"1 for the state an account is in ({', '.join(Status)}), 0 for the others.",
        labels=("account", "state"),
    )
    for each in accounts:
        for status in Status:
            states.add_metric((each.name, status.value), float(each.state.status is status))
    yield states


def _of_queues(watch: Backlog, webhooks: Backlog, failed: int) -> Iterable[Metric]:
    yield GaugeMetricFamily("gateway_watch_tasks", "Tasks that are watched.", value=watch.length)
    yield GaugeMetricFamily(
        "gateway_watch_overdue_seconds",
        "For how long the first check that nobody took has been due; 0 if none is.",
        value=watch.overdue / 1000,
    )
    yield GaugeMetricFamily(
        "gateway_webhook_receivers", "Receivers that something is to be delivered to.", value=webhooks.length
    )
    yield GaugeMetricFamily(
        "gateway_webhook_overdue_seconds",
        "For how long the first delivery that nobody took has been due; 0 if none is.",
        value=webhooks.overdue / 1000,
    )
    yield GaugeMetricFamily(
        "gateway_webhooks_failed", "Deliveries that were given up in the last 30 days.", value=failed
    )


def _uses(account: AccountStanding) -> float | None:
    return account.state.count.value if account.state.count else None


def _money(account: AccountStanding) -> float | None:
    return account.state.money.value / _FEN if account.state.money else None


def _since_seen(account: AccountStanding) -> float | None:
    received = [each.received for each in (account.state.count, account.state.money) if each]
    return max(account.now - max(received), 0) / 1000 if received else None
