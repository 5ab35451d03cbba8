"""JSON of the tenants' API."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Annotated, Any, overload

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from service.domain import ledger, tasks
from service.domain.errors import FieldError, InvalidOptions
from service.domain.ledger import Measure, ReservationState, Tally, count_charged_tasks, sum_charged_fen
from service.domain.tasks import ArtifactName, CostBasis, Kind, State
from service.domain.tenants import Window
from service.usecases import reports
from service.usecases.reports import (
    BalanceSuggestion,
    FlaggedSubmission,
    Group,
    Interval,
    PolicyReport,
    QuotaReport,
    SubmissionStatus,
    UsageReport,
)
from service.usecases.task_cache import CachedTask, DurationEstimator

FEN_PER_YUAN = 100
Yuan = Annotated[int | float, Meta(description="Money in yuan (CNY).")]
PRIVATE_HEADERS = {"Cache-Control": "private, no-cache"}
REPLAYED_HEADERS = {"Idempotent-Replayed": "true"}
"""Says that an answer is about an earlier submission under the same idempotency key."""


class Amount(Struct, frozen=True):
    """Prepaid uses and money."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class Cost(Struct, frozen=True):
    """What a task took from its account, and how that is known."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan
    basis: CostBasis


class Artifact(Struct, frozen=True):
    """One result: where the gateway hands it out, and where the upstream keeps it."""

    name: ArtifactName
    url: Annotated[str, Meta(description="Of the upstream, which may remove it some day.")]
    href: Annotated[str, Meta(description="Where to fetch it through the gateway.")]


class TaskError(Struct, frozen=True):
    """Why a task failed."""

    code: Annotated[str, Meta(description="The kind of failure, to branch on.", examples=["task-failed", "task-lost"])]
    detail: Annotated[str, Meta(description="The reason in words.")]


class Links(Struct, frozen=True):
    """Where to go from here."""

    self: Annotated[str, Meta(description="Where the task is read.")]
    events: Annotated[str, Meta(description="Where its changes are streamed.")]


class Task(Struct, frozen=True):
    """A task: an image that the upstream accepted, and what became of it."""

    id: str
    kind: Kind
    state: State
    created_at: datetime
    updated_at: Annotated[datetime, Meta(description="When anything of it last changed.")]
    finished_at: Annotated[datetime | None, Meta(description="Null until it has ended.")]
    options: Annotated[
        dict[str, Any], Meta(description="All options of its kind, those you left to their defaults too.")
    ]
    metadata: Annotated[dict[str, str], Meta(description="What you sent, untouched.")]
    artifacts: Annotated[list[Artifact], Meta(description="The results, once it has succeeded.")]
    error: Annotated[TaskError | None, Meta(description="Null unless it has failed.")]
    cost: Cost
    links: Links


class TaskList(Struct, frozen=True):
    """Tasks, newest first. Go on with `next_cursor` until it is null."""

    items: list[Task]
    next_cursor: str | None


class Policy(Struct, frozen=True):
    """One policy of the tenant; `window` and `resets_at` are null where nothing resets by itself."""

    policy: Annotated[str, Meta(description="Its name, as problems and the `RateLimit` header have it.")]
    unit: Annotated[str, Meta(description="`tasks`, `money` (yuan) or `active` (tasks at once).")]
    window: Window | None
    limit: int | float
    used: int | float
    reserved: Annotated[int | float, Meta(description="Held by what is under way.")]
    remaining: int | float
    overrun: Annotated[int | float | None, Meta(description="Spent beyond a limit on money, as prices came out.")]
    resets_at: datetime | None


class Availability(Struct, frozen=True):
    """Whether an upstream account of the tenant can pay for a task now, and if not when it is looked at again."""

    can_pay: bool
    look_again_at: datetime | None


class Quota(Struct, frozen=True):
    """What the tenant may still spend."""

    policies: list[Policy]
    account: Availability


def to_yuan(fen: int) -> int | float:
    """Fen as yuan: whole where they are."""
    return fen // FEN_PER_YUAN if fen % FEN_PER_YUAN == 0 else fen / FEN_PER_YUAN


@overload
def to_datetime(milliseconds: int) -> datetime: ...


@overload
def to_datetime(milliseconds: int | None) -> datetime | None: ...


def to_datetime(milliseconds: int | None) -> datetime | None:
    """A time of the ledger."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def task_path(task: tasks.Task) -> str:
    """Where a task is read."""
    return f"/v1/tasks/{task.id}"


def events_path(task: tasks.Task) -> str:
    """Where the changes of a task are streamed."""
    return f"{task_path(task)}/events"


