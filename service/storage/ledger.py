"""The ledger in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    AccountState,
    AccountStatus,
    Balance,
    DayUsage,
    Grant,
    Idempotency,
    InFlight,
    KeyReuse,
    Measure,
    NoAccount,
    PolicyDenial,
    Refund,
    RefundResult,
    Replay,
    Reservation,
    ReservationState,
    Tally,
    TenantState,
    Verdict,
    Violation,
)
from service.domain.tasks import Kind
from service.storage.redis import (
    RETRY_AFTER_SECONDS,
    Keys,
    RedisScripts,
    drop_none,
    parse_ledger_time,
    parse_server_time,
    parse_withscores,
)
from service.usecases.ports import BalanceCheck, ReserveRequest, Settlement, TenantSnapshot

DAY_MS = 86_400_000
KEEP_IDEMPOTENCY_KEY_MS = DAY_MS
"""For how long an idempotency key is remembered, in milliseconds."""
_BATCH_SIZE = 100
KEEP_USAGE_MS = 400 * DAY_MS
"""For how long the usage of a day is kept, in milliseconds: 13 months at the least."""


class Retention(Struct, frozen=True, kw_only=True):
    """How long things last and are kept.

    A running task fails once responses that do not know it add up to `lost_after_ms`, or all unusable ones, these
    included, to `unusable_after_ms`.
    """

    lease_ms: int
    check_interval_ms: int
    claim_lease_ms: int
    watched_ms: int
    lost_after_ms: int
    unusable_after_ms: int
    keep_finished_ms: int

    @property
    def keep_ms(self) -> int:
        """How long a reservation and a running task are kept: longer than any task can run."""
        return self.keep_finished_ms + 30 * DAY_MS


class RedisLedger:
    """Holds places and books outcomes, each in one call."""

    def __init__(self, scripts: RedisScripts, keys: Keys, retention: Retention) -> None:
        self._scripts = scripts
        self._keys = keys
        self._retention = retention

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
        """Hold a place, or say who refused."""
        keys = self._keys
        answer = await self._scripts.call(
            "reserve",
            [
                keys.clock,
                keys.tenant(request.tenant),
                keys.reservation(request.reservation),
                keys.leases,
                *map(keys.account, request.accounts),
            ],
            {
                "reservation": request.reservation,
                "tenant": request.tenant,
                "kind": request.kind,
                "lease_ms": self._retention.lease_ms,
                "keep_ms": self._retention.keep_ms,
                "accounts": request.accounts,
                "reservation_prefix": keys.reservation(""),
            }
            | drop_none(idempotency=self._idempotency_argument(request.tenant, request.idempotency)),
        )
        return _parse_verdict(answer), TenantSnapshot(msgspec.msgpack.decode(answer[1], type=TenantState), answer[2])

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
        """Move the reservation from account `left` to the next of `ask.accounts`."""
        keys = self._keys
        answer = await self._scripts.call(
            "change_account",
            [
                keys.clock,
                keys.tenant(request.tenant),
                keys.reservation(request.reservation),
                keys.account(previous),
                *map(keys.account, request.accounts),
            ],
            {"previous_account": previous, "keep_ms": self._retention.keep_ms, "accounts": request.accounts}
            | drop_none(account_status=account_status),
        )
        return _parse_verdict(answer)

    async def settle(self, settlement: Settlement) -> bool:
        """Book an outcome; False if a final one was booked before."""
        keys = self._keys
        ask: dict[str, Any] = {
            "reservation": settlement.reservation,
            "tenant": settlement.tenant,
            "account": settlement.account,
            "kind": settlement.kind,
            "created_at": settlement.created_at,
            "outcome": settlement.outcome,
            "balance": pack_balance(settlement.balance),
            "keep_ms": self._retention.keep_ms,
            "is_late": settlement.is_late,
            "usage_prefix": keys.usage(settlement.tenant, ""),
            "keep_usage_ms": KEEP_USAGE_MS,
            "reservation_prefix": keys.reservation(""),
            "idempotency_prefix": keys.idempotency(settlement.tenant, ""),
        } | drop_none(idempotency=self._idempotency_argument(settlement.tenant, settlement.idempotency))
        if settlement.new_task:
            ask["new_task"] = {
                "id": settlement.new_task.id,
                "options": str(settlement.new_task.options, "utf-8"),
                "metadata": str(settlement.new_task.metadata, "utf-8"),
                "check_interval_ms": self._retention.check_interval_ms,
            } | drop_none(webhook_url=settlement.new_task.webhook_url, trace_context=settlement.new_task.trace_context)
        status, _, *account = await self._scripts.call(
            "settle",
            [
                keys.clock,
                keys.tenant(settlement.tenant),
                keys.reservation(settlement.reservation),
                keys.leases,
                keys.account(settlement.account),
                keys.task(settlement.reservation),
                keys.tenant_tasks(settlement.tenant),
                keys.poll_due,
            ],
            ask | drop_none(account_status=settlement.account_status),
        )
        if status == b"wrong-account":  # the answer to a change of account was lost; the balance is the other account's
            moved = msgspec.structs.replace(settlement, account=account[0], balance=Balance(), account_status=None)
            return await self.settle(moved)
        return bool(status == b"settled")

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        """Settle as unknown the reservations whose process died before it could."""
        *time, rows, data_version = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZRANGE", self._keys.leases, 0, limit - 1, "WITHSCORES"),
            ("GET", self._keys.data_version),
        )
        self._scripts.compare_version(data_version)  # what follows also removes members, by no script
        now = parse_ledger_time(*time).ledger_ms
        ids = [reservation for reservation, lease in parse_withscores(rows) if lease <= now]
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
                created_at=reservation.created_at,
                outcome=ReservationState.UNKNOWN,
            )
            if await self.settle(settlement):
                settled.append(settlement)
        return settled

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot:
        """The counters of a tenant, and the server's time."""
        packed, time = await self._scripts.read(
            ("HGET", self._keys.tenant(tenant), "state"), self._keys.server_time_command
        )
        state = msgspec.msgpack.decode(packed, type=TenantState) if packed else TenantState()
        return TenantSnapshot(state, parse_server_time(time))

    async def tenant_states(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantState], int]:
        """The counters of all these tenants, and the server's time."""
        (time,) = await self._scripts.read(self._keys.server_time_command)
        found = await self._read_states([self._keys.tenant(each) for each in ids])
        states = {
            each: msgspec.msgpack.decode(packed, type=TenantState) if packed else TenantState()
            for each, packed in zip(ids, found, strict=True)
        }
        return states, parse_server_time(time)

    async def _read_states(self, keys: Sequence[str]) -> list[bytes | None]:
        """What stands under each key, a few at a time, so that other work comes in between."""
        found: list[bytes | None] = []
        for start in range(0, len(keys), _BATCH_SIZE):
            found += await self._scripts.read(*(("HGET", key, "state") for key in keys[start : start + _BATCH_SIZE]))
        return found

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        """What is known of each account, with all times in the server's time."""
        offset = await self.clock_offset()
        found = await self._read_states([self._keys.account(each) for each in ids])
        states = (msgspec.msgpack.decode(packed, type=AccountState) if packed else AccountState() for packed in found)
        return {
            each: state.to_server_time(offset) if offset else state for each, state in zip(ids, states, strict=True)
        }

    async def clock_offset(self) -> int:
        """By how many milliseconds the ledger's time is ahead of the server's."""
        return parse_ledger_time(*await self._scripts.read(*self._keys.clock_commands)).offset_ms

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
        """Make the ledger's time the server's again, and all that is kept in it earlier by as much; by how much."""
        keys = self._keys
        (offset,) = await self._scripts.call(
            "reset_clock",
            [
                keys.clock,
                keys.leases,
                keys.poll_due,
                keys.poll_claimed,
                keys.webhook_queues,
                *map(keys.account, accounts),
            ],
            {
                "accounts": accounts,
                "reservation_prefix": keys.reservation(""),
                "task_prefix": keys.task(""),
                "usage_prefixes": [keys.usage(tenant, "") for tenant in tenants],
                "keep_ms": self._retention.keep_ms,
                "due_prefix": keys.deliveries_due(""),
                "claimed_prefix": keys.deliveries_claimed(""),
                "failing_prefix": keys.webhook_failing(""),
            },
        )
        return int(offset)

    async def reopen_account(self, account: int) -> None:
        """Let the next submission find out whether the account can pay."""
        await self._scripts.call("reopen", [self._keys.clock, self._keys.account(account)], {"account": account})

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        """Claim the turn to look at an account's balance, if that is due."""
        status, now, *rest = await self._scripts.call(
            "claim_balance_check",
            [self._keys.clock, self._keys.account(account)],
            {"account": account, "count_only": count_only},
        )
        return BalanceCheck(account, str(rest[0], "ascii"), now) if status == b"due" else None

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        """Take in what a second check of a finished task told."""
        await self._scripts.call(
            "record_balance_check",
            [self._keys.clock, self._keys.account(check.account)],
            {
                "account": check.account,
                "reservation": check.reservation,
                "claimed_at": check.claimed_at,
                "balance": pack_balance(balance),
                "reservation_prefix": self._keys.reservation(""),
            },
        )

    async def get_reservation(self, reservation: str) -> Reservation | None:
        """A submission; None if it is not known (any more)."""
        packed, *time = await self._scripts.read(
            ("GET", self._keys.reservation(reservation)), *self._keys.clock_commands
        )
        return _decode_reservation(packed, parse_ledger_time(*time).offset_ms) if packed else None

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        """Give back what a submission was charged for, once."""
        keys = self._keys
        status, *rest = await self._scripts.call(
            "refund",
            [keys.clock, keys.tenant(tenant), keys.reservation(reservation)],
            {
                "reservation": reservation,
                "tenant": tenant,
                "reason": reason,
                "usage_prefix": keys.usage(tenant, ""),
                "keep_usage_ms": KEEP_USAGE_MS,
            },
        )
        if status == b"not-found":
            return None
        return RefundResult(str(status, "ascii")), _decode_reservation(*rest)

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        """What a tenant used on each of the days."""
        found = await self._scripts.read(*(("HGETALL", self._keys.usage(tenant, day)) for day in days))
        return [_parse_day_usage(fields) for fields in found]

    async def current_day(self) -> int:
        """The day of the server's clock, counted from the epoch."""
        (time,) = await self._scripts.read(self._keys.server_time_command)
        return parse_server_time(time) // DAY_MS

    def _idempotency_argument(self, tenant: int, idempotency: Idempotency | None) -> dict[str, Any] | None:
        if idempotency is None:
            return None
        return {
            "redis_key": self._keys.idempotency(tenant, idempotency.key_digest),
            "key_digest": idempotency.key_digest,
            "content_digest": idempotency.content_digest,
            "keep_ms": KEEP_IDEMPOTENCY_KEY_MS,
        }


