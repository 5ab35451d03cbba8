"""A store whose calls fail in every way a call can, each when it is told to.

A call that moves a place waits as a letter until its fate is told; those of the watch and of readers are carried out
at once. Rules that can be broken only while a call is carried out are checked there and then.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from service.domain import ledger
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import AccountState, Figures, Granted, ReservationState, Status, TenantState, Verdict
from service.domain.tasks import Backlog, Kind, State, Task
from service.domain.tenants import Window
from service.usecases.ports import Ask, Check, Due, Look, Page, Settlement, Snapshot
from tests.fakes import FakeLedger
from tests.model import ledger_model

T = TypeVar("T")

CHARGED = (ReservationState.ACCEPTED, ReservationState.UNKNOWN)
COUNTED = (ReservationState.RESERVED, *CHARGED)
_PROVISIONAL = {None, ReservationState.RESERVED, ReservationState.UNKNOWN}


class Fate(StrEnum):
    """What becomes of a call."""

    DONE = "done"
    TWICE = "twice"
    LOST = "lost"
    """It never arrives, and the caller learns that it failed."""
    UNANSWERED = "unanswered"
    """It is carried out, but the caller learns that it failed."""
    LATE = "late"
    """The caller learns that it failed, and it may arrive some time later."""


@dataclass
class Store(FakeLedger):
    """The model ledger; `breaches` are the rules that were broken, by reckoning that does not use its counters.

    `doubted` are the reservations that were unknown at some time.
    """

    breaches: list[str] = field(default_factory=list)
    doubted: set[str] = field(default_factory=set)

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        known, before = ask.reservation in self.reservations, self._books(ask.tenant)
        verdict, snapshot = await super().reserve(ask)
        if not isinstance(verdict, Granted):
            self.expect(self._books(ask.tenant) == before, "a refusal changed the books")
        elif not known:
            self.expect(self._within_limits(ask), "a place was granted past a limit")
        return verdict, snapshot

    async def settle(self, settlement: Settlement) -> bool:
        before = self.state(settlement.reservation)
        booked = await super().settle(settlement)
        after = self.state(settlement.reservation)
        if after is ReservationState.UNKNOWN:
            self.doubted.add(settlement.reservation)
        self.expect(before in _PROVISIONAL or before is after, f"an outcome was final, but {before} became {after}")
        return booked

    def expect(self, kept: bool, breach: str) -> None:
        """Keep in mind that a rule was broken; raised here, it would be taken for a fault of the store's."""
        if not kept:
            self.breaches.append(breach)

    def state(self, reservation: str) -> ReservationState | None:
        """What became of a reservation."""
        known = self.reservations.get(reservation)
        return known.state if known else None

    def outcomes(self, tenant: int, window: Window) -> Counter[ReservationState]:
        """How many reservations that a tenant made in this window stand where."""
        now = ledger.period_of(window, self.clock.at)
        return Counter(
            each.state
            for each in self.reservations.values()
            if each.tenant == tenant and ledger.period_of(window, each.created) == now
        )

    def active(self, tenant: int) -> int:
        """How many submissions of a tenant are being sent or have a running task."""
        return sum(
            each.tenant == tenant
            and each.state in {ReservationState.RESERVED, ReservationState.ACCEPTED}
            and each.cost is None
            for each in self.reservations.values()
        )

    def counted(self, tenant: int) -> TenantState:
        """What the ledger itself has counted of a tenant."""
        state = copy.deepcopy(self._tenant(tenant))
        ledger_model.roll(state, self.clock.at)
        return state

    def _within_limits(self, ask: Ask) -> bool:
        policy, holds = self._limits(ask.tenant), self.reservations[ask.reservation].holds
        for limit in policy.limits:
            outcomes, counter = self.outcomes(ask.tenant, limit.window), self.counted(ask.tenant).windows[limit.window]
            if limit.tasks is not None and sum(outcomes[each] for each in COUNTED) > limit.tasks:
                return False
            spent = counter.money + counter.money_reserved
            if limit.money is not None and holds.get(limit.window) and spent > limit.money:
                return False
        return policy.max_active is None or self.active(ask.tenant) <= policy.max_active

    def _books(self, tenant: int) -> tuple[TenantState, dict[int, AccountState], int]:
        accounts = {each: copy.deepcopy(self._account(each)) for each in self.account_policies}
        return self.counted(tenant), accounts, len(self.reservations)


