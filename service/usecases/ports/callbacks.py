"""The tenants' own servers, which are told of the ends of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from service.domain.tenants import Webhook


class Reply(Struct, frozen=True, kw_only=True):
    """What came of a call: the status of the answer and how that begins, or in `error` why there is none.

    `retry_after` is in how many seconds the receiver wants to be called again.
    """

    status: int | None = None
    retry_after: float | None = None
    error: str | None = None
    answer: str | None = None


class Callbacks(Protocol):
    """Calls addresses that tenants chose. Never raises for anything that the network or a receiver does."""

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> Reply:
        """Send once, within a time limit, to an address of the host that `webhook` lets be reached.

        The host is resolved and checked anew for every call. Redirects are not followed. Raises Overloaded if this
        machine could not make the call.
        """
        ...
