"""JSON and CSV of the tenants' API."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, overload

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from service.domain import ledger, tasks
from service.domain.errors import FieldError, InvalidOptions
from service.domain.ledger import (
    UNIT_MONEY,
    Measure,
    ReservationState,
    Tally,
    count_charged_tasks,
    sum_charged_fen,
    sum_charged_uses,
)
from service.domain.tasks import ArtifactName, CostBasis, Kind, State
from service.domain.tenants import Window
from service.domain.thresholds import Threshold
from service.usecases import reports
from service.usecases.caches import CachedTask, DurationEstimator
from service.usecases.reports import (
    BalanceSuggestion,
    FlaggedSubmission,
    Group,
    Interval,
    PolicyReport,
    QuotaReport,
    SubmissionStatus,
    TaskReport,
    UsageReport,
)

FEN_PER_YUAN = 100
Yuan = Annotated[float, Meta(description="Money in yuan (CNY).")]
PRIVATE_HEADERS = {"Cache-Control": "private, no-cache"}
"""For responses with data of a tenant."""
REPLAYED_HEADERS = {"Idempotent-Replayed": "true"}
"""For responses about an earlier submission under the same idempotency key."""


class Amount(Struct, frozen=True):
    """Prepaid uses and money."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class Cost(Struct, frozen=True):
    """Cost of a task."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan
    basis: CostBasis


class Artifact(Struct, frozen=True):
    """A result."""

    name: ArtifactName
    url: Annotated[str, Meta(description="At the upstream, which may remove it. Secrets in it are left out.")]
    href: Annotated[str, Meta(description="Path to fetch it through the gateway.")]


class TaskError(Struct, frozen=True):
    """Reason why a task failed."""

    code: Annotated[str, Meta(description="The kind of failure, for programs.", examples=["task-failed", "task-lost"])]
    detail: Annotated[str, Meta(description="The reason in words.")]


class Links(Struct, frozen=True):
    """Paths of a task."""

    self: Annotated[str, Meta(description="To read the task.")]
    events: Annotated[str, Meta(description="To stream its changes.")]


class Task(Struct, frozen=True):
    """A task: an image that the upstream has accepted."""

    id: str
    kind: Kind
    state: State
    created_at: datetime
    updated_at: Annotated[datetime, Meta(description="Time of its last change.")]
    finished_at: Annotated[datetime | None, Meta(description="Null until it has ended.")]
    options: Annotated[dict[str, Any], Meta(description="All options of its kind, including defaults.")]
    metadata: Annotated[dict[str, str], Meta(description="As sent.")]
    artifacts: Annotated[list[Artifact], Meta(description="The results, after success.")]
    error: Annotated[TaskError | None, Meta(description="Null unless it has failed.")]
    cost: Cost
    links: Links


class TaskList(Struct, frozen=True):
    """Tasks, newest first. Continue with `next_cursor` until it is null."""

    items: list[Task]
    next_cursor: str | None


class OperatorTask(Task, frozen=True, kw_only=True):
    """A task of any tenant. Its paths are those of the tenants' port."""

    submission: Annotated[str, Meta(description="The `id` of its submission.")]
    tenant: Annotated[str | None, Meta(description="Also of a deleted one. Null if unknown.")]
    account: Annotated[str | None, Meta(description="Null once it is deleted.")]


class OperatorTaskList(Struct, frozen=True):
    """Tasks of a tenant, newest first. Continue with `next_cursor` until it is null."""

    items: list[OperatorTask]
    next_cursor: str | None


class Policy(Struct, frozen=True):
    """A policy of the tenant; `window` and `resets_at` are null if it never resets."""

    policy: Annotated[str, Meta(description="Its name in problems and in the `RateLimit` header.")]
    unit: Annotated[str, Meta(description="`tasks`, `money` (yuan) or `active` (tasks at once).")]
    window: Window | None
    limit: float
    used: float
    reserved: Annotated[float, Meta(description="Held for open submissions.")]
    remaining: float
    overrun: Annotated[float | None, Meta(description="Spent beyond a limit on money by final prices.")]
    resets_at: datetime | None


