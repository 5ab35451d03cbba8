"""The ports Ledger and Books in memory, over the pure functions that specify them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    DayUsage,
    Figures,
    Granted,
    Idempotency,
    InFlight,
    KeyReused,
    LedgerClock,
    Refunding,
    Replayed,
    Reservation,
    ReservationState,
    Status,
    TenantState,
    Verdict,
)
from service.domain.tasks import Basis, Cost, State, Task
from service.storage.ledger import DAY, KEEP_KEY
from service.usecases.ports import Ask, Look, Settlement, Snapshot
from tests.fakes.tasks import FakeTasks
from tests.model import ledger_model
from tests.model.ledger_model import shown


@dataclass
class FakeLedger(FakeTasks):
    """The ports Ledger, Books and Tasks: the model that Redis is held against."""

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        self._answer()
        at, tenant = self.clock.moment(), copy.deepcopy(self._tenant(ask.tenant))
        now = at.wall
        if ask.tenant not in self.tenant_policies:
            raise LedgerUnavailable("gone", retry_after=2)
        ledger_model.roll(tenant, now)
        known = self.reservations.get(ask.reservation)
        if known:
            return self._again(known), Snapshot(copy.deepcopy(tenant), now)
        replay = self._replay(ask)
        if replay:
            return replay, Snapshot(copy.deepcopy(tenant), now)
        lease = at.now + self.spans.lease
        made = Reservation(ReservationState.RESERVED, ask.tenant, 0, ask.kind, created=now, sent=at.now, lease=lease)
        made.key = ask.idempotency.key if ask.idempotency else None
        verdict = ledger_model.reserve(tenant, self._limits(ask.tenant), self._candidates(ask.accounts), made, at)
        if isinstance(verdict, Granted):
            self.tenants[ask.tenant] = tenant
            self.reservations[ask.reservation] = made
            self._remember(ask.tenant, ask.reservation, ask.idempotency)
        return verdict, Snapshot(copy.deepcopy(tenant), now)

    def _replay(self, ask: Ask) -> Verdict | None:
        if ask.idempotency is None:
            return None
        name, content, until = self.keys.get((ask.tenant, ask.idempotency.key), ("", "", 0))
        known = self.reservations.get(name)
        if known is None or until <= self.clock.at:
            return None
        if content != ask.idempotency.content:
            return KeyReused(self.clock.at)
        if known.state is ReservationState.RESERVED:
            return InFlight(self.clock.at)
        return Replayed(name, known.state, self.clock.at)

    def _remember(self, tenant: int, name: str, idempotency: Idempotency | None) -> None:
        if idempotency:
            self.keys[tenant, idempotency.key] = name, idempotency.content, self.clock.at + KEEP_KEY

    async def retarget(self, ask: Ask, left: int, closes: Status | None) -> Verdict:
        self._answer()
        known = self.reservations.get(ask.reservation)
        if known is None or known.state is not ReservationState.RESERVED:
            raise LedgerUnavailable("given up")
        if known.account != left:
            return self._again(known)
        tenant = copy.deepcopy(self._tenant(ask.tenant))
        verdict = ledger_model.retarget(
            tenant,
            self._limits(ask.tenant),
            self._candidate(left),
            closes,
            self._candidates(ask.accounts),
            known,
            self.clock.moment(),
        )
        if isinstance(verdict, Granted):
            self.tenants[ask.tenant] = tenant
        return verdict

    async def settle(self, settlement: Settlement) -> bool:
        self._answer()
        at, name = self.clock.moment(), settlement.reservation
        tenant = copy.deepcopy(self._tenant(settlement.tenant))
        known = self.reservations.get(name)
        if known is None:
            known = self.reservations[name] = Reservation(
                settlement.outcome,
                settlement.tenant,
                settlement.account,
                settlement.kind,
                created=settlement.created,
                sent=min(settlement.created, at.now),
                lease=settlement.created,
            )
            if settlement.outcome in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
                return True
            self._keep_key(settlement, known)
            ledger_model.adopt(tenant, self._account(settlement.account), name, known, self._day(known), at)
            if settlement.outcome is ReservationState.UNKNOWN:
                self.tenants[settlement.tenant] = tenant
                return True
        if settlement.late and known.state is ReservationState.RESERVED and known.lease > at.now:
            return False
        account = self._candidate(known.account)
        figures, closes, day = settlement.figures, settlement.closes, self._day(known)
        if settlement.account != known.account:  # it was retargeted, and what is told is of the account it left
            figures, closes = Figures(), None
        if not ledger_model.settle(tenant, account, name, known, settlement.outcome, figures, closes, day, at):
            return False
        self.tenants[settlement.tenant] = tenant
        self._resolve(account)
        if settlement.outcome in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
            self._free_key(name, known)
        if settlement.outcome is ReservationState.ACCEPTED and settlement.draft:
            self._accept(settlement, known)
        return True

    def _keep_key(self, settlement: Settlement, known: Reservation) -> None:
        idempotency = settlement.idempotency
        if idempotency is None:
            return
        known.key = idempotency.key
        _, _, until = self.keys.get((known.tenant, idempotency.key), ("", "", 0))
        if until <= self.clock.at:
            self._remember(known.tenant, settlement.reservation, idempotency)

    def _free_key(self, name: str, known: Reservation) -> None:
        if known.key and self.keys.get((known.tenant, known.key), ("",))[0] == name:
            del self.keys[known.tenant, known.key]

    def _accept(self, settlement: Settlement, known: Reservation) -> None:
        if settlement.draft is None:
            return
        self.tasks[settlement.reservation] = Task(
            id=settlement.draft.id,
            reservation=settlement.reservation,
            tenant=known.tenant,
            account=known.account,
            kind=known.kind,
            state=State.QUEUED,
            created=known.created,
            updated=known.created,
            finished=None,
            options=settlement.draft.options,
            metadata=settlement.draft.metadata,
            artifacts=(),
            error=None,
            cost=Cost(0, 0, Basis.UNKNOWN),
            version=1,
            checked=known.created,
            webhook=settlement.draft.webhook,
            trace=settlement.draft.trace,
        )
        self.due[settlement.reservation] = self.clock.moment().now + self.spans.check_after

    async def expire(self, most: int) -> Sequence[Settlement]:
        self._answer()
        now = self.clock.moment().now
        lapsed = [
            (each.lease, name, each)
            for name, each in self.reservations.items()
            if each.state is ReservationState.RESERVED and each.lease <= now
        ]
        settled = [
            Settlement(
                reservation=name,
                tenant=each.tenant,
                account=each.account,
                kind=each.kind,
                created=each.created,
                outcome=ReservationState.UNKNOWN,
            )
            for _, name, each in sorted(lapsed)[:most]
        ]
        for settlement in settled:
            await self.settle(settlement)
        return settled

    async def counters(self, tenant: int) -> Snapshot:
        self._answer()
        return Snapshot(copy.deepcopy(self._tenant(tenant)), self.clock.at)

    async def counters_of(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        self._answer()
        return {each: copy.deepcopy(self._tenant(each)) for each in ids}, self.clock.at

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        self._answer()
        offset = self.clock.moment().offset
        return {each: self._account(each).moved(offset) for each in ids}

    async def reopen(self, account: int) -> None:
        self._answer()
        state = self._account(account)
        state.status, state.probe_at, state.count, state.money = Status.OPEN, 0, None, None
        state.closed, state.reopened = 0, self.clock.moment().now

    async def clock_offset(self) -> int:
        self._answer()
        return self.clock.moment().offset

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        self._answer()
        offset = self.clock.moment().offset
        for name, each in self.reservations.items():
            reserved, runs = each.state is ReservationState.RESERVED, name in self.due or name in self.claims
            unknown = each.state is ReservationState.UNKNOWN and each.tenant in tenants
            if reserved or unknown or (runs and each.state is ReservationState.ACCEPTED):
                self.reservations[name] = each.moved(offset)
        for account in set(accounts) & self.account_states.keys():
            self.account_states[account] = self.account_states[account].moved(offset)
        self.patience = {name: (one.moved(offset), other.moved(offset)) for name, (one, other) in self.patience.items()}
        for name in self.failing.keys() & self.turns.keys():
            self.failing[name] -= offset
        for times in (self.due, self.claims, self.turns, self.queued, self.leased):
            for name in times:
                times[name] -= offset
        self.clock.kept = LedgerClock(self.clock.at)
        return offset

    async def look(self, account: int, *, count_only: bool) -> Look | None:
        self._answer()
        candidate, now = self._candidate(account), self.clock.moment().now
        state, policy = candidate.state, candidate.policy
        if account not in self.account_policies or not ledger_model.look_due(state, policy, now, count_only=count_only):
            return None
        ledger_model.begin_look(state, now)
        return Look(account, state.newest.reservation, now) if state.newest else None

    async def looked(self, look: Look, figures: Figures) -> None:
        self._answer()
        candidate, now = self._candidate(look.account), self.clock.moment().now
        claimed = min(look.claimed, now)
        ledger_model.looked(candidate.state, candidate.policy, look.reservation, figures, claimed, now)
        self._resolve(candidate)

    async def submission(self, reservation: str) -> Reservation | None:
        self._answer()
        known, at = self.reservations.get(reservation), self.clock.moment()
        return copy.deepcopy(known).moved(at.offset) if known else None

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[Refunding, Reservation] | None:
        self._answer()
        known = self.reservations.get(reservation)
        if known is None or known.tenant != tenant:
            return None
        at, state = self.clock.moment(), copy.deepcopy(self._tenant(tenant))
        did = ledger_model.refund(state, reservation, known, reason, self._day(known), at)
        if did is Refunding.REFUNDED:
            self.tenants[tenant] = state
        return did, copy.deepcopy(known).moved(at.offset)

    async def usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        self._answer()
        return [copy.deepcopy(self.days.get((tenant, day), DayUsage())) for day in days]

    async def today(self) -> int:
        self._answer()
        return self.clock.at // DAY

    def _again(self, known: Reservation) -> Granted:
        if known.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
            raise LedgerUnavailable("given up")
        at = self.clock.moment()
        return Granted(known.account, at.wall, shown(at, known.lease))
