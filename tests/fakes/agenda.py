"""The ports Agenda and Callbacks in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from service.domain.tasks import Backlog
from service.domain.tenants import Webhook
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import AT_ONCE, FAILING, KEEP, LEASE
from service.usecases.ports import Claimed, Delivery, Outcome, Reply
from tests.fakes.memory import Memory
from tests.model.ledger_model import receiver


@dataclass
class FakeAgenda:
    """The deliveries, in a queue for each receiver; the receivers take turns."""

    memory: Memory

    async def claim(self, most: int) -> Sequence[Claimed]:
        self.memory._answer()
        held, now = self.memory, self.memory.clock.moment().now
        claimed: list[Claimed] = []
        for _, each in sorted((at, name) for name, at in held.turns.items() if at <= now)[:most]:
            for name in self._of(each, held.leased):
                if held.leased[name] <= now:
                    del held.leased[name]
                    held.queued[name] = now
            room = min(self._at_once(each) - len(self._of(each, held.leased)), most - len(claimed))
            waiting = sorted((held.queued[name], name) for name in self._of(each, held.queued))
            for _, name in [pair for pair in waiting if pair[0] <= now][: max(room, 0)]:
                del held.queued[name]
                held.leased[name] = now + LEASE
                claimed.append(Claimed(held.deliveries[name], now + LEASE))
            self._take_turn(each)
        return claimed

    async def record(self, claimed: Claimed, outcome: Outcome) -> bool:
        self.memory._answer()
        held, at, name = self.memory, self.memory.clock.moment(), claimed.delivery.reservation
        delivery = held.deliveries[name]
        if delivery.state is not DeliveryState.PENDING:
            return False
        delivered = outcome.state is DeliveryState.DELIVERED
        if not delivered and held.leased.get(name) != claimed.leased:
            return False
        held.leased.pop(name, None)
        held.queued.pop(name, None)
        to = receiver(delivery.tenant, delivery.url)
        if delivered:
            held.failing.pop(to, None)
        elif outcome.attempted:
            held.failing[to] = at.now + FAILING
        pending = outcome.state is DeliveryState.PENDING
        held.deliveries[name] = replace(
            delivery,
            state=outcome.state,
            updated=at.wall,
            due=at.wall + outcome.wait if pending else None,
            attempts=delivery.attempts + outcome.attempted,
            status=outcome.status,
            error=outcome.error,
            answer=outcome.answer,
        )
        if pending:
            held.queued[name] = at.now + outcome.wait
        elif not delivered:
            held.given_up[name] = at.wall
            held.given_up = {each: when for each, when in held.given_up.items() if when > at.wall - KEEP}
        self._take_turn(to)
        return True

    async def backlog(self) -> tuple[Backlog, int]:
        self.memory._answer()
        now, turns = self.memory.clock.moment().now, self.memory.turns
        return Backlog(len(turns), max(now - min(turns.values(), default=now), 0)), len(self.memory.given_up)

    async def failed(self, most: int) -> Sequence[Delivery]:
        self.memory._answer()
        newest = sorted(((at, name) for name, at in self.memory.given_up.items()), reverse=True)
        return [self.memory.deliveries[name] for _, name in newest[:most]]

    async def redeliver(self, reservation: str) -> Delivery | None:
        self.memory._answer()
        delivery = self.memory.deliveries.get(reservation)
        if delivery and reservation not in self.memory.leased:
            self.memory.given_up.pop(reservation, None)
            self.enqueue(replace(delivery, attempts=0))
        return self.memory.deliveries.get(reservation)

    def enqueue(self, delivery: Delivery) -> None:
        """Have a delivery sent now."""
        held, at = self.memory, self.memory.clock.moment()
        name = delivery.reservation
        held.deliveries[name] = replace(delivery, state=DeliveryState.PENDING, updated=at.wall, due=at.wall)
        held.queued[name] = at.now
        self._take_turn(receiver(delivery.tenant, delivery.url))

    def _of(self, to: str, among: Mapping[str, int]) -> list[str]:
        """Which of the deliveries are to this receiver."""
        found = {name: self.memory.deliveries[name] for name in among}
        return [name for name, each in found.items() if receiver(each.tenant, each.url) == to]

    def _at_once(self, to: str) -> int:
        return 1 if self.memory.failing.get(to, 0) > self.memory.clock.moment().now else AT_ONCE

    def _take_turn(self, to: str) -> None:
        held = self.memory
        leases = sorted(held.leased[name] for name in self._of(to, held.leased))
        waiting = [] if len(leases) >= self._at_once(to) else [held.queued[name] for name in self._of(to, held.queued)]
        turns = leases[:1] + waiting
        if turns:
            held.turns[to] = min(turns)
        else:
            held.turns.pop(to, None)


@dataclass
class FakeCallbacks:
    """Receivers that answer what they are told to, 204 by default, and remember what they were sent."""

    sent: list[tuple[str, Mapping[str, str], bytes]] = field(default_factory=list)
    replies: list[Reply] = field(default_factory=list)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> Reply:
        del webhook
        self.sent.append((url, headers, body))
        return self.replies.pop(0) if self.replies else Reply(status=204)