class QuotaThreshold(Struct, frozen=True):
    """A limit of which so much was used that you are told; `resets_at` is null if it never resets."""

    tenant: str
    policy: Annotated[str, Meta(description="Its name in `/v1/quota`.")]
    unit: Annotated[str, Meta(description="`tasks` or `money` (yuan).")]
    window: Window
    threshold: Annotated[int, Meta(description="The share of the limit that was reached, in percent.")]
    limit: float
    used: float
    reserved: Annotated[float, Meta(description="Held for open submissions.")]
    remaining: float
    resets_at: datetime | None


def render_threshold(tenant: str, threshold: Threshold) -> QuotaThreshold:
    amounts = threshold.limit, threshold.used, threshold.reserved, threshold.remaining
    limit, used, reserved, remaining = map(to_yuan, amounts) if threshold.unit == UNIT_MONEY else amounts
    return QuotaThreshold(
        tenant=tenant,
        policy=threshold.policy,
        unit=threshold.unit,
        window=threshold.window,
        threshold=threshold.percent,
        limit=limit,
        used=used,
        reserved=reserved,
        remaining=remaining,
        resets_at=to_datetime(threshold.resets_at),
    )


class Availability(Struct, frozen=True):
    """Whether an upstream account of the tenant can pay now, and if not, the time of the next check."""

    can_pay: bool
    look_again_at: datetime | None


class Quota(Struct, frozen=True):
    """Remaining quota of the tenant."""

    policies: list[Policy]
    account: Availability


def to_yuan(fen: int) -> int | float:
    """Convert fen to yuan, to an int if possible."""
    return fen // FEN_PER_YUAN if fen % FEN_PER_YUAN == 0 else fen / FEN_PER_YUAN


@overload
def to_datetime(milliseconds: int) -> datetime: ...


@overload
def to_datetime(milliseconds: int | None) -> datetime | None: ...


def to_datetime(milliseconds: int | None) -> datetime | None:
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def task_path(task: tasks.Task) -> str:
    return f"/v1/tasks/{task.id}"


def events_path(task: tasks.Task) -> str:
    return f"{task_path(task)}/events"


def render_task(task: tasks.Task) -> Task:
    return Task(
        id=task.id,
        kind=task.kind,
        state=task.state,
        created_at=to_datetime(task.created_at),
        updated_at=to_datetime(task.updated_at),
        finished_at=to_datetime(task.finished_at),
        options=msgspec.json.decode(task.options),
        metadata=msgspec.json.decode(task.metadata),
        artifacts=[
            Artifact(artifact.name, artifact.url, f"{task_path(task)}/artifacts/{artifact.name}")
            for artifact in task.artifacts
        ],
        error=TaskError(task.error.code, task.error.detail) if task.error else None,
        cost=Cost(task.cost.count, to_yuan(task.cost.money_fen), task.cost.basis),
        links=Links(self=task_path(task), events=events_path(task)),
    )


def render_operator_task(report: TaskReport) -> OperatorTask:
    fields = msgspec.structs.asdict(render_task(report.task))
    return OperatorTask(**fields, submission=report.task.reservation, tenant=report.tenant, account=report.account)


def task_etag(task: tasks.Task) -> str:
    # With the state: a task that Redis has lost is read from the upstream alone, under one version in every state.
    return f'"{task.reservation[:12]}-{task.version}-{task.state}"'


def task_headers(cached: CachedTask, estimator: DurationEstimator) -> dict[str, str]:
    """Return the ETag, the age in seconds and, unless the task has ended, when to repeat the request."""
    task = cached.task
    headers = {"ETag": task_etag(task), "Age": str(max(int(cached.age_seconds), 0))}
    if not task.state.is_final:
        headers["Retry-After"] = str(estimator.retry_after(task, cached.known_at))
    return headers


def render_quota(report: QuotaReport) -> Quota:
    return Quota(
        policies=render_policies(report.policies),
        account=Availability(report.can_pay, to_datetime(report.next_check_at)),
    )


