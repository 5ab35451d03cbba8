"""Reserving, moving and settling, where the order or the moment matters."""

from __future__ import annotations

from service.domain.ledger import (
    AccountState,
    Candidate,
    DayUsage,
    Figure,
    Figures,
    Granted,
    Moment,
    NoAccount,
    PolicyDenied,
    Reservation,
    ReservationState,
    Source,
    Status,
    TenantState,
    Verdict,
    Violation,
    period_of,
)
from service.domain.tasks import Basis, Cost, Kind
from service.domain.tenants import AccountPolicy, Limit, TenantPolicy, Window
from tests.model import ledger_model
from tests.model.ledger_model import roll

NOW = 1_790_000_000_000
DAY_ENDS = period_of(Window.DAY, NOW)[1]


def at(now: int) -> Moment:
    """A moment at which both clocks agree."""
    return Moment(now, now)


def account(number: int = 1, *, policy: AccountPolicy | None = None, **state: object) -> Candidate:
    return Candidate(number, policy or AccountPolicy(), AccountState(**state))  # type: ignore[arg-type] # its own fields


def figure(value: int) -> Figure:
    """A figure that was told long ago."""
    return Figure(value, 0, 0, Source.SUBMIT)


def reservation() -> Reservation:
    return Reservation(ReservationState.RESERVED, 1, 0, Kind.UPSCALE, created=NOW, sent=NOW, lease=NOW + 180_000)


def reserve(
    tenant: TenantState, policy: TenantPolicy, *accounts: Candidate, made: Reservation | None = None
) -> Verdict:
    return ledger_model.reserve(tenant, policy, accounts, made or reservation(), at(NOW))


def test_refusal_changes_nothing() -> None:
    """A refused submission leaves no trace in the tenant's counters or the account."""
    tenant, paying = TenantState(), account(count=figure(5))
    policy = TenantPolicy(limits=(Limit(Window.DAY, tasks=0),))
    assert reserve(tenant, policy, paying) == PolicyDenied((Violation("day-tasks", 0, DAY_ENDS),), NOW)
    assert tenant.active == 0
    assert all(each.tasks_reserved == 0 for each in tenant.windows.values())
    assert paying.state == AccountState(count=figure(5))


def test_policies_come_before_accounts() -> None:
    """A tenant that is out of quota hears of that, even if no account could pay either."""
    policy = TenantPolicy(max_active=0)
    assert isinstance(reserve(TenantState(), policy, account(status=Status.INVALID)), PolicyDenied)


def test_first_account_that_pays() -> None:
    """Accounts are used in order, those that can't pay passed over."""
    broke, paying = account(1, status=Status.EXHAUSTED, probe_at=NOW + 1), account(2)
    granted = reserve(TenantState(), TenantPolicy(), broke, paying)
    assert isinstance(granted, Granted)
    assert granted.account == 2
    assert (broke.state.open, paying.state.open, paying.state.sending) == (0, 1, 1)


def test_when_no_account_pays() -> None:
    """The earliest look at an exhausted account is told; with none but invalid ones there is no such time."""
    soon, late = (account(status=Status.EXHAUSTED, probe_at=NOW + wait) for wait in (20_000, 50_000))
    invalid = account(status=Status.INVALID)
    assert reserve(TenantState(), TenantPolicy(), late, invalid, soon) == NoAccount(NOW + 20_000, NOW)
    assert reserve(TenantState(), TenantPolicy(), invalid) == NoAccount(None, NOW)
    assert reserve(TenantState(), TenantPolicy()) == NoAccount(None, NOW)


def test_one_probe_at_a_time() -> None:
    """The probe that is let through puts off the next one."""
    exhausted = account(status=Status.EXHAUSTED, probe_at=NOW)
    assert isinstance(reserve(TenantState(), TenantPolicy(), exhausted), Granted)
    assert isinstance(reserve(TenantState(), TenantPolicy(), exhausted), NoAccount)


def test_probe_is_no_receipt() -> None:
    """What was known before a probe tells nothing of its cost: if it is taken, somebody topped the account up."""
    made, topped_up = reservation(), account(status=Status.EXHAUSTED, probe_at=NOW, count=figure(0), money=figure(0))
    assert isinstance(reserve(TenantState(), TenantPolicy(), topped_up, made=made), Granted)
    assert made.before is None


