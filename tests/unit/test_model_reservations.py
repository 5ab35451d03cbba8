"""Reserving, moving and settling, where the order or the moment matters."""

from __future__ import annotations

from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    BalanceReading,
    Candidate,
    ClockReading,
    DayUsage,
    Grant,
    NoAccount,
    PolicyDenial,
    ReadingSource,
    Reservation,
    ReservationState,
    TenantState,
    Verdict,
    Violation,
    window_bounds,
)
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy, Limit, TenantPolicy, Window
from tests.model import ledger_model
from tests.model.ledger_model import roll_windows

NOW = 1_790_000_000_000
DAY_ENDS = window_bounds(Window.DAY, NOW)[1]


def make_moment(now: int) -> ClockReading:
    """A moment at which both clocks agree."""
    return ClockReading(now, now)


def make_candidate(number: int = 1, *, policy: AccountPolicy | None = None, **state: object) -> Candidate:
    return Candidate(number, policy or AccountPolicy(), AccountState(**state))  # type: ignore[arg-type] # its own fields


def make_reading(value: int) -> BalanceReading:
    """A figure that was told long ago."""
    return BalanceReading(value, 0, 0, ReadingSource.SUBMIT)


def make_reservation() -> Reservation:
    return Reservation(
        ReservationState.RESERVED, 1, 0, Kind.UPSCALE, created_at=NOW, dispatched_at=NOW, lease_expires_at=NOW + 180_000
    )


def reserve_place(
    tenant: TenantState, policy: TenantPolicy, *accounts: Candidate, made: Reservation | None = None
) -> Verdict:
    return ledger_model.reserve_place(tenant, policy, accounts, made or make_reservation(), make_moment(NOW))


def test_refusal_changes_nothing() -> None:
    """A refused submission leaves no trace in the tenant's counters or the account."""
    tenant, paying = TenantState(), make_candidate(count=make_reading(5))
    policy = TenantPolicy(limits=(Limit(Window.DAY, tasks=0),))
    assert reserve_place(tenant, policy, paying) == PolicyDenial((Violation("day-tasks", 0, DAY_ENDS),), NOW)
    assert tenant.active_tasks == 0
    assert all(each.tasks_reserved == 0 for each in tenant.windows.values())
    assert paying.state == AccountState(count=make_reading(5))


def test_policies_come_before_accounts() -> None:
    """A tenant that is out of quota hears of that, even if no account could pay either."""
    policy = TenantPolicy(max_active=0)
    assert isinstance(reserve_place(TenantState(), policy, make_candidate(status=AccountStatus.INVALID)), PolicyDenial)


def test_first_account_that_pays() -> None:
    """Accounts are used in order, those that can't pay passed over."""
    broke, paying = make_candidate(1, status=AccountStatus.EXHAUSTED, probe_at=NOW + 1), make_candidate(2)
    granted = reserve_place(TenantState(), TenantPolicy(), broke, paying)
    assert isinstance(granted, Grant)
    assert granted.account == 2
    assert (broke.state.open_submissions, paying.state.open_submissions, paying.state.unsettled) == (0, 1, 1)


def test_when_no_account_pays() -> None:
    """The earliest look at an exhausted account is told; with none but invalid ones there is no such time."""
    soon, late = (make_candidate(status=AccountStatus.EXHAUSTED, probe_at=NOW + wait) for wait in (20_000, 50_000))
    invalid = make_candidate(status=AccountStatus.INVALID)
    assert reserve_place(TenantState(), TenantPolicy(), late, invalid, soon) == NoAccount(NOW + 20_000, NOW)
    assert reserve_place(TenantState(), TenantPolicy(), invalid) == NoAccount(None, NOW)
    assert reserve_place(TenantState(), TenantPolicy()) == NoAccount(None, NOW)


def test_one_probe_at_a_time() -> None:
    """The probe that is let through puts off the next one."""
    exhausted = make_candidate(status=AccountStatus.EXHAUSTED, probe_at=NOW)
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), exhausted), Grant)
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), exhausted), NoAccount)


def test_probe_is_no_receipt() -> None:
    """What was known before a probe tells nothing of its cost: if it is taken, somebody topped the account up."""
    made, topped_up = (
        make_reservation(),
        make_candidate(status=AccountStatus.EXHAUSTED, probe_at=NOW, count=make_reading(0), money=make_reading(0)),
    )
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), topped_up, made=made), Grant)
    assert made.balance_before is None


