"""What submissions became and were charged for, on Redis: the port `Books`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from msgspec import Struct

from service.domain.ledger import DayUsage, Measure, Refund, Refunding, Reservation, Tally
from service.domain.tasks import Kind
from service.storage.keys import Keys
from service.storage.ledger import DAY, KEEP_USAGE
from service.storage.scripts import Scripts, moment, server_time

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
