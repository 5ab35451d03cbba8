"""The ledger in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    DayUsage,
    Figures,
    Granted,
    Idempotency,
    InFlight,
    KeyReused,
    Measure,
    NoAccount,
    PolicyDenied,
    Refund,
    Refunding,
    Replayed,
    Reservation,
    ReservationState,
    Status,
    Tally,
    TenantState,
    Verdict,
    Violation,
)
from service.domain.tasks import Kind
from service.storage.redis import RETRY_AFTER, Keys, Scripts, given, moment, scored, server_time
from service.usecases.ports import Ask, Look, Settlement, Snapshot

DAY = 86_400_000


KEEP_KEY = DAY
"""For how long an idempotency key is remembered, in milliseconds."""


_BATCH = 100


KEEP_USAGE = 400 * DAY
"""For how long the usage of a day is kept, in milliseconds: 13 months at the least."""


class Spans(Struct, frozen=True):
    """How long things last, in milliseconds: a lease, the time between checks, and how long things are kept.

    A running task is given up once answers that do not know it add up to `lost_after`, or all that can't be used,
    these included, to `unusable_after`.
    """

    lease: int = 180_000
    check_after: int = 2_500
    claim: int = 30_000
    interest: int = 30_000
    lost_after: int = 1_800_000
    unusable_after: int = DAY
    keep_ended: int = 30 * DAY

    @property
    def keep(self) -> int:
        """How long a reservation and a running task are kept: longer than any task can run."""
        return self.keep_ended + 30 * DAY


class RedisLedger:
    """Holds places and books outcomes, each in one call."""

    def __init__(self, scripts: Scripts, keys: Keys, spans: Spans) -> None:
        self._scripts = scripts
        self._keys = keys
        self._spans = spans

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        """Hold a place, or say who refused."""
        keys = self._keys
        answer = await self._scripts.call(
            "reserve",
            [
                keys.clock,
                keys.tenant(ask.tenant),
                keys.reservation(ask.reservation),
                keys.leases,
                *map(keys.account, ask.accounts),
            ],
            {
                "reservation": ask.reservation,
                "tenant": ask.tenant,
                "kind": ask.kind,
                "lease": self._spans.lease,
                "keep": self._spans.keep,
                "accounts": ask.accounts,
                "reservations": keys.reservation(""),
            }
            | given(idempotency=self._idempotency(ask.tenant, ask.idempotency)),
        )
        return _verdict(answer), Snapshot(msgspec.msgpack.decode(answer[1], type=TenantState), answer[2])

    async def retarget(self, ask: Ask, left: int, closes: Status | None) -> Verdict:
        """Move the reservation from account `left` to the next of `ask.accounts`."""
        keys = self._keys
        answer = await self._scripts.call(
            "retarget",
            [
                keys.clock,
                keys.tenant(ask.tenant),
                keys.reservation(ask.reservation),
                keys.account(left),
                *map(keys.account, ask.accounts),
            ],
            {"left": left, "keep": self._spans.keep, "accounts": ask.accounts} | given(closes=closes),
        )
        return _verdict(answer)

    async def settle(self, settlement: Settlement) -> bool:
        """Book an outcome; False if a final one was booked before."""
        keys = self._keys
        ask: dict[str, Any] = {
            "reservation": settlement.reservation,
            "tenant": settlement.tenant,
            "account": settlement.account,
            "kind": settlement.kind,
            "created": settlement.created,
            "outcome": settlement.outcome,
            "figures": packed_figures(settlement.figures),
            "keep": self._spans.keep,
            "late": settlement.late,
            "usage": keys.usage(settlement.tenant, ""),
            "keep_usage": KEEP_USAGE,
            "reservations": keys.reservation(""),
            "keys": keys.idempotency(settlement.tenant, ""),
        } | given(idempotency=self._idempotency(settlement.tenant, settlement.idempotency))
        if settlement.draft:
            ask["draft"] = {
                "id": settlement.draft.id,
                "options": str(settlement.draft.options, "utf-8"),
                "metadata": str(settlement.draft.metadata, "utf-8"),
                "check_after": self._spans.check_after,
            } | given(webhook=settlement.draft.webhook, trace=settlement.draft.trace)
        status, _, *elsewhere = await self._scripts.call(
            "settle",
            [
                keys.clock,
                keys.tenant(settlement.tenant),
                keys.reservation(settlement.reservation),
                keys.leases,
                keys.account(settlement.account),
                keys.task(settlement.reservation),
                keys.tasks(settlement.tenant),
                keys.watch,
            ],
            ask | given(closes=settlement.closes),
        )
        if status == b"elsewhere":  # a retarget took place whose answer never arrived, and this tells of the other one
            moved = msgspec.structs.replace(settlement, account=elsewhere[0], figures=Figures(), closes=None)
            return await self.settle(moved)
        return bool(status == b"settled")

    async def expire(self, most: int) -> Sequence[Settlement]:
        """Settle as unknown the reservations whose process died before it could."""
        *time, rows, data_version = await self._scripts.read(
            *self._keys.moment,
            ("ZRANGE", self._keys.leases, 0, most - 1, "WITHSCORES"),
            ("GET", self._keys.data_version),
        )
        self._scripts.compare_version(data_version)  # what follows also removes members, by no script
        now = moment(*time).now
        ids = [reservation for reservation, lease in scored(rows) if lease <= now]
        found = await self._scripts.read(*(("GET", self._keys.reservation(each)) for each in ids))
        settled: list[Settlement] = []
        for each, packed in zip(ids, found, strict=True):
            if packed is None:  # it outlived its reservation, which nobody can settle any more
                await self._scripts.read(("ZREM", self._keys.leases, each))
                continue
            reservation = msgspec.msgpack.decode(packed, type=Reservation)
            settlement = Settlement(
                reservation=each,
                tenant=reservation.tenant,
                account=reservation.account,
                kind=reservation.kind,
                created=reservation.created,
                outcome=ReservationState.UNKNOWN,
            )
            if await self.settle(settlement):
                settled.append(settlement)
        return settled

    async def counters(self, tenant: int) -> Snapshot:
        """The counters of a tenant, and the server's time."""
        packed, time = await self._scripts.read(("HGET", self._keys.tenant(tenant), "state"), self._keys.time)
        state = msgspec.msgpack.decode(packed, type=TenantState) if packed else TenantState()
        return Snapshot(state, server_time(time))

    async def counters_of(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        """The counters of all these tenants, and the server's time."""
        (time,) = await self._scripts.read(self._keys.time)
        found = await self._states([self._keys.tenant(each) for each in ids])
        states = {
            each: msgspec.msgpack.decode(packed, type=TenantState) if packed else TenantState()
            for each, packed in zip(ids, found, strict=True)
        }
        return states, server_time(time)

    async def _states(self, keys: Sequence[str]) -> list[bytes | None]:
        """What stands under each key, a few at a time, so that other work comes in between."""
        found: list[bytes | None] = []
        for start in range(0, len(keys), _BATCH):
            found += await self._scripts.read(*(("HGET", key, "state") for key in keys[start : start + _BATCH]))
        return found

    async def accounts(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        """What is known of each account, with all times in the server's time."""
        offset = await self.clock_offset()
        found = await self._states([self._keys.account(each) for each in ids])
        states = (msgspec.msgpack.decode(packed, type=AccountState) if packed else AccountState() for packed in found)
        return {each: state.moved(offset) if offset else state for each, state in zip(ids, states, strict=True)}

    async def clock_offset(self) -> int:
        """By how many milliseconds the ledger's time is ahead of the server's."""
        return moment(*await self._scripts.read(*self._keys.moment)).offset

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        """Make the ledger's time the server's again, and all that is kept in it earlier by as much; by how much."""
        keys = self._keys
        (offset,) = await self._scripts.call(
            "reset_clock",
            [keys.clock, keys.leases, keys.watch, keys.claims, keys.receivers, *map(keys.account, accounts)],
            {
                "accounts": accounts,
                "reservations": keys.reservation(""),
                "tasks": keys.task(""),
                "usages": [keys.usage(tenant, "") for tenant in tenants],
                "keep": self._spans.keep,
                "queues": keys.deliveries_due(""),
                "delivery_claims": keys.deliveries_claimed(""),
                "failing": keys.failing(""),
            },
        )
        return int(offset)

    async def reopen(self, account: int) -> None:
        """Let the next submission find out whether the account can pay."""
        await self._scripts.call("reopen", [self._keys.clock, self._keys.account(account)], {"account": account})

    async def look(self, account: int, *, count_only: bool) -> Look | None:
        """Claim the turn to look at an account's balance, if that is due."""
        status, now, *rest = await self._scripts.call(
            "look", [self._keys.clock, self._keys.account(account)], {"account": account, "count_only": count_only}
        )
        return Look(account, str(rest[0], "ascii"), now) if status == b"due" else None

    async def looked(self, look: Look, figures: Figures) -> None:
        """Take in what a second check of a finished task told."""
        await self._scripts.call(
            "looked",
            [self._keys.clock, self._keys.account(look.account)],
            {
                "account": look.account,
                "reservation": look.reservation,
                "claimed": look.claimed,
                "figures": packed_figures(figures),
                "reservations": self._keys.reservation(""),
            },
        )

    def _idempotency(self, tenant: int, idempotency: Idempotency | None) -> dict[str, Any] | None:
        if idempotency is None:
            return None
        at = self._keys.idempotency(tenant, idempotency.key)
        return {"at": at, "key": idempotency.key, "content": idempotency.content, "keep": KEEP_KEY}


def _verdict(answer: list[Any]) -> Verdict:
    status, now = answer[0], answer[2]
    if status == b"granted":
        return Granted(answer[3], now, answer[4])
    if status == b"denied":
        return PolicyDenied(
            tuple(Violation(str(policy, "ascii"), limit, resets or None) for policy, limit, resets in answer[3:]), now
        )
    if status == b"no-account":
        return NoAccount(answer[3] or None, now)
    if status == b"replayed":
        return Replayed(str(answer[3], "ascii"), ReservationState(str(answer[4], "ascii")), now)
    if status == b"in-flight":
        return InFlight(now)
    if status == b"key-reused":
        return KeyReused(now)
    if status == b"gone":
        raise LedgerUnavailable("The gateway's store does not know this tenant. Try again.", retry_after=RETRY_AFTER)
    raise LedgerUnavailable("This submission was given up before it could be sent. Submit it again.", retry_after=1)


def packed_figures(figures: Figures) -> dict[str, int]:
    """Figures for a script, in which what is not known is not there."""
    return given(count=figures.count, money=figures.money)


_UNKNOWN, _REFUND = "unknown", "refund"


class _RefundEntry(Struct):
    """A refund as the scripts write it into the usage of a day."""

    kind: Kind
    at: int
    reason: str
    count: int
    money: int


class RedisBooks:
    """Reads submissions and usage, and refunds."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def submission(self, reservation: str) -> Reservation | None:
        """A submission; None if it is not known (any more)."""
        packed, *time = await self._scripts.read(("GET", self._keys.reservation(reservation)), *self._keys.moment)
        return _reservation(packed, moment(*time).offset) if packed else None

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[Refunding, Reservation] | None:
        """Give back what a submission was charged for, once."""
        keys = self._keys
        status, *rest = await self._scripts.call(
            "refund",
            [keys.clock, keys.tenant(tenant), keys.reservation(reservation)],
            {
                "reservation": reservation,
                "tenant": tenant,
                "reason": reason,
                "usage": keys.usage(tenant, ""),
                "keep_usage": KEEP_USAGE,
            },
        )
        if status == b"gone":
            return None
        return Refunding(str(status, "ascii")), _reservation(*rest)

    async def usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        """What a tenant used on each of the days."""
        found = await self._scripts.read(*(("HGETALL", self._keys.usage(tenant, day)) for day in days))
        return [_day(fields) for fields in found]

    async def today(self) -> int:
        """The day of the server's clock, counted from the epoch."""
        (time,) = await self._scripts.read(self._keys.time)
        return server_time(time) // DAY


def _reservation(packed: bytes, offset: int) -> Reservation:
    """A reservation whose times are shown, where the ledger's time is ahead by `offset`."""
    return msgspec.msgpack.decode(packed, type=Reservation).moved(offset)


def _day(fields: Mapping[bytes, bytes]) -> DayUsage:
    day = DayUsage()
    for name, value in fields.items():
        first, _, second = str(name, "ascii").partition(" ")
        if first == _UNKNOWN:
            day.unknown[second] = Kind(str(value, "ascii"))
        elif first == _REFUND:
            entry = msgspec.msgpack.decode(value, type=_RefundEntry)
            day.refunds[second] = entry.kind, Refund(entry.at, entry.reason, entry.count, entry.money)
        else:
            day.tallies.setdefault(Kind(first), Tally())[Measure(second)] = int(value)
    return day
