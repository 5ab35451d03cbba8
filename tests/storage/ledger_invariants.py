"""Ledger invariants, recomputed from the reservations alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import msgspec
from hypothesis.stateful import invariant

from service.domain.ledger import (
    AccountState,
    DayUsage,
    Reservation,
    ReservationState,
    TenantState,
    count_charged_tasks,
    sum_charged_fen,
)
from service.domain.tenants import Window
from service.storage.ledger import DAY_MS
from tests.storage.ledger_comparison import ACCOUNTS, TENANT, LedgerComparison
from tests.storage.ledger_views import (
    charge_in_window,
    is_charged,
    is_open,
    is_provisional,
    is_reserved,
    roll_state,
    sum_charges,
)


class LedgerInvariants(LedgerComparison):
    """Checks the counters of both sides.

    `has_lost_data` is set once a reservation was deleted: its charges can no longer be recomputed.
    """

    def __init__(self, url: str) -> None:
        self.has_lost_data = False
        self.final_states: dict[str, ReservationState] = {}
        super().__init__(url)

    def tenant_state(self) -> TenantState:
        return roll_state(self.model.tenants.get(TENANT, TenantState()), self.model.clock.now_ms)

    def take_snapshot(self) -> Any:
        """Return everything that a call could change."""
        model = self.model
        accounts = [model.states_by_account.get(each, AccountState()) for each in ACCOUNTS]
        kept = accounts, model.reservations, model.tasks, model.due_checks, list(model.usage_days.items())
        return self.tenant_state(), dict(model.idempotency_keys), msgspec.msgpack.encode(kept)

    def check_limits(self) -> None:
        """Require that no limit in force is exceeded, counted from the reservations of each window."""
        policy, state = self.model.tenant_policies[TENANT], self.tenant_state()
        held = [each for each in self.model.reservations.values() if is_charged(each) or is_open(each)]
        if self.has_lost_data:
            return
        assert policy.max_active is None or sum(map(is_open, held)) <= policy.max_active
        for limit in policy.limits:
            key = state.windows[limit.window].key
            mine = [each for each in held if each.window_starts.get(limit.window) == key and not each.refund]
            assert limit.tasks is None or len(mine) <= limit.tasks
            if (
                limit.money_fen is not None
                and sum(charge_in_window(each, limit.window) for each in mine) > limit.money_fen
            ):
                newest = max(mine, key=lambda each: (each.lease_expires_at, each.submission_seq))
                assert not newest.money_holds, "it held money that was not there"

    @invariant()
    def outcomes_are_final(self) -> None:
        """Require that an outcome never changes, except an unknown one that is resolved."""
        for name, reservation in self.model.reservations.items():
            assert self.final_states.get(name, reservation.state) is reservation.state
            if not is_provisional(reservation):
                self.final_states[name] = reservation.state

    @invariant()
    def counters_add_up(self) -> None:
        """Require that all counters follow from the reservations and none is negative."""
        held, state = list(self.model.reservations.values()), self.tenant_state()
        for counter in state.windows.values():
            assert min(counter.tasks_reserved, counter.money_reserved_fen, counter.overrun_fen) >= 0
        if self.has_lost_data:
            return
        assert state.active_tasks == sum(map(is_open, held))
        assert {kind: tasks for kind, tasks in state.active_by_kind.items() if tasks} == Counter(
            each.kind for each in held if is_open(each)
        )
        aside = [(window, counter) for window, counters in state.retained_counters.items() for counter in counters]
        for window, counter in (*state.windows.items(), *aside):
            mine = [each for each in held if each.window_starts.get(window) == counter.key]
            charged = [each for each in mine if is_charged(each) and not each.refund]
            assert counter.tasks_reserved == sum(map(is_reserved, mine))
            assert counter.tasks == len(charged)
            assert counter.money_reserved_fen == sum(each.money_holds.get(window, 0) for each in mine if is_open(each))
            assert counter.money_fen == sum(charge_in_window(each, window) for each in charged if not is_open(each))
        for account in self.model.states_by_account:
            self._check_account(account, [each for each in held if each.account == account])

    def _check_account(self, account: int, mine: list[Reservation]) -> None:
        known = self.model.states_by_account[account]
        assert known.open_submissions == sum(map(is_open, mine))
        assert known.unsettled == sum(map(is_reserved, mine))
        assert known.unknown_outcomes == sum(each.state is ReservationState.UNKNOWN for each in mine)
        assert known.pending_prepaid_only == sum(each.prepaid_only for each in mine)
        assert known.pending_charges == sum(each.charge_pending for each in mine if is_open(each))
        assert 0 <= known.untracked_charges <= sum(each.charge_pending for each in mine if not is_open(each))

    @invariant()
    def usage_matches_windows(self) -> None:
        """Require that a day's usage equals its window, and the sum of all days the total."""
        state, now = self.tenant_state(), self.model.clock.now_ms
        days = {day: usage for (_, day), usage in self.model.usage_days.items()}
        today = days.get(now // DAY_MS, DayUsage())
        day = state.windows[Window.DAY]
        if day.replacement_key is None:  # else the day was counted before, by a counter that is gone
            assert (day.tasks, day.money_fen) == (
                sum_charges(count_charged_tasks, [today]),
                sum_charges(sum_charged_fen, [today]),
            )
        assert state.windows[Window.TOTAL].tasks == sum_charges(count_charged_tasks, days.values())
