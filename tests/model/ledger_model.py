"""The ledger's rules in Python: the oracle of the property tests of the Lua scripts."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from service.domain import availability
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
    """Put in what the reservation `name` counts for, or (with a sign of -1) take it out."""
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
    """What a reservation counts for, which follows from it alone."""
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
    """Begin the windows anew whose period is over.

    The clock may step back into an earlier period, so the counter of the last one is set aside, as are those of later
    ones where it has. An earlier one whose counter is not kept, and which may have been counted before, is counted
    under another name.
    """
    for window in Window:
        period, _ = window_bounds(window, now)
        if window in state.windows and state.windows[window].window_start == period:
            continue
        known = _all_counters(state, window)
        later = [each for each in known if each.window_start > period]
        last = max(
            (each for each in known if each.window_start < period), key=lambda each: each.window_start, default=None
        )
        begun = current_counter(state, window, now)
        if later and begun not in known:
            state.replacement_key_seq += 1
            begun.replacement_key = -state.replacement_key_seq
        aside = [*later, last] if last else later
        state.windows[window] = begun
        state.retained_counters = {
            each: kept for each, kept in (state.retained_counters | {window: aside}).items() if kept
        }


def find_counter(state: TenantState, window: Window, key: int | None) -> WindowCounter | None:
    """The counter of a window that reservations know by a key, if there still is one."""
    return next((each for each in _all_counters(state, window) if each.key == key), None)


def to_server_time(moment: ClockReading, ledger_time: int) -> int:
    """A time of the ledger in the server's time; 0 stands for never, and stays so."""
    return ledger_time and ledger_time - moment.offset_ms


_URL_HOST = re.compile(r"[a-z]+://([^/:?]+)")


_DIGITS = re.compile(r"[0-9.]+")


def queue_name(tenant: int, url: str) -> str:
    """Whom the deliveries to an address may keep waiting: a tenant's others at the same host.

    Ports make no difference, and addresses without a name are all one, so that a tenant has no more receivers than
    hosts on its list: each of them may occupy a part of what is sent at once.
    """
    host = _URL_HOST.match(url)
    name = host[1] if host else ""
    return f"{tenant}:{'ip' if name.startswith('[') or _DIGITS.fullmatch(name) else name}"


def add_expected_charge(state: AccountState, policy: AccountPolicy, kind: Kind, sign: int) -> None:
    """Count a submission among those that the balance may drop for, or (with a sign of -1) no longer."""
    price = policy.max_price.get(kind)
    expected = state.expected_drop
    expected.charges = max(expected.charges + sign, 0)
    if price is None:
        expected.unpriced = max(expected.unpriced + sign, 0)
    else:
        expected.max_fen = max(expected.max_fen + sign * price, 0)


def attribute_drop(state: AccountState, count: int, money: int) -> None:
    """Set a drop against what the gateway's own submissions may have taken; what is left was taken by somebody else.

    Once each of them is seen to have taken a use, none has taken money.
    """
    expected = state.expected_drop
    state.unexplained_count += max(count - expected.charges, 0)
    expected.charges = max(expected.charges - count, 0)
    if expected.charges == 0:
        state.unexplained_money_fen += money + expected.attributed_fen
        state.expected_drop = ExpectedDrop()
        return
    own = money if expected.unpriced else min(money, expected.max_fen)
    state.unexplained_money_fen += money - own
    expected.max_fen = max(expected.max_fen - own, 0)
    expected.attributed_fen += own


def mark_charge_pending(state: AccountState, reservation: Reservation) -> None:
    """From now on the figures may lack this submission, which is under way."""
    state.pending_charges += 1
    state.pending_prepaid_only += reservation.prepaid_only
    reservation.charge_pending = True


def clear_pending_charge(state: AccountState, reservation: Reservation) -> None:
    """The figures show what this submission, which was under way, took if it took anything."""
    if reservation.charge_pending:
        state.pending_charges -= 1
        reservation.charge_pending = False
    _clear_prepaid_only(state, reservation)
    _clear_expected_drop(state)