def _parse_verdict(answer: list[Any]) -> Verdict:
    status, now = answer[0], answer[2]
    if status == b"granted":
        return Grant(answer[3], now, answer[4])
    if status == b"denied":
        return PolicyDenial(
            tuple(Violation(str(policy, "ascii"), limit, resets or None) for policy, limit, resets in answer[3:]), now
        )
    if status == b"no-account":
        return NoAccount(answer[3] or None, now)
    if status == b"replayed":
        return Replay(str(answer[3], "ascii"), ReservationState(str(answer[4], "ascii")), now)
    if status == b"in-flight":
        return InFlight(now)
    if status == b"key-reused":
        return KeyReuse(now)
    if status == b"unknown-tenant":
        raise LedgerUnavailable(
            "The gateway's store does not know this tenant. Try again.", retry_after=RETRY_AFTER_SECONDS
        )
    raise LedgerUnavailable("This submission was given up before it could be sent. Submit it again.", retry_after=1)


def pack_balance(balance: Balance) -> dict[str, int]:
    """Figures for a script, in which what is not known is not there."""
    return drop_none(count=balance.count, money_fen=balance.money_fen)


_UNKNOWN_FIELD, _REFUND_FIELD = "unknown", "refund"


class _StoredRefund(Struct):
    """A refund as the scripts write it into the usage of a day."""

    kind: Kind
    refunded_at: int
    reason: str
    count: int
    money_fen: int


def _decode_reservation(packed: bytes, offset: int) -> Reservation:
    """A reservation whose times are shown, where the ledger's time is ahead by `offset`."""
    return msgspec.msgpack.decode(packed, type=Reservation).to_server_time(offset)


def _parse_day_usage(fields: Mapping[bytes, bytes]) -> DayUsage:
    day = DayUsage()
    for name, value in fields.items():
        first, _, second = str(name, "ascii").partition(" ")
        if first == _UNKNOWN_FIELD:
            day.unknown[second] = Kind(str(value, "ascii"))
        elif first == _REFUND_FIELD:
            entry = msgspec.msgpack.decode(value, type=_StoredRefund)
            day.refunds[second] = entry.kind, Refund(entry.refunded_at, entry.reason, entry.count, entry.money_fen)
        else:
            day.tallies.setdefault(Kind(first), Tally())[Measure(second)] = int(value)
    return day
