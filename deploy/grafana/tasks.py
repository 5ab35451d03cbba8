"""The dashboard of tasks and webhooks."""

from __future__ import annotations

from deploy.grafana.layout import Dashboard, Row, Variable
from deploy.grafana.panels import (
    COUNT,
    PER_MINUTE,
    PER_SECOND,
    QUARTER,
    RATIO,
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
_NO_FINISHED_TASKS = "No task has ended"

_SUCCEEDED = 'state="succeeded"'


def _active_tasks() -> str:
    """Sum the active tasks of all tenants by kind; every process exports the same."""
    return f"sum by (kind) ({max_by('gateway_tasks_active', 'tenant', 'kind', where=(_TENANT,))})"


_TASKS_ROW = Row(
    "Tasks",
    (
        graph(
            "Submitted",
            "Tasks per minute that the vendor accepted, by kind. Worry when it falls to zero while tenants submit.",
            PER_MINUTE,
            {"{{kind}}": per_minute("gateway_tasks_submitted_total", "kind", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Finished",
            "Finished tasks per minute, by state. Worry when more than a few in a hundred fail, or when fewer finish"
            " than are submitted: then the active ones grow.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_tasks_finished_total", "state", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Active",
            "Accepted tasks that have not ended, by kind, from Redis. Worry when it grows while the rate of"
            " submissions does not.",
            COUNT,
            {"{{kind}}": or_zero_if_redis_up(_active_tasks(), "kind")},
            width=THIRD,
            stacked=True,
        ),
        *(
            graph(
                f"Duration of tasks, {percent}%",
                "From submission to a successful end, by kind, of all tenants. The vendor does the work: worry when it"
                " rises although the checks below are not late.",
                SECONDS,
                {"{{kind}}": quantile(percent / 100, "gateway_task_duration_seconds", "kind", where=(_SUCCEEDED,))},
                width=THIRD,
                empty=_NO_FINISHED_TASKS,
            )
            for percent in (50, 95)
        ),
        graph(
            "Mean duration by tenant",
            "From submission to end, for all states and kinds. A single slow tenant sends larger images, or other"
            " kinds.",
            SECONDS,
            {"{{tenant}}": mean("gateway_tenant_task_duration_seconds", "tenant", where=(_TENANT,))},
            width=THIRD,
            empty=_NO_FINISHED_TASKS,
        ),
        graph(
            "Submissions by outcome",
            "Outcomes of submissions at the vendor per minute, of all tenants. `unknown` may have been charged and"
            " needs an operator; `exhausted` and `invalid-account` close an account; `misconfigured` is a key that"
            " can't be decrypted, `redirected` a wrong base address, `busy` an HTTP 429.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_submissions_total", "outcome")},
        ),
        graph(
            "Reads by source",
            "Where reads of tasks were served from: the memory of the process, Redis (store), or the vendor"
            " (upstream). The last is for tasks that Redis has lost or while it is unavailable; worry when it lasts.",
            PER_SECOND,
            {"{{source}}": rate("gateway_task_reads_total", "source")},
        ),
    ),
)

_POLLER_ROW = Row(
    "Polling and settlement",
    (
        graph(
            "Polled tasks",
            "Tasks that the processes check at the vendor periodically. Worry when it differs much from the active"
            " ones: the ends of unpolled tasks are not noticed.",
            COUNT,
            {"polled": or_zero_if_redis_up(max_by("gateway_poll_tasks"))},
            width=QUARTER,
        ),
        graph(
            "Checks overdue",
            "How long the first unclaimed check has been overdue. Above a minute the processes do not keep up, or no"
            " worker runs.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_poll_overdue_seconds"))},
            width=QUARTER,
            steps=rising_thresholds(30, 60),
        ),
        graph(
            "Lateness of checks",
            "How late checks begin. Worry above a few seconds: all clients that wait for a task wait as much longer.",
            SECONDS,
            {f"{each}%": quantile(each / 100, "gateway_poll_lag_seconds") for each in (50, 95, 99)},
            width=QUARTER,
            empty="No checks",
        ),
        graph(
            "Checks in progress",
            "Concurrent checks in all processes, and their limit. At the limit checks begin late.",
            COUNT,
            {
                "checks": sum_by("gateway_poll_checks_in_progress"),
                "limit": sum_by("gateway_poll_checks_limit"),
            },
            width=QUARTER,
        ),
        graph(
            "Checks in the event loop",
            "Share of its event loop that the checks of a process take, the largest. They fill what requests leave up"
            " to 60%, and fall back to 15% where requests need the rest: then checks begin late.",
            RATIO,
            {"checks": max_by("gateway_poll_loop_share")},
            width=THIRD,
            maximum=1,
        ),
        graph(
            "Checks by outcome",
            "Outcomes of checks. Most are `running`. `not_found` is a task that the vendor reports as unknown,"
            " `invalid` an end without usable results, `no_response` a timeout or failure: worry when these last.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_poll_checks_total", "outcome")},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Checks claimed at once",
            "How many checks a process claims in one call, mean and 95%. Always at the maximum: there are more checks"
            " than the processes can make.",
            COUNT,
            {"mean": mean("gateway_poll_batch_size"), "95%": quantile(0.95, "gateway_poll_batch_size")},
            width=THIRD,
            empty="No checks",
        ),
        graph(
            "Settlements",
            "Outcomes of submissions that could not be stored yet, as when Redis is unavailable, and reservations per"
            " minute whose process died before their settlement. Both should be zero; the latter are settled as"
            " unknown.",
            COUNT,
            {
                "pending": sum_by("gateway_settlements_pending"),
                "expired per minute": per_minute("gateway_reservations_expired_total"),
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
            "Failed deliveries",
            "Deliveries that failed for good in the last 30 days. Their tenants may not have noticed the end of tasks;"
            " an operator can send them again.",
            COUNT,
            {"failed": or_zero_if_redis_up(max_by("gateway_webhooks_failed"))},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ).height(_LOW),
        figure(
            "Queues",
            "Webhook queues with pending deliveries, one per receiving host. One that stays is a tenant whose server"
            " does not respond; many at once are our network.",
            COUNT,
            {"queues": or_zero_if_redis_up(max_by("gateway_webhook_queues"))},
            width=QUARTER,
        ).height(_LOW),
        graph(
            "Deliveries overdue",
            "How long the first unclaimed delivery has been overdue. Above five minutes the processes do not keep up,"
            " or no worker runs.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_webhook_overdue_seconds"))},
            steps=rising_thresholds(60, 300),
        ).height(_LOW),
        graph(
            "Attempts by state",
            "Attempts per minute by the state of the delivery after them: `pending` is retried later, `failed` is"
            " final, `off` is a URL that responded with 410. Worry when `pending` outweighs `delivered`.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_webhook_attempts_total", "state")},
            stacked=True,
        ),
        graph(
            "Age at the end, 95%",
            "Time from the end of the task until its delivery was delivered, failed or disabled. Successful ones take"
            " a second or two; worry above a minute.",
            SECONDS,
            {"{{state}}": quantile(0.95, "gateway_webhook_age_seconds", "state")},
            empty="No delivery has ended",
        ),
    ),
)

TASKS = Dashboard(
    "tasks",
    "tasks and webhooks",
    "Tasks, their duration, the checks of running tasks, and webhooks.",
    (_TASKS_ROW, _POLLER_ROW, _WEBHOOKS_ROW),
    variables=(Variable("tenant", "gateway_tasks_active", "The tenants to show on panels by tenant."),),
)