def render_policies(reports: Sequence[PolicyReport]) -> list[Policy]:
    return list(map(_render_policy, reports))


def _render_policy(report: PolicyReport) -> Policy:
    amounts = report.limit, report.used, report.reserved, report.remaining
    limit, used, reserved, remaining = map(to_yuan, amounts) if report.unit == UNIT_MONEY else amounts
    return Policy(
        policy=report.policy,
        unit=report.unit,
        window=report.window,
        limit=limit,
        used=used,
        reserved=reserved,
        remaining=remaining,
        overrun=None if report.overrun is None else to_yuan(report.overrun),
        resets_at=to_datetime(report.resets_at),
    )


class TaskLink(Struct, frozen=True):
    """The task of a submission."""

    id: str
    state: State
    link: Annotated[str, Meta(description="To read the task.")]


class Refund(Struct, frozen=True):
    """A refund to the windows of the tenant."""

    refunded_at: datetime
    reason: str
    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class Submission(Struct, frozen=True, kw_only=True):
    """A submission and its outcome."""

    id: str
    tenant: Annotated[str | None, Meta(description="For operators.")] | UnsetType = UNSET
    account: Annotated[str | None, Meta(description="For operators. Null once it is deleted.")] | UnsetType = UNSET
    outcome: ReservationState
    kind: Kind
    created_at: Annotated[datetime | None, Meta(description="Null if it was abandoned before it was created.")]
    settled_at: Annotated[datetime | None, Meta(description="Time of its outcome.")]
    task: Annotated[TaskLink | None, Meta(description="Null if there is none, or it is no longer kept.")]
    cost: Annotated[Cost | None, Meta(description="Null if it cost nothing. Of an `unknown` one the amount held.")]
    balance_suggests: Annotated[
        BalanceSuggestion | None,
        Meta(description="Of an `unknown` one: whether the account seems to have been charged for it."),
    ]
    refund: Refund | None


class RefundBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A refund of a task, or of a submission. Either field takes the `id` of either."""

    reason: Annotated[str, Meta(min_length=1, max_length=500, description="Shown in the usage of the tenant.")]
    task: Annotated[str, Meta(description="The `id` of a task.")] | None = None
    submission: Annotated[str, Meta(description="The `id` of a submission.")] | None = None

    def target_id(self) -> str:
        """Return the id that is named. Raises InvalidOptions unless exactly one is."""
        ids = [target for target in (self.task, self.submission) if target is not None]
        if len(ids) != 1:
            raise InvalidOptions([FieldError("submission", "must be given, or `task`, but not both")])
        return ids[0]

    def checked_reason(self) -> str:
        """Return the reason. Raises InvalidOptions if it is blank."""
        if not self.reason.strip():
            raise InvalidOptions([FieldError("reason", "must not be blank")])
        return self.reason


def render_submission(status: SubmissionStatus, *, for_operators: bool) -> Submission:
    reservation, task, cost = status.reservation, status.task, status.cost
    refund = reservation.refund
    return Submission(
        id=status.id,
        tenant=status.tenant if for_operators else UNSET,
        account=status.account if for_operators else UNSET,
        outcome=reservation.state,
        kind=reservation.kind,
        created_at=to_datetime(reservation.created_at or None),
        settled_at=to_datetime(reservation.settled_at or None),
        task=TaskLink(task.id, task.state, task_path(task)) if task else None,
        cost=Cost(cost.count, to_yuan(cost.money_fen), cost.basis) if cost else None,
        balance_suggests=status.balance_suggests,
        refund=Refund(to_datetime(refund.refunded_at), refund.reason, refund.count, to_yuan(refund.money_fen))
        if refund
        else None,
    )


CSV_MEDIA_TYPE = "text/csv; header=present"
_JSON_TYPE, _CSV_TYPE = "application/json", "text/csv"
_QUALITY = re.compile(r"(?:^|;)\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII)
_FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n")


def prefers_csv(accept: str) -> bool:
    """Return whether an `Accept` header prefers CSV to JSON: by quality, then by the more specific range (RFC 9110)."""
    return _rank_media_type(accept, _CSV_TYPE) > _rank_media_type(accept, _JSON_TYPE)


def _rank_media_type(accept: str, media_type: str) -> tuple[float, int]:
    """Return the quality of a media type by its most specific range, and how specific that is."""
    qualities = {}
    for part in accept.lower().split(","):
        name, _, parameters = part.partition(";")
        quality = _QUALITY.search(parameters)
        qualities[name.strip()] = float(quality[1]) if quality else 1.0
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next(((qualities[name], -index) for index, name in enumerate(ranges) if name in qualities), (0.0, 0))


def render_csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Render CSV (RFC 4180). Texts that a spreadsheet would run as formulas are quoted; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([map(_escape_cell, row) for row in (head, *rows)])
    return text.getvalue().encode()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested objects by path, such as `spent_observed_count`."""
    leaves: dict[str, Any] = {}
    for name, item in value.items():
        leaves |= flatten(item, f"{prefix}{name}_") if isinstance(item, Mapping) else {prefix + name: item}
    return leaves


