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

from service.domain.errors import FieldError, InvalidOptions
from service.domain.ledger import Measure, Refund, ReservationState, Tally, charged_money, charged_tasks
from service.domain.tasks import ArtifactName, Basis, Kind, State, Task
from service.domain.tenants import Window
from service.usecases.reports import (
    BalanceSuggestion,
    Fate,
    Group,
    Interval,
    Marked,
    PolicyReport,
    QuotaReport,
    Report,
    Row,
)
from service.usecases.task_cache import Pace, Seen

FEN = 100


Yuan = Annotated[int | float, Meta(description="Money in yuan (CNY).")]


PRIVATE = {"Cache-Control": "private, no-cache"}


REPLAYED = {"Idempotent-Replayed": "true"}
"""Says that an answer is about an earlier submission under the same idempotency key."""


class AmountView(Struct, frozen=True):
    """Prepaid uses and money."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class CostView(Struct, frozen=True):
    """What a task took from its account, and how that is known."""

    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan
    basis: Basis


class ArtifactView(Struct, frozen=True):
    """One result: where the gateway hands it out, and where the upstream keeps it."""

    name: ArtifactName
    url: Annotated[str, Meta(description="Of the upstream, which may remove it some day.")]
    href: Annotated[str, Meta(description="Where to fetch it through the gateway.")]


class TaskErrorView(Struct, frozen=True):
    """Why a task failed."""

    code: Annotated[str, Meta(description="The kind of failure, to branch on.", examples=["task-failed", "task-lost"])]
    detail: Annotated[str, Meta(description="The reason in words.")]


class LinksView(Struct, frozen=True):
    """Where to go from here."""

    self: Annotated[str, Meta(description="Where the task is read.")]
    events: Annotated[str, Meta(description="Where its changes are streamed.")]


class TaskView(Struct, frozen=True):
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
    artifacts: Annotated[list[ArtifactView], Meta(description="The results, once it has succeeded.")]
    error: Annotated[TaskErrorView | None, Meta(description="Null unless it has failed.")]
    cost: CostView
    links: LinksView


class TaskList(Struct, frozen=True):
    """Tasks, newest first. Go on with `next_cursor` until it is null."""

    items: list[TaskView]
    next_cursor: str | None


class PolicyView(Struct, frozen=True):
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


class AccountAbility(Struct, frozen=True):
    """Whether an upstream account of the tenant can pay for a task now, and if not when it is looked at again."""

    can_pay: bool
    look_again_at: datetime | None


class QuotaView(Struct, frozen=True):
    """What the tenant may still spend."""

    policies: list[PolicyView]
    account: AccountAbility


def yuan(fen: int) -> int | float:
    """Fen as yuan: whole where they are."""
    return fen // FEN if fen % FEN == 0 else fen / FEN


@overload
def moment(milliseconds: int) -> datetime: ...


@overload
def moment(milliseconds: int | None) -> datetime | None: ...


def moment(milliseconds: int | None) -> datetime | None:
    """A time of the ledger."""
    return None if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC)


def task_path(task: Task) -> str:
    """Where a task is read."""
    return f"/v1/tasks/{task.id}"


def events_path(task: Task) -> str:
    """Where the changes of a task are streamed."""
    return f"{task_path(task)}/events"


def task_view(task: Task) -> TaskView:
    """A task as JSON shows it."""
    return TaskView(
        id=task.id,
        kind=task.kind,
        state=task.state,
        created_at=datetime.fromtimestamp(task.created / 1000, UTC),
        updated_at=datetime.fromtimestamp(task.updated / 1000, UTC),
        finished_at=moment(task.finished),
        options=msgspec.json.decode(task.options),
        metadata=msgspec.json.decode(task.metadata),
        artifacts=[
            ArtifactView(each.name, each.url, f"{task_path(task)}/artifacts/{each.name}") for each in task.artifacts
        ],
        error=TaskErrorView(task.error.code, task.error.detail) if task.error else None,
        cost=CostView(task.cost.count, yuan(task.cost.money), task.cost.basis),
        links=LinksView(self=task_path(task), events=events_path(task)),
    )


def task_headers(seen: Seen, pace: Pace) -> dict[str, str]:
    """What a reader of a task is told beside it: its version, its age, and when to ask again while it runs."""
    headers = PRIVATE | {"ETag": etag(seen.task), "Age": str(max(int(seen.age), 0))}
    return headers if seen.task.state.ended else headers | {"Retry-After": str(pace.retry_after(seen.task, seen.now))}


def etag(task: Task) -> str:
    """The version of a task as an entity tag."""
    # A task that Redis has lost is told by the upstream's answer alone, under one version in every state.
    return f'"{task.reservation[:12]}-{task.version}-{task.state}"'


def quota_view(report: QuotaReport) -> QuotaView:
    """A tenant's quota as JSON shows it."""
    return QuotaView(
        policies=[_policy_view(each) for each in report.policies],
        account=AccountAbility(report.can_pay, moment(report.look_again)),
    )


