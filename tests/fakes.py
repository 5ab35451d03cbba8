"""The ports in memory, over the pure functions that specify them: the model that Redis is held against."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from service.domain import balance, booking, charges, quota, windows
from service.domain.account import AccountState, Figures, Status
from service.domain.errors import LedgerUnavailable, MalformedRequest
from service.domain.registry import Registry
from service.domain.reservation import (
    Candidate,
    Granted,
    Idempotency,
    InFlight,
    KeyReused,
    Refunding,
    Replayed,
    Reservation,
    ReservationState,
    Verdict,
)
from service.domain.task import Artifact, ArtifactName, Basis, Cost, Kind, Options, State, Task, TaskError
from service.domain.tenancy import Account, AccountPolicy, TenantPolicy
from service.domain.usage import DayUsage
from service.domain.windows import TenantState
from service.storage.ledger import DAY, KEEP_KEY, Spans
from service.usecases.ports import (
    Answered,
    Ask,
    Check,
    Due,
    Image,
    Look,
    Page,
    RegistryChange,
    Settlement,
    Snapshot,
    SubmitOutcome,
    Submitted,
)

START = 1_790_000_000_000
"""A moment to begin at, in milliseconds: 2026-09-21 14:13:20 UTC."""


@dataclass
class FakeClock:
    """A clock that stands until it is moved; milliseconds."""

    at: int = START

    def now(self) -> float:
        """Seconds since the epoch."""
        return self.at / 1000


class Stopwatch(msgspec.Struct, frozen=True):
    """How long something has lasted, in which only time between two moments that count in a row is counted."""

    total: int = 0
    since: int | None = None

    def went_on(self, now: int, *, counts: bool) -> Stopwatch:
        """What it shows now."""
        if not counts:
            return Stopwatch(self.total)
        return Stopwatch(self.total + (0 if self.since is None else now - self.since), now)


@dataclass
class FakeLedger:
    """The ports Ledger, Books and Tasks. `away` makes every call fail as when Redis does not answer."""

    clock: FakeClock = field(default_factory=FakeClock)
    spans: Spans = field(default_factory=Spans)
    away: bool = False
    tenant_policies: dict[int, TenantPolicy] = field(default_factory=dict)
    account_policies: dict[int, AccountPolicy] = field(default_factory=dict)
    tenants: dict[int, TenantState] = field(default_factory=dict)
    account_states: dict[int, AccountState] = field(default_factory=dict)
    reservations: dict[str, Reservation] = field(default_factory=dict)
    tasks: dict[str, Task] = field(default_factory=dict)
    due: dict[str, int] = field(default_factory=dict)
    patience: dict[str, tuple[Stopwatch, Stopwatch]] = field(default_factory=dict)
    keys: dict[tuple[int, str], tuple[str, str, int]] = field(default_factory=dict)
    days: dict[tuple[int, int], DayUsage] = field(default_factory=dict)

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        self._answer()
        now, tenant = self.clock.at, self._tenant(ask.tenant)
        if ask.tenant not in self.tenant_policies:
            raise LedgerUnavailable("gone", retry_after=2)
        windows.roll(tenant, now)
        known = self.reservations.get(ask.reservation)
        if known:
            return self._again(known), Snapshot(copy.deepcopy(tenant), now)
        replay = self._replay(ask)
        if replay:
            return replay, Snapshot(copy.deepcopy(tenant), now)
        lease = now + self.spans.lease
        made = Reservation(ReservationState.RESERVED, ask.tenant, 0, ask.kind, created=now, sent=now, lease=lease)
        made.key = ask.idempotency.key if ask.idempotency else None
        verdict = quota.reserve(tenant, self._limits(ask.tenant), self._candidates(ask.accounts), made, now)
        if isinstance(verdict, Granted):
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
        return quota.retarget(
            self._tenant(ask.tenant),
            self._limits(ask.tenant),
            self._candidate(left),
            closes,
            self._candidates(ask.accounts),
            known,
            self.clock.at,
        )

    async def settle(self, settlement: Settlement) -> bool:
        self._answer()
        now, tenant, name = self.clock.at, self._tenant(settlement.tenant), settlement.reservation
        known = self.reservations.get(name)
        if known is None:
            known = self.reservations[name] = Reservation(
                settlement.outcome,
                settlement.tenant,
                settlement.account,
                settlement.kind,
                created=settlement.created,
                sent=settlement.created,
                lease=settlement.created,
            )
            if settlement.outcome in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
                return True
            self._keep_key(settlement, known)
            booking.adopt(tenant, self._account(settlement.account), name, known, self._day(known), now)
            if settlement.outcome is ReservationState.UNKNOWN:
                return True
        if settlement.late and known.state is ReservationState.RESERVED and known.lease > now:
            return False
        account = self._candidate(known.account)
        figures, closes, day = settlement.figures, settlement.closes, self._day(known)
        if not booking.settle(tenant, account, name, known, settlement.outcome, figures, closes, day, now):
            return False
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

    def _resolve(self, account: Candidate) -> None:
        """Tell a submission in doubt what was found out of it."""
        doubt = account.state.doubt
        if doubt and doubt.suggests:
            if doubt.reservation in self.reservations:
                charges.tell(account.state, account.policy, self.reservations[doubt.reservation])
            account.state.doubt = None

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
        )
        self.due[settlement.reservation] = self.clock.at + self.spans.check_after

    async def expire(self, most: int) -> int:
        self._answer()
        lapsed = [
            (each.lease, name, each)
            for name, each in self.reservations.items()
            if each.state is ReservationState.RESERVED and each.lease <= self.clock.at
        ]
        for _, name, each in sorted(lapsed)[:most]:
            await self.settle(
                Settlement(
                    reservation=name,
                    tenant=each.tenant,
                    account=each.account,
                    kind=each.kind,
                    created=each.created,
                    outcome=ReservationState.UNKNOWN,
                )
            )
        return len(lapsed[:most])

    async def counters(self, tenant: int) -> Snapshot:
        self._answer()
        return Snapshot(copy.deepcopy(self._tenant(tenant)), self.clock.at)

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        self._answer()
        return {each: copy.deepcopy(self._account(each)) for each in ids}

    async def reopen(self, account: int) -> None:
        self._answer()
        state = self._account(account)
        state.status, state.probe_at, state.count, state.money = Status.OPEN, 0, None, None
        state.closed, state.reopened = 0, self.clock.at

    async def look(self, account: int, *, count_only: bool) -> Look | None:
        self._answer()
        candidate, now = self._candidate(account), self.clock.at
        state, policy = candidate.state, candidate.policy
        if account not in self.account_policies or not balance.look_due(state, policy, now, count_only=count_only):
            return None
        state.looked = now
        return Look(account, state.newest.reservation, now) if state.newest else None

    async def looked(self, look: Look, figures: Figures) -> None:
        self._answer()
        candidate, now = self._candidate(look.account), self.clock.at
        balance.looked(candidate.state, candidate.policy, look.reservation, figures, look.claimed, now)
        self._resolve(candidate)

    async def submission(self, reservation: str) -> Reservation | None:
        self._answer()
        return copy.deepcopy(self.reservations.get(reservation))

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[Refunding, Reservation] | None:
        self._answer()
        known = self.reservations.get(reservation)
        if known is None or known.tenant != tenant:
            return None
        did = booking.refund(self._tenant(tenant), reservation, known, reason, self._day(known), self.clock.at)
        return did, copy.deepcopy(known)

    async def usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        self._answer()
        return [copy.deepcopy(self.days.get((tenant, day), DayUsage())) for day in days]

    async def today(self) -> int:
        self._answer()
        return self.clock.at // DAY

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        self._answer()
        task = self.tasks.get(reservation)
        return (task, self.clock.at) if task else None

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        self._answer()
        found = sorted(
            (
                task
                for task in self.tasks.values()
                if task.tenant == tenant and state in {None, task.state} and kind in {None, task.kind}
            ),
            key=lambda task: (task.created, task.reservation),
            reverse=True,
        )
        if cursor:
            position = next((index for index, task in enumerate(found) if task.reservation == cursor), None)
            if position is None:
                raise MalformedRequest("The cursor is none of this list.")
            found = found[position + 1 :]
        kept = tuple(found[:limit])
        return Page(kept, kept[-1].reservation if len(found) > limit else None)

    async def claim(self, most: int) -> Sequence[Due]:
        self._answer()
        ready = sorted(((at, name) for name, at in self.due.items() if at <= self.clock.at))[:most]
        for _, name in ready:
            self.due[name] = self.clock.at + self.spans.claim
        return [Due(self.tasks[name], self.clock.at) for _, name in ready]

    async def record(self, due: Due, check: Check) -> Task | None:
        self._answer()
        name, now = due.task.reservation, self.clock.at
        task = self.tasks.get(name)
        if task is None or task.state.ended:
            self.due.pop(name, None)
            return None
        answered, error = check.answered, check.error
        silent, useless = self.patience.pop(name, (Stopwatch(), Stopwatch()))
        if answered in {Answered.SILENT, Answered.UNUSABLE, Answered.NOTHING}:
            silent = silent.went_on(now, counts=answered is Answered.SILENT)
            useless = useless.went_on(now, counts=answered is not Answered.NOTHING)
            self.patience[name] = (silent, useless)
        if answered is Answered.SILENT and silent.total >= self.spans.lost_after:
            answered, error = Answered.FAILED, TaskError("task-lost", "")
        elif answered in {Answered.SILENT, Answered.UNUSABLE} and useless.total >= self.spans.unusable_after:
            answered, error = Answered.FAILED, TaskError("result-unusable", "")
        checked = task.checked if answered in {Answered.NOTHING, Answered.UNUSABLE} else now
        if answered in {Answered.SUCCEEDED, Answered.FAILED}:
            cost = self._end(name, due, check, succeeded=answered is Answered.SUCCEEDED)
            self.due.pop(name, None)
            changes = {"state": State(answered), "finished": now, "artifacts": check.artifacts, "error": error}
            self.tasks[name] = msgspec.structs.replace(
                task, updated=now, checked=checked, version=task.version + 1, cost=cost, **changes
            )
        else:
            self.due[name] = now + self.spans.check_after
            begins = answered is Answered.RUNNING and task.state is State.QUEUED
            changes = {"state": State.RUNNING, "updated": now, "version": task.version + 1} if begins else {}
            self.tasks[name] = msgspec.structs.replace(task, checked=checked, **changes)
        return self.tasks[name]

    def _end(self, name: str, due: Due, check: Check, *, succeeded: bool) -> Cost:
        reservation = self.reservations[name]
        account = self._candidate(reservation.account)
        cost = booking.end(
            self._tenant(reservation.tenant),
            self._limits(reservation.tenant),
            account,
            name,
            reservation,
            check.figures,
            due.claimed,
            self._day(reservation),
            self.clock.at,
            succeeded=succeeded,
        )
        self._resolve(account)
        return cost

    def _day(self, reservation: Reservation) -> DayUsage:
        return self.days.setdefault((reservation.tenant, reservation.created // DAY), DayUsage())

    def _again(self, known: Reservation) -> Granted:
        if known.state in {ReservationState.REFUSED, ReservationState.NOT_SENT}:
            raise LedgerUnavailable("given up")
        return Granted(known.account, self.clock.at, known.lease)

    def _answer(self) -> None:
        if self.away:
            raise LedgerUnavailable("away", retry_after=2)

    def _tenant(self, tenant: int) -> TenantState:
        return self.tenants.setdefault(tenant, TenantState())

    def _limits(self, tenant: int) -> TenantPolicy:
        return self.tenant_policies.get(tenant, TenantPolicy())

    def _account(self, account: int) -> AccountState:
        return self.account_states.setdefault(account, AccountState())

    def _candidate(self, account: int) -> Candidate:
        return Candidate(account, self.account_policies.get(account, AccountPolicy()), self._account(account))

    def _candidates(self, accounts: Sequence[int]) -> list[Candidate]:
        return [self._candidate(each) for each in accounts if each in self.account_policies]


@dataclass
class FakeRegistry:
    """The ports RegistryStore and RegistryView; policies go to the ledger in the same breath."""

    ledger: FakeLedger
    current: Registry = field(default_factory=Registry)
    ready: bool = True

    async def refresh(self) -> None:
        if self.ledger.away:
            raise LedgerUnavailable("away", retry_after=2)

    async def write(self, change: RegistryChange) -> bool:
        await self.refresh()
        now = self.current
        if change.version != now.version:
            return False
        tenants = dict(now.tenants) | {each.name: each for each in change.tenants}
        accounts = dict(now.accounts) | {each.name: each for each in change.accounts}
        tokens = dict(now.tokens) | {each.id: each for each in change.tokens}
        for tenant in change.drop_tenants:
            del tenants[tenant.name]
        for account in change.drop_accounts:
            del accounts[account.name]
        for token in change.drop_tokens:
            del tokens[token.id]
        for gone in change.drop_tenants:
            self.ledger.tenant_policies.pop(gone.id, None)
        for left in change.drop_accounts:
            self.ledger.account_policies.pop(left.id, None)
        self.ledger.tenant_policies |= {each.id: each.policy for each in change.tenants}
        self.ledger.account_policies |= {each.id: each.policy for each in change.accounts}
        gone = {each.id: each.name for each in change.drop_tenants}
        former = {**now.former, **change.former, **gone}
        version = max(now.version, change.later_than) + 1
        self.current = Registry(version, change.next_id, tenants, accounts, tokens, former)
        return True


@dataclass
class FakeUpstream:
    """The port Upstream, told beforehand what to answer. By default it accepts, counts down, and then succeeds."""

    count: int = 10
    money: int = 30_000
    submits: list[tuple[str, Options, Image]] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)
    next_submits: list[Submitted] = field(default_factory=list)
    next_checks: list[Check] = field(default_factory=list)

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        del seconds
        self.submits.append((account.name, options, image))
        if self.next_submits:
            return self.next_submits.pop(0)
        self.count -= 1
        figures = Figures(self.count, self.money)
        return Submitted(outcome=SubmitOutcome.ACCEPTED, upstream_id=f"up-{len(self.submits)}", figures=figures)

    async def check(self, account: Account, upstream_id: str) -> Check:
        del account
        self.checks.append(upstream_id)
        if self.next_checks:
            return self.next_checks.pop(0)
        return Check(
            answered=Answered.SUCCEEDED,
            artifacts=(Artifact(ArtifactName.IMAGE, f"http://upstream.test/{upstream_id}.png"),),
            figures=Figures(self.count, self.money),
        )
