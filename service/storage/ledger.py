"""The ledger in Redis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from service.domain.errors import LedgerUnavailable, Violation
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
    SpentSums,
    Tally,
    TenantState,
    Verdict,
)
from service.domain.tasks import Kind
from service.storage.redis import (
    DAY_MS,
    RETRY_AFTER_SECONDS,
    Keys,
    RedisScripts,
    parse_ledger_time,
    parse_server_time,
    parse_withscores,
)
from service.usecases.ports import BalanceCheck, ReserveRequest, Settlement, TenantFigures, TenantSnapshot

T = TypeVar("T")
KEEP_IDEMPOTENCY_KEY_MS = DAY_MS
_BATCH_SIZE = 100
_MEASURES = {f"{kind} {measure}".encode(): (kind, measure) for kind in Kind for measure in Measure}
"""The fields of a day's usage with numbers."""


class _StoredRefund(Refund):
    """A refund in the usage of a day."""

    kind: Kind


class Retention(Struct, frozen=True, kw_only=True):
    """The durations of leases, checks and stored data.

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
        """Retention of reservations and running tasks: longer than any task runs.

        That of a reservation starts when it is made, and again when it is accepted, refused or ended: one without an
        outcome, or of unknown outcome, is never older.
        """
        return self.keep_finished_ms + 30 * DAY_MS


class RedisLedger:
    """The ledger, each call of which runs one script."""

    def __init__(self, scripts: RedisScripts, keys: Keys, retention: Retention) -> None:
        self._scripts = scripts
        self._keys = keys
        self._retention = retention

    async def reserve(self, request: ReserveRequest) -> tuple[Verdict, TenantSnapshot]:
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
            reservation=request.reservation,
            tenant=request.tenant,
            kind=request.kind,
            lease_ms=self._retention.lease_ms,
            keep_ms=self._retention.keep_ms,
            accounts=request.accounts,
            reservation_prefix=keys.reservation(""),
            idempotency=self._idempotency_argument(request.tenant, request.idempotency),
        )
        return _parse_verdict(answer), TenantSnapshot(msgspec.msgpack.decode(answer[1], type=TenantState), answer[2])

    async def change_account(
        self, request: ReserveRequest, previous: int, account_status: AccountStatus | None
    ) -> Verdict:
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
            previous_account=previous,
            account_status=account_status,
            accounts=request.accounts,
        )
        return _parse_verdict(answer)

    async def settle(self, settlement: Settlement) -> bool:
        keys, new_task = self._keys, settlement.new_task
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
            reservation=settlement.reservation,
            tenant=settlement.tenant,
            account=settlement.account,
            kind=settlement.kind,
            created_at=settlement.created_at,
            outcome=settlement.outcome,
            balance=settlement.balance,
            account_status=settlement.account_status,
            keep_ms=self._retention.keep_ms,
            is_late=settlement.is_late,
            usage_prefix=keys.usage(settlement.tenant, ""),
            reservation_prefix=keys.reservation(""),
            idempotency_prefix=keys.idempotency(settlement.tenant, ""),
            idempotency=self._idempotency_argument(settlement.tenant, settlement.idempotency),
            new_task=new_task
            and {
                "id": new_task.id,
                "options": str(new_task.options, "utf-8"),
                "metadata": str(new_task.metadata, "utf-8"),
                "check_interval_ms": self._retention.check_interval_ms,
                "webhook_url": new_task.webhook_url,
                "trace_context": new_task.trace_context,
            },
        )
        if status == b"wrong-account":  # the answer to a change of account was lost; the balance is the other account's
            moved = msgspec.structs.replace(settlement, account=account[0], balance=Balance(), account_status=None)
            return await self.settle(moved)
        return bool(status == b"settled")

    async def settle_expired(self, limit: int) -> Sequence[Settlement]:
        *time, rows, data_version = await self._scripts.read(
            *self._keys.clock_commands,
            ("ZRANGE", self._keys.leases, 0, limit - 1, "WITHSCORES"),
            ("GET", self._keys.data_version),
        )
        self._scripts.compare_version(data_version)  # no script does it before the removal below
        now = parse_ledger_time(*time).ledger_ms
        ids = [reservation for reservation, lease_expires_at in parse_withscores(rows) if lease_expires_at <= now]
        reservations = await self._scripts.read(*(("GET", self._keys.reservation(reservation)) for reservation in ids))
        settled: list[Settlement] = []
        for reservation_id, packed in zip(ids, reservations, strict=True):
            if packed is None:  # the reservation has expired before its lease, and can't be settled any more
                await self._scripts.read(("ZREM", self._keys.leases, reservation_id))
                continue
            reservation = msgspec.msgpack.decode(packed, type=Reservation)
            settlement = Settlement(
                reservation=reservation_id,
                tenant=reservation.tenant,
                account=reservation.account,
                kind=reservation.kind,
                created_at=reservation.created_at,
                outcome=ReservationState.UNKNOWN,
            )
            if await self.settle(settlement):
                settled.append(settlement)
        return settled

    async def find_replay(
        self, tenant: int, idempotency: Idempotency
    ) -> tuple[Replay | InFlight | None, TenantSnapshot]:
        keys = self._keys
        entry, packed, time = await self._scripts.read(
            ("GET", keys.idempotency(tenant, idempotency.key_digest)),
            ("HGET", keys.tenant(tenant), "state"),
            keys.server_time_command,
        )
        snapshot = _make_snapshot(packed, time)
        name, *digests = str(entry or b"", "ascii").split(" ")
        if digests[1:] != [idempotency.source_digest]:
            return None, snapshot
        reservation = await self.get_reservation(name)
        match reservation and reservation.state:
            case ReservationState.RESERVED:
                return InFlight(snapshot.now), snapshot
            case ReservationState.ACCEPTED | ReservationState.UNKNOWN as state:
                return Replay(name, state, snapshot.now), snapshot
        return None, snapshot

    async def tenant_snapshot(self, tenant: int) -> TenantSnapshot:
        return _make_snapshot(
            *await self._scripts.read(("HGET", self._keys.tenant(tenant), "state"), self._keys.server_time_command)
        )

    async def tenant_figures(self, ids: Sequence[int]) -> tuple[Mapping[int, TenantFigures], int]:
        (time,) = await self._scripts.read(self._keys.server_time_command)
        fields = ("state", *(f"spent {kind}" for kind in Kind))
        rows = await self._read_in_batches([("HMGET", self._keys.tenant(tenant), *fields) for tenant in ids])
        figures = (TenantFigures(_decode(state, TenantState), _decode_spent(spent)) for state, *spent in rows)
        return dict(zip(ids, figures, strict=True)), parse_server_time(time)

    async def _read_in_batches(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """Run plain commands in batches, so that other calls come in between."""
        answers: list[Any] = []
        for start in range(0, len(commands), _BATCH_SIZE):
            answers += await self._scripts.read(*commands[start : start + _BATCH_SIZE])
        return answers

    async def account_states(self, ids: Sequence[int]) -> Mapping[int, AccountState]:
        offset_ms = await self.clock_offset()
        rows = await self._read_in_batches([("HGET", self._keys.account(account), "state") for account in ids])
        states = [_decode(packed, AccountState) for packed in rows]
        if offset_ms:
            states = [state.to_server_time(offset_ms) for state in states]
        return dict(zip(ids, states, strict=True))

    async def clock_offset(self) -> int:
        return parse_ledger_time(*await self._scripts.read(*self._keys.clock_commands)).offset_ms

    async def reset_clock(self, tenants: Sequence[int], accounts: Sequence[int]) -> int:
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
            accounts=accounts,
            reservation_prefix=keys.reservation(""),
            task_prefix=keys.task(""),
            usage_prefixes=[keys.usage(tenant, "") for tenant in tenants],
            keep_ms=self._retention.keep_ms,
            due_prefix=keys.deliveries_due(""),
            claimed_prefix=keys.deliveries_claimed(""),
            failing_prefix=keys.webhook_failing(""),
        )
        return int(offset)

    async def reopen_account(self, account: int) -> None:
        await self._scripts.call("reopen", [self._keys.clock, self._keys.account(account)], account=account)

    async def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        status, now, *rest = await self._scripts.call(
            "claim_balance_check",
            [self._keys.clock, self._keys.account(account)],
            account=account,
            count_only=count_only,
        )
        return BalanceCheck(account, str(rest[0], "ascii"), now) if status == b"due" else None

    async def record_balance_check(self, check: BalanceCheck, balance: Balance) -> None:
        await self._scripts.call(
            "record_balance_check",
            [self._keys.clock, self._keys.account(check.account)],
            account=check.account,
            reservation=check.reservation,
            claimed_at=check.claimed_at,
            balance=balance,
            reservation_prefix=self._keys.reservation(""),
        )

    async def get_reservation(self, reservation: str) -> Reservation | None:
        packed, *time = await self._scripts.read(
            ("GET", self._keys.reservation(reservation)), *self._keys.clock_commands
        )
        return _decode_reservation(packed, parse_ledger_time(*time).offset_ms) if packed else None

    async def refund(self, tenant: int, reservation: str, reason: str) -> tuple[RefundResult, Reservation] | None:
        keys = self._keys
        status, *rest = await self._scripts.call(
            "refund",
            [keys.clock, keys.tenant(tenant), keys.reservation(reservation)],
            reservation=reservation,
            tenant=tenant,
            reason=reason,
            usage_prefix=keys.usage(tenant, ""),
        )
        if status == b"not-found":
            return None
        return RefundResult(str(status, "ascii")), _decode_reservation(*rest)

    async def get_usage(self, tenant: int, days: Sequence[int]) -> Sequence[DayUsage]:
        rows = await self._scripts.read(*(("HGETALL", self._keys.usage(tenant, day)) for day in days))
        return [_parse_day_usage(fields) for fields in rows]

    async def sum_usage(self, tenant: int, first: int, last: int) -> Mapping[int, DayUsage]:
        keys = self._keys
        sums, *named = await self._scripts.call(
            "sum_usage", [keys.tenant(tenant)], usage_prefix=keys.usage(tenant, ""), first=first, last=last
        )
        fields: dict[int, dict[bytes, Any]] = {first: dict(zip(sums[::2], sums[1::2], strict=True))}
        for day, field, value in named:
            fields.setdefault(day, {})[field] = value
        return {day: _parse_day_usage(values) for day, values in fields.items()}

    async def current_day(self) -> int:
        (time,) = await self._scripts.read(self._keys.server_time_command)
        return parse_server_time(time) // DAY_MS

    def _idempotency_argument(self, tenant: int, idempotency: Idempotency | None) -> dict[str, Any] | None:
        if idempotency is None:
            return None
        return {
            "redis_key": self._keys.idempotency(tenant, idempotency.key_digest),
            "key_digest": idempotency.key_digest,
            "content_digest": idempotency.content_digest,
            "digests": f"{idempotency.content_digest} {idempotency.source_digest}".rstrip(),
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
    raise LedgerUnavailable("This submission expired before it could be sent. Submit it again.", retry_after=1)


def _make_snapshot(packed: bytes | None, time: Any) -> TenantSnapshot:
    return TenantSnapshot(_decode(packed, TenantState), parse_server_time(time))


def _decode(packed: bytes | None, kind: type[T]) -> T:
    return msgspec.msgpack.decode(packed, type=kind) if packed else kind()


def _decode_spent(row: Sequence[bytes | None]) -> Mapping[Kind, SpentSums]:
    return {kind: _decode(packed, SpentSums) for kind, packed in zip(Kind, row, strict=True) if packed}


def _decode_reservation(packed: bytes, offset: int) -> Reservation:
    return msgspec.msgpack.decode(packed, type=Reservation).to_server_time(offset)


def _parse_day_usage(fields: Mapping[bytes, Any]) -> DayUsage:
    day = DayUsage()
    for name, value in fields.items():
        if measured := _MEASURES.get(name):
            kind, measure = measured
            day.tallies.setdefault(kind, Tally())[measure] = int(value)
            continue
        first, _, second = str(name, "ascii").partition(" ")
        if first == "unknown":
            day.unknown[second] = Kind(str(value, "ascii"))
        elif first == "refund":
            entry = msgspec.msgpack.decode(value, type=_StoredRefund)
            day.refunds[second] = entry.kind, Refund(entry.refunded_at, entry.reason, entry.count, entry.money_fen)
    return day