def _policy_view(report: PolicyReport) -> PolicyView:
    figures = report.limit, report.used, report.reserved, report.remaining
    limit, used, reserved, remaining = map(yuan, figures) if report.unit == "money" else figures
    return PolicyView(
        policy=report.policy,
        unit=report.unit,
        window=report.window,
        limit=limit,
        used=used,
        reserved=reserved,
        remaining=remaining,
        overrun=None if report.overrun is None else yuan(report.overrun),
        resets_at=moment(report.resets_at),
    )


class TaskLinkView(Struct, frozen=True):
    """The task that a submission became."""

    id: str
    state: State
    link: Annotated[str, Meta(description="Where the task is read.")]


class RefundView(Struct, frozen=True):
    """What an operator gave back to the windows of the tenant, and why."""

    refunded_at: datetime
    reason: str
    count: Annotated[int, Meta(description="Prepaid uses.")]
    money: Yuan


class SubmissionView(Struct, frozen=True, kw_only=True):
    """A submission, and what became of it."""

    id: str
    tenant: Annotated[str | None, Meta(description="For operators.")] | UnsetType = UNSET
    account: Annotated[str | None, Meta(description="For operators. Null once it is deleted.")] | UnsetType = UNSET
    outcome: ReservationState
    kind: Kind
    created_at: Annotated[datetime | None, Meta(description="Null if it was given up before it was made.")]
    settled_at: Annotated[datetime | None, Meta(description="When it got its outcome.")]
    task: Annotated[TaskLinkView | None, Meta(description="Null if it became none, or that is not kept any more.")]
    cost: Annotated[CostView | None, Meta(description="Null if it cost nothing. Of an `unknown` one what is held.")]
    balance_suggests: Annotated[
        BalanceSuggestion | None,
        Meta(description="Of an `unknown` one: whether the account seems to have been charged for it."),
    ]
    refund: RefundView | None


class RefundBody(Struct, frozen=True, forbid_unknown_fields=True):
    """A wish to refund a task, or the submission that became it or is unknown."""

    reason: Annotated[str, Meta(min_length=1, max_length=500, description="Shown in the usage of the tenant.")]
    task: Annotated[str, Meta(description="The `id` of a task.")] | None = None
    submission: Annotated[str, Meta(description="The `id` of a submission.")] | None = None

    def means(self, of_task: Callable[[str], str]) -> str:
        """The submission that is meant; `of_task` tells that of a task. Raises InvalidOptions unless it is one."""
        if self.task is not None and self.submission is None:
            return of_task(self.task)
        if self.submission is None or self.task is not None:
            raise InvalidOptions([FieldError("submission", "must be given, or `task`, but not both")])
        return self.submission

    def why(self) -> str:
        """The reason. Raises InvalidOptions for a blank one."""
        if not self.reason.strip():
            raise InvalidOptions([FieldError("reason", "must say why")])
        return self.reason