def test_unknown_price_holds_all_that_remains() -> None:
    """Where no price is known one submission holds the whole limit on money, so that a second one is refused."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.MONTH, money=500),))
    paying = account(count=figure(0), money=figure(10_000))
    made = reservation()
    assert isinstance(reserve(tenant, policy, paying, made=made), Granted)
    assert made.holds == dict.fromkeys(Window, 500)
    assert isinstance(reserve(tenant, policy, paying), PolicyDenied)


def test_overrun() -> None:
    """A receipt that passes the limit is booked in full, and what passes it is counted."""
    policy = TenantPolicy(limits=(Limit(Window.MONTH, money=100),))
    tenant = TenantState()
    paying = account(count=figure(0), money=figure(1_000), highest={Kind.UPSCALE: 80})
    made = reservation()
    reserve(tenant, policy, paying, made=made)
    ledger_model.settle(
        tenant, paying, "r", made, ReservationState.ACCEPTED, Figures(0, 870), None, DayUsage(), at(NOW + 5)
    )
    cost = ledger_model.end(
        tenant, policy, paying, "r", made, Figures(0, 870), NOW + 10, DayUsage(), at(NOW + 20), succeeded=True
    )
    assert cost == Cost(0, 130, Basis.OBSERVED)
    month = tenant.windows[Window.MONTH]
    assert (month.money, month.money_reserved, month.overrun) == (130, 0, 30)
    assert tenant.windows[Window.TOTAL].money == 130


def test_receipt_of_one_that_was_not_alone() -> None:
    """Two tasks at once on an account can't tell whose the drop was."""
    tenant, paying = (
        TenantState(),
        account(count=figure(0), money=figure(1_000)),
    )
    paying.state.prices[Kind.UPSCALE] = 90
    first, second = reservation(), reservation()
    for made in (first, second):
        reserve(tenant, TenantPolicy(), paying, made=made)
        ledger_model.settle(
            tenant, paying, "r", made, ReservationState.ACCEPTED, Figures(), None, DayUsage(), at(NOW + 5)
        )
    for made in (first, second):
        cost = ledger_model.end(
            tenant,
            TenantPolicy(),
            paying,
            "r",
            made,
            Figures(0, 800),
            NOW + 10,
            DayUsage(),
            at(NOW + 20),
            succeeded=True,
        )
        assert cost == Cost(0, 90, Basis.ESTIMATED)
    assert (paying.state.open, tenant.active) == (0, 0)


