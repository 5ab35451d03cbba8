"""The landing dashboard: what is wrong now."""

from __future__ import annotations

from grafana_foundation_sdk.builders import dashboard
from grafana_foundation_sdk.models.dashboard import DashboardLinkType

from deploy.grafana.layout import Dashboard, Row
from deploy.grafana.panels import (
    COUNT,
    DAYS,
    EIGHTH,
    PER_SECOND,
    QUARTER,
    RATIO,
    RED_FROM_ONE,
    SECONDS,
    THIRD,
    Panel,
    alert_table,
    bars,
    falling_thresholds,
    figure,
    graph,
    rising_thresholds,
)
from deploy.grafana.queries import max_by, only_gateways, or_zero, or_zero_if_redis_up, quantile, rate, series

_ALERTS = 'alertname=~"Gateway.+"'
_FIRING = 'alertstate="firing"'
_MAX_BARS = 15
_NEAR_LIMIT = 0.8


def _linked(name: str, *panels: Panel) -> tuple[Panel, ...]:
    """Add a link to the dashboard with the details."""
    url = f"/d/gateway-{name}?${{__url_time_range}}&${{__all_variables}}"
    link = dashboard.DashboardLink(f"Details: {name}").type(DashboardLinkType.LINK).url(url)
    return tuple(panel.links([link]) for panel in panels)


def _firing(severity: str) -> str:
    alerts = series("ALERTS", _ALERTS, _FIRING, f'severity="{severity}"')
    return or_zero(f"count({alerts})")


def _firing_since() -> str:
    """The milliseconds since the epoch at which each firing alert became active, by its labels."""
    active = f"{series('ALERTS_FOR_STATE', _ALERTS)} and ignoring (alertstate) {series('ALERTS', _ALERTS, _FIRING)}"
    return f'label_replace(1000 * ({active}), "runbook", "$1", "alertname", "(.+)")'


def _bad_ratio() -> str:
    bad = series("namespace_sli:gateway_sli_bad_requests_per_requests:ratio_rate5m", 'sli="availability"')
    return or_zero(f"max({bad} >= 0)")


def _unusable_accounts() -> str:
    states = max_by("gateway_account_state", "account", "state", where=('state!="open"',))
    return or_zero_if_redis_up(f"sum({states})")


def _down() -> str:
    targets = series("up", 'job="imaging-gateway"')
    return f"sum({targets} == bool 0)"


def _denials() -> str:
    denials = f"sum by (tenant, policy) (rate({series('gateway_quota_denials_total')}[5m]))"
    return f"topk({_MAX_BARS}, 60 * {denials} > 0)"


_STATE_ROW = Row(
    "Now",
    (
        figure(
            "Pages",
            "Alerts that need a person now. The table below names them, and leads to their entries in the runbook.",
            COUNT,
            {"firing": _firing("page")},
            steps=RED_FROM_ONE,
            width=EIGHTH,
        ),
        figure(
            "Tickets",
            "Alerts for the next working day.",
            COUNT,
            {"firing": _firing("ticket")},
            steps=((None, "green"), (1, "yellow")),
            width=EIGHTH,
        ),
        *_linked(
            "service",
            figure(
                "Processes down",
                "Processes that do not respond to Prometheus. One of several may be a rollout, all are an outage.",
                COUNT,
                {"down": _down()},
                steps=RED_FROM_ONE,
                width=EIGHTH,
            ),
            figure(
                "Failed requests",
                "Share of the tenants' requests with a status of 500 or above, over 5 minutes. The objective allows"
                " 0.1%.",
                RATIO,
                {"failed": _bad_ratio()},
                steps=rising_thresholds(0.001, 0.0144),
                decimals=2,
                width=EIGHTH,
            ),
        ),
        *_linked(
            "tasks",
            figure(
                "Checks overdue",
                "How long the first unclaimed check of a task has been overdue: the lag of the poller. Above a minute"
                " the processes do not keep up, or no worker runs.",
                SECONDS,
                {"overdue": or_zero_if_redis_up(max_by("gateway_poll_overdue_seconds"))},
                steps=rising_thresholds(30, 60),
                width=EIGHTH,
            ),
        ),
        *_linked(
            "upstream",
            figure(
                "Accounts that can't pay",
                "Accounts that are exhausted (top them up) or invalid (the vendor reports the key as unknown).",
                COUNT,
                {"accounts": _unusable_accounts()},
                steps=RED_FROM_ONE,
                width=EIGHTH,
            ),
        ),
        *_linked(
            "service",
            figure(
                "Last rollout",
                "Time since the newest process started: a rollout, a restart, or an added replica. The cause of a"
                " problem that began then is probably there.",
                SECONDS,
                {"ago": f"time() - max({only_gateways(series('process_start_time_seconds'))})"},
                width=EIGHTH,
            ),
            figure(
                "Versions",
                "Processes by version. Two versions for long are a rollout that does not end.",
                COUNT,
                {"{{version}}": f"count by (version) ({series('gateway_build_info')})"},
                width=EIGHTH,
            ),
        ),
    ),
)