def submission_view(fate: Fate, *, for_operators: bool) -> SubmissionView:
    """A submission as JSON shows it; only operators are told whose it is."""
    known, task, cost, refund = fate.reservation, fate.task, fate.cost, fate.reservation.refund
    return SubmissionView(
        id=fate.id,
        tenant=fate.tenant if for_operators else UNSET,
        account=fate.account if for_operators else UNSET,
        outcome=known.state,
        kind=known.kind,
        created_at=moment(known.created or None),
        settled_at=moment(known.settled or None),
        task=TaskLinkView(task.id, task.state, task_path(task)) if task else None,
        cost=CostView(cost.count, yuan(cost.money), cost.basis) if cost else None,
        balance_suggests=fate.balance_suggests,
        refund=RefundView(moment(refund.at), refund.reason, refund.count, yuan(refund.money)) if refund else None,
    )


MEDIA_TYPE = "text/csv; header=present"


_JSON, _CSV = "application/json", "text/csv"


_QUALITY = re.compile(r"(?:^|;)\s*q\s*=\s*(0(?:\.\d{0,3})?|1(?:\.0{0,3})?)\s*(?:;|$)", re.ASCII)


_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def wants_csv(accept: str) -> bool:
    """Whether an `Accept` header (RFC 9110) puts CSV before JSON: by its qualities, and else by naming it."""
    return _rank(accept, _CSV) > _rank(accept, _JSON)


def _rank(accept: str, media_type: str) -> tuple[float, int]:
    """The quality that the most special range for a media type gives it, and how special that is."""
    qualities = {}
    for each in accept.lower().split(","):
        name, _, parameters = each.partition(";")
        quality = _QUALITY.search(parameters)
        qualities[name.strip()] = float(quality[1]) if quality else 1.0
    ranges = (media_type, f"{media_type.partition('/')[0]}/*", "*/*")
    return next(((qualities[each], -place) for place, each in enumerate(ranges) if each in qualities), (0.0, 0))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Rows under their names. No text becomes a formula in a spreadsheet; None is an empty field."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerows([map(_cell, row) for row in (head, *rows)])
    return text.getvalue().encode()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The leaves of nested objects by their paths, such as `spent_observed_count`."""
    found: dict[str, Any] = {}
    for name, each in value.items():
        found |= flat(each, f"{prefix}{name}_") if isinstance(each, Mapping) else {prefix + name: each}
    return found


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


Uses = Annotated[int, Meta(description="Prepaid uses.")]


Day = Annotated[date, Meta(description="When it was submitted.")]


class OutcomesView(Struct, frozen=True):
    """Submissions by what became of them."""

    running: int
    succeeded: int
    failed: int
    unknown: Annotated[int, Meta(description="Sent, but not answered usably: they may have been charged.")]
    refused: Annotated[int, Meta(description="By the upstream, at no cost.")]
    not_sent: Annotated[int, Meta(description="As the upstream could not be reached, at no cost.")]


class ChargedView(Struct, frozen=True):
    """What the tenant's limits count of them: less than was spent, where something was refunded."""

    tasks: int
    money: Yuan


class UnclearView(Struct, frozen=True):
    """What nobody knows."""

    tasks: Annotated[int, Meta(description="Ended tasks of unknown cost.")]
    money: Annotated[int | float, Meta(description="In yuan, held for submissions of unknown outcome.")]


class SpendingView(Struct, frozen=True):
    """What they took from the accounts, refunded or not, by how that is known."""

    observed: Annotated[AmountView, Meta(description="Seen in the balance.")]
    estimated: Annotated[AmountView, Meta(description="Taken from an earlier price.")]
    unknown: UnclearView


class RefundedView(Struct, frozen=True):
    """What operators gave back of it."""

    tasks: int
    count: Uses
    money: Yuan


class UsageSumView(Struct, frozen=True):
    """What all submissions came to."""

    tasks: OutcomesView
    charged: ChargedView
    spent: SpendingView
    refunded: RefundedView


class UsageRowView(Struct, frozen=True, kw_only=True):
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
    tasks: OutcomesView
    charged: ChargedView
    spent: SpendingView
    refunded: RefundedView


