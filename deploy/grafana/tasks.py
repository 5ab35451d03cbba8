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
            "Tasks a minute that the vendor accepted, by kind. Worry when it falls to nothing while tenants send.",
            PER_MINUTE,
            {"{{kind}}": per_minute("gateway_tasks_submitted_total", "kind", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Ended",
            "Tasks a minute that ended, by state. Worry when failures are more than a few in a hundred, or when fewer"
            " end than are submitted: then the active ones grow.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_tasks_finished_total", "state", where=(_TENANT,))},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Active",
            "Tasks that were accepted and have not ended, by kind, from the ledger. Worry when it grows while no more"
            " is submitted.",
            COUNT,
            {"{{kind}}": or_zero_if_redis_up(_active_tasks(), "kind")},
            width=THIRD,
            stacked=True,
        ),
        *(
            graph(
                f"Duration of tasks, {percent}%",
                "From submit to a successful end, by kind, of all tenants. The vendor does the work: worry when it"
                " rises while the checks below are not late.",
                SECONDS,
                {"{{kind}}": quantile(percent / 100, "gateway_task_duration_seconds", "kind", where=(_SUCCEEDED,))},
                width=THIRD,
                empty=_NO_FINISHED_TASKS,
            )
            for percent in (50, 95)
        ),
        graph(
            "Mean duration by tenant",
            "From submit to end, whatever the end and the kind. A tenant that alone is slow sends larger images, or"
            " other kinds.",
            SECONDS,
            {"{{tenant}}": mean("gateway_tenant_task_duration_seconds", "tenant", where=(_TENANT,))},
            width=THIRD,
            empty=_NO_FINISHED_TASKS,
        ),
        graph(
            "Submissions by outcome",
            "What became of submissions at the vendor, a minute, of all tenants. `unknown` may have been paid for and"
            " needs an operator; `exhausted` and `invalid-account` close an account; `misconfigured` is a key that"
            " cannot be opened, `redirected` a base address that is wrong, `busy` an HTTP 429.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_submissions_total", "outcome")},
        ),
        graph(
            "Reads by source",
            "Where reads of tasks were answered from: the memory of the process, the store (Redis), or the vendor."
            " The last is for what the store has forgotten or while it is away; worry when it stays.",
            PER_SECOND,
            {"{{source}}": rate("gateway_task_reads_total", "source")},
        ),
    ),
)

_POLLER_ROW = Row(
    "Watch and settlement",
    (
        graph(
            "Watched tasks",
            "Tasks that the processes ask the vendor about in turns. Worry when it is far from the active ones: those"
            " that are not watched are not seen to end.",
            COUNT,
            {"watched": or_zero_if_redis_up(max_by("gateway_poll_tasks"))},
            width=QUARTER,
        ),
        graph(
            "Checks overdue",
            "For how long the first check that nobody took has been due. Above a minute the processes do not keep up,"
            " or none is watching.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_poll_overdue_seconds"))},
            width=QUARTER,
            steps=rising_thresholds(30, 60),
        ),
        graph(
            "Lateness of checks",
            "How late checks begin after they were due. Worry above a few seconds: everybody who waits for a task"
            " waits so much longer.",
            SECONDS,
            {f"{each}%": quantile(each / 100, "gateway_poll_lag_seconds") for each in (50, 95, 99)},
            width=QUARTER,
            empty="No checks",
        ),
        graph(
            "Checks in progress",
            "Checks under way in all processes, and how many may be. At the limit they begin late.",
            COUNT,
            {
                "checks": sum_by("gateway_poll_checks_in_progress"),
                "limit": sum_by("gateway_poll_checks_limit"),
            },
            width=QUARTER,
        ),
        graph(
            "Checks by answer",
            "What checks were answered. Most say `running`. `silent` is a task that the vendor does not know,"
            " `unusable` an end without results, `nothing` no answer at all: worry when these stay.",
            PER_MINUTE,
            {"{{outcome}}": per_minute("gateway_poll_checks_total", "outcome")},
            width=THIRD,
            stacked=True,
        ),
        graph(
            "Checks claimed at once",
            "How many checks a process takes in one call, in the mean and at the top. Always at the top: there is more"
            " to check than the processes get round to.",
            COUNT,
            {"mean": mean("gateway_poll_batch_size"), "95%": quantile(0.95, "gateway_poll_batch_size")},
            width=THIRD,
            empty="No checks",
        ),
        graph(
            "Settlements",
            "Outcomes of submissions that could not be booked yet, since Redis is away, and reservations a minute whose"
            " process died before it knew its outcome. Both should be zero; the latter are now of unknown outcome.",
            COUNT,
            {
                "waiting to be booked": sum_by("gateway_settlements_pending"),
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
            "Given up",
            "Deliveries that were given up in the last 30 days. Their tenants may not know that tasks ended; an"
            " operator can send them again.",
            COUNT,
            {"given up": or_zero_if_redis_up(max_by("gateway_webhooks_failed"))},
            width=QUARTER,
            steps=RED_FROM_ONE,
        ).height(_LOW),
        figure(
            "Receivers waiting",
            "Receivers that something is still to be delivered to. One that stays is a tenant whose endpoint does not"
            " answer; many at once are our network.",
            COUNT,
            {"receivers": or_zero_if_redis_up(max_by("gateway_webhook_queues"))},
            width=QUARTER,
        ).height(_LOW),
        graph(
            "Deliveries overdue",
            "For how long the first delivery that nobody took has been due. Above five minutes the processes do not"
            " keep up, or none delivers.",
            SECONDS,
            {"overdue": or_zero_if_redis_up(max_by("gateway_webhook_overdue_seconds"))},
            steps=rising_thresholds(60, 300),
        ).height(_LOW),
        graph(
            "Attempts by state",
            "Attempts a minute by where the delivery stands after them: `pending` is tried again later, `failed` is"
            " given up, `off` is an address that said it is gone. Worry when `pending` outweighs `delivered`.",
            PER_MINUTE,
            {"{{state}}": per_minute("gateway_webhook_attempts_total", "state")},
            stacked=True,
        ),
        graph(
            "Age at the end, 95%",
            "How long after the end of its task a delivery was delivered, given up or turned off. Delivered ones take a"
            " second or two; worry above a minute.",
            SECONDS,
            {"{{state}}": quantile(0.95, "gateway_webhook_age_seconds", "state")},
            empty="No delivery has come to its end",
        ),
    ),
)

TASKS = Dashboard(
    "tasks",
    "tasks and webhooks",
    "What becomes of tasks, how long they take, whether the gateway looks after them in time, and whether tenants are"
    " told.",
    (_TASKS_ROW, _POLLER_ROW, _WEBHOOKS_ROW),
    variables=(Variable("tenant", "gateway_tenant_spent_yuan", "Which tenants to show, where tasks are by tenant."),),
)
