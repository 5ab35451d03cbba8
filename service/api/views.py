"""What callers see of the gateway's values: RFC 3339 times, money in yuan, names of the contract."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, overload

import msgspec
from msgspec import Meta, Struct

from service.domain.tasks import ArtifactName, Basis, Kind, State, Task
from service.domain.tenants import Window
from service.usecases.reports import PolicyReport, QuotaReport
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
