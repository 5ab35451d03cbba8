"""The figures of `gateway top`: load, running tasks, how long balances last, and denials."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx2
import msgspec
from msgspec import Struct

from service.cli.scrape import BUILD, START, FetchError, Metrics, Target, fetch, select, total

_SPENDING_SECONDS = 60.0
"""The interval of reading the usage, which changes slowly and costs more than the metrics."""
_SPENDING_DAYS = 7
_SECONDS_PER_DAY = 86_400
_TIMEOUT = httpx2.Timeout(5.0, connect=2.0)  # without Redis, a gateway needs 3 s for its metrics
_OPEN = "open"
_BALANCE = "balance"
"""The policy of denials for lack of an account that can pay."""


class GatewayFigures(Struct, frozen=True, kw_only=True):
    """A process. All but `url` and `error` are null while it does not respond, and rates until its second read."""

    url: str
    error: str | None = None
    version: str | None = None
    started_at: datetime | None = None
    requests_per_second: Mapping[str, float] | None = None
    """Of tenants, by class of status such as `2xx`, since the last refresh."""
    in_progress: int | None = None
    uploads: int | None = None
    """Images on their way to the vendor."""
    upload_bytes: int | None = None
    """Of uploads in memory."""
    upload_limit_bytes: int | None = None


class TaskFigures(Struct, frozen=True):
    """Running tasks by kind, and how late checks are: the first unclaimed one, and the mean of the last minute."""

    running: Mapping[str, int]
    polled: int
    overdue_seconds: float
    lag_seconds: float | None


class AccountFigures(Struct, frozen=True, kw_only=True):
    """An account: its last observed balance, and the days until its floors at the mean rate of 7 days."""

    name: str
    state: str
    uses: float | None
    uses_days: float | None
    yuan: float | None
    yuan_days: float | None
    in_flight: int
    unknown: int


class TenantFigures(Struct, frozen=True, kw_only=True):
    """A tenant: running tasks, refused submissions by policy in the last minute, and the limit nearest to its end."""

    name: str
    running: int
    denials_per_minute: Mapping[str, float]
    nearest_limit: str | None
    used_ratio: float | None


class Figures(Struct, frozen=True, kw_only=True):
    """All figures at one time. What the ledger has is null while no gateway can read it."""

    at: datetime
    gateways: Sequence[GatewayFigures]
    tasks: TaskFigures | None
    accounts: Sequence[AccountFigures] | None
    tenants: Sequence[TenantFigures] | None
    warnings: Sequence[str]


class Spending(Struct, frozen=True):
    """The mean spending of each tenant per day, in uses and yuan, and the accounts that it uses, in order."""

    per_day: Mapping[str, tuple[float, float]] = {}
    accounts: Mapping[str, Sequence[str]] = {}

    def by_account(self, open_accounts: set[str]) -> Mapping[str, tuple[float, float]]:
        """Return the spending of each account per day, if each tenant uses the first of its accounts that is open."""
        sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for tenant, (uses, yuan) in self.per_day.items():
            names = self.accounts.get(tenant, ())
            for name in [*(name for name in names if name in open_accounts), *names][:1]:
                sums[name] = sums[name][0] + uses, sums[name][1] + yuan
        return sums


class Monitor:
    """Reads gateways, of which one at least must serve `/admin/v1` for the days left."""

    def __init__(self, urls: Sequence[str], admin_token: str, metrics_token: str | None) -> None:
        # A proxy from the environment would receive the tokens.
        self._http = httpx2.AsyncClient(timeout=_TIMEOUT, trust_env=False)
        self._targets = [Target(url, self._http, metrics_token) for url in dict.fromkeys(urls)]
        self._headers = {"Authorization": f"Bearer {admin_token}"}
        self._spending = Spending()
        self._spending_error = ""
        self._next_spending_at = 0.0

    async def aclose(self) -> None:
        await self._http.aclose()

    async def refresh(self) -> None:
        """Read all gateways; none of them needs to respond."""
        await asyncio.gather(*(target.refresh() for target in self._targets))
        if time.monotonic() >= self._next_spending_at:
            await self._read_spending()

    async def _read_spending(self) -> None:
        for target in self._targets:
            if target.error is None:
                try:
                    self._spending = await self._fetch_spending(target.url)
                except FetchError as error:
                    self._spending_error = str(error)
                else:
                    self._spending_error = ""
                    self._next_spending_at = time.monotonic() + _SPENDING_SECONDS
                    return

    async def _fetch_spending(self, url: str) -> Spending:
        now = datetime.now(UTC)
        first = now.date() - timedelta(days=_SPENDING_DAYS)
        query = f"from={first}&to={now.date()}&interval=day&group_by=tenant"
        registry = await fetch(self._http, f"{url}/admin/v1/registry", self._headers)
        usage = await fetch(self._http, f"{url}/admin/v1/usage?{query}", self._headers)
        return Spending(
            mean_per_day(msgspec.json.decode(usage)["items"], now),
            {name: tenant["accounts"] for name, tenant in msgspec.json.decode(registry)["tenants"].items()},
        )

    def figures(self) -> Figures:
        """Return what the last refresh read."""
        responding = [target for target in self._targets if target.error is None]
        # The ledger is the same for all.
        ledgers = [target.metrics for target in responding if total(target.metrics, "gateway_redis_up")]
        ledger = ledgers[0] if ledgers else None
        warnings = ["no gateway can read Redis"] if responding and not ledger else []
        warnings += [f"the days left are unknown: {self._spending_error}"] if self._spending_error else []
        return Figures(
            at=datetime.now(UTC).replace(microsecond=0),
            gateways=[_describe_gateway(target) for target in self._targets],
            tasks=self._describe_tasks(ledger) if ledger else None,
            accounts=self._describe_accounts(ledger) if ledger else None,
            tenants=self._describe_tenants(ledger) if ledger else None,
            warnings=warnings,
        )

    def _describe_tasks(self, ledger: Metrics) -> TaskFigures:
        late, checks = (
            sum(rate for target in self._targets for _, rate in target.mean_rates(f"gateway_poll_lag_seconds_{part}"))
            for part in ("sum", "count")
        )
        return TaskFigures(
            running=_running_by(ledger, "kind"),
            polled=int(total(ledger, "gateway_poll_tasks")),
            overdue_seconds=total(ledger, "gateway_poll_overdue_seconds"),
            lag_seconds=round(late / checks, 3) if checks else None,
        )

    def _describe_accounts(self, ledger: Metrics) -> Sequence[AccountFigures]:
        states = {own["account"]: own["state"] for own, value in select(ledger, "gateway_account_state") if value}
        spending = self._spending.by_account({name for name, state in states.items() if state == _OPEN})

        def read(name: str, account: str) -> float | None:
            return ledger.get(f"gateway_account_{name}", {}).get((("account", account),))

        def describe(name: str) -> AccountFigures:
            uses, yuan = read("remaining_uses", name), read("remaining_yuan", name)
            uses_per_day, yuan_per_day = spending.get(name, (0.0, 0.0))
            return AccountFigures(
                name=name,
                state=states[name],
                uses=uses,
                uses_days=days_left(uses, read("floor_uses", name), uses_per_day),
                yuan=yuan,
                yuan_days=days_left(yuan, read("floor_yuan", name), yuan_per_day),
                in_flight=int(read("open_submissions", name) or 0),
                unknown=int(read("unknown_submissions", name) or 0),
            )

        return [describe(name) for name in sorted(states)]

    def _describe_tenants(self, ledger: Metrics) -> Sequence[TenantFigures]:
        """Return the tenants with metrics of their own, and the sum of those beyond them as `other`."""
        running, limits = _running_by(ledger, "tenant"), _used_ratios(ledger)
        denials: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        for target in self._targets:
            for name in ("gateway_quota_denials_total", "gateway_balance_denials_total"):
                for own, rate in target.mean_rates(name):
                    denials[own["tenant"]][own.get("policy", _BALANCE)] += 60 * rate
        return [
            TenantFigures(
                name=name,
                running=running.get(name, 0),
                denials_per_minute={policy: round(rate, 2) for policy, rate in denials[name].items() if rate},
                nearest_limit=limits[name][1] if name in limits else None,
                used_ratio=round(limits[name][0], 4) if name in limits else None,
            )
            for name in sorted(running.keys() | denials.keys() | limits.keys())
        ]


def _describe_gateway(target: Target) -> GatewayFigures:
    if target.error is not None:
        return GatewayFigures(url=target.url, error=target.error)
    metrics = target.metrics
    classes: dict[str, float] | None = None
    rates = target.last_rates("gateway_http_requests_total", port="tenants")
    if rates is not None:
        classes = {"2xx": 0.0, "4xx": 0.0, "5xx": 0.0}
        for own, rate in rates:
            name = f"{own['status'][0]}xx"
            classes[name] = round(classes.get(name, 0.0) + rate, 3)
    return GatewayFigures(
        url=target.url,
        version=next(own["version"] for own, _ in select(metrics, BUILD)),
        started_at=datetime.fromtimestamp(round(total(metrics, START)), UTC),
        requests_per_second=classes,
        in_progress=int(total(metrics, "gateway_http_requests_in_progress", port="tenants")),
        uploads=int(total(metrics, "gateway_upstream_connections", operation="submit", state="busy")),
        upload_bytes=int(total(metrics, "gateway_upload_bytes")),
        upload_limit_bytes=int(total(metrics, "gateway_upload_limit_bytes")),
    )


def _running_by(ledger: Metrics, label: str) -> Mapping[str, int]:
    sums: Counter[str] = Counter()
    for own, value in select(ledger, "gateway_tasks_active"):
        sums[own[label]] += int(value)
    return dict(sums)


def _used_ratios(ledger: Metrics) -> Mapping[str, tuple[float, str]]:
    """Return for each tenant the largest used share of its limits, and the name of that limit."""
    nearest: dict[str, tuple[float, str]] = {}
    for labels, limit in ledger.get("gateway_quota_limit", {}).items():
        own = dict(labels)
        used = sum(ledger[f"gateway_quota_{part}"].get(labels, 0.0) for part in ("used", "reserved"))
        ratio = used / limit if limit else 1.0  # a limit of 0 is always reached
        nearest[own["tenant"]] = max(nearest.get(own["tenant"], (0.0, "")), (ratio, own["policy"]))
    return nearest


def mean_per_day(rows: Iterable[Mapping[str, Any]], now: datetime) -> Mapping[str, tuple[float, float]]:
    """Return the uses and yuan that each tenant spends per day, from its usage by day.

    The mean begins with the first day of any spending, and is over a day at least: the first busy hour of a new gateway
    is not extrapolated.
    """
    sums: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    first = now.date()
    for row in rows:
        amounts = [row["spent"][basis] for basis in ("observed", "estimated")]
        uses, yuan = sum(item["count"] for item in amounts), sum(item["money"] for item in amounts)
        if uses or yuan:
            sums[row["tenant"]] = sums[row["tenant"]][0] + uses, sums[row["tenant"]][1] + yuan
            first = min(first, date.fromisoformat(row["period"]))
    since = datetime(first.year, first.month, first.day, tzinfo=UTC)
    days = max((now - since).total_seconds() / _SECONDS_PER_DAY, 1.0)
    return {name: (uses / days, yuan / days) for name, (uses, yuan) in sums.items()}


def days_left(remaining: float | None, floor: float | None, per_day: float) -> float | None:
    """Return how long a balance lasts, or None if it is unknown or nothing is spent."""
    if remaining is None or per_day <= 0:
        return None
    return round(max(remaining - (floor or 0.0), 0.0) / per_day, 2)
