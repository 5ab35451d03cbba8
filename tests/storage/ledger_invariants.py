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
from service.storage.redis import DAY_MS
from tests.model.ledger_model import counter_key
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
        accounts = [model.states_by_account.get(account, AccountState()) for account in ACCOUNTS]
        kept = accounts, model.reservations, model.tasks, model.due_checks, list(model.usage_days.items())
        return self.tenant_state(), dict(model.idempotency_keys), msgspec.msgpack.encode(kept)

    def check_limits(self) -> None:
        """Require that no limit in force is exceeded, counted from the reservations of each window."""
        policy, state = self.model.tenant_policies[TENANT], self.tenant_state()
        held = [
            reservation
            for reservation in self.model.reservations.values()
            if is_charged(reservation) or is_open(reservation)
        ]
        if self.has_lost_data:
            return
        assert policy.max_active is None or sum(map(is_open, held)) <= policy.max_active
        for limit in policy.limits:
            key = counter_key(state.windows[limit.window])
            mine = [item for item in held if item.window_starts.get(limit.window) == key and not item.refund]
            assert limit.tasks is None or len(mine) <= limit.tasks
            if (
                limit.money_fen is not None
                and sum(charge_in_window(item, limit.window) for item in mine) > limit.money_fen
            ):
                newest = max(mine, key=lambda item: (item.lease_expires_at, item.submission_seq))
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
            item.kind for item in held if is_open(item)
        )
        folder = [(window, counter) for window, counters in state.retained_counters.items() for counter in counters]
        for window, counter in (*state.windows.items(), *folder):
            mine = [item for item in held if item.window_starts.get(window) == counter_key(counter)]
            charged = [item for item in mine if is_charged(item) and not item.refund]
            assert counter.tasks_reserved == sum(map(is_reserved, mine))
            assert counter.tasks == len(charged)
            assert counter.money_reserved_fen == sum(item.money_holds.get(window, 0) for item in mine if is_open(item))
            assert counter.money_fen == sum(charge_in_window(item, window) for item in charged if not is_open(item))
        for account in self.model.states_by_account:
            self._check_account(account, [item for item in held if item.account == account])

    def _check_account(self, account: int, mine: list[Reservation]) -> None:
        known = self.model.states_by_account[account]
        assert known.open_submissions == sum(map(is_open, mine))
        assert known.unsettled == sum(map(is_reserved, mine))
        assert known.unknown_outcomes == sum(item.state is ReservationState.UNKNOWN for item in mine)
        assert known.pending_prepaid_only == sum(item.prepaid_only for item in mine)
        assert known.pending_charges == sum(item.charge_pending for item in mine if is_open(item))
        assert 0 <= known.untracked_charges <= sum(item.charge_pending for item in mine if not is_open(item))

    @invariant()
    def usage_matches_windows(self) -> None:
        """Require that a day's usage equals its window, and the sum of all days the total."""
        state, now = self.tenant_state(), self.model.clock.now_ms
        days = {day: usage for (_, day), usage in self.model.usage_days.items()}
        today = days.get(now // DAY_MS, DayUsage())
        day = state.windows[Window.DAY]
        if day.replacement_key is None:  # otherwise an earlier, deleted counter counted the day
            assert (day.tasks, day.money_fen) == (
                sum_charges(count_charged_tasks, [today]),
                sum_charges(sum_charged_fen, [today]),
            )
        assert state.windows[Window.TOTAL].tasks == sum_charges(count_charged_tasks, days.values())
