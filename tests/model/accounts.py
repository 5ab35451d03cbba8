"""The rules of an account in Python: the oracle of the property tests of the Lua scripts.

Functions change the state they are given. Times are milliseconds of ledger time, money is in fen.
"""

from __future__ import annotations

from service.domain.availability import (
    PROBE_INTERVAL_MS,
    _max_price_any_kind,
    _needs_balance_check,
    _stays_above_floors,
)
from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    BalanceReading,
    ChargeInference,
    ExpectedDrop,
    FinishedTaskCheck,
    InferredCharge,
    ReadingSource,
    Reservation,
)
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy
from service.storage.redis import LATE_CHARGE_MS


def add_expected_charge(state: AccountState, policy: AccountPolicy, kind: Kind, sign: int) -> None:
    """Expect a charge of this kind; with a sign of -1 no longer."""
    price = policy.max_price.get(kind)
    expected = state.expected_drop
    expected.charges = max(expected.charges + sign, 0)
    if price is None:
        expected.unpriced = max(expected.unpriced + sign, 0)
    else:
        expected.max_fen = max(expected.max_fen + sign * price, 0)


def attribute_drop(state: AccountState, count: int, money: int) -> None:
    """Attribute a drop to the gateway's submissions; the rest is unexplained.

    Once each of them has taken a prepaid use, none has taken money.
    """
    expected = state.expected_drop
    state.unexplained_count += max(count - expected.charges, 0)
    expected.charges = max(expected.charges - count, 0)
    if expected.charges == 0:
        state.unexplained_money_fen += money + expected.attributed_fen
        state.expected_drop = ExpectedDrop()
        return
    attributed = money if expected.unpriced else min(money, expected.max_fen)
    state.unexplained_money_fen += money - attributed
    expected.max_fen = max(expected.max_fen - attributed, 0)
    expected.attributed_fen += attributed


def mark_charge_pending(state: AccountState, reservation: Reservation) -> None:
    """The balance may lack this open submission from now on."""
    state.pending_charges += 1
    state.pending_prepaid_only += reservation.prepaid_only
    reservation.charge_pending = True


def clear_pending_charge(state: AccountState, reservation: Reservation) -> None:
    """The balance includes the charge of this open submission."""
    if reservation.charge_pending:
        state.pending_charges -= 1
        reservation.charge_pending = False
    _clear_prepaid_only(state, reservation)
    _clear_expected_drop(state)


def cancel_expected_charge(
    state: AccountState, policy: AccountPolicy, reservation: Reservation, *, still_expected: bool
) -> None:
    """This submission costs nothing. `still_expected`: the balance may have lacked it until now."""
    if still_expected:
        add_expected_charge(state, policy, reservation.kind, -1)
    clear_pending_charge(state, reservation)


def mark_untracked(state: AccountState, reservation: Reservation, until_ms: int) -> None:
    """This submission is no longer open; readings requested from `until_ms` on include it."""
    if reservation.charge_pending:
        state.pending_charges -= 1
        state.untracked_charges += 1
        state.untracked_until = max(state.untracked_until, until_ms)
    _clear_prepaid_only(state, reservation)


def resolve_untracked(state: AccountState, reservation: Reservation) -> bool:
    """Resolve an untracked submission. Return whether the balance may not yet have included it."""
    was_untracked = (
        reservation.charge_pending and state.untracked_charges > 0 and reservation.settled_at > state.reconciled_at
    )
    if was_untracked:
        state.untracked_charges -= 1
    reservation.charge_pending = False
    _clear_expected_drop(state)
    return was_untracked


def reconcile_balance(state: AccountState, balance: Balance, sent_at: int, received_at: int) -> None:
    """Clear the untracked charges if a reading includes them all."""
    if (
        state.untracked_charges
        and balance.count is not None
        and balance.money_fen is not None
        and sent_at >= state.untracked_until
    ):
        state.untracked_charges, state.reconciled_at = 0, received_at
        _clear_expected_drop(state)


