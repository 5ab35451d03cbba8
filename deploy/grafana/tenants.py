"""The dashboard of tenants: quota and spending."""

from __future__ import annotations

from deploy.grafana.layout import Dashboard, Row, Variable
from deploy.grafana.panels import (
    COUNT,
    PER_MINUTE,
    QUARTER,
    RATIO,
    SECONDS,
    THIRD,
    YUAN,
    bars,
    figure,
    graph,
    rising_thresholds,
)
from deploy.grafana.queries import max_by, or_zero_if_redis_up, per_hour, per_minute, series

_TENANT = 'tenant=~"$tenant"'
_NO_LIMITS = "No tenant has a limit"
_SPENT_METRICS = (("Yuan", "gateway_tenant_spent_yuan", YUAN), ("Uses", "gateway_tenant_spent_uses", COUNT))
_SPENT_WINDOWS = (
    ("today", "since midnight", "day"),
    ("this month", "since the first of the month", "month"),
    ("in total", "ever", "total"),
)
_EXACT_NOTE = "Exact, from the ledger: what limits and `gateway report` count, less refunds; calendar time in UTC."
_RATE_NOTE = (
    "Counted by the processes when tasks end: a restart resets the counters, so the exact sums are in the row above."
)


def _quota(name: str, *where: str) -> str:
    return max_by(f"gateway_quota_{name}", "tenant", "policy", where=(_TENANT, *where))


def _used_ratio() -> str:
    return f"({_quota('used')} + {_quota('reserved')}) / ({_quota('limit')} > 0)"


def _time_until_limit(window: str, over: str, before: str) -> str:
    """Seconds until a limit is reached at the recent rate, if that is before its window resets."""
    where = f'policy=~"{window}-.*"'
    left = f"clamp_min({_quota('limit', where)} - {_quota('used', where)} - {_quota('reserved', where)}, 0)"
    used = series("gateway_quota_used", _TENANT, where)
    pace = f"max by (tenant, policy) (deriv({used}[{over}]))"
    return f"{left} / ({pace} > 0) < {before}"


def _reached() -> str:
    return max_by("gateway_quota_threshold_reached", "tenant", "policy", where=(_TENANT,))


_FORECASTS = (
    ("hour", "10m", "3600 - time() % 3600"),
    ("day", "1h", "86400 - time() % 86400"),
    ("month", "6h", "(scalar(days_in_month()) + 1 - scalar(day_of_month())) * 86400 - time() % 86400"),
    ("total", "6h", "30 * 86400"),
)
"""Windows, the range of their rate, and the seconds until they reset."""


def _spent(metric: str, window: str, by: str = "") -> str:
    """What the chosen tenants have spent in the current window, or zero."""
    each = max_by(metric, "tenant", "kind", where=(_TENANT, f'window="{window}"'))
    if not by:
        return or_zero_if_redis_up(f"sum({each})")
    return or_zero_if_redis_up(f"topk(15, sum by ({by}) ({each}))", by)


_QUOTA_ROW = Row(
    "Quota",
    (
        bars(
            "Limit usage",
            "Used and reserved, as a share of the limit, by tenant and policy. At 100% the tenant gets 429 until the"
            " window resets; raise the limit before, or let it take effect.",
            RATIO,
            {"{{tenant}} {{policy}}": f"topk(20, {_used_ratio()})"},
            steps=rising_thresholds(0.8, 0.95),
            maximum=1,
            empty=_NO_LIMITS,
        ),
        graph(
            "Limit usage over time",
            "Used and reserved as a share of the limit, over time. Windows reset to zero; a line that reaches 100%"
            " every day is a limit that is too low.",
            RATIO,
            {"{{tenant}} {{policy}}": _used_ratio()},
            steps=rising_thresholds(0.8, 0.95),
            empty=_NO_LIMITS,
        ),
        graph(
            "Limits that run out before they reset",
            "The time until a limit is reached at the recent rate: of the last 10 minutes for an hour's limit, of the"
            " last hour for a day's, of the last 6 hours for a month's and for a total. Only limits that run out"
            " before their reset are shown, and totals that run out within 30 days. Just after a reset the rate is not"
            " known yet.",
            SECONDS,
            {"{{tenant}} {{policy}}": " or ".join(_time_until_limit(*each) for each in _FORECASTS)},
            width=THIRD,
            empty="No limit runs out at this rate",
        ),
        graph(
            "Denials",
            "Refused submissions per minute, by tenant and policy; `balance` means that no account could pay, which"
            " needs a top-up. A tenant that stays here retries without regard to Retry-After.",
            PER_MINUTE,
            {
                "{{tenant}} {{policy}}": per_minute(
                    "gateway_quota_denials_total", "tenant", "policy", where=(_TENANT,)
                ),
                "{{tenant}} balance": per_minute("gateway_balance_denials_total", "tenant", where=(_TENANT,)),
            },
            width=THIRD,
        ),
        bars(
            "Limits above a threshold",
            "Used share of the limits that have reached a threshold of their `warn_at` in the current window. Each was"
            " reported to the tenant's webhook once. Worry when it is early in the window.",
            RATIO,
            {"{{tenant}} {{policy}}": f"topk(20, {_quota('used')} / ({_quota('limit')} > 0) and ({_reached()} == 1))"},
            width=THIRD,
            steps=rising_thresholds(0.8, 0.95),
            maximum=1,
            empty="No threshold is reached",
        ),
    ),
)