def cancel_expected_charge(
    state: AccountState, policy: AccountPolicy, reservation: Reservation, *, still_expected: bool
) -> None:
    """This submission takes nothing; the figures might have `lacked` it until now, so that it was still expected to."""
    if still_expected:
        add_expected_charge(state, policy, reservation.kind, -1)
    clear_pending_charge(state, reservation)


def mark_untracked(state: AccountState, reservation: Reservation, until_ms: int) -> None:
    """This submission is no longer under way, and may be missing in the figures until they are asked for at `until`."""
    if reservation.charge_pending:
        state.pending_charges -= 1
        state.untracked_charges += 1
        state.untracked_until = max(state.untracked_until, until_ms)
    _clear_prepaid_only(state, reservation)


def resolve_untracked(state: AccountState, reservation: Reservation) -> bool:
    """What became of a stray submission is known; whether the figures might have lacked it until now."""
    lacked = reservation.charge_pending and reservation.settled_at > state.reconciled_at
    if lacked:
        state.untracked_charges -= 1
    reservation.charge_pending = False
    _clear_expected_drop(state)
    return lacked


def reconcile_balance(state: AccountState, balance: Balance, sent_at: int, received_at: int) -> None:
    """See whether figures that were asked for at `sent` show all the strays."""
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
    """Where the figures lack nothing, no drop is to be expected any more."""
    if state.unaccounted_charges == 0:
        state.expected_drop = ExpectedDrop()


def start_inference(state: AccountState, name: str, reservation: Reservation, now: int) -> None:
    """A submission became unknown. If it had the account to itself, the next figures may tell what became of it."""
    mark_untracked(state, reservation, now + LATE_CHARGE_MS)
    before = reservation.balance_before
    if _was_exclusive(state, reservation) and reservation.balance_exact and before:
        state.pending_inference = ChargeInference(name, reservation.submission_seq, now, before.count, before.money_fen)


def infer_unknown_charge(
    state: AccountState, balance: Balance, source: ReadingSource, sent_at: int, kind: Kind | None
) -> None:
    """See from the first figures after a submission in doubt whether it was charged.

    Nothing else may have happened since, but for the one submission (of `kind`) whose answer this is.
    """
    doubt = state.pending_inference
    if (
        doubt is None
        or doubt.inferred_charge
        or balance.count is None
        or balance.money_fen is None
        or sent_at <= doubt.unknown_at
    ):
        return
    count, money, others = (
        doubt.count - balance.count,
        doubt.money_fen - balance.money_fen,
        state.submission_seq - doubt.submission_seq,
    )
    own: tuple[int, int] | None = (0, 0)
    if others == 1 and source is ReadingSource.SUBMIT and not state.charges_on_completion:
        price = state.last_price.get(kind) if kind else None
        own = (1, 0) if count > 0 else None if price is None else (0, price)
    elif others > 1 or (others == 1 and source is ReadingSource.CHECK):
        own = None
    if own is None or not _is_single_charge(count - own[0], money - own[1]):
        state.pending_inference = None
    elif (count, money) != own:
        doubt.inferred_charge = InferredCharge.CHARGED
    elif state.charges_on_completion is False:
        doubt.inferred_charge = InferredCharge.NOT_CHARGED
    elif others:
        state.pending_inference = None


def store_inference(state: AccountState, policy: AccountPolicy, reservation: Reservation) -> None:
    """Write to the submission in doubt what was found out of it."""
    if state.pending_inference and state.pending_inference.inferred_charge:
        reservation.inferred_charge = state.pending_inference.inferred_charge
        if reservation.inferred_charge is InferredCharge.NOT_CHARGED:
            add_expected_charge(state, policy, reservation.kind, -1)
        resolve_untracked(state, reservation)
        state.pending_inference = None


def learn_charge_timing(state: AccountState, reservation: Reservation, balance_after: Balance) -> None:
    """See from the answer to a submission when it is charged, once that answer is observed.

    If it took nothing it is at the task's end; if it had the account to itself and took something, at once.
    """
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
    """A task has ended: its figures, which are observed, show what it took. Without them it is astray."""
    if balance.count is None or balance.money_fen is None or sent_at < state.reopened_at:
        mark_untracked(state, reservation, now)
    else:
        clear_pending_charge(state, reservation)