_CAUSES_ROW = Row(
    "What and who",
    (
        alert_table(
            "Alerts firing",
            "Each firing alert with its labels, and since when its condition holds. `runbook` leads to its entry in the"
            " runbook: its meaning, what to check, what to do.",
            _firing_since(),
        ),
        *_linked(
            "upstream",
            bars(
                "Accounts by days left",
                "How long the prepaid uses and the money above the floors last, at the mean rate of the last 7 days,"
                " the least first. Top up below a week, at once below a day. Accounts without spending are not shown.",
                DAYS,
                {
                    "{{account}} {{unit}}": f"bottomk({_MAX_BARS}, min by (account, unit) "
                    f"({series('namespace_account_unit:gateway_account_remaining:days')}))"
                },
                width=QUARTER,
                steps=falling_thresholds(1, 7),
                empty="No spending in the last 7 days",
            ),
        ),
        *_linked(
            "tenants",
            bars(
                "Tenants near a limit",
                "Limits that are used to more than 80%, with what running tasks hold. At 100% the tenant gets 429 until"
                " the window resets.",
                RATIO,
                {
                    "{{tenant}} {{policy}}": f"topk({_MAX_BARS}, max by (tenant, policy) "
                    f"({series('namespace_tenant_policy:gateway_quota_used_ratio:max')}) > {_NEAR_LIMIT})"
                },
                width=QUARTER,
                steps=rising_thresholds(_NEAR_LIMIT, 0.95),
                maximum=1,
                empty="No tenant is near a limit",
            ),
        ),
    ),
)

_TRENDS_ROW = Row(
    "Load",
    (
        *_linked(
            "service",
            graph(
                "Responses by status",
                "Responses to tenants. Worry about any lasting 5xx, and about a line that falls to zero. A vertical"
                " line is the start of a process.",
                PER_SECOND,
                {"{{status}}": rate("gateway_http_requests_total", "status", where=('port="tenants"',))},
                width=THIRD,
                stacked=True,
            ),
        ),
        *_linked(
            "tasks",
            graph(
                "Running tasks, and lateness of their checks",
                "Tasks that are checked at the vendor, and the seconds within which 99% of their checks begin. Worry"
                " when both grow: the ends of tasks are noticed late.",
                COUNT,
                {
                    "running": or_zero_if_redis_up(max_by("gateway_poll_tasks")),
                    "late, seconds": quantile(0.99, "gateway_poll_lag_seconds"),
                },
                width=THIRD,
            ),
        ),
        *_linked(
            "tenants",
            bars(
                "Denials per minute",
                "Submissions refused by a limit over the last 5 minutes, by tenant and policy. A tenant that stays here"
                " retries without regard to Retry-After, or needs a higher limit.",
                COUNT,
                {"{{tenant}} {{policy}}": _denials()},
                width=THIRD,
                empty="No denials",
            ),
        ),
    ),
)

NOW = Dashboard(
    "now",
    "now",
    "Start here: what is wrong now, since when, and where to continue. The other dashboards have the details.",
    (_STATE_ROW, _CAUSES_ROW, _TRENDS_ROW),
)
