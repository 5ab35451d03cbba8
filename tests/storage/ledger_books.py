"""What the books must obey whatever happens, counted anew from the reservations alone."""

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
    charged_money,
    charged_tasks,
)
from service.domain.tenants import Window
from service.storage.ledger import DAY
from tests.storage.ledger_pair import ACCOUNTS, TENANT, LedgerPair
from tests.storage.ledger_views import charge, is_charged, is_open, is_provisional, is_reserved, rolled, sum_of


class LedgerBooks(LedgerPair):
    """Holds both to their books. `lossy` once a reservation was lost: what it was counted as can't be taken back."""

    def __init__(self, url: str) -> None:
        self.lossy = False
        self.final: dict[str, ReservationState] = {}
        super().__init__(url)

    def tenant_state(self) -> TenantState:
        return rolled(self.model.tenants.get(TENANT, TenantState()), self.model.clock.at)

    def all_state(self) -> Any:
        """All that a call could change, to tell whether it did."""
        model = self.model
        accounts = [model.account_states.get(each, AccountState()) for each in ACCOUNTS]
        kept = accounts, model.reservations, model.tasks, model.due, list(model.days.items())
        return self.tenant_state(), dict(model.keys), msgspec.msgpack.encode(kept)

    def within_limits(self) -> None:
        """Nothing was granted past a limit in force, counted from the reservations of each window alone."""
        policy, state = self.model.tenant_policies[TENANT], self.tenant_state()
        held = [each for each in self.model.reservations.values() if is_charged(each) or is_open(each)]
        if self.lossy:
            return
        assert policy.max_active is None or sum(map(is_open, held)) <= policy.max_active
        for limit in policy.limits:
            key = state.windows[limit.window].key
            mine = [each for each in held if each.periods.get(limit.window) == key and not each.refund]
            assert limit.tasks is None or len(mine) <= limit.tasks
            if limit.money is not None and sum(charge(each, limit.window) for each in mine) > limit.money:
                newest = max(mine, key=lambda each: (each.lease, each.seq))
                assert not newest.holds, "it held money that was not there"

    @invariant()
    def an_outcome_is_final(self) -> None:
        """What a reservation became is never undone, but for an unknown that is found out."""
        for name, reservation in self.model.reservations.items():
            assert self.final.get(name, reservation.state) is reservation.state
            if not is_provisional(reservation):
                self.final[name] = reservation.state

    @invariant()
    def the_books_add_up(self) -> None:
        """What is reserved, used and active follows from the reservations alone, and nothing is ever negative."""
        held, state = list(self.model.reservations.values()), self.tenant_state()
        for counter in state.windows.values():
            assert min(counter.tasks_reserved, counter.money_reserved, counter.overrun) >= 0
        if self.lossy:
            return
        assert state.active == sum(map(is_open, held))
        assert {kind: tasks for kind, tasks in state.kinds.items() if tasks} == Counter(
            each.kind for each in held if is_open(each)
        )
        aside = [(window, counter) for window, counters in state.aside.items() for counter in counters]
        for window, counter in (*state.windows.items(), *aside):
            mine = [each for each in held if each.periods.get(window) == counter.key]
            charged = [each for each in mine if is_charged(each) and not each.refund]
            assert counter.tasks_reserved == sum(map(is_reserved, mine))
            assert counter.tasks == len(charged)
            assert counter.money_reserved == sum(each.holds.get(window, 0) for each in mine if is_open(each))
            assert counter.money == sum(charge(each, window) for each in charged if not is_open(each))
        for account in self.model.account_states:
            self._account_adds_up(account, [each for each in held if each.account == account])

    def _account_adds_up(self, account: int, mine: list[Reservation]) -> None:
        known = self.model.account_states[account]
        assert known.open == sum(map(is_open, mine))
        assert known.sending == sum(map(is_reserved, mine))
        assert known.unknown == sum(each.state is ReservationState.UNKNOWN for each in mine)
        assert known.thrifty == sum(each.thrifty for each in mine)
        assert known.uncharged == sum(each.owes for each in mine if is_open(each))
        assert 0 <= known.astray <= sum(each.owes for each in mine if not is_open(each))

    @invariant()
    def usage_is_what_the_windows_counted(self) -> None:
        """A day's usage comes to what its window counted, and all days to the total."""
        state, now = self.tenant_state(), self.model.clock.at
        days = {day: usage for (_, day), usage in self.model.days.items()}
        today = days.get(now // DAY, DayUsage())
        day = state.windows[Window.DAY]
        if day.name is None:  # else the day was counted before, by a counter that is gone
            assert (day.tasks, day.money) == (sum_of(charged_tasks, [today]), sum_of(charged_money, [today]))
        assert state.windows[Window.TOTAL].tasks == sum_of(charged_tasks, days.values())
