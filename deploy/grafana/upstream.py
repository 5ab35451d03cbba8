"""The dashboard of the upstream: balances, spending and errors."""

from __future__ import annotations

from deploy.grafana.layout import Dashboard, Row, Variable
from deploy.grafana.panels import (
    COUNT,
    DAYS,
    PER_MINUTE,
    PER_SECOND,
    QUARTER,
    RATIO,
    RED_FROM_ONE,
    SECONDS,
    THIRD,
    YUAN,
    bars,
    falling_thresholds,
    graph,
    rising_thresholds,
    states,
)
from deploy.grafana.queries import (
    increase_by,
    max_by,
    or_zero,
    or_zero_if_redis_up,
    per_hour,
    per_minute,
    quantile,
    rate,
    series,
    sum_by,
)

_ACCOUNT = 'account=~"$account"'
_NO_BALANCE = "No balance has been reported yet"
_REQUESTS = "gateway_upstream_requests_total"
_DURATION = "gateway_upstream_request_duration_seconds"
_ERROR_OUTCOMES = "unknown|not-sent|misconfigured|redirected|no_response|invalid|not_found|unreachable|transfer-aborted"
"""Outcomes of requests without a usable response; a refusal is usable."""


def _account(name: str, *where: str) -> str:
    return max_by(f"gateway_account_{name}", "account", where=(_ACCOUNT, *where))


def _days_left(unit: str) -> str:
    days = series("namespace_account_unit:gateway_account_remaining:days", _ACCOUNT, f'unit="{unit}"')
    return f"min by (account) ({days})"


def _state(state: str) -> str:
    return _account("state", f'state="{state}"')


def _unexplained_drop(unit: str) -> str:
    name = f"gateway_account_unexplained_{unit}_total"
    return or_zero_if_redis_up(increase_by(name, "account", where=(_ACCOUNT,), over="1h"), "account")


def _error_rate() -> str:
    ratio = series("namespace_operation:gateway_upstream_request_errors_per_requests:ratio_rate10m")
    return or_zero(f"max by (operation) ({ratio} >= 0)", "operation")


_BALANCES_ROW = Row(
    "Balances",
    (
        graph(
            "Prepaid uses left",
            "The last reported prepaid uses of each account, and its floor. Top up before the lines meet, unless the"
            " account may continue with money.",
            COUNT,
            {"{{account}}": _account("remaining_uses"), "{{account}} floor": _account("floor_uses")},
            empty=_NO_BALANCE,
        ),
        graph(
            "Money left",
            "The last reported money of each account, and its floor. Without uses and money left, tenants of that"
            " account get 402.",
            YUAN,
            {"{{account}}": _account("remaining_yuan"), "{{account}} floor": _account("floor_yuan")},
            empty=_NO_BALANCE,
        ),
        bars(
            "Days left, prepaid uses",
            "How long the prepaid uses above the floor last, at the mean rate of the last 7 days. Top up below a week,"
            " at once below a day. Accounts without spending are not shown.",
            DAYS,
            {"{{account}}": _days_left("uses")},
            width=QUARTER,
            steps=falling_thresholds(1, 7),
            empty="No spending in the last 7 days",
        ),
        bars(
            "Days left, money",
            "How long the money above the floor lasts, at the mean rate of the last 7 days. Money is spent only"
            " without prepaid uses left. Top up below a week, at once below a day.",
            DAYS,
            {"{{account}}": _days_left("yuan")},
            width=QUARTER,
            steps=falling_thresholds(1, 7),
            empty="No spending in the last 7 days",
        ),
        states(
            "State of accounts",
            "When each account was open, exhausted (no balance left: it opens after a top-up), or invalid (the vendor"
            " reports its key as unknown: it stays unusable until an operator reopens it).",
            {"{{account}}": f"{_state('exhausted')} + 2 * {_state('invalid')}"},
            {0: ("open", "green"), 1: ("exhausted", "yellow"), 2: ("invalid", "red")},
        ),
    ),
)

_SPENDING_ROW = Row(
    "Spending",
    (
        graph(
            "Uses spent by tasks",
            "Prepaid uses per hour of each account that finished tasks of the gateway took. Worry when the balance"
            " falls faster.",
            COUNT,
            {"{{account}}": per_hour("gateway_account_spent_uses_total", "account", where=(_ACCOUNT,))},
            width=QUARTER,
        ),
        graph(
            "Money spent by tasks",
            "Yuan per hour of each account that finished tasks of the gateway took. Worry when it starts although"
            " prepaid uses should have lasted.",
            YUAN,
            {"{{account}}": per_hour("gateway_account_spent_yuan_total", "account", where=(_ACCOUNT,))},
            width=QUARTER,
        ),
        graph(
            "Unexplained uses",
            "Prepaid uses that disappeared within an hour and that no task of the gateway explains. Above zero another"
            " client uses the key. Find it, or have the key renewed.",
            COUNT,
            {"{{account}}": _unexplained_drop("uses")},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ),
        graph(
            "Unexplained money",
            "Yuan that disappeared within an hour and that no task of the gateway explains. Above zero another client"
            " uses the key, or the vendor has raised its prices.",
            YUAN,
            {"{{account}}": _unexplained_drop("yuan")},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ),
        graph(
            "Age of the balance",
            "Time since a response last reported the balance. The vendor reports it only with tasks, so it is old"
            " without load; worry when it grows while tasks run: responses lack the balance.",
            SECONDS,
            {"{{account}}": _account("balance_age_seconds")},
            width=THIRD,
            empty=_NO_BALANCE,
        ),
        graph(
            "Open submissions",
            "Submissions of each account that have not ended. They follow the load; worry when they stay without new"
            " submissions, since each holds a use or money of its account.",
            COUNT,
            {"{{account}}": or_zero_if_redis_up(_account("open_submissions"), "account")},
            width=THIRD,
        ),
        graph(
            "Submissions of unknown outcome",
            "Sent without a usable response: they may have been charged. Each stays charged to its tenant until an"
            " operator refunds it, as described in the runbook.",
            COUNT,
            {"{{account}}": or_zero_if_redis_up(_account("unknown_submissions"), "account")},
            width=THIRD,
            steps=RED_FROM_ONE,
        ),
    ),
)

