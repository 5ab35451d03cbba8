"""The ledger's rules in Python: the oracle of the property tests of the Lua scripts.

Functions change the state they are given. Times are milliseconds (`at` holds ledger time and server time), money is in
fen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from service.domain.availability import (
    PROBE_INTERVAL_MS,
    _max_price_any_kind,
    _needs_balance_check,
    _stays_above_floors,
    choose_account,
)
from service.domain.errors import Violation
from service.domain.ledger import (
    MAX_ACTIVE_POLICY,
    UNIT_MONEY,
    UNIT_TASKS,
    AccountState,
    AccountStatus,
    Balance,
    BalanceReading,
    BalanceSnapshot,
    Candidate,
    ChargeInference,
    ClockReading,
    DayUsage,
    ExpectedDrop,
    FinishedTaskCheck,
    Grant,
    InferredCharge,
    Measure,
    NoAccount,
    PolicyDenial,
    ReadingSource,
    Refund,
    RefundResult,
    Reservation,
    ReservationState,
    Tally,
    TenantState,
    Verdict,
    WindowCounter,
    _all_counters,
    current_counter,
    policy_name,
    window_bounds,
)
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy, Limit, SpendingMode, TenantPolicy, Window
from service.storage.redis import AGE_PER_CHECK_INTERVAL, LATE_CHARGE_MS, MAX_CHECK_BACKOFF_MS, MAX_CHECK_INTERVAL_MS

_COST_MEASURES = {
    CostBasis.OBSERVED: (Measure.OBSERVED_COUNT, Measure.OBSERVED_MONEY),
    CostBasis.ESTIMATED: (Measure.ESTIMATED_COUNT, Measure.ESTIMATED_MONEY),
}


def apply_to_usage(day: DayUsage, name: str, reservation: Reservation, sign: int) -> None:
    """Add what the reservation `name` counts for in its day; with a sign of -1 remove it."""
    tally = day.tallies.setdefault(reservation.kind, Tally())
    for measure, change in _usage_of(reservation).items():
        tally[measure] += sign * change
    if reservation.state is ReservationState.UNKNOWN:
        day.unknown[name] = reservation.kind
        if sign < 0:
            del day.unknown[name]
    if reservation.refund:
        day.refunds[name] = reservation.kind, msgspec.structs.replace(reservation.refund)
        if sign < 0:
            del day.refunds[name]


def _usage_of(reservation: Reservation) -> Tally:
    tally = Tally()
    match reservation.state:
        case ReservationState.RESERVED:
            pass
        case ReservationState.REFUSED:
            tally[Measure.REFUSED] = 1
        case ReservationState.NOT_SENT:
            tally[Measure.NOT_SENT] = 1
        case ReservationState.UNKNOWN:
            tally[Measure.UNKNOWN] = 1
            tally[Measure.UNKNOWN_MONEY] = reservation.money_holds.get(Window.DAY, 0)
        case ReservationState.ACCEPTED:
            cost = reservation.cost
            if cost is None:
                tally[Measure.RUNNING] = 1
            else:
                tally[Measure.SUCCEEDED if reservation.succeeded else Measure.FAILED] = 1
            if cost and cost.basis in _COST_MEASURES:
                uses, money = _COST_MEASURES[cost.basis]
                tally[uses], tally[money] = cost.count, cost.money_fen
            elif cost:
                tally[Measure.UNKNOWN_COST] = 1
    if reservation.refund:
        tally[Measure.REFUNDED] = 1
        tally[Measure.REFUNDED_COUNT] = reservation.refund.count
        tally[Measure.REFUNDED_MONEY] = reservation.refund.money_fen
    return tally


def roll_windows(state: TenantState, now: int) -> None:
    """Start the windows whose bounds no longer contain `now`.

    The server clock may step back into an earlier window, so the previous counter is retained, and later ones after a
    step. An earlier window whose counter is gone gets a replacement key: it may have been counted before.
    """
    for window in Window:
        start, _ = window_bounds(window, now)
        if window in state.windows and state.windows[window].window_start == start:
            continue
        counters = _all_counters(state, window)
        later = [counter for counter in counters if counter.window_start > start]
        previous = max(
            (counter for counter in counters if counter.window_start < start),
            key=lambda counter: counter.window_start,
            default=None,
        )
        current = current_counter(state, window, now)
        if later and current not in counters:
            state.replacement_key_seq += 1
            current.replacement_key = -state.replacement_key_seq
        retained = [*later, previous] if previous else later
        state.windows[window] = current
        state.retained_counters = state.retained_counters | {window: retained}
        if not retained:
            del state.retained_counters[window]


def counter_key(counter: WindowCounter) -> int:
    """Return the key by which reservations refer to a counter."""
    return counter.window_start if counter.replacement_key is None else counter.replacement_key


def find_counter(state: TenantState, window: Window, key: int | None) -> WindowCounter | None:
    return next((counter for counter in _all_counters(state, window) if counter_key(counter) == key), None)


def to_server_time(moment: ClockReading, ledger_time: int) -> int:
    """Convert a ledger time; 0 means never and stays 0."""
    return ledger_time and ledger_time - moment.offset_ms


_URL_HOST = re.compile(r"[a-z]+://([^/:?]+)")
_DIGITS = re.compile(r"[0-9.]+")


def queue_name(tenant: int, url: str) -> str:
    """Return the delivery queue of a URL: one per tenant and host, whatever the port, one for all IP addresses.

    Thus a tenant has at most as many queues as hosts on its allow list.
    """
    host = _URL_HOST.match(url)
    name = host[1] if host else ""
    return f"{tenant}:{'ip' if name.startswith('[') or _DIGITS.fullmatch(name) else name}"


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
    was_untracked = reservation.charge_pending and reservation.settled_at > state.reconciled_at
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
    if _was_exclusive(state, reservation) and reservation.balance_exact and before:
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
            _was_exclusive(state, reservation)
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
    is_exclusive = _was_exclusive(state, reservation) and reservation.balance_exact
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


def _was_exclusive(state: AccountState, reservation: Reservation) -> bool:
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


def start_balance_check(state: AccountState, now: int) -> None:
    state.last_balance_check_at = now
    state.failed_balance_checks += 1


def record_balance_check(
    state: AccountState,
    policy: AccountPolicy,
    reservation: str,
    balance: Balance,
    sent_at: int,
    received_at: int,
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


_CHARGED_STATES = frozenset({ReservationState.ACCEPTED, ReservationState.UNKNOWN})


def recreate_reservation(
    tenant: TenantState, account: AccountState, name: str, reservation: Reservation, day: DayUsage, at: ClockReading
) -> None:
    """Recreate a lost reservation as unknown, in the windows of its creation."""
    roll_windows(tenant, at.server_ms)
    reservation.state, reservation.settled_at = ReservationState.UNKNOWN, at.ledger_ms
    reservation.window_starts = {window: window_bounds(window, reservation.created_at)[0] for window in Window}
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(day, name, reservation, 1)
    account.unknown_outcomes += 1
    account.expected_drop.charges += 1
    account.expected_drop.unpriced += 1
    mark_charge_pending(account, reservation)
    mark_untracked(account, reservation, at.ledger_ms + LATE_CHARGE_MS)


def settle_reservation(
    tenant: TenantState,
    account: Candidate,
    name: str,
    reservation: Reservation,
    outcome: ReservationState,
    balance: Balance,
    account_status: AccountStatus | None,
    day: DayUsage,
    at: ClockReading,
) -> bool:
    """Settle the reservation `name`; return False if it has a final outcome."""
    roll_windows(tenant, at.server_ms)
    previous, state, still_expected = reservation.state, account.state, True
    if previous not in {ReservationState.RESERVED, ReservationState.UNKNOWN} or previous is outcome:
        return False
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    if previous is ReservationState.RESERVED:
        state.unsettled -= 1
        state.open_submissions -= 1
    else:
        state.unknown_outcomes -= 1
        still_expected = resolve_untracked(state, reservation)
        if state.pending_inference and state.pending_inference.reservation == name:
            state.pending_inference = None
    reservation.state, reservation.settled_at = outcome, at.ledger_ms
    if outcome is ReservationState.ACCEPTED:
        state.open_submissions += 1
        reservation.balance_after = balance
        if reservation.refund:
            reservation.refund.count = reservation.refund.money_fen = 0  # until its task has ended
        open_on_acceptance(state, reservation.dispatched_at)
        if previous is ReservationState.UNKNOWN:
            mark_charge_pending(state, reservation)
            add_expected_charge(state, account.policy, reservation.kind, 1)
    elif outcome is ReservationState.UNKNOWN:
        state.unknown_outcomes += 1
        start_inference(state, name, reservation, at.ledger_ms)
    else:
        reservation.money_holds, reservation.refund = {}, None
        cancel_expected_charge(state, account.policy, reservation, still_expected=still_expected)
        if account_status:
            close_on_refusal(state, account_status, reservation.dispatched_at, at.ledger_ms)
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(day, name, reservation, 1)
    observe_balance(
        state, account.policy, balance, ReadingSource.SUBMIT, reservation.dispatched_at, at.ledger_ms, reservation.kind
    )
    if outcome is ReservationState.ACCEPTED:
        learn_charge_timing(state, reservation, balance)
    return True


def complete_task(
    tenant: TenantState,
    policy: TenantPolicy,
    account: Candidate,
    name: str,
    reservation: Reservation,
    balance: Balance,
    sent_at: int,
    day: DayUsage,
    at: ClockReading,
    *,
    succeeded: bool,
) -> Cost:
    """Finish an accepted submission whose task has ended.

    A check may return the balance at the end of the task, which may be as old as its submission: if anything else
    happened on the account since, the reading counts as that old, unless checks return the current balance.
    """
    roll_windows(tenant, at.server_ms)
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    state = account.state
    state.open_submissions -= 1
    is_exclusive = reservation.exclusive and state.submission_seq == reservation.submission_seq
    reading_at = min(sent_at if is_exclusive or state.live_balance_checks else reservation.dispatched_at, at.ledger_ms)
    observe_balance(state, account.policy, balance, ReadingSource.CHECK, reading_at, at.ledger_ms)
    cost = compute_cost(state, account.policy, reservation, balance, succeeded=succeeded)
    if succeeded:
        store_finished_task(state, name, balance, min(sent_at, at.ledger_ms))
    finish_charge(state, reservation, balance, reading_at, at.ledger_ms)
    reservation.money_holds, reservation.cost, reservation.succeeded = {}, cost, succeeded
    reservation.balance_before = reservation.balance_after = None
    if reservation.refund:
        reservation.refund.count, reservation.refund.money_fen = cost.count, cost.money_fen
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(day, name, reservation, 1)
    if not reservation.refund:
        _count_overrun(tenant, policy, reservation, cost.money_fen)
    return cost


def refund_reservation(
    tenant: TenantState, name: str, reservation: Reservation, reason: str, day: DayUsage, at: ClockReading
) -> RefundResult:
    """Refund a submission to its tenant's windows, once; it counts for nothing in them from then on."""
    roll_windows(tenant, at.server_ms)
    if reservation.refund:
        return RefundResult.ALREADY_REFUNDED
    if reservation.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
        return RefundResult.NOTHING_CHARGED
    if reservation.state is ReservationState.UNKNOWN:
        refund = Refund(at.server_ms, reason, 0, reservation.money_holds.get(Window.DAY, 0))
    elif reservation.cost is None:
        return RefundResult.RUNNING
    else:
        refund = Refund(at.server_ms, reason, reservation.cost.count, reservation.cost.money_fen)
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    reservation.refund = refund
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(day, name, reservation, 1)
    return RefundResult.REFUNDED