def compute_cost(
    state: AccountState, policy: AccountPolicy, reservation: Reservation, balance: Balance, *, succeeded: bool
) -> Cost:
    """What an ended task cost, remembering the price if it was observed; `figures` were told about its end.

    The drop is a receipt if nothing else of the account was open in between, if it is one that a task can cause, and
    not above what the operator calls the highest price. A task that failed tells no figures; what it took shows in
    those of its submission where tasks are charged at once, but is an estimate: it may have been given back since. Else
    it is taken to be a use, if it was to take one, or the last price of its kind, or the operator's highest.
    """
    kind, before, told = reservation.kind, reservation.balance_before, balance
    observed_end = balance.count is not None and balance.money_fen is not None
    if not observed_end and not state.charges_on_completion and reservation.balance_after:
        told = reservation.balance_after
    by_itself = _was_exclusive(state, reservation) and reservation.balance_exact
    if by_itself and before and told.count is not None and told.money_fen is not None:
        count, money = before.count - told.count, before.money_fen - told.money_fen
        if _is_single_charge(count, money) and money <= policy.max_price.get(kind, money):
            if money:
                state.last_price[kind] = money
                state.max_observed_price[kind] = max(state.max_observed_price.get(kind, 0), money)
            if count or money or (observed_end and not succeeded):
                return Cost(count, money, CostBasis.OBSERVED if succeeded or observed_end else CostBasis.ESTIMATED)
    left = told.count if told.count is not None or state.count is None else state.count.value
    if reservation.expects_prepaid or (reservation.expects_prepaid is None and left):
        return Cost(1, 0, CostBasis.ESTIMATED)
    price = state.last_price.get(kind, policy.max_price.get(kind) if left is not None else None)
    return Cost(0, 0, CostBasis.UNKNOWN) if price is None else Cost(0, price, CostBasis.ESTIMATED)


def _was_exclusive(state: AccountState, reservation: Reservation) -> bool:
    """Whether nothing else was open on its account since it was sent."""
    return reservation.exclusive and state.submission_seq == reservation.submission_seq


def _is_single_charge(count: int, money: int) -> bool:
    """Whether a drop of the balance is one that a single task can cause: one use, or money, or nothing."""
    return (count, money) == (1, 0) or (count == 0 and money >= 0)


def price_hold(state: AccountState, policy: AccountPolicy, kind: Kind) -> int | None:
    """The money one more submission may take, in fen; None where no price is known at all."""
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
    """Take in what the answer to a submission of `kind`, or to a check, told.

    A rise reopens an exhausted account, reaching the floors closes it. A drop that the gateway's own submissions can't
    explain is somebody else's, but for one to what may have been the figures before they last rose. What became of a
    submission in doubt may show.
    """
    if sent_at < state.reopened_at:
        return
    infer_unknown_charge(state, balance, source, sent_at, kind)
    begins = state.count is None or state.money is None
    count, state.count = _update_reading(state.count, balance.count, source, sent_at, received_at)
    money, state.money = _update_reading(state.money, balance.money_fen, source, sent_at, received_at)
    if sent_at > state.last_increase_at:
        attribute_drop(state, max(-count, 0), max(-money, 0))
    reconcile_balance(state, balance, sent_at, received_at)
    rises = count > 0 or money > 0
    if begins or rises:
        state.last_increase_at = received_at
    if state.status is AccountStatus.EXHAUSTED and rises:
        state.status = AccountStatus.OPEN
    if state.status is AccountStatus.OPEN and not _stays_above_floors(state, policy, None, 0):
        _close_account(state, AccountStatus.EXHAUSTED, received_at)


