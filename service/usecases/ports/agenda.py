"""What tenants are to be told, and when."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct

from service.domain.tasks import Backlog
from service.domain.webhooks import DeliveryState


class Delivery(Struct, frozen=True, kw_only=True):
    """The end of `task`, by its public id, to be told at `url`. Times are milliseconds of the server's clock.

    `due` is when it is tried next, `attempts` counts the tries since it was last sent from the start. Of the last one:
    the `status` of its answer and how that begins, and the `error` if it was no success.
    """

    reservation: str
    task: str
    tenant: int
    url: str
    state: DeliveryState
    created: int
    updated: int
    attempts: int = 0
    due: int | None = None
    status: int | None = None
    error: str | None = None
    answer: str | None = None


class Claimed(Struct, frozen=True):
    """A delivery that is this process's until `leased`, the ledger's time when its lease ends."""

    delivery: Delivery
    leased: int


class Outcome(Struct, frozen=True, kw_only=True):
    """What became of a delivery. If it is still pending, it is tried again after `wait` milliseconds.

    It was `attempted` if something was sent, or should have been.
    """

    state: DeliveryState
    attempted: bool = True
    wait: int = 0
    status: int | None = None
    error: str | None = None
    answer: str | None = None


class Agenda(Protocol):
    """The deliveries: each end of a task that has a webhook begins one, in the call that records the end."""

    async def claim(self, most: int) -> Sequence[Claimed]:
        """Up to `most` deliveries that are due, which nobody else gets until their lease runs out.

        Of each receiver (a tenant's deliveries to one host) a few at a time, and one alone if it has failed lately:
        the others never wait for it.
        """
        ...

    async def record(self, claimed: Claimed, outcome: Outcome) -> bool:
        """Write what became of an attempt; False if it had its outcome, or is somebody else's by now.

        What was delivered is delivered, though, whoever has it by now.
        """
        ...

    async def backlog(self) -> tuple[Backlog, int]:
        """How many receivers wait for something, how late the first is, and how many deliveries failed in 30 days."""
        ...

    async def failed(self, most: int) -> Sequence[Delivery]:
        """Up to `most` deliveries that were given up in the last 30 days, the newest first."""
        ...

    async def redeliver(self, reservation: str) -> Delivery | None:
        """Begin a delivery anew, unless it is under way just now; None if it is not known (any more)."""
        ...