class UnknownSubmissionView(Struct, frozen=True, kw_only=True):
    """A submission of unknown outcome."""

    id: Annotated[str, Meta(description="The `submission_id`.")]
    tenant: Annotated[str, Meta(description="For operators.")] | UnsetType = UNSET
    tenant_id: Annotated[int, Meta(description="For operators.")] | UnsetType = UNSET
    kind: Kind
    day: Day


class RefundedSubmissionView(Struct, frozen=True, kw_only=True):
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


class UsageView(Struct, frozen=True, rename={"first": "from", "last": "to"}):
    """What was spent from one day to another, both included, in UTC. Rows with nothing to count are left out."""

    first: date
    last: date
    interval: Interval
    group_by: list[Group]
    items: list[UsageRowView]
    total: UsageSumView
    unknown_submissions: list[UnknownSubmissionView]
    refunds: Annotated[list[RefundedSubmissionView], Meta(description="Of what was submitted on these days.")]


def usage_view(report: Report, *, for_operators: bool) -> UsageView:
    """A report as JSON shows it; only operators are told of tenants."""
    unknown = [
        UnknownSubmissionView(id=each.submission, kind=each.kind, day=each.day, **_tenant(each, for_operators))
        for each in report.unknown
    ]
    return UsageView(
        first=report.first,
        last=report.last,
        interval=report.interval,
        group_by=list(report.groups),
        items=[_row(row, for_operators) for row in report.rows],
        total=UsageSumView(**_sums(report.total)),
        unknown_submissions=unknown,
        refunds=[_refunded(marked, refund, for_operators) for marked, refund in report.refunds],
    )


def usage_table(report: Report, *, for_operators: bool) -> tuple[list[str], list[list[Any]]]:
    """The rows of a report as CSV shows them, under the names they have in JSON."""
    head = flat(msgspec.to_builtins(_row(_NO_ROW, for_operators)))
    rows = [flat(msgspec.to_builtins(_row(row, for_operators))) for row in report.rows]
    return list(head), [list(row.values()) for row in rows]


_NO_ROW = Row(period="", owner=None, kind=None, tally=Tally())


def _row(row: Row, for_operators: bool) -> UsageRowView:
    return UsageRowView(period=row.period, kind=row.kind, **_sums(row.tally), **_tenant(row, for_operators))


def _tenant(whose: Row | Marked, for_operators: bool) -> dict[str, Any]:
    if not for_operators:
        return {}
    owner = whose.owner
    return {"tenant": owner and owner.name, "tenant_id": owner and owner.id}


def _refunded(marked: Marked, refund: Refund, for_operators: bool) -> RefundedSubmissionView:
    return RefundedSubmissionView(
        submission=marked.submission,
        kind=marked.kind,
        day=marked.day,
        count=refund.count,
        money=yuan(refund.money),
        reason=refund.reason,
        refunded_at=moment(refund.at),
        **_tenant(marked, for_operators),
    )


def _sums(tally: Tally) -> dict[str, Any]:
    return {
        "tasks": OutcomesView(
            running=tally[Measure.RUNNING],
            succeeded=tally[Measure.SUCCEEDED],
            failed=tally[Measure.FAILED],
            unknown=tally[Measure.UNKNOWN],
            refused=tally[Measure.REFUSED],
            not_sent=tally[Measure.NOT_SENT],
        ),
        "charged": ChargedView(charged_tasks(tally), yuan(charged_money(tally))),
        "spent": SpendingView(
            observed=AmountView(tally[Measure.OBSERVED_COUNT], yuan(tally[Measure.OBSERVED_MONEY])),
            estimated=AmountView(tally[Measure.ESTIMATED_COUNT], yuan(tally[Measure.ESTIMATED_MONEY])),
            unknown=UnclearView(tally[Measure.UNKNOWN_COST], yuan(tally[Measure.UNKNOWN_MONEY])),
        ),
        "refunded": RefundedView(
            tally[Measure.REFUNDED], tally[Measure.REFUNDED_COUNT], yuan(tally[Measure.REFUNDED_MONEY])
        ),
    }