def close_on_refusal(state: AccountState, status: AccountStatus, sent_at: int, received_at: int) -> None:
    """The upstream said that the account can't pay, or that it does not know it.

    An answer whose request was sent before the known figures were asked for is too old to close anything.
    """
    newest = max((figure.sent_at for figure in (state.count, state.money) if figure), default=0)
    if sent_at >= max(newest, state.reopened_at):
        _close_account(state, status, received_at)
        state.closed_at = sent_at


def open_on_acceptance(state: AccountState, sent_at: int) -> None:
    """The upstream took a submission: the account is known and could pay, unless a later one was refused."""
    if sent_at > state.closed_at:
        state.status = AccountStatus.OPEN


def is_balance_check_due(state: AccountState, policy: AccountPolicy, now: int, *, count_only: bool) -> bool:
    """Whether the newest finished task is to be checked again, which tells the balance without spending any.

    That is so for an account that is exhausted, or too close to its floor for some task, for one whose figures may lack
    submissions that have ended, and where a tenant that may spend nothing but uses (`count_only`) waits for some: once
    per interval.
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
    """An account is being looked at, which may tell nothing."""
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
    """Take in what a second check of a finished task told.

    Figures that differ from those of its first check are today's: from then on all such figures are believed. One that
    tells none is not asked again.
    """
    newest = state.last_finished_task
    if newest is None or newest.reservation != reservation:
        return
    state.failed_balance_checks = 0
    if balance.count is None or balance.money_fen is None:
        state.last_finished_task = None
        return
    if (balance.count, balance.money_fen) != (newest.count, newest.money_fen):
        state.live_balance_checks = True
    if state.live_balance_checks:
        state.last_finished_task = FinishedTaskCheck(
            reservation, max(sent_at, newest.sent_at), balance.count, balance.money_fen
        )
        observe_balance(state, policy, balance, ReadingSource.CHECK, sent_at, received_at)


def store_finished_task(state: AccountState, reservation: str, balance: Balance, sent_at: int) -> None:
    """A task has ended: if it told figures and none was checked later, it is the one to check again."""
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
    known: BalanceReading | None, value: int | None, source: ReadingSource, sent_at: int, received_at: int
) -> tuple[int, BalanceReading | None]:
    """By how much a figure rose (or dropped, below zero), and what is known of it after an observation."""
    if value is None:
        return 0, known
    if known is None or sent_at > known.received_at:
        return (value - known.value if known else 0), BalanceReading(value, sent_at, received_at, source)
    if value < known.value:
        latest = max(received_at, known.received_at)
        return value - known.value, BalanceReading(value, max(sent_at, known.sent_at), latest, source)
    return 0, known


def _close_account(state: AccountState, status: AccountStatus, received_at: int) -> None:
    state.status, state.next_probe_at, state.last_balance_check_at = (
        status,
        received_at + PROBE_INTERVAL_MS,
        received_at,
    )


_CHARGED_STATES = frozenset({ReservationState.ACCEPTED, ReservationState.UNKNOWN})


def recreate_reservation(
    tenant: TenantState, account: AccountState, name: str, reservation: Reservation, day: DayUsage, at: ClockReading
) -> None:
    """Charge a reservation the ledger has lost as unknown, in the windows of its creation, before it is settled."""
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
    """Give the reservation `name` its outcome; False if it had a final one already, and nothing changes.

    `figures` is what the answer told of the balance, `closes` what a refusal said of the account.
    """
    roll_windows(tenant, at.server_ms)
    was, state, lacked = reservation.state, account.state, True
    if was not in {ReservationState.RESERVED, ReservationState.UNKNOWN} or was is outcome:
        return False
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    if was is ReservationState.RESERVED:
        state.unsettled -= 1
        state.open_submissions -= 1
    else:
        state.unknown_outcomes -= 1
        lacked = resolve_untracked(state, reservation)
        if state.pending_inference and state.pending_inference.reservation == name:
            state.pending_inference = None
    reservation.state, reservation.settled_at = outcome, at.ledger_ms
    if outcome is ReservationState.ACCEPTED:
        state.open_submissions += 1
        reservation.balance_after = balance
        if reservation.refund:
            reservation.refund.count = reservation.refund.money_fen = 0  # until it has ended
        open_on_acceptance(state, reservation.dispatched_at)
        if was is ReservationState.UNKNOWN:
            mark_charge_pending(state, reservation)
            add_expected_charge(state, account.policy, reservation.kind, 1)
    elif outcome is ReservationState.UNKNOWN:
        state.unknown_outcomes += 1
        start_inference(state, name, reservation, at.ledger_ms)
    else:
        reservation.money_holds, reservation.refund = {}, None
        cancel_expected_charge(state, account.policy, reservation, still_expected=lacked)
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
    """Book the receipt of an accepted submission whose task has ended; `figures` were asked for at `sent`.

    A check may tell the balance as it was when the task ended, which may be as long ago as its submission: where
    anything else has happened on the account since, its figures are as old, unless checks tell the balance of now.
    """
    roll_windows(tenant, at.server_ms)
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    state = account.state
    state.open_submissions -= 1
    alone = reservation.exclusive and state.submission_seq == reservation.submission_seq
    asked = min(sent_at if alone or state.live_balance_checks else reservation.dispatched_at, at.ledger_ms)
    observe_balance(state, account.policy, balance, ReadingSource.CHECK, asked, at.ledger_ms)
    cost = compute_cost(state, account.policy, reservation, balance, succeeded=succeeded)
    if succeeded:
        store_finished_task(state, name, balance, min(sent_at, at.ledger_ms))
    finish_charge(state, reservation, balance, asked, at.ledger_ms)
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
    """Give what a submission was charged for back to the windows of its tenant, once.

    From then on it counts for nothing in them, whatever a late answer makes of it.
    """
    roll_windows(tenant, at.server_ms)
    if reservation.refund:
        return RefundResult.ALREADY_REFUNDED
    if reservation.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
        return RefundResult.NOTHING_CHARGED
    if reservation.state is ReservationState.UNKNOWN:
        given = Refund(at.server_ms, reason, 0, reservation.money_holds.get(Window.DAY, 0))
    elif reservation.cost is None:
        return RefundResult.RUNNING
    else:
        given = Refund(at.server_ms, reason, reservation.cost.count, reservation.cost.money_fen)
    apply_to_windows(tenant, reservation, -1)
    apply_to_usage(day, name, reservation, -1)
    reservation.refund = given
    apply_to_windows(tenant, reservation, 1)
    apply_to_usage(day, name, reservation, 1)
    return RefundResult.REFUNDED


def apply_to_windows(tenant: TenantState, reservation: Reservation, sign: int) -> None:
    """Put in what a reservation counts for in the windows it was counted in; with a sign of -1 take it out."""
    holds_place = reservation.state is ReservationState.RESERVED
    runs = reservation.state is ReservationState.ACCEPTED and reservation.cost is None
    charged = reservation.state in _CHARGED_STATES and not reservation.refund
    if holds_place or runs:
        tenant.active_tasks += sign
        tenant.active_by_kind[reservation.kind] = tenant.active_by_kind.get(reservation.kind, 0) + sign
    for window in Window:
        each = find_counter(tenant, window, reservation.window_starts.get(window))
        if each is None:
            continue
        held = reservation.money_holds.get(window, 0)
        each.tasks_reserved += sign * holds_place
        each.money_reserved_fen += sign * held * (holds_place or runs)
        if charged:
            each.tasks += sign
            each.money_fen += sign * (reservation.cost.money_fen if reservation.cost else held * (not runs))


def _count_overrun(tenant: TenantState, policy: TenantPolicy, reservation: Reservation, money_fen: int) -> None:
    """Count how much of what was just charged lies beyond the limits."""
    for limit in policy.limits:
        each = find_counter(tenant, limit.window, reservation.window_starts.get(limit.window))
        if limit.money_fen is not None and each:
            each.overrun_fen += min(max(each.money_fen - limit.money_fen, 0), money_fen)


def reserve_place(
    tenant: TenantState,
    policy: TenantPolicy,
    accounts: Sequence[Candidate],
    reservation: Reservation,
    at: ClockReading,
) -> Verdict:
    """Hold a place for `reservation`, which says tenant, kind and lease, on the first account that can pay.

    The tenant's policies are asked first. A refusal changes nothing.
    """
    roll_windows(tenant, at.server_ms)
    chosen, retry = choose_account(accounts, policy.spending_mode, reservation.kind, at.ledger_ms)
    violations = _find_violations(tenant, policy, at.server_ms)
    holds: dict[Window, int] = {}
    if chosen:
        price = price_hold(chosen.state, chosen.policy, reservation.kind)
        refused, holds = _compute_holds(tenant, policy.limits, price, at.server_ms)
        violations += refused
    if violations:
        return PolicyDenial(tuple(violations), at.server_ms)
    if chosen is None:
        return NoAccount(retry and to_server_time(at, retry), at.server_ms)
    reservation.window_starts = {window: tenant.windows[window].key for window in Window}
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
    """Move a reservation that `left` did not take to the next of `accounts`, keeping its place in the windows.

    `why` closes the account that was left; without it there was merely no connection. A refusal moves nothing: the
    reservation stays where it is, to be settled.
    """
    roll_windows(tenant, at.server_ms)
    if account_status:
        close_on_refusal(previous.state, account_status, reservation.dispatched_at, at.ledger_ms)
    chosen, retry = choose_account(accounts, policy.spending_mode, reservation.kind, at.ledger_ms)
    if chosen is None:
        return NoAccount(retry and to_server_time(at, retry), at.server_ms)
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
    found = []
    for limit in policy.limits:
        if limit.tasks is None:
            continue
        each = tenant.windows[limit.window]
        if each.tasks + each.tasks_reserved >= limit.tasks:
            found.append(_make_violation(limit.window, UNIT_TASKS, limit.tasks, now))
    if policy.max_active is not None and tenant.active_tasks >= policy.max_active:
        found.append(Violation(MAX_ACTIVE_POLICY, policy.max_active, None))
    return found


def _compute_holds(
    tenant: TenantState, limits: Sequence[Limit], price: int | None, now: int
) -> tuple[list[Violation], dict[Window, int]]:
    """What each window has to hold for a price, and the limits on money that can't.

    Without a known price a limited window holds all that remains of it, and one without a limit the most of those: each
    is counted, so that a limit added later starts right.
    """
    refused: list[Violation] = []
    holds: dict[Window, int] = {}
    for limit in limits:
        if limit.money_fen is None:
            continue
        each = tenant.windows[limit.window]
        remaining = limit.money_fen - each.money_fen - each.money_reserved_fen
        wanted = max(remaining, 1) if price is None else price
        if wanted > max(remaining, 0):
            refused.append(_make_violation(limit.window, UNIT_MONEY, limit.money_fen, now))
        holds[limit.window] = wanted
    elsewhere = max(holds.values(), default=0) if price is None else price
    holds = {window: holds.get(window, elsewhere) for window in Window}
    return refused, holds if any(holds.values()) else {}


def _make_violation(window: Window, unit: str, limit: int, now: int) -> Violation:
    return Violation(policy_name(window, unit), limit, window_bounds(window, now)[1])


def _assign_account(
    account: Candidate, reservation: Reservation, holds: dict[Window, int], spending_mode: SpendingMode, now: int
) -> None:
    """Point a reservation at an account, whose figures it remembers for its receipt.

    A probe remembers none: if it is taken, somebody has topped the account up since.
    """
    state = account.state
    if account.is_probe:
        state.next_probe_at = now + availability.PROBE_INTERVAL_MS
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
    """How long after a check the next one is due: `poll` at the least.

    A task that somebody looks at or waits for (`interesting`) is checked each time; else the less often the older it
    is, as what ran for minutes may run for more. Checks that failed in a row (`misses`) are repeated ever later.
    """
    if failures:
        return min(poll_ms << failures, max(MAX_CHECK_BACKOFF_MS, poll_ms))
    if is_watched:
        return poll_ms
    return max(min(age_ms // AGE_PER_CHECK_INTERVAL, MAX_CHECK_INTERVAL_MS), poll_ms)