def _clear_prepaid_only(state: AccountState, reservation: Reservation) -> None:
    state.pending_prepaid_only -= reservation.prepaid_only
    reservation.prepaid_only = False


def _clear_expected_drop(state: AccountState) -> None:
    if state.unaccounted_charges == 0:
        state.expected_drop = ExpectedDrop()


def start_inference(state: AccountState, name: str, reservation: Reservation, now: int) -> None:
    """Start charge inference: possible only if no other submission was open on the account."""
    mark_untracked(state, reservation, now + LATE_CHARGE_MS)
    before = reservation.balance_before
    if was_exclusive(state, reservation) and reservation.balance_exact and before:
        state.pending_inference = ChargeInference(name, reservation.submission_seq, now, before.count, before.money_fen)


def infer_unknown_charge(
    state: AccountState, balance: Balance, source: ReadingSource, sent_at: int, kind: Kind | None
) -> None:
    """Infer from the first reading after an unknown submission whether it was charged.

    Nothing else may have happened since, apart from the one submission (of `kind`) whose response this is.
    """
    inference = state.pending_inference
    if (
        inference is None
        or inference.inferred_charge
        or balance.count is None
        or balance.money_fen is None
        or sent_at <= inference.unknown_at
    ):
        return
    count, money, others = (
        inference.count - balance.count,
        inference.money_fen - balance.money_fen,
        state.submission_seq - inference.submission_seq,
    )
    own_drop: tuple[int, int] | None = (0, 0)
    if others == 1 and source is ReadingSource.SUBMIT and not state.charges_on_completion:
        price = state.last_price.get(kind) if kind else None
        own_drop = (1, 0) if count > 0 else None if price is None else (0, price)
    elif others > 1 or (others == 1 and source is ReadingSource.CHECK):
        own_drop = None
    if own_drop is None or not _is_single_charge(count - own_drop[0], money - own_drop[1]):
        state.pending_inference = None
    elif (count, money) != own_drop:
        inference.inferred_charge = InferredCharge.CHARGED
    elif state.charges_on_completion is False:
        inference.inferred_charge = InferredCharge.NOT_CHARGED
    elif others:
        state.pending_inference = None


def store_inference(state: AccountState, policy: AccountPolicy, reservation: Reservation) -> None:
    """Store the inferred charge in its reservation."""
    if state.pending_inference and state.pending_inference.inferred_charge:
        reservation.inferred_charge = state.pending_inference.inferred_charge
        if reservation.inferred_charge is InferredCharge.NOT_CHARGED:
            add_expected_charge(state, policy, reservation.kind, -1)
        resolve_untracked(state, reservation)
        state.pending_inference = None


def learn_charge_timing(state: AccountState, reservation: Reservation, balance_after: Balance) -> None:
    """Learn from the observed response to a submission whether it is charged at once or at the task's end."""
    if balance_after.count is None or balance_after.money_fen is None or reservation.dispatched_at < state.reopened_at:
        return
    before = reservation.balance_before
    if before:
        count, money = before.count - balance_after.count, before.money_fen - balance_after.money_fen
        if (count, money) == (0, 0):
            state.charges_on_completion = True
        elif (
            was_exclusive(state, reservation)
            and reservation.balance_exact
            and _is_single_charge(count, money)
            and count == reservation.expects_prepaid
        ):
            state.charges_on_completion = False
    if state.charges_on_completion is False:
        clear_pending_charge(state, reservation)


def finish_charge(state: AccountState, reservation: Reservation, balance: Balance, sent_at: int, now: int) -> None:
    """A task ended: its reading includes its charge; without figures the charge is untracked."""
    if balance.count is None or balance.money_fen is None or sent_at < state.reopened_at:
        mark_untracked(state, reservation, now)
    else:
        clear_pending_charge(state, reservation)