@dataclass(eq=False)
class Letter:
    """A call on its way."""

    carry_out: Callable[[], Coroutine[Any, Any, Any]]
    answer: asyncio.Future[Any]


class Post:
    """The calls of all processes: those under way, and the strays, for whose answers nobody waits any more.

    `upsets` are the fates of the next calls that are carried out at once.
    """

    def __init__(self) -> None:
        self.letters: list[Letter] = []
        self.strays: list[Letter] = []
        self.upsets: list[Fate] = []

    async def deliver(self, letter: Letter, fate: Fate) -> None:
        """Let a call have its fate."""
        self.letters.remove(letter)
        try:
            if fate in {Fate.LOST, Fate.LATE}:
                raise LedgerUnavailable("no connection", retry_after=1)
            answer = await letter.carry_out()
            if fate is Fate.TWICE:
                answer = await letter.carry_out()
            if fate is Fate.UNANSWERED:
                raise LedgerUnavailable("no answer", retry_after=1)
        except LedgerUnavailable as error:
            letter.answer.set_exception(error)
        else:
            letter.answer.set_result(answer)
        if fate is Fate.LATE:
            self.strays.append(letter)

    async def arrive(self, letter: Letter) -> None:
        """Carry out a call that was given up."""
        self.strays.remove(letter)
        try:
            await letter.carry_out()
        except LedgerUnavailable:
            return


class Line:
    """The ports Ledger and Tasks as one process has them: its way to the store."""

    def __init__(self, store: Store, post: Post) -> None:
        self._store = store
        self._post = post
        self._waiting: list[Letter] = []
        self._cut = False
        self._heard = True

    def cut(self, *, heard: bool) -> None:
        """The process is no more: it asks for nothing, and what it has asked for is lost unless it was `heard`."""
        self._cut, self._heard = True, heard
        for letter in self._waiting:
            letter.answer.cancel()

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        return await self._call(lambda: self._store.reserve(ask))

    async def retarget(self, ask: Ask, left: int, closes: Status | None) -> Verdict:
        return await self._call(lambda: self._store.retarget(ask, left, closes))

    async def settle(self, settlement: Settlement) -> bool:
        return await self._call(lambda: self._store.settle(settlement))

    async def expire(self, most: int) -> Sequence[Settlement]:
        return await self._call_at_once(lambda: self._store.expire(most))

    async def claim(self, most: int) -> Sequence[Due]:
        return await self._call_at_once(lambda: self._store.claim(most))

    async def record(self, due: Due, check: Check) -> tuple[Task, int] | None:
        return await self._call_at_once(lambda: self._store.record(due, check))

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        return await self._call_at_once(lambda: self._store.get(reservation))

    async def attend(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        return await self._call_at_once(lambda: self._store.attend(reservations))

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        return await self._store.page(tenant, state=state, kind=kind, limit=limit, cursor=cursor)

    async def counters(self, tenant: int) -> Snapshot:
        return await self._store.counters(tenant)

    async def counters_of(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        return await self._store.counters_of(ids)

    async def backlog(self) -> Backlog:
        return await self._store.backlog()

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        return await self._store.accounts(ids)

    async def reopen(self, account: int) -> None:
        await self._store.reopen(account)

    async def clock_offset(self) -> int:
        return await self._store.clock_offset()

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        return await self._store.reset_clock(tenants, accounts)

    async def look(self, account: int, *, count_only: bool) -> Look | None:
        return await self._store.look(account, count_only=count_only)

    async def looked(self, look: Look, figures: Figures) -> None:
        await self._store.looked(look, figures)

    async def _call(self, work: Callable[[], Coroutine[Any, Any, T]], fate: Fate | None = None) -> T:
        if self._cut:
            raise asyncio.CancelledError
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        letter = Letter(work, answer)
        self._post.letters.append(letter)
        if fate:
            await self._post.deliver(letter, fate)
        self._waiting.append(letter)
        try:
            return await answer
        except asyncio.CancelledError:  # whoever asked has gone, but not what was asked for
            if letter in self._post.letters:
                self._post.letters.remove(letter)
                self._post.strays += [letter] if self._heard else []
            raise
        finally:
            self._waiting.remove(letter)

    async def _call_at_once(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return await self._call(work, self._post.upsets.pop() if self._post.upsets else Fate.DONE)