def apply_to_windows(tenant: TenantState, reservation: Reservation, sign: int) -> None:
    """Add what a reservation counts for in its windows; with a sign of -1 remove it."""
    is_reserved = reservation.state is ReservationState.RESERVED
    is_running = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    is_charged = reservation.state in _CHARGED_STATES and not reservation.refund
    if is_reserved or is_running:
        tenant.active_tasks += sign
        tenant.active_by_kind[reservation.kind] = tenant.active_by_kind.get(reservation.kind, 0) + sign
    for window in Window:
        counter = find_counter(tenant, window, reservation.window_starts.get(window))
        if counter is None:
            continue
        held = reservation.money_holds.get(window, 0)
        counter.tasks_reserved += sign * is_reserved
        counter.money_reserved_fen += sign * held * (is_reserved or is_running)
        if is_charged:
            counter.tasks += sign
            counter.money_fen += sign * (reservation.cost.money_fen if reservation.cost else held * (not is_running))


def _count_overrun(tenant: TenantState, policy: TenantPolicy, reservation: Reservation, money_fen: int) -> None:
    for limit in policy.limits:
        counter = find_counter(tenant, limit.window, reservation.window_starts.get(limit.window))
        if limit.money_fen is not None and counter:
            counter.overrun_fen += min(max(counter.money_fen - limit.money_fen, 0), money_fen)


