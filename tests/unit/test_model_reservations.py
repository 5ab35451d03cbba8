"""Reservations in the ledger model."""

from __future__ import annotations

from service.domain.errors import Violation
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
    window_bounds,
)
from service.domain.tasks import Cost, CostBasis, Kind
from service.domain.tenants import AccountPolicy, Limit, TenantPolicy, Window
from tests.model import ledger_model
from tests.model.ledger_model import roll_windows

NOW = 1_790_000_000_000
DAY_ENDS = window_bounds(Window.DAY, NOW)[1]


def make_moment(now: int) -> ClockReading:
    return ClockReading(now, now)


def make_candidate(number: int = 1, *, policy: AccountPolicy | None = None, **state: object) -> Candidate:
    return Candidate(number, policy or AccountPolicy(), AccountState(**state))  # type: ignore[arg-type] # its own fields


def make_reading(value: int) -> BalanceReading:
    """Make an old balance reading."""
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
    tenant, paying = TenantState(), make_candidate(count=make_reading(5))
    policy = TenantPolicy(limits=(Limit(Window.DAY, tasks=0),))
    assert reserve_place(tenant, policy, paying) == PolicyDenial((Violation("day-tasks", 0, DAY_ENDS),), NOW)
    assert tenant.active_tasks == 0
    assert all(window.tasks_reserved == 0 for window in tenant.windows.values())
    assert paying.state == AccountState(count=make_reading(5))


def test_policies_precede_accounts() -> None:
    policy = TenantPolicy(max_active=0)
    assert isinstance(reserve_place(TenantState(), policy, make_candidate(status=AccountStatus.INVALID)), PolicyDenial)


def test_first_available_account_is_used() -> None:
    broke, paying = make_candidate(1, status=AccountStatus.EXHAUSTED, next_probe_at=NOW + 1), make_candidate(2)
    granted = reserve_place(TenantState(), TenantPolicy(), broke, paying)
    assert isinstance(granted, Grant)
    assert granted.account == 2
    assert (broke.state.open_submissions, paying.state.open_submissions, paying.state.unsettled) == (0, 1, 1)


def test_retry_time_without_an_available_account() -> None:
    soon, late = (make_candidate(status=AccountStatus.EXHAUSTED, next_probe_at=NOW + wait) for wait in (20_000, 50_000))
    invalid = make_candidate(status=AccountStatus.INVALID)
    assert reserve_place(TenantState(), TenantPolicy(), late, invalid, soon) == NoAccount(NOW + 20_000, NOW)
    assert reserve_place(TenantState(), TenantPolicy(), invalid) == NoAccount(None, NOW)
    assert reserve_place(TenantState(), TenantPolicy()) == NoAccount(None, NOW)


def test_one_probe_at_a_time() -> None:
    exhausted = make_candidate(status=AccountStatus.EXHAUSTED, next_probe_at=NOW)
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), exhausted), Grant)
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), exhausted), NoAccount)


def test_probe_cost_is_not_observed() -> None:
    made, topped_up = (
        make_reservation(),
        make_candidate(status=AccountStatus.EXHAUSTED, next_probe_at=NOW, count=make_reading(0), money=make_reading(0)),
    )
    assert isinstance(reserve_place(TenantState(), TenantPolicy(), topped_up, made=made), Grant)
    assert made.balance_before is None


def test_unknown_price_holds_the_whole_limit() -> None:
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.MONTH, money_fen=500),))
    paying = make_candidate(count=make_reading(0), money=make_reading(10_000))
    made = make_reservation()
    assert isinstance(reserve_place(tenant, policy, paying, made=made), Grant)
    assert made.money_holds == dict.fromkeys(Window, 500)
    assert isinstance(reserve_place(tenant, policy, paying), PolicyDenial)


def test_overrun() -> None:
    policy = TenantPolicy(limits=(Limit(Window.MONTH, money_fen=100),))
    tenant = TenantState()
    paying = make_candidate(count=make_reading(0), money=make_reading(1_000), max_observed_price={Kind.UPSCALE: 80})
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


def test_overlapping_task_has_no_observed_cost() -> None:
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


def test_retarget_keeps_the_windows() -> None:
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, tasks=1, money_fen=100),))
    prices = AccountPolicy(max_price={Kind.UPSCALE: 60})
    previous, right = (
        make_candidate(1, policy=prices),
        make_candidate(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 90})),
    )
    made = make_reservation()
    reserve_place(tenant, policy, previous, right, made=made)
    moved = ledger_model.change_account(
        tenant, policy, previous, AccountStatus.EXHAUSTED, [right], made, make_moment(NOW + 1)
    )
    assert isinstance(moved, Grant)
    assert (moved.account, made.account, made.money_holds) == (2, 2, dict.fromkeys(Window, 90))
    assert (previous.state.status, previous.state.open_submissions, right.state.open_submissions) == (
        AccountStatus.EXHAUSTED,
        0,
        1,
    )
    day = tenant.windows[Window.DAY]
    assert (day.tasks_reserved, day.money_reserved_fen) == (1, 90)


def test_retarget_without_an_available_account() -> None:
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, money_fen=100),))
    previous = make_candidate(1, policy=AccountPolicy(max_price={Kind.UPSCALE: 60}))
    dear = make_candidate(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 101}))
    made = make_reservation()
    reserve_place(tenant, policy, previous, made=made)
    assert isinstance(
        ledger_model.change_account(tenant, policy, previous, None, [], made, make_moment(NOW)), NoAccount
    )
    assert isinstance(
        ledger_model.change_account(tenant, policy, previous, None, [dear], made, make_moment(NOW)), PolicyDenial
    )
    assert (made.account, tenant.windows[Window.DAY].money_reserved_fen, previous.state.open_submissions) == (1, 60, 1)


def test_late_settlement_replaces_unknown() -> None:
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


def test_settlement_after_the_window() -> None:
    tenant, paying, made = TenantState(), make_candidate(), make_reservation()
    reserve_place(tenant, TenantPolicy(), paying, made=made)
    later = NOW + 86_400_000
    ledger_model.settle_reservation(
        tenant, paying, "r", made, ReservationState.ACCEPTED, Balance(), None, DayUsage(), make_moment(later)
    )
    roll_windows(tenant, later)
    used = {window: (item.tasks, item.tasks_reserved) for window, item in tenant.windows.items()}
    assert used[Window.DAY] == used[Window.MINUTE] == (0, 0)
    assert used[Window.MONTH] == used[Window.TOTAL] == (1, 0)


def test_lost_reservation_counts_in_its_creation_window() -> None:
    tenant, state, made = TenantState(), AccountState(), make_reservation()
    ledger_model.recreate_reservation(tenant, state, "r", made, DayUsage(), make_moment(NOW + 86_400_000))
    assert tenant.windows[Window.DAY].tasks == 0
    assert tenant.windows[Window.TOTAL].tasks == 1
    assert (made.state, state.unknown_outcomes) == (ReservationState.UNKNOWN, 1)


def test_clock_step_keeps_the_window() -> None:
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


def test_repeated_window_keeps_its_count() -> None:
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


def test_verdicts_use_server_time() -> None:
    made = make_reservation()
    verdict = ledger_model.reserve_place(
        TenantState(), TenantPolicy(), [make_candidate()], made, ClockReading(NOW, NOW - 1_000)
    )
    assert verdict == Grant(1, NOW - 1_000, NOW + 179_000)
