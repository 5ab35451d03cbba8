"""The other side of the sandbox: what a test or a developer asks of it, in the process or over `/_control/...`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec

from service.sandbox.accounts import Balance
from service.sandbox.asgi import JSON, ClientLeftError, Exchange
from service.sandbox.dials import Dials, Panel
from service.sandbox.journal import Journal, Received
from service.sandbox.store import Store
from service.sandbox.workshop import Workshop

CONTROL: Final = "/_control/"


class Control:
    """Turns the dials, sets the accounts, reads the journal."""

    def __init__(
        self,
        panel: Panel,
        store: Store,
        workshop: Workshop,
        journal: Journal,
        accounts: Mapping[str, Balance],
    ) -> None:
        """Take hold of the parts of a sandbox, and of what `reset` leads back to."""
        self._panel = panel
        self._store = store
        self._workshop = workshop
        self._journal = journal
        self._first_accounts = accounts
        self._first_dials = panel.dials

    async def dials(self) -> Dials:
        """Give the dials in force, with the faults that are left."""
        return self._panel.dials

    async def set_dials(self, dials: Dials) -> None:
        """Replace all dials, faults included, from the next request on."""
        self._panel.dials = dials

    async def accounts(self) -> dict[str, Balance]:
        """Give what every account holds."""
        return self._store.accounts()

    async def set_account(self, user_key: str, balance: Balance) -> None:
        """Make an account, or replace what it holds."""
        self._store.set_account(user_key, balance)

    async def requests(self) -> list[Received]:
        """Give the requests received since the start or the last reset, oldest first."""
        return self._journal.entries()

    async def until(self, holds: Callable[[Sequence[Received]], bool], *, seconds: float = 10.0) -> list[Received]:
        """Wait until something holds of the requests received, and give them.

        Raises:
            TimeoutError: it does not hold in time.

        """
        async with asyncio.timeout(seconds):
            return await self._journal.until(holds)

    async def idle(self, *, seconds: float = 30.0) -> None:
        """Wait until every task has ended.

        Raises:
            TimeoutError: one has not ended in time.

        """
        async with asyncio.timeout(seconds):
            await self._workshop.idle()

    async def reset(self) -> None:
        """Lead back to the beginning: no tasks, no requests, accounts and dials as configured."""
        self._panel.dials = self._first_dials
        await self._workshop.drop()
        self._store.clear(self._first_accounts)
        self._journal.clear()


class ControlRoutes:
    """The same over HTTP. A body that can't be read is answered 400, with a sentence that says why."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[Any]]] = {
            ("GET", "dials"): self._dials,
            ("PUT", "dials"): self._set_dials,
            ("GET", "accounts"): self._accounts,
            ("GET", "requests"): self._requests,
            ("POST", "reset"): self._reset,
        }

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request to the control side."""
        resource = exchange.path.removeprefix(CONTROL)
        route = self._routes.get((exchange.method, resource))
        if exchange.method == "PUT" and resource.startswith("accounts/"):
            route = self._set_account
        if route is None:
            await exchange.respond(404, JSON, b'{"error":"no such control"}')
            return
        try:
            status, content = 200, await route(exchange)
        except ClientLeftError:
            return
        except msgspec.DecodeError as error:
            status, content = 400, {"error": str(error)}
        await exchange.respond(status, JSON, msgspec.json.encode(content))

    async def _dials(self, _: Exchange) -> Dials:
        return await self._control.dials()

    async def _set_dials(self, exchange: Exchange) -> Dials:
        await self._control.set_dials(msgspec.json.decode(await _body(exchange), type=Dials))
        return await self._control.dials()

    async def _accounts(self, _: Exchange) -> dict[str, Balance]:
        return await self._control.accounts()

    async def _set_account(self, exchange: Exchange) -> Balance:
        balance = msgspec.json.decode(await _body(exchange), type=Balance)
        await self._control.set_account(exchange.path.removeprefix(f"{CONTROL}accounts/"), balance)
        return balance

    async def _requests(self, _: Exchange) -> list[Received]:
        return await self._control.requests()

    async def _reset(self, _: Exchange) -> dict[str, Balance]:
        await self._control.reset()
        return await self._control.accounts()


async def _body(exchange: Exchange) -> bytes:
    return b"".join([chunk async for chunk in exchange.body()])