def reserve_place(
    tenant: TenantState,
    policy: TenantPolicy,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    at: ClockReading,
) -> Verdict:
    """Reserve on the first account that can pay; the tenant's policies come first. A refusal changes nothing."""
    roll_windows(tenant, at.server_ms)
    chosen, retry_at = choose_account(accounts, policy.spending_mode, reservation.kind, at.ledger_ms)
    violations = _find_violations(tenant, policy, at.server_ms)
    holds: dict[Window, int] = {}
    if chosen:
        price = price_hold(chosen.state, chosen.policy, reservation.kind)
        refused, holds = _compute_holds(tenant, policy.limits, price, at.server_ms)
        violations += refused
    if violations:
        return PolicyDenial(tuple(violations), at.server_ms)
    if chosen is None:
        return NoAccount(retry_at and to_server_time(at, retry_at), at.server_ms)
    reservation.window_starts = {window: counter_key(tenant.windows[window]) for window in Window}
    _assign_account(chosen, reservation, holds, policy.spending_mode, at.ledger_ms)
    apply_to_windows(tenant, reservation, 1)
    return Grant(chosen.id, at.server_ms, to_server_time(at, reservation.lease_expires_at))


def change_account(
    tenant: TenantState,
    policy: TenantPolicy,
    previous: Candidate,
    account_status: AccountStatus | None,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    at: ClockReading,
) -> Verdict:
    """Move a reservation to the next account, with its place in the windows; a refusal moves nothing."""
    roll_windows(tenant, at.server_ms)
    if account_status:
        close_on_refusal(previous.state, account_status, reservation.dispatched_at, at.ledger_ms)
    chosen, retry_at = choose_account(accounts, policy.spending_mode, reservation.kind, at.ledger_ms)
    if chosen is None:
        return NoAccount(retry_at and to_server_time(at, retry_at), at.server_ms)
    apply_to_windows(tenant, reservation, -1)
    price = price_hold(chosen.state, chosen.policy, reservation.kind)
    violations, holds = _compute_holds(tenant, policy.limits, price, at.server_ms)
    if violations:
        apply_to_windows(tenant, reservation, 1)
        return PolicyDenial(tuple(violations), at.server_ms)
    previous.state.open_submissions -= 1
    previous.state.unsettled -= 1
    cancel_expected_charge(previous.state, previous.policy, reservation, still_expected=True)
    _assign_account(chosen, reservation, holds, policy.spending_mode, at.ledger_ms)
    apply_to_windows(tenant, reservation, 1)
    return Grant(chosen.id, at.server_ms, to_server_time(at, reservation.lease_expires_at))


