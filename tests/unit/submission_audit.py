"""Consistency of reservations, requests, stored states and responses of submissions."""

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
from tests.unit.fault_simulation import Caller
from tests.unit.faulty_store import FaultyStore

_EXPECTED_STATES = {
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
"""The final reservation state for each upstream outcome."""

_OUTCOMES_BY_ERROR: dict[type[BaseException], set[SubmitOutcome | None]] = {
    SubmissionUnknown: {SubmitOutcome.UNKNOWN, None},
    UpstreamRejected: {SubmitOutcome.REJECTED},
    BalanceExhausted: {SubmitOutcome.EXHAUSTED},
    AccountMisconfigured: {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED},
    UpstreamUnavailable: {SubmitOutcome.NOT_SENT, SubmitOutcome.BUSY},
}
"""The upstream outcomes that may lead to each error after a reservation."""


def check_recorded_state(store: FaultyStore, caller: Caller) -> None:
    """Assert that the stored state matches the outcome; UNKNOWN is allowed only if the process was killed."""
    assert len(caller.reservation_ids) == 1
    booked = store.state_of(caller.reservation_ids[0])
    if caller.was_refused:
        assert booked is None
        assert caller.requests == []
    elif caller.process.is_dead:
        nothing = set() if caller.requests else {None}
        assert booked in {_EXPECTED_STATES[caller.outcome], ReservationState.UNKNOWN} | nothing
    else:
        assert booked is _EXPECTED_STATES[caller.outcome]


def check_response(store: FaultyStore, caller: Caller, callers: Sequence[Caller]) -> None:
    """Assert that the response matches the outcome and the stored state."""
    assert caller.response.done()
    if caller.response.cancelled():
        return
    error = caller.response.exception()
    if caller.was_refused:
        same = {item.reservation_ids[0] for item in callers if (item.tenant, item.key) == (caller.tenant, caller.key)}
        _check_refusal(store, caller, error, same if caller.key else set())
    elif error is None:
        returned, booked = caller.response.result().task, store.tasks[caller.reservation_ids[0]]
        assert caller.outcome is SubmitOutcome.ACCEPTED
        assert store.state_of(caller.reservation_ids[0]) is ReservationState.ACCEPTED
        assert booked.state.is_final
        assert (booked.id, booked.account) == (returned.id, caller.requests[-1].account.id)
        # One that is booked from its id alone, which is left to do where the process died, has lost its options.
        assert caller.process.is_dead or booked.options == returned.options
    elif isinstance(error, LedgerUnavailable):
        assert caller.requests == []
    else:
        assert caller.outcome in _OUTCOMES_BY_ERROR[type(error)]
        assert not isinstance(error, SubmissionUnknown) or error.submission_id == caller.reservation_ids[0]


def _check_refusal(store: FaultyStore, caller: Caller, error: BaseException | None, same: Collection[str]) -> None:
    """Assert that a refusal has a cause, or replays one of the submissions in `same`."""
    if error is None:
        submission = caller.response.result()
        assert submission.is_replay
        assert submission.task.reservation in same
        assert store.state_of(submission.task.reservation) is ReservationState.ACCEPTED
    elif isinstance(error, SubmissionUnknown):
        assert error.submission_id in store.unknown_reservations.intersection(same)
    elif isinstance(error, IdempotencyInFlight | LedgerUnavailable):
        assert set(same) > {caller.reservation_ids[0]}
    else:
        assert isinstance(error, QuotaDenied | BalanceExhausted | AccountMisconfigured)