_VENDOR_ROW = Row(
    "Vendor",
    (
        graph(
            "Requests",
            "Requests to the vendor by operation: submit a task, check one, fetch a result. They follow the tasks;"
            " worry when checks stop while tasks are active.",
            PER_SECOND,
            {"{{operation}}": rate(_REQUESTS, "operation")},
            width=THIRD,
        ),
        graph(
            "Failed requests",
            "Requests per minute without a usable response, by operation and outcome. `unknown` may have been charged"
            " and is the worst; `not-sent` and `unreachable` are the network.",
            PER_MINUTE,
            {
                "{{operation}} {{outcome}}": per_minute(
                    _REQUESTS, "operation", "outcome", where=(f'outcome=~"{_ERROR_OUTCOMES}"',)
                )
            },
            width=THIRD,
        ),
        graph(
            "Share of failed requests",
            "Requests without a usable response, as a share of all, over 10 minutes. Worry when it stays above 5%.",
            RATIO,
            {"{{operation}}": _error_rate()},
            width=THIRD,
            steps=rising_thresholds(0.01, 0.05),
        ),
        *(
            graph(
                f"Duration of requests, {percent}%",
                "Duration of requests with a usable response, by operation. A submission includes the upload and takes"
                " seconds; a check takes well under one. Worry when either doubles.",
                SECONDS,
                {
                    "{{operation}}": quantile(
                        percent / 100, _DURATION, "operation", where=(f'outcome!~"{_ERROR_OUTCOMES}"',)
                    )
                },
                width=THIRD,
                empty="No requests",
            )
            for percent in (50, 95)
        ),
        graph(
            "Duration by outcome, 95%",
            "Duration of requests by outcome. A slow failure is a timeout, a quick one a refusal; worry when both"
            " become frequent.",
            SECONDS,
            {"{{operation}} {{outcome}}": quantile(0.95, _DURATION, "operation", "outcome")},
            width=THIRD,
            empty="No requests",
        ),
        graph(
            "Images fetched from URLs",
            "Fetches of an `image_url` per minute, by outcome. All but `done` and `overloaded` are up to callers and"
            " the servers of their images.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_image_fetches_total", "outcome")},
            width=THIRD,
        ),
        graph(
            "Duration of fetches from URLs, 95%",
            "Duration of fetches of an `image_url`, before anything is reserved. Worry when it nears the limit.",
            SECONDS,
            {"95%": quantile(0.95, "gateway_image_fetch_duration_seconds")},
            width=THIRD,
            empty="No requests",
        ),
        graph(
            "Connections in use",
            "Busy connections of all processes and their limit, by operation. At the limit requests wait.",
            COUNT,
            {
                "{{operation}}": sum_by("gateway_upstream_connections", "operation", where=('state="busy"',)),
                "{{operation}} limit": sum_by("gateway_upstream_connections_limit", "operation"),
            },
            width=THIRD,
        ),
        graph(
            "Waiting for a connection",
            "Requests that wait for a connection, by operation. Above zero for long: the vendor has become slow, or"
            " the limit on connections is too low for the load.",
            COUNT,
            {"{{operation}}": sum_by("gateway_upstream_waiting", "operation")},
            width=THIRD,
        ),
        graph(
            "Breakers open",
            "Processes that refuse requests to an address at once, since it could not be reached. Above zero"
            " submissions get 503 there; the breaker closes when the address responds again.",
            COUNT,
            {"{{upstream}}": or_zero(sum_by("gateway_upstream_breaker_open", "upstream"), "upstream")},
            width=THIRD,
            steps=RED_FROM_ONE,
        ),
    ),
)

UPSTREAM = Dashboard(
    "upstream",
    "upstream and accounts",
    "Balances of accounts and how long they last, spending, and requests to the vendor.",
    (_BALANCES_ROW, _SPENDING_ROW, _VENDOR_ROW),
    variables=(Variable("account", "gateway_account_open_submissions", "The accounts to show."),),
    time_from="now-24h",
)
