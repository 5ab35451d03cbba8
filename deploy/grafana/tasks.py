"""The dashboard of tasks and webhooks."""

from __future__ import annotations

from deploy.grafana.layout import Dashboard, Row, Variable
from deploy.grafana.panels import (
    COUNT,
    PER_MINUTE,
    PER_SECOND,
    QUARTER,
    RED_FROM_ONE,
    SECONDS,
    THIRD,
    figure,
    graph,
    rising_thresholds,
)
from deploy.grafana.queries import (
    max_by,
    mean,
    or_zero_if_redis_up,
    per_minute,
    quantile,
    rate,
    sum_by,
)

_TENANT = 'tenant=~"$tenant"'
_LOW = 6
_NO_FINISHED_TASKS = "No finished task"

_SUCCEEDED = 'state="succeeded"'


def _active_tasks() -> str:
    """Sum the active tasks of all tenants by kind; every process exports the same."""
    return f"sum by (kind) ({max_by('gateway_tasks_active', 'tenant', 'kind', where=(_TENANT,))})"


_TASKS_ROW = Row(
    "Tasks",
    (
        graph(
            "Submitted",
            "Tasks a minute that the vendor accepted, by kind. Worry when they drop to zero while tenants submit.",
            PER_MINUTE,
            {"{{kind}}": per_minute("gateway_tasks_submitted_total", "kind", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Ended",
            "Tasks a minute that ended, by state. Worry when more than a few percent fail, or when fewer end than"
            " are submitted: then the active ones grow.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_tasks_finished_total", "state", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Active",
            "Accepted tasks that have not ended, by kind, from the ledger. Worry when they grow while submissions"
            " do not.",
            COUNT,
            {"{{kind}}": or_zero_if_redis_up(_active_tasks(), "kind")},
            width=THIRD,
            stacked=True,
        ),
        *(
            graph(
                f"Duration of tasks, {percent}%",
                "From submit to a successful end, by kind, of all tenants. The vendor does the work: worry when it"
                " grows while the checks below are not late.",
                SECONDS,
                {"{{kind}}": quantile(percent / 100, "gateway_task_duration_seconds", "kind", where=(_SUCCEEDED,))},
                width=THIRD,
                empty=_NO_FINISHED_TASKS,
            )
            for percent in (50, 95)
        ),
        graph(
            "Mean duration by tenant",
            "From submit to any end, of any kind. A single slow tenant sends larger images, or other kinds.",
            SECONDS,
            {"{{tenant}}": mean("gateway_tenant_task_duration_seconds", "tenant", where=(_TENANT,))},
            width=THIRD,
            empty=_NO_FINISHED_TASKS,
        ),
        graph(
            "Submissions by outcome",
            "Outcomes of submissions at the vendor, a minute, of all tenants. `unknown` may have been charged and"
            " needs an operator; `exhausted` and `invalid-account` close an account; `misconfigured` is a key that"
            " cannot be decrypted, `redirected` a wrong base URL, `busy` an HTTP 429.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_submissions_total", "outcome")},
        ),
        graph(
            "Reads by source",
            "Reads of tasks from the memory of the process, from the store (Redis), or from the vendor. The vendor"
            " is used for expired tasks and during an outage of Redis; worry when that lasts.",
            PER_SECOND,
            {"{{source}}": rate("gateway_task_reads_total", "source")},
        ),
    ),
)

_POLLER_ROW = Row(
    "Poller and settlement",
    (
        graph(
            "Polled tasks",
            "Tasks that the processes check in turns. Worry when they differ much from the active ones: the end of"
            " an unpolled task is not noticed.",
            COUNT,
            {"watched": or_zero_if_redis_up(max_by("gateway_poll_tasks"))},
            width=QUARTER,
        ),
        graph(
            "Checks overdue",
            "How long the oldest unclaimed check has been due. Above a minute the processes do not keep up, or none"
            " is polling.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_poll_overdue_seconds"))},
            width=QUARTER,
            steps=rising_thresholds(30, 60),
        ),
        graph(
            "Lateness of checks",
            "How late checks start. Worry above a few seconds: every waiting client waits that much longer.",
            SECONDS,
            {f"{percent}%": quantile(percent / 100, "gateway_poll_lag_seconds") for percent in (50, 95, 99)},
            width=QUARTER,
            empty="No checks",
        ),
        graph(
            "Checks in progress",
            "Concurrent checks in all processes, and their limit. At the limit they start late.",
            COUNT,
            {
                "checks": sum_by("gateway_poll_checks_in_progress"),
                "limit": sum_by("gateway_poll_checks_limit"),
            },
            width=QUARTER,
        ),
        graph(
            "Checks by outcome",
            "Outcomes of checks, mostly `running`. `not_found` is a task unknown to the vendor, `invalid` an"
            " unusable response, `no_response` none at all: worry when these last.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_poll_checks_total", "outcome")},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Checks claimed at once",
            "Checks that a process claims in one call: mean and maximum. Constantly at the maximum, the processes"
            " do not keep up.",
            COUNT,
            {"mean": mean("gateway_poll_batch_size"), "95%": quantile(0.95, "gateway_poll_batch_size")},
            width=THIRD,
            empty="No checks",
        ),
        graph(
            "Settlements",
            "Settlements that wait for Redis, and reservations a minute whose process died before their outcome."
            " Both should be zero; the latter are now of unknown outcome.",
            COUNT,
            {
                "waiting": sum_by("gateway_settlements_pending"),
                "expired a minute": per_minute("gateway_reservations_expired_total"),
            },
            width=THIRD,
            steps=RED_FROM_ONE,
        ),
    ),
)

_WEBHOOKS_ROW = Row(
    "Webhooks",
    (
        figure(
            "Failed",
            "Deliveries that failed for good in the last 30 days. Their tenants may not know that tasks ended; an"
            " operator can redeliver them.",
            COUNT,
            {"failed": or_zero_if_redis_up(max_by("gateway_webhooks_failed"))},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ).height(_LOW),
        figure(
            "Receivers with deliveries",
            "Receivers with pending deliveries. A lasting one is a tenant whose endpoint does not respond; many at"
            " once are our network.",
            COUNT,
            {"receivers": or_zero_if_redis_up(max_by("gateway_webhook_queues"))},
            width=QUARTER,
        ).height(_LOW),
        graph(
            "Deliveries overdue",
            "How long the oldest unclaimed delivery has been due. Above five minutes the processes do not keep up,"
            " or none delivers.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_webhook_overdue_seconds"))},
            steps=rising_thresholds(60, 300),
        ).height(_LOW),
        graph(
            "Attempts by state",
            "Attempts a minute by the resulting state: `pending` is retried later, `failed` has no retry left,"
            " `off` is a URL that responded 410. Worry when `pending` outweighs `delivered`.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_webhook_attempts_total", "state")},
            stacked=True,
        ),
        graph(
            "Age at the last attempt, 95%",
            "Time from the end of a task to the last attempt of its delivery. Successful ones take a second or two;"
            " worry above a minute.",
            SECONDS,
            {"{{state}}": quantile(0.95, "gateway_webhook_age_seconds", "state")},
            empty="No finished delivery",
        ),
    ),
)

TASKS = Dashboard(
    "tasks",
    "tasks and webhooks",
    "Outcome and duration of tasks, lateness of their checks, and webhooks.",
    (_TASKS_ROW, _POLLER_ROW, _WEBHOOKS_ROW),
    variables=(Variable("tenant", "gateway_tenant_spent_yuan", "Tenants to show, for metrics by tenant."),),
)