def render_task(task: tasks.Task) -> Task:
    """A task as JSON shows it."""
    return Task(
        id=task.id,
        kind=task.kind,
        state=task.state,
        created_at=datetime.fromtimestamp(task.created_at / 1000, UTC),
        updated_at=datetime.fromtimestamp(task.updated_at / 1000, UTC),
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


def task_headers(cached: CachedTask, estimator: DurationEstimator) -> dict[str, str]:
    """What a reader of a task is told beside it: its version, its age, and when to ask again while it runs."""
    headers = PRIVATE_HEADERS | {"ETag": task_etag(cached.task), "Age": str(max(int(cached.age_seconds), 0))}
    return (
        headers
        if cached.task.state.is_final
        else headers | {"Retry-After": str(estimator.retry_after(cached.task, cached.known_at))}
    )


def task_etag(task: tasks.Task) -> str:
    """The version of a task as an entity tag."""
    # A task that Redis has lost is told by the upstream's answer alone, under one version in every state.
    return f'"{task.reservation[:12]}-{task.version}-{task.state}"'


def render_quota(report: QuotaReport) -> Quota:
    """A tenant's quota as JSON shows it."""
    return Quota(
        policies=[_render_policy(policy) for policy in report.policies],
        account=Availability(report.can_pay, to_datetime(report.next_check_at)),
    )


def _render_policy(report: PolicyReport) -> Policy:
    figures = report.limit, report.used, report.reserved, report.remaining
    limit, used, reserved, remaining = map(to_yuan, figures) if report.unit == "money" else figures
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
    """The task that a submission became."""

    id: str
    state: State
    link: Annotated[str, Meta(description="Where the task is read.")]


class Refund(Struct, frozen=True):
    """What an operator gave back to the windows of the tenant, and why."""

    refunded_at: datetime
    reason: str
    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class Submission(Struct, frozen=True, kw_only=True):
    """A submission, and what became of it."""

    id: str
    tenant: Annotated[str | None, Meta(description="For operators.")] | UnsetType = UNSET
    account: Annotated[str | None, Meta(description="For operators. Null once it is deleted.")] | UnsetType = UNSET
    outcome: ReservationState
    kind: Kind
    created_at: Annotated[datetime | None, Meta(description="Null if it was given up before it was made.")]
    settled_at: Annotated[datetime | None, Meta(description="When it got its outcome.")]
    task: Annotated[TaskLink | None, Meta(description="Null if it became none, or that is not kept any more.")]
    cost: Annotated[Cost | None, Meta(description="Null if it cost nothing. Of an `unknown` one what is held.")]
    balance_suggests: Annotated[
        BalanceSuggestion | None,
        Meta(description="Of an `unknown` one: whether the account seems to have been charged for it."),
    ]
    refund: Refund | None


class RefundBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A wish to refund a task, or the submission that became it or is unknown."""

    reason: Annotated[str, Meta(min_length=1, max_length=500, description="Shown in the usage of the tenant.")]
    task: Annotated[str, Meta(description="The `id` of a task.")] | None = None
    submission: Annotated[str, Meta(description="The `id` of a submission.")] | None = None

    def submission_id(self, find_by_task: Callable[[str], str]) -> str:
        """The submission that is meant; `of_task` tells that of a task. Raises InvalidOptions unless it is one."""
        if self.task is not None and self.submission is None:
            return find_by_task(self.task)
        if self.submission is None or self.task is not None:
            raise InvalidOptions([FieldError("submission", "must be given, or `task`, but not both")])
        return self.submission

    def checked_reason(self) -> str:
        """The reason. Raises InvalidOptions for a blank one."""
        if not self.reason.strip():
            raise InvalidOptions([FieldError("reason", "must say why")])
        return self.reason


def render_submission(status: SubmissionStatus, *, for_operators: bool) -> Submission:
    """A submission as JSON shows it; only operators are told whose it is."""
    known, task, cost, refund = status.reservation, status.task, status.cost, status.reservation.refund
    return Submission(
        id=status.id,
        tenant=status.tenant if for_operators else UNSET,
        account=status.account if for_operators else UNSET,
        outcome=known.state,
        kind=known.kind,
        created_at=to_datetime(known.created_at or None),
        settled_at=to_datetime(known.settled_at or None),
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
    """Whether an `Accept` header (RFC 9110) puts CSV before JSON: by its qualities, and else by naming it."""
    return _rank_media_type(accept, _CSV_TYPE) > _rank_media_type(accept, _JSON_TYPE)


def _rank_media_type(accept: str, media_type: str) -> tuple[float, int]:
    """The quality that the most special range for a media type gives it, and how special that is."""
    qualities = {}
    for part in accept.lower().split(","):
        name, _, parameters = part.partition(";")
        quality = _QUALITY.search(parameters)
        qualities[name.strip()] = float(quality[1]) if quality else 1.0
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next(((qualities[item], -place) for place, item in enumerate(ranges) if item in qualities), (0.0, 0))


def render_csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows under their names. No text becomes a formula in a spreadsheet; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([map(_escape_cell, row) for row in (head, *rows)])
    return text.getvalue().encode()


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their paths, such as `spent_observed_count`."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        found |= flatten(item, f"{prefix}{name}_") if isinstance(item, Mapping) else {prefix + name: item}
    return found


def _escape_cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA_PREFIXES) else value


Uses = Annotated[int, Meta(description="Prepaid uses.")]
Day = Annotated[date, Meta(description="When it was submitted.")]


class Outcomes(Struct, frozen=True):
    """Submissions by what became of them."""

    running: int
    succeeded: int
    failed: int
    unknown: Annotated[int, Meta(description="Sent, but not answered usably: they may have been charged.")]
    refused: Annotated[int, Meta(description="By the upstream, at no cost.")]
    not_sent: Annotated[int, Meta(description="As the upstream could not be reached, at no cost.")]


class Charged(Struct, frozen=True):
    """What the tenant's limits count of them: less than was spent, where something was refunded."""

    tasks: int
    money: Yuan


class Unclear(Struct, frozen=True):
    """What nobody knows."""

    tasks: Annotated[int, Meta(description="Ended tasks of unknown cost.")]
    money: Annotated[int | float, Meta(description="In yuan, held for submissions of unknown outcome.")]


class Spending(Struct, frozen=True):
    """What they took from the accounts, refunded or not, by how that is known."""

    observed: Annotated[Amount, Meta(description="Seen in the balance.")]
    estimated: Annotated[Amount, Meta(description="Taken from an earlier price.")]
    unknown: Unclear


class Refunded(Struct, frozen=True):
    """What operators gave back of it."""

    tasks: int
    count: Uses
    money: Yuan


class UsageSum(Struct, frozen=True):
    """What all submissions came to."""

    tasks: Outcomes
    charged: Charged
    spent: Spending
    refunded: Refunded


class UsageRow(Struct, frozen=True, kw_only=True):
    """What the submissions of one period came to. Each belongs to the period in which it was submitted."""

    period: Annotated[
        str,
        Meta(
            description="A day, a month or the whole interval, as ISO 8601 has them.",
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


class UnknownSubmission(Struct, frozen=True, kw_only=True):
    """A submission of unknown outcome."""

    id: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day


class RefundedSubmission(Struct, frozen=True, kw_only=True):
    """A submission whose cost was given back to the windows of its tenant."""

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
    """What was spent from one day to another, both included, in UTC. Rows with nothing to count are left out."""

    first: date
    last: date
    interval: Interval
    group_by: list[Group]
    items: list[UsageRow]
    total: UsageSum
    unknown_submissions: list[UnknownSubmission]
    refunds: Annotated[list[RefundedSubmission], Meta(description="Of what was submitted on these days.")]


def render_usage(report: UsageReport, *, for_operators: bool) -> Usage:
    """A report as JSON shows it; only operators are told of tenants."""
    unknown = [
        UnknownSubmission(id=item.submission, kind=item.kind, day=item.day, **_tenant_fields(item, for_operators))
        for item in report.unknown
    ]
    return Usage(
        first=report.first,
        last=report.last,
        interval=report.interval,
        group_by=list(report.groups),
        items=[_render_row(row, for_operators) for row in report.rows],
        total=UsageSum(**_sum_fields(report.total)),
        unknown_submissions=unknown,
        refunds=[_render_refund(marked, refund, for_operators) for marked, refund in report.refunds],
    )


def tabulate_usage(report: UsageReport, *, for_operators: bool) -> tuple[list[str], list[list[Any]]]:
    """The rows of a report as CSV shows them, under the names they have in JSON."""
    head = flatten(msgspec.to_builtins(_render_row(_EMPTY_ROW, for_operators)))
    rows = [flatten(msgspec.to_builtins(_render_row(row, for_operators))) for row in report.rows]
    return list(head), [list(row.values()) for row in rows]


_EMPTY_ROW = reports.UsageRow(period="", tenant=None, kind=None, tally=Tally())


def _render_row(row: reports.UsageRow, for_operators: bool) -> UsageRow:
    return UsageRow(period=row.period, kind=row.kind, **_sum_fields(row.tally), **_tenant_fields(row, for_operators))


def _tenant_fields(source: reports.UsageRow | FlaggedSubmission, for_operators: bool) -> dict[str, Any]:
    if not for_operators:
        return {}
    owner = source.tenant
    return {"tenant": owner and owner.name, "tenant_id": owner and owner.id}


def _render_refund(submission: FlaggedSubmission, refund: ledger.Refund, for_operators: bool) -> RefundedSubmission:
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
        "charged": Charged(count_charged_tasks(tally), to_yuan(sum_charged_fen(tally))),
        "spent": Spending(
            observed=Amount(tally[Measure.OBSERVED_COUNT], to_yuan(tally[Measure.OBSERVED_MONEY])),
            estimated=Amount(tally[Measure.ESTIMATED_COUNT], to_yuan(tally[Measure.ESTIMATED_MONEY])),
            unknown=Unclear(tally[Measure.UNKNOWN_COST], to_yuan(tally[Measure.UNKNOWN_MONEY])),
        ),
        "refunded": Refunded(
            tally[Measure.REFUNDED], tally[Measure.REFUNDED_COUNT], to_yuan(tally[Measure.REFUNDED_MONEY])
        ),
    }