def test_moving_on() -> None:
    """A reservation moves to the next account with its place in the windows, and closes the one it left."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, tasks=1, money=100),))
    prices = AccountPolicy(max_price={Kind.UPSCALE: 60})
    left, right = account(1, policy=prices), account(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 90}))
    made = reservation()
    reserve(tenant, policy, left, right, made=made)
    moved = ledger_model.retarget(tenant, policy, left, Status.EXHAUSTED, [right], made, at(NOW + 1))
    assert isinstance(moved, Granted)
    assert (moved.account, made.account, made.holds) == (2, 2, dict.fromkeys(Window, 90))
    assert (left.state.status, left.state.open, right.state.open) == (Status.EXHAUSTED, 0, 1)
    day = tenant.windows[Window.DAY]
    assert (day.tasks_reserved, day.money_reserved) == (1, 90)


def test_nowhere_to_move() -> None:
    """Where no account can take it, or its price does not fit, a reservation stays to be settled."""
    tenant, policy = TenantState(), TenantPolicy(limits=(Limit(Window.DAY, money=100),))
    left = account(1, policy=AccountPolicy(max_price={Kind.UPSCALE: 60}))
    dear = account(2, policy=AccountPolicy(max_price={Kind.UPSCALE: 101}))
    made = reservation()
    reserve(tenant, policy, left, made=made)
    assert isinstance(ledger_model.retarget(tenant, policy, left, None, [], made, at(NOW)), NoAccount)
    assert isinstance(ledger_model.retarget(tenant, policy, left, None, [dear], made, at(NOW)), PolicyDenied)
    assert (made.account, tenant.windows[Window.DAY].money_reserved, left.state.open) == (1, 60, 1)


def test_late_settlement_replaces_unknown() -> None:
    """An unknown outcome stays charged until a late refusal gives it back or a late acceptance keeps it."""
    for late, used, active in ((ReservationState.REFUSED, 0, 0), (ReservationState.ACCEPTED, 1, 1)):
        tenant, paying, made = TenantState(), account(), reservation()
        reserve(tenant, TenantPolicy(), paying, made=made)
        assert ledger_model.settle(
            tenant, paying, "r", made, ReservationState.UNKNOWN, Figures(), None, DayUsage(), at(NOW)
        )
        assert (tenant.windows[Window.DAY].tasks, tenant.active, paying.state.unknown) == (1, 0, 1)
        assert ledger_model.settle(tenant, paying, "r", made, late, Figures(), None, DayUsage(), at(NOW))
        assert (tenant.windows[Window.DAY].tasks, tenant.active, paying.state.unknown) == (used, active, 0)
        assert not ledger_model.settle(
            tenant, paying, "r", made, ReservationState.UNKNOWN, Figures(), None, DayUsage(), at(NOW)
        )


def test_settling_after_the_window() -> None:
    """What was reserved in a period that is over touches only the windows it is still in."""
    tenant, paying, made = TenantState(), account(), reservation()
    reserve(tenant, TenantPolicy(), paying, made=made)
    later = NOW + 86_400_000
    ledger_model.settle(tenant, paying, "r", made, ReservationState.ACCEPTED, Figures(), None, DayUsage(), at(later))
    roll(tenant, later)
    used = {window: (each.tasks, each.tasks_reserved) for window, each in tenant.windows.items()}
    assert used[Window.DAY] == used[Window.MINUTE] == (0, 0)
    assert used[Window.MONTH] == used[Window.TOTAL] == (1, 0)


def test_lost_reservation_is_charged_where_it_was_made() -> None:
    """A reservation that the ledger lost counts in the windows of its creation, not of its discovery."""
    tenant, state, made = TenantState(), AccountState(), reservation()
    ledger_model.adopt(tenant, state, "r", made, DayUsage(), at(NOW + 86_400_000))
    assert tenant.windows[Window.DAY].tasks == 0
    assert tenant.windows[Window.TOTAL].tasks == 1
    assert (made.state, state.unknown) == (ReservationState.UNKNOWN, 1)


def test_counted_where_it_was_reserved() -> None:
    """A reservation stays in the counters it was counted in, though the server's clock has stepped back since."""
    tenant, paying, made = TenantState(), account(), reservation()
    reserve(tenant, TenantPolicy(), paying, made=made)
    stepped = Moment(NOW + 1, NOW - 86_400_000)
    other = reservation()
    ledger_model.reserve(tenant, TenantPolicy(), [paying], other, stepped)
    ledger_model.settle(tenant, paying, "r", made, ReservationState.ACCEPTED, Figures(), None, DayUsage(), stepped)
    assert (tenant.windows[Window.DAY].tasks, tenant.windows[Window.DAY].tasks_reserved) == (0, 1)
    roll(tenant, NOW)
    assert (tenant.windows[Window.DAY].tasks, tenant.windows[Window.DAY].tasks_reserved) == (1, 0)


def test_limit_of_a_period_that_comes_again() -> None:
    """What was counted in a period is still counted once the server's clock has stepped back and comes to it again."""
    tenant, paying = TenantState(), account()
    policy = TenantPolicy(limits=(Limit(Window.DAY, tasks=1),))
    assert isinstance(reserve(tenant, policy, paying), Granted)
    before = ledger_model.reserve(tenant, policy, [paying], reservation(), Moment(NOW + 1, NOW - 86_400_000))
    assert isinstance(before, Granted)
    assert isinstance(ledger_model.reserve(tenant, policy, [paying], reservation(), at(NOW + 2)), PolicyDenied)


def test_verdicts_tell_the_time_of_the_server() -> None:
    """A grant tells when it was made and when its lease ends as the server's clock shows it."""
    made = reservation()
    verdict = ledger_model.reserve(TenantState(), TenantPolicy(), [account()], made, Moment(NOW, NOW - 1_000))
    assert verdict == Granted(1, NOW - 1_000, NOW + 179_000)
