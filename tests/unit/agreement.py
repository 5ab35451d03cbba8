"""What was asked of the ledger, sent, booked and told of one submission has to agree."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from service.domain.errors import (
    AccountMisconfigured,
    BalanceExhausted,
    IdempotencyInFlight,
    LedgerUnavailable,
    QuotaDenied,
    SubmissionUnknown,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.domain.ledger import ReservationState
from service.usecases.ports import SubmitOutcome
from tests.unit.faulty_store import Store
from tests.unit.faulty_world import Caller

_BOOKED = {
    SubmitOutcome.ACCEPTED: ReservationState.ACCEPTED,
    SubmitOutcome.UNKNOWN: ReservationState.UNKNOWN,
    None: ReservationState.UNKNOWN,
    SubmitOutcome.NOT_SENT: ReservationState.NOT_SENT,
    SubmitOutcome.MISCONFIGURED: ReservationState.NOT_SENT,
    SubmitOutcome.REJECTED: ReservationState.REFUSED,
    SubmitOutcome.EXHAUSTED: ReservationState.REFUSED,
    SubmitOutcome.INVALID_ACCOUNT: ReservationState.REFUSED,
    SubmitOutcome.REDIRECTED: ReservationState.REFUSED,
    SubmitOutcome.BUSY: ReservationState.REFUSED,
}
"""What is booked of each thing that can have happened."""

_TOLD: dict[type[BaseException], set[SubmitOutcome | None]] = {
    SubmissionUnknown: {SubmitOutcome.UNKNOWN, None},
    UpstreamRejected: {SubmitOutcome.REJECTED},
    BalanceExhausted: {SubmitOutcome.EXHAUSTED},
    AccountMisconfigured: {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED},
    UpstreamUnavailable: {SubmitOutcome.NOT_SENT, SubmitOutcome.BUSY},
}
"""What may have happened where a caller is told so after a place was granted."""


def check_booking(store: Store, caller: Caller) -> None:
    """What happened is what is booked, once; only what a process did not live to book may stand as unknown."""
    assert len(caller.asked) == 1
    booked = store.state(caller.asked[0])
    if caller.refused:
        assert booked is None
        assert caller.requests == []
    elif caller.process.gone:
        nothing = set() if caller.requests else {None}
        assert booked in {_BOOKED[caller.outcome], ReservationState.UNKNOWN} | nothing
    else:
        assert booked is _BOOKED[caller.outcome]


def check_answer(store: Store, caller: Caller, callers: Sequence[Caller]) -> None:
    """What a caller was told is what happened and what is booked."""
    assert caller.answer.done()
    if caller.answer.cancelled():
        return
    error = caller.answer.exception()
    if caller.refused:
        same = {each.asked[0] for each in callers if (each.tenant, each.key) == (caller.tenant, caller.key)}
        _check_refusal(store, caller, error, same if caller.key else set())
    elif error is None:
        told, booked = caller.answer.result().task, store.tasks[caller.asked[0]]
        assert caller.outcome is SubmitOutcome.ACCEPTED
        assert store.state(caller.asked[0]) is ReservationState.ACCEPTED
        assert booked.state.ended
        assert (booked.id, booked.account) == (told.id, caller.requests[-1].account.id)
        # One that is booked from its id alone, which is left to do where the process died, has lost its options.
        assert caller.process.gone or booked.options == told.options
    elif isinstance(error, LedgerUnavailable):
        assert caller.requests == []
    else:
        assert caller.outcome in _TOLD[type(error)]
        assert not isinstance(error, SubmissionUnknown) or error.submission_id == caller.asked[0]


def _check_refusal(store: Store, caller: Caller, error: BaseException | None, same: Collection[str]) -> None:
    """Who was granted no place is told why, or what became of one of the `same` submissions under its key."""
    if error is None:
        submission = caller.answer.result()
        assert submission.replayed
        assert submission.task.reservation in same
        assert store.state(submission.task.reservation) is ReservationState.ACCEPTED
    elif isinstance(error, SubmissionUnknown):
        assert error.submission_id in store.doubted.intersection(same)
    elif isinstance(error, IdempotencyInFlight | LedgerUnavailable):
        assert set(same) > {caller.asked[0]}
    else:
        assert isinstance(error, QuotaDenied | BalanceExhausted | AccountMisconfigured)