def test_unknown_price_holds_all_that_remains() -> None:
    """Where no price is known one submission holds the whole limit on money, so that a second one is refused."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.MONTH, money_fen=500),))
    paying = make_candidate(count=make_reading(0), money=make_reading(10_000))
    made = make_reservation()
    assert isinstance(reserve_place(tenant, policy, paying, made=made), Grant)
    assert made.money_holds == dict.fromkeys(Window, 500)
    assert isinstance(reserve_place(tenant, policy, paying), PolicyDenial)


def test_overrun() -> None:
    """A receipt that passes the limit is booked in full, and what passes it is counted."""
    policy = TenantPolicy(limits=(Limit(Window.MONTH, money_fen=100),))
    tenant = TenantState()
    paying = make_candidate(count=make_reading(0), money=make_reading(1_000), highest={Kind.UPSCALE: 80})
    made = make_reservation()
    reserve_place(tenant, policy, paying, made=made)
    ledger_model.settle_reservation(
        tenant, paying, "r", made, ReservationState.ACCEPTED, Balance(0, 870), None, DayUsage(), make_moment(NOW + 5)
    )
    cost = ledger_model.complete_task(
        tenant, policy, paying, "r", made, Balance(0, 870), NOW + 10, DayUsage(), make_moment(NOW + 20), succeeded=True
    )
    assert cost == Cost(0, 130, CostBasis.OBSERVED)
    month = tenant.windows[Window.MONTH]
    assert (month.money_fen, month.money_reserved_fen, month.overrun_fen) == (130, 0, 30)
    assert tenant.windows[Window.TOTAL].money_fen == 130


def test_receipt_of_one_that_was_not_alone() -> None:
    """Two tasks at once on an account can't tell whose the drop was."""
    tenant, paying = (
        TenantState(),
        make_candidate(count=make_reading(0), money=make_reading(1_000)),
    )
    paying.state.last_price[Kind.UPSCALE] = 90
    first, second = make_reservation(), make_reservation()
    for made in (first, second):
        reserve_place(tenant, TenantPolicy(), paying, made=made)
        ledger_model.settle_reservation(
            tenant, paying, "r", made, ReservationState.ACCEPTED, Balance(), None, DayUsage(), make_moment(NOW + 5)
        )
    for made in (first, second):
        cost = ledger_model.complete_task(
            tenant,
            TenantPolicy(),
            paying,
            "r",
            made,
            Balance(0, 800),
            NOW + 10,
            DayUsage(),
            make_moment(NOW + 20),
            succeeded=True,
        )
        assert cost == Cost(0, 90, CostBasis.ESTIMATED)
    assert (paying.state.open_submissions, tenant.active_tasks) == (0, 0)


def test_moving_on() -> None:
    """A reservation moves to the next account with its place in the windows, and closes the one it left."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, tasks=1, money_fen=100),))
    prices = AccountPolicy(max_price={Kind.UPSCALE: 60})
    left, right = (
        make_candidate(1, policy=prices),
        make_candidate(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 90})),
    )
    made = make_reservation()
    reserve_place(tenant, policy, left, right, made=made)
    moved = ledger_model.change_account(
        tenant, policy, left, AccountStatus.EXHAUSTED, [right], made, make_moment(NOW + 1)
    )
    assert isinstance(moved, Grant)
    assert (moved.account, made.account, made.money_holds) == (2, 2, dict.fromkeys(Window, 90))
    assert (left.state.status, left.state.open_submissions, right.state.open_submissions) == (
        AccountStatus.EXHAUSTED,
        0,
        1,
    )
    day = tenant.windows[Window.DAY]
    assert (day.tasks_reserved, day.money_reserved_fen) == (1, 90)


def test_nowhere_to_move() -> None:
    """Where no account can take it, or its price does not fit, a reservation stays to be settled."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, money_fen=100),))
    left = make_candidate(1, policy=AccountPolicy(max_price={Kind.UPSCALE: 60}))
    dear = make_candidate(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 101}))
    made = make_reservation()
    reserve_place(tenant, policy, left, made=made)
    assert isinstance(ledger_model.change_account(tenant, policy, left, None, [], made, make_moment(NOW)), NoAccount)
    assert isinstance(
        ledger_model.change_account(tenant, policy, left, None, [dear], made, make_moment(NOW)), PolicyDenial
    )
    assert (made.account, tenant.windows[Window.DAY].money_reserved_fen, left.state.open_submissions) == (1, 60, 1)