def compute_cost(
    state: AccountState, policy: AccountPolicy, reservation: Reservation, balance: Balance, *, succeeded: bool
) -> Cost:
    """Return the cost of an ended task, and remember an observed price.

    The drop is the cost if no other submission was open in between, a single task can cause it, and it does not exceed
    `max_price`. A failed task has no figures at its end; the drop at its submission is an estimate then, since it may
    have been given back. Otherwise the cost is estimated: a prepaid use, or the last price, or `max_price`.
    """
    kind, before, at_end = reservation.kind, reservation.balance_before, balance
    has_end_balance = balance.count is not None and balance.money_fen is not None
    if not has_end_balance and not state.charges_on_completion and reservation.balance_after:
        at_end = reservation.balance_after
    is_exclusive = was_exclusive(state, reservation) and reservation.balance_exact
    if is_exclusive and before and at_end.count is not None and at_end.money_fen is not None:
        count, money = before.count - at_end.count, before.money_fen - at_end.money_fen
        if _is_single_charge(count, money) and money <= policy.max_price.get(kind, money):
            if money:
                state.last_price[kind] = money
                state.max_observed_price[kind] = max(state.max_observed_price.get(kind, 0), money)
            if count or money or (has_end_balance and not succeeded):
                return Cost(count, money, CostBasis.OBSERVED if succeeded or has_end_balance else CostBasis.ESTIMATED)
    uses_left = at_end.count if at_end.count is not None or state.count is None else state.count.value
    if reservation.expects_prepaid or (reservation.expects_prepaid is None and uses_left):
        return Cost(1, 0, CostBasis.ESTIMATED)
    price = state.last_price.get(kind, policy.max_price.get(kind) if uses_left is not None else None)
    return Cost(0, 0, CostBasis.UNKNOWN) if price is None else Cost(0, price, CostBasis.ESTIMATED)


def was_exclusive(state: AccountState, reservation: Reservation) -> bool:
    return reservation.exclusive and state.submission_seq == reservation.submission_seq


def _is_single_charge(count: int, money: int) -> bool:
    """Whether one task can cause this drop: one prepaid use, or money, or nothing."""
    return (count, money) == (1, 0) or (count == 0 and money >= 0)


def price_hold(state: AccountState, policy: AccountPolicy, kind: Kind) -> int | None:
    """Return the money that one more submission may take; None without a known price."""
    if state.count is not None and state.count.value > max(state.open_submissions, state.unaccounted_charges):
        return 0
    return policy.max_price.get(kind, state.max_observed_price.get(kind))


def observe_balance(
    state: AccountState,
    policy: AccountPolicy,
    balance: Balance,
    source: ReadingSource,
    sent_at: int,
    received_at: int,
    kind: Kind | None = None,
) -> None:
    """Apply the figures of a response to a submission of `kind`, or to a check.

    A rise reopens an exhausted account, reaching the floors closes it. A drop that the gateway's submissions can't
    explain is unexplained, unless its request is older than the last rise.
    """
    if sent_at < state.reopened_at:
        return
    infer_unknown_charge(state, balance, source, sent_at, kind)
    is_first = state.count is None or state.money is None
    count, state.count = _update_reading(state.count, balance.count, source, sent_at, received_at)
    money, state.money = _update_reading(state.money, balance.money_fen, source, sent_at, received_at)
    if sent_at > state.last_increase_at:
        attribute_drop(state, max(-count, 0), max(-money, 0))
    reconcile_balance(state, balance, sent_at, received_at)
    has_increased = count > 0 or money > 0
    if is_first or has_increased:
        state.last_increase_at = received_at
    if state.status is AccountStatus.EXHAUSTED and has_increased:
        state.status = AccountStatus.OPEN
    if state.status is AccountStatus.OPEN and not _stays_above_floors(state, policy, None, 0):
        _close_account(state, AccountStatus.EXHAUSTED, received_at)


