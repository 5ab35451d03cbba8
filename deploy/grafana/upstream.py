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
_NO_BALANCE = "No balance has been seen yet"
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
            "What the vendor last said is left of each account's prepaid uses, and the floor at which the gateway stops"
            " using it. Top up before the lines meet, unless the account may go on with money.",
            COUNT,
            {"{{account}}": _account("remaining_uses"), "{{account}} floor": _account("floor_uses")},
            empty=_NO_BALANCE,
        ),
        graph(
            "Money left",
            "What the vendor last said is left of each account's money, and its floor. Where neither uses nor money"
            " are left, tenants of that account get 402.",
            YUAN,
            {"{{account}}": _account("remaining_yuan"), "{{account}} floor": _account("floor_yuan")},
            empty=_NO_BALANCE,
        ),
        bars(
            "Days left, prepaid uses",
            "For how long the prepaid uses above the floor last, if each day is as the last 7 were in the mean. Top up"
            " below a week, at once below a day. Accounts that nothing was taken from are not shown.",
            DAYS,
            {"{{account}}": _days_left("uses")},
            width=QUARTER,
            steps=falling_thresholds(1, 7),
            empty="Nothing was taken in the last 7 days",
        ),
        bars(
            "Days left, money",
            "For how long the money above the floor lasts, if each day is as the last 7 were in the mean. Money is"
            " taken only when no prepaid uses are left. Top up below a week, at once below a day.",
            DAYS,
            {"{{account}}": _days_left("yuan")},
            width=QUARTER,
            steps=falling_thresholds(1, 7),
            empty="Nothing was taken in the last 7 days",
        ),
        states(
            "State of accounts",
            "When each account was open, exhausted (nothing left to spend: top up, and it opens by itself), or invalid"
            " (the vendor does not know its key: nobody can use it until an operator reopens it).",
            {"{{account}}": f"{_state('exhausted')} + 2 * {_state('invalid')}"},
            {0: ("open", "green"), 1: ("exhausted", "yellow"), 2: ("invalid", "red")},
        ),
    ),
)

_SPENDING_ROW = Row(
    "Books",
    (
        graph(
            "Spent by tasks",
            "Prepaid uses an hour that ended tasks of the gateway took from each account. Worry when the balance falls"
            " faster than that.",
            COUNT,
            {"{{account}}": per_hour("gateway_account_spent_uses_total", "account", where=(_ACCOUNT,))},
            width=QUARTER,
        ),
        graph(
            "Money spent by tasks",
            "Yuan an hour that ended tasks of the gateway took from each account. Worry when it begins where prepaid"
            " uses should have lasted.",
            YUAN,
            {"{{account}}": per_hour("gateway_account_spent_yuan_total", "account", where=(_ACCOUNT,))},
            width=QUARTER,
        ),
        graph(
            "Unexplained uses",
            "Prepaid uses that vanished within an hour and that no task of the gateway explains. Anything above zero:"
            " somebody else uses the key. Find out who, or have the key changed.",
            COUNT,
            {"{{account}}": _unexplained_drop("uses")},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ),
        graph(
            "Unexplained money",
            "Yuan that vanished within an hour and that no task of the gateway explains. Anything above zero: somebody"
            " else uses the key, or the vendor has raised its prices.",
            YUAN,
            {"{{account}}": _unexplained_drop("yuan")},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ),
        graph(
            "Balance last seen",
            "How long ago an answer told the balance. The vendor tells it only with tasks, so it is old when nothing is"
            " done; worry when tasks run and it grows: answers have lost their figures.",
            SECONDS,
            {"{{account}}": _account("balance_age_seconds")},
            width=THIRD,
            empty=_NO_BALANCE,
        ),
        graph(
            "Open submissions",
            "Submissions of each account that have not ended. They follow the load; worry when they stay while nothing"
            " is submitted, since each holds a use or money of its account.",
            COUNT,
            {"{{account}}": or_zero_if_redis_up(_account("open_submissions"), "account")},
            width=THIRD,
        ),
        graph(
            "Submissions of unknown outcome",
            "Sent, but no usable answer came: nobody knows whether they were paid for. Each stays charged to its tenant"
            " until an operator looks at it; the runbook says how.",
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
            "Requests to the vendor by operation: submit a task, check one, fetch a result. It follows the tasks;"
            " worry when checks stop while tasks are active.",
            PER_SECOND,
            {"{{operation}}": rate(_REQUESTS, "operation")},
            width=THIRD,
        ),
        graph(
            "Requests that went wrong",
            "Requests a minute that got no answer which can be used, by operation and outcome. `unknown` may have been"
            " paid for and is the worst; `not-sent` and `unreachable` are the network.",
            PER_MINUTE,
            {
                "{{operation}} {{outcome}}": per_minute(
                    _REQUESTS, "operation", "outcome", where=(f'outcome=~"{_ERROR_OUTCOMES}"',)
                )
            },
            width=THIRD,
        ),
        graph(
            "Share that went wrong",
            "Requests that got no answer which can be used, as a share of all, over 10 minutes. Worry when it stays"
            " above 5%.",
            RATIO,
            {"{{operation}}": _error_rate()},
            width=THIRD,
            steps=rising_thresholds(0.01, 0.05),
        ),
        *(
            graph(
                f"Duration of requests, {percent}%",
                "How long requests took that were answered, by operation. A submission includes the upload"
                " and takes seconds; a check takes well under one. Worry when either doubles.",
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
            "How long requests took by what came of them. A failure that takes long is a time limit, a quick one a"
            " refusal; worry when both become usual.",
            SECONDS,
            {"{{operation}} {{outcome}}": quantile(0.95, _DURATION, "operation", "outcome")},
            width=THIRD,
            empty="No requests",
        ),
        graph(
            "Connections in use",
            "Busy connections of all processes and how many there may be, by operation. At the limit requests"
            " wait for their turn.",
            COUNT,
            {
                "{{operation}}": sum_by("gateway_upstream_connections", "operation", where=('state="busy"',)),
                "{{operation}} limit": sum_by("gateway_upstream_connections_limit", "operation"),
            },
            width=THIRD,
        ),
        graph(
            "Waiting for a connection",
            "Requests that wait for their turn, by operation. Above zero for long: the vendor got slow, or the limit on"
            " connections is too low for the load.",
            COUNT,
            {"{{operation}}": sum_by("gateway_upstream_waiting", "operation")},
            width=THIRD,
        ),
        graph(
            "Breakers open",
            "Processes that give up requests to an address at once, since it could not be reached. Above zero"
            " submissions get 503 there; it closes by itself when the address answers again.",
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
    "What is left to spend at the vendor and for how long, whether the books agree with the balances, and how the"
    " vendor behaves.",
    (_BALANCES_ROW, _SPENDING_ROW, _VENDOR_ROW),
    variables=(Variable("account", "gateway_account_open_submissions", "Which accounts to show."),),
    time_from="now-24h",
)