def _escape_cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_PREFIXES) else value


Uses = Annotated[int, Meta(description="Prepaid uses.")]
Day = Annotated[date, Meta(description="Day of the submission.")]


class Outcomes(Struct, frozen=True):
    """Submissions by outcome."""

    running: int
    succeeded: int
    failed: int
    unknown: Annotated[int, Meta(description="Sent without a usable response: they may have been charged.")]
    refused: Annotated[int, Meta(description="By the upstream, at no cost.")]
    not_sent: Annotated[int, Meta(description="As the upstream could not be reached, at no cost.")]


class Charged(Struct, frozen=True):
    """Spending less refunds. The tenant's limits count the tasks and the money."""

    tasks: int
    count: Uses
    money: Yuan


class Unclear(Struct, frozen=True):
    """Spending of unknown amount."""

    tasks: Annotated[int, Meta(description="Ended tasks of unknown cost.")]
    money: Annotated[float, Meta(description="In yuan, held for submissions of unknown outcome.")]


class Spending(Struct, frozen=True):
    """Spending from the accounts, refunded or not, by its basis."""

    observed: Annotated[Amount, Meta(description="Observed in the balance.")]
    estimated: Annotated[Amount, Meta(description="Estimated from an earlier price.")]
    unknown: Unclear


class Refunded(Struct, frozen=True):
    """Refunds by operators."""

    tasks: int
    count: Uses
    money: Yuan


OverrunYuan = Annotated[
    float,
    Meta(description="Of the money spent, in yuan, what passed a limit; of several limits that passed the most."),
]


class UsageSum(Struct, frozen=True):
    """Totals of all submissions."""

    tasks: Outcomes
    charged: Charged
    spent: Spending
    refunded: Refunded
    overrun: OverrunYuan


class UsageRow(Struct, frozen=True, kw_only=True):
    """Totals of the submissions of one period."""

    period: Annotated[
        str,
        Meta(
            description="A day, a month or the whole interval, in ISO 8601.",
            examples=["2026-01-31", "2026-01", "2026-01-01/2026-01-31"],
        ),
    ]
    tenant: Annotated[str | None, Meta(description="For operators; null unless grouped by.")] | UnsetType = UNSET
    tenant_id: Annotated[int | None, Meta(description="Never reused, as names can be.")] | UnsetType = UNSET
    kind: Annotated[Kind | None, Meta(description="Null unless grouped by.")]
    tasks: Outcomes
    charged: Charged
    spent: Spending
    refunded: Refunded
    overrun: OverrunYuan


class UnknownSubmission(Struct, frozen=True, kw_only=True):
    """A submission of unknown outcome."""

    id: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day


class RefundedSubmission(Struct, frozen=True, kw_only=True):
    """A submission that was refunded to the windows of its tenant."""

    submission: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day
    count: Uses
    money: Yuan
    reason: str
    refunded_at: datetime


