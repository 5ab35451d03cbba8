"""What callers see of a submission, and what operators send to refund one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from service.api.views import CostView, Yuan, moment, task_path, yuan
from service.domain.errors import FieldError, InvalidOptions
from service.domain.ledger import ReservationState
from service.domain.tasks import Kind, State
from service.usecases.reports import BalanceSuggestion, Fate


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
