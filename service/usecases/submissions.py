"""What became of a submission, and giving its cost back."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from enum import StrEnum

import structlog
from msgspec import Struct

from service.domain.errors import Conflict, NotFound
from service.domain.ledger import Refund, Refunding, Reservation, ReservationState
from service.domain.tasks import Basis, Cost, Task, TaskIds
from service.domain.tenants import Tenant, Window
from service.telemetry.told import yuan
from service.usecases.ports import Books, RegistryView, Tasks

_log = structlog.get_logger(__name__)

_ID = re.compile(r"[0-9a-f]{32}")


class BalanceSuggestion(StrEnum):
    """What the balance suggests of a submission whose outcome is unknown."""

    CHARGED = "charged"
    NOT_CHARGED = "not-charged"
    CANNOT_TELL = "cannot-tell"


class Fate(Struct, frozen=True):
    """What became of the submission `id`, and its task if it has one that is still known.

    `tenant` and `account` are their names; None for one that nobody remembers.
    """

    id: str
    reservation: Reservation
    task: Task | None
    tenant: str | None
    account: str | None

    @property
    def cost(self) -> Cost | None:
        """What it took, as far as it is known, or is held for it while nobody knows its outcome; None for nothing."""
        known = self.reservation
        if known.state is ReservationState.ACCEPTED:
            return known.cost or Cost(0, 0, Basis.UNKNOWN)
        if known.state is ReservationState.UNKNOWN:
            return Cost(0, known.holds.get(Window.DAY, 0), Basis.UNKNOWN)
        return None

    @property
    def balance_suggests(self) -> BalanceSuggestion | None:
        """Whether the account seems to have been charged; None if the outcome is known."""
        known = self.reservation
        if known.state is not ReservationState.UNKNOWN:
            return None
        return BalanceSuggestion(known.suggests) if known.suggests else BalanceSuggestion.CANNOT_TELL


class Submissions:
    """Tells of submissions, and refunds them. Everything raises NotFound or LedgerUnavailable."""

    def __init__(self, *, books: Books, tasks: Tasks, registry: RegistryView, task_ids: TaskIds) -> None:
        self._books = books
        self._tasks = tasks
        self._registry = registry
        self._task_ids = task_ids

    async def of(self, tenant: Tenant, submission: str) -> Fate:
        """What became of a submission of this tenant; that of another one is not found."""
        known = await self._known(submission)
        if known.tenant != tenant.id:
            raise _not_found()
        return await self._fate(submission, known)

    async def of_any(self, submission: str) -> Fate:
        """What became of a submission of whichever tenant."""
        return await self._fate(submission, await self._known(submission))

    def of_task(self, task_id: str) -> str:
        """The id of the submission that became a task."""
        return self._task_ids.open(task_id).reservation

    async def refund(self, submission: str, reason: str) -> Fate:
        """Give what a submission was charged for back to the windows of its tenant, once.

        Raises Conflict if it was refunded before, has not ended, or cost nothing.
        """
        known = await self._known(submission)
        done = await self._books.refund(known.tenant, submission, reason)
        if done is None:
            raise _not_found()
        became, known = done
        if became is Refunding.AGAIN and known.refund:
            raise Conflict(f"Submission {submission} {_refunded(known.refund)}")
        if became is Refunding.RUNNING:
            raise Conflict(f"Submission {submission} has not ended, so that nobody knows yet what it costs. Try later.")
        if became is Refunding.FREE:
            raise Conflict(f"Submission {submission} cost nothing: it is {known.state}.")
        fate = await self._fate(submission, known)
        given = known.refund
        _log.info(
            "submission.refunded",
            tenant=fate.tenant,
            account=fate.account,
            reservation=submission,
            kind=known.kind,
            reason=reason,
            uses=given and given.count,
            yuan=given and yuan(given.money),
        )
        return fate

    async def _known(self, submission: str) -> Reservation:
        known = await self._books.submission(submission) if _ID.fullmatch(submission) else None
        if known is None:
            raise _not_found()
        return known

    async def _fate(self, submission: str, known: Reservation) -> Fate:
        found = await self._tasks.get(submission) if known.state is ReservationState.ACCEPTED else None
        registry = self._registry.current
        account = registry.account(known.account)
        return Fate(
            id=submission,
            reservation=known,
            task=found[0] if found else None,
            tenant=registry.tenant_name(known.tenant),
            account=account.name if account else None,
        )


def _refunded(refund: Refund) -> str:
    at = datetime.fromtimestamp(refund.at // 1000, UTC).isoformat().replace("+00:00", "Z")
    return f"was refunded before, at {at}, with this reason: {refund.reason}"


def _not_found() -> NotFound:
    return NotFound("There is no such submission.")