def test_late_settlement_replaces_unknown() -> None:
    """An unknown outcome stays charged until a late refusal gives it back or a late acceptance keeps it."""
    for late, used, active in ((ReservationState.REFUSED, 0, 0), (ReservationState.ACCEPTED, 1, 1)):
        tenant, paying, made = TenantState(), make_candidate(), make_reservation()
        reserve_place(tenant, TenantPolicy(), paying, made=made)
        assert ledger_model.settle_reservation(
            tenant, paying, "r", made, ReservationState.UNKNOWN, Balance(), None, DayUsage(), make_moment(NOW)
        )
        assert (tenant.windows[Window.DAY].tasks, tenant.active_tasks, paying.state.unknown_outcomes) == (1, 0, 1)
        assert ledger_model.settle_reservation(
            tenant, paying, "r", made, late, Balance(), None, DayUsage(), make_moment(NOW)
        )
        assert (tenant.windows[Window.DAY].tasks, tenant.active_tasks, paying.state.unknown_outcomes) == (
            used,
            active,
            0,
        )
        assert not ledger_model.settle_reservation(
            tenant, paying, "r", made, ReservationState.UNKNOWN, Balance(), None, DayUsage(), make_moment(NOW)
        )


def test_settling_after_the_window() -> None:
    """What was reserved in a period that is over touches only the windows it is still in."""
    tenant, paying, made = TenantState(), make_candidate(), make_reservation()
    reserve_place(tenant, TenantPolicy(), paying, made=made)
    later = NOW + 86_400_000
    ledger_model.settle_reservation(
        tenant, paying, "r", made, ReservationState.ACCEPTED, Balance(), None, DayUsage(), make_moment(later)
    )
    roll_windows(tenant, later)
    used = {window: (each.tasks, each.tasks_reserved) for window, each in tenant.windows.items()}
    assert used[Window.DAY] == used[Window.MINUTE] == (0, 0)
    assert used[Window.MONTH] == used[Window.TOTAL] == (1, 0)


def test_lost_reservation_is_charged_where_it_was_made() -> None:
    """A reservation that the ledger lost counts in the windows of its creation, not of its discovery."""
    tenant, state, made = TenantState(), AccountState(), make_reservation()
    ledger_model.recreate_reservation(tenant, state, "r", made, DayUsage(), make_moment(NOW + 86_400_000))
    assert tenant.windows[Window.DAY].tasks == 0
    assert tenant.windows[Window.TOTAL].tasks == 1
    assert (made.state, state.unknown_outcomes) == (ReservationState.UNKNOWN, 1)


def test_counted_where_it_was_reserved() -> None:
    """A reservation stays in the counters it was counted in, though the server's clock has stepped back since."""
    tenant, paying, made = TenantState(), make_candidate(), make_reservation()
    reserve_place(tenant, TenantPolicy(), paying, made=made)
    stepped = ClockReading(NOW + 1, NOW - 86_400_000)
    other = make_reservation()
    ledger_model.reserve_place(tenant, TenantPolicy(), [paying], other, stepped)
    ledger_model.settle_reservation(
        tenant, paying, "r", made, ReservationState.ACCEPTED, Balance(), None, DayUsage(), stepped
    )
    assert (tenant.windows[Window.DAY].tasks, tenant.windows[Window.DAY].tasks_reserved) == (0, 1)
    roll_windows(tenant, NOW)
    assert (tenant.windows[Window.DAY].tasks, tenant.windows[Window.DAY].tasks_reserved) == (1, 0)


def test_limit_of_a_period_that_comes_again() -> None:
    """What was counted in a period is still counted once the server's clock has stepped back and comes to it again."""
    tenant, paying = TenantState(), make_candidate()
    policy = TenantPolicy(limits=(Limit(Window.DAY, tasks=1),))
    assert isinstance(reserve_place(tenant, policy, paying), Grant)
    before = ledger_model.reserve_place(
        tenant, policy, [paying], make_reservation(), ClockReading(NOW + 1, NOW - 86_400_000)
    )
    assert isinstance(before, Grant)
    assert isinstance(
        ledger_model.reserve_place(tenant, policy, [paying], make_reservation(), make_moment(NOW + 2)), PolicyDenial
    )


def test_verdicts_tell_the_time_of_the_server() -> None:
    """A grant tells when it was made and when its lease ends as the server's clock shows it."""
    made = make_reservation()
    verdict = ledger_model.reserve_place(
        TenantState(), TenantPolicy(), [make_candidate()], made, ClockReading(NOW, NOW - 1_000)
    )
    assert verdict == Grant(1, NOW - 1_000, NOW + 179_000)