class Usage(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """Usage from one day to another, inclusive, in UTC. Empty rows are omitted."""

    first: date
    last: date
    interval: Interval
    group_by: list[Group]
    items: list[UsageRow]
    total: UsageSum
    unknown_submissions: list[UnknownSubmission]
    refunds: Annotated[list[RefundedSubmission], Meta(description="Of submissions of these days.")]


def render_usage(report: UsageReport, *, for_operators: bool) -> Usage:
    unknown = [
        UnknownSubmission(id=entry.submission, kind=entry.kind, day=entry.day, **_tenant_fields(entry, for_operators))
        for entry in report.unknown
    ]
    return Usage(
        first=report.first,
        last=report.last,
        interval=report.interval,
        group_by=list(report.groups),
        items=[_render_row(row, for_operators) for row in report.rows],
        total=UsageSum(**_sum_fields(report.total)),
        unknown_submissions=unknown,
        refunds=[_render_refunded(submission, refund, for_operators) for submission, refund in report.refunds],
    )


def tabulate_usage(report: UsageReport, *, for_operators: bool) -> tuple[list[str], list[list[Any]]]:
    """Return the columns, named as in JSON, and the rows of a report."""
    rows = (msgspec.to_builtins(_render_row(row, for_operators)) for row in report.rows)
    return tabulate_items(rows, for_operators=for_operators)


def tabulate_items(items: Iterable[Mapping[str, Any]], *, for_operators: bool) -> tuple[list[str], list[list[Any]]]:
    """Return the columns and rows of the items of a response."""
    head = flatten(msgspec.to_builtins(_render_row(_EMPTY_ROW, for_operators)))
    return list(head), [list(flatten(item).values()) for item in items]


_EMPTY_ROW = reports.UsageRow(period="", tenant=None, kind=None, tally=Tally())


def _render_row(row: reports.UsageRow, for_operators: bool) -> UsageRow:
    return UsageRow(period=row.period, kind=row.kind, **_sum_fields(row.tally), **_tenant_fields(row, for_operators))


def _tenant_fields(source: reports.UsageRow | FlaggedSubmission, for_operators: bool) -> dict[str, Any]:
    if not for_operators:
        return {}
    tenant = source.tenant
    return {"tenant": tenant and tenant.name, "tenant_id": tenant and tenant.id}


def _render_refunded(submission: FlaggedSubmission, refund: ledger.Refund, for_operators: bool) -> RefundedSubmission:
    return RefundedSubmission(
        submission=submission.submission,
        kind=submission.kind,
        day=submission.day,
        count=refund.count,
        money=to_yuan(refund.money_fen),
        reason=refund.reason,
        refunded_at=to_datetime(refund.refunded_at),
        **_tenant_fields(submission, for_operators),
    )


def _sum_fields(tally: Tally) -> dict[str, Any]:
    return {
        "tasks": Outcomes(
            running=tally[Measure.RUNNING],
            succeeded=tally[Measure.SUCCEEDED],
            failed=tally[Measure.FAILED],
            unknown=tally[Measure.UNKNOWN],
            refused=tally[Measure.REFUSED],
            not_sent=tally[Measure.NOT_SENT],
        ),
        "charged": Charged(count_charged_tasks(tally), sum_charged_uses(tally), to_yuan(sum_charged_fen(tally))),
        "spent": Spending(
            observed=Amount(tally[Measure.OBSERVED_COUNT], to_yuan(tally[Measure.OBSERVED_MONEY])),
            estimated=Amount(tally[Measure.ESTIMATED_COUNT], to_yuan(tally[Measure.ESTIMATED_MONEY])),
            unknown=Unclear(tally[Measure.UNKNOWN_COST], to_yuan(tally[Measure.UNKNOWN_MONEY])),
        ),
        "refunded": Refunded(
            tally[Measure.REFUNDED], tally[Measure.REFUNDED_COUNT], to_yuan(tally[Measure.REFUNDED_MONEY])
        ),
        "overrun": to_yuan(tally[Measure.OVERRUN_MONEY]),
    }