def _find_violations(tenant: TenantState, policy: TenantPolicy, now: int) -> list[Violation]:
    violations = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        counter = tenant.windows[limit.window]
        if counter.tasks + counter.tasks_reserved >= limit.tasks:
            violations.append(_make_violation(limit.window, UNIT_TASKS, limit.tasks, now))
    if policy.max_active is not None and tenant.active_tasks >= policy.max_active:
        violations.append(Violation(MAX_ACTIVE_POLICY, policy.max_active, None))
    return violations


def _compute_holds(
    tenant: TenantState, limits: Sequence[Limit], price: int | None, now: int
) -> tuple[list[Violation], dict[Window, int]]:
    """Return the limits on money that refuse a price, and what each window holds for it.

    Without a known price a limited window holds all that remains, an unlimited one the most of those.
    """
    refused: list[Violation] = []
    holds: dict[Window, int] = {}
    for limit in limits:
        if limit.money_fen is None:
            continue
        counter = tenant.windows[limit.window]
        remaining = limit.money_fen - counter.money_fen - counter.money_reserved_fen
        hold = max(remaining, 1) if price is None else price
        if hold > max(remaining, 0):
            refused.append(_make_violation(limit.window, UNIT_MONEY, limit.money_fen, now))
        holds[limit.window] = hold
    unlimited_hold = max(holds.values(), default=0) if price is None else price
    holds = {window: holds.get(window, unlimited_hold) for window in Window}
    return refused, holds if any(holds.values()) else {}


def _make_violation(window: Window, unit: str, limit: int, now: int) -> Violation:
    return Violation(policy_name(window, unit), limit, window_bounds(window, now)[1])


def _assign_account(
    account: Candidate, reservation: Reservation, holds: dict[Window, int], spending_mode: SpendingMode, now: int
) -> None:
    """Assign a reservation to an account and remember its balance.

    A probe remembers none: its acceptance means that the account was topped up.
    """
    state = account.state
    if account.is_probe:
        state.next_probe_at = now + PROBE_INTERVAL_MS
    state.submission_seq += 1
    reservation.account, reservation.dispatched_at, reservation.submission_seq = account.id, now, state.submission_seq
    reservation.exclusive, reservation.balance_exact = state.open_submissions == 0, state.unaccounted_charges == 0
    reservation.expects_prepaid = state.count.value > state.unaccounted_charges if state.count else None
    reservation.prepaid_only = spending_mode is SpendingMode.COUNT_ONLY
    reservation.balance_before = None
    if state.count and state.money and not account.is_probe:
        reservation.balance_before = BalanceSnapshot(state.count.value, state.money.value)
    reservation.money_holds = holds
    state.open_submissions += 1
    state.unsettled += 1
    mark_charge_pending(state, reservation)
    add_expected_charge(state, account.policy, reservation.kind, 1)


def next_check_delay(poll_ms: int, age_ms: int, failures: int, *, is_watched: bool) -> int:
    """Return the delay until the next check.

    A watched task is checked each time, another one less often with its age; failures back off.
    """
    if failures:
        return min(poll_ms << failures, max(MAX_CHECK_BACKOFF_MS, poll_ms))
    if is_watched:
        return poll_ms
    return max(min(age_ms // AGE_PER_CHECK_INTERVAL, MAX_CHECK_INTERVAL_MS), poll_ms)