def close_on_refusal(state: AccountState, status: AccountStatus, sent_at: int, received_at: int) -> None:
    """Close an account that can't pay or is unknown, unless the refusal is older than the known balance."""
    last_sent_at = max((reading.sent_at for reading in (state.count, state.money) if reading), default=0)
    if sent_at >= max(last_sent_at, state.reopened_at):
        _close_account(state, status, received_at)
        state.closed_at = sent_at


def open_on_acceptance(state: AccountState, sent_at: int) -> None:
    """Open an account that accepted a submission, unless a later one was refused."""
    if sent_at > state.closed_at:
        state.status = AccountStatus.OPEN


def is_balance_check_due(state: AccountState, policy: AccountPolicy, now: int, *, count_only: bool) -> bool:
    """Whether to check the last finished task again, which reads the balance at no cost.

    Once per interval for an account that is exhausted or too close to its floor for some task, whose balance lacks
    ended submissions, or whose `count_only` tenant waits for prepaid uses.
    """
    if (
        state.last_finished_task is None
        or state.status is AccountStatus.INVALID
        or now < state.last_balance_check_at + PROBE_INTERVAL_MS
    ):
        return False
    if state.status is AccountStatus.EXHAUSTED or (state.live_balance_checks and _needs_balance_check(state)):
        return True
    if count_only and state.count is not None and state.count.value - state.unaccounted_charges <= policy.floor_count:
        return True
    return (
        policy.floor_money_fen > 0
        and state.open_submissions == 0
        and not _stays_above_floors(state, policy, _max_price_any_kind(state, policy), 0)
    )


def record_balance_check(
    state: AccountState, policy: AccountPolicy, reservation: str, balance: Balance, sent_at: int, received_at: int
) -> None:
    """Record a repeated check of the last finished task.

    Figures that differ from those of the first check prove that checks return the current balance. Without figures the
    task is not checked again.
    """
    last_check = state.last_finished_task
    if last_check is None or last_check.reservation != reservation:
        return
    state.failed_balance_checks = 0
    if balance.count is None or balance.money_fen is None:
        state.last_finished_task = None
        return
    if (balance.count, balance.money_fen) != (last_check.count, last_check.money_fen):
        state.live_balance_checks = True
    if state.live_balance_checks:
        state.last_finished_task = FinishedTaskCheck(
            reservation, max(sent_at, last_check.sent_at), balance.count, balance.money_fen
        )
        observe_balance(state, policy, balance, ReadingSource.CHECK, sent_at, received_at)


def store_finished_task(state: AccountState, reservation: str, balance: Balance, sent_at: int) -> None:
    """Remember an ended task for balance checks if it had figures and none was checked later."""
    if (
        balance.count is None
        or balance.money_fen is None
        or (state.last_finished_task and sent_at < state.last_finished_task.sent_at)
    ):
        return
    state.last_finished_task, state.failed_balance_checks = (
        FinishedTaskCheck(reservation, sent_at, balance.count, balance.money_fen),
        0,
    )


def _update_reading(
    reading: BalanceReading | None, value: int | None, source: ReadingSource, sent_at: int, received_at: int
) -> tuple[int, BalanceReading | None]:
    """Return the change of a figure (negative for a drop) and its reading after an observation."""
    if value is None:
        return 0, reading
    if reading is None or sent_at > reading.received_at:
        return (value - reading.value if reading else 0), BalanceReading(value, sent_at, received_at, source)
    if value < reading.value:
        latest = max(received_at, reading.received_at)
        return value - reading.value, BalanceReading(value, max(sent_at, reading.sent_at), latest, source)
    return 0, reading


def _close_account(state: AccountState, status: AccountStatus, received_at: int) -> None:
    state.status = status
    state.next_probe_at, state.last_balance_check_at = received_at + PROBE_INTERVAL_MS, received_at