_SPENDING_ROW = Row(
    "Spent (exact)",
    (
        figure(
            "Tenants",
            "Number of tenants, selected or not. Worry when it falls: the tokens of deleted tenants are refused.",
            COUNT,
            {"tenants": or_zero_if_redis_up(max_by("gateway_tenants"))},
            width=QUARTER,
        ),
        *(
            figure(
                f"{name} {title}",
                f"{name} that the selected tenants have spent {text}. {_EXACT_NOTE} Worry when it is more than the"
                " budget, whatever the limits.",
                unit,
                {"spent": _spent(metric, window)},
                width=QUARTER if unit == YUAN else THIRD,
                decimals=2 if unit == YUAN else 0,
            )
            for name, metric, unit in _SPENT_METRICS
            for title, text, window in _SPENT_WINDOWS
        ),
        *(
            bars(
                f"{name} {title} by {by}",
                f"What was spent {text}, by {by}: the 15 largest. {_EXACT_NOTE} Worry about an unusual one.",
                unit,
                {f"{{{{{by}}}}}": _spent(metric, window, by)},
                width=THIRD,
            )
            for name, metric, unit in _SPENT_METRICS
            for by in ("tenant", "kind")
            for title, text, window in _SPENT_WINDOWS
        ),
    ),
)

_RATES_ROW = Row(
    "Rates",
    (
        graph(
            "Money by tenant",
            f"Yuan per hour of finished tasks. {_RATE_NOTE} Worry about an unannounced rise.",
            YUAN,
            {"{{tenant}}": per_hour("gateway_spent_yuan_total", "tenant", where=(_TENANT,))},
            stacked=True,
        ),
        graph(
            "Money by kind",
            f"Yuan per hour of finished tasks by kind. {_RATE_NOTE} Worry when a kind costs more without more tasks:"
            " the vendor has raised its price.",
            YUAN,
            {"{{kind}}": per_hour("gateway_spent_yuan_total", "kind", where=(_TENANT,))},
            stacked=True,
        ),
        graph(
            "Prepaid uses by tenant",
            "Prepaid uses per hour of finished tasks; while some are left, tasks cost these and no money."
            f" {_RATE_NOTE} Worry about an unannounced rise.",
            COUNT,
            {"{{tenant}}": per_hour("gateway_spent_uses_total", "tenant", where=(_TENANT,))},
            stacked=True,
        ),
        graph(
            "Prepaid uses by kind",
            f"Prepaid uses per hour of finished tasks by kind. {_RATE_NOTE} Worry when they run out sooner than"
            " planned.",
            COUNT,
            {"{{kind}}": per_hour("gateway_spent_uses_total", "kind", where=(_TENANT,))},
            stacked=True,
        ),
        graph(
            "Tasks submitted",
            "Accepted tasks per minute by tenant. Worry when a tenant sends much more than announced, or nothing.",
            PER_MINUTE,
            {"{{tenant}}": per_minute("gateway_tasks_submitted_total", "tenant", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Costs by basis",
            "How the cost of finished tasks is known, of all tenants: observed in the balance, estimated from an"
            " earlier price if tasks overlapped, or unknown. Many unknown ones: the vendor has stopped reporting its"
            " balance.",
            PER_MINUTE,
            {"{{basis}}": per_minute("gateway_task_costs_total", "basis")},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Idempotent replays",
            "Submissions per minute, of all tenants, that repeated a key and got the first submission's task without a"
            " second charge. Some are normal retries; many are a client in a loop.",
            PER_MINUTE,
            {"replays": per_minute("gateway_idempotent_replays_total")},
            width=THIRD,
        ),
    ),
)

TENANTS = Dashboard(
    "tenants",
    "tenants and spend",
    "Spending and limits by tenant. Tenants beyond the first 200 are combined as `other`.",
    (_QUOTA_ROW, _SPENDING_ROW, _RATES_ROW),
    variables=(Variable("tenant", "gateway_tasks_active", "The tenants to show."),),
    time_from="now-24h",
)
