"""The ASGI application of the sandbox, its control interface and its server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from service.sandbox.faults import Behaviour, FaultInjector, RequestLog, RequestRecord
from service.sandbox.http import (
    CONNECTION_EXTENSION,
    JSON_TYPE,
    ClientDisconnectedError,
    Exchange,
    Receive,
    Scope,
    Send,
)
from service.sandbox.store import MAX_TASKS, AccountBalance, Store
from service.sandbox.vendor_api import FILES_PATH, VendorApi
from service.sandbox.worker import Worker
from service.server import HttpProtocol, HttpServer, base_url, listen

CONTROL_PATH: Final = "/_control/"


class SandboxControl:
    """Turns the dials, sets the accounts, reads the journal."""

    def __init__(
        self,
        panel: FaultInjector,
        store: Store,
        workshop: Worker,
        journal: RequestLog,
        accounts: Mapping[str, AccountBalance],
    ) -> None:
        """Take hold of the parts of a sandbox, and of what `reset` leads back to."""
        self._fault_injector = panel
        self._store = store
        self._worker = workshop
        self._request_log = journal
        self._initial_accounts = accounts
        self._initial_behaviour = panel.behaviour

    async def get_behaviour(self) -> Behaviour:
        """Give the dials in force, with the faults that are left."""
        return self._fault_injector.behaviour

    async def set_behaviour(self, dials: Behaviour) -> None:
        """Replace all dials, faults included, from the next request on."""
        self._fault_injector.behaviour = dials

    async def list_accounts(self) -> dict[str, AccountBalance]:
        """Give what every account holds."""
        return self._store.list_accounts()

    async def set_account(self, user_key: str, balance: AccountBalance) -> None:
        """Make an account, or replace what it holds."""
        self._store.set_account(user_key, balance)

    async def list_requests(self) -> list[RequestRecord]:
        """Give the requests received since the start or the last reset, oldest first."""
        return self._request_log.records()

    async def wait_for_requests(
        self, predicate: Callable[[Sequence[RequestRecord]], bool], *, timeout_seconds: float = 10.0
    ) -> list[RequestRecord]:
        """Wait until something holds of the requests received, and give them.

        Raises:
            TimeoutError: it does not hold in time.

        """
        async with asyncio.timeout(timeout_seconds):
            return await self._request_log.wait_until(predicate)

    async def wait_until_idle(self, *, timeout_seconds: float = 30.0) -> None:
        """Wait until every task has ended.

        Raises:
            TimeoutError: one has not ended in time.

        """
        async with asyncio.timeout(timeout_seconds):
            await self._worker.wait_until_idle()

    async def reset(self) -> None:
        """Lead back to the beginning: no tasks, no requests, accounts and dials as configured."""
        self._fault_injector.behaviour = self._initial_behaviour
        await self._worker.cancel_all()
        self._store.clear(self._initial_accounts)
        self._request_log.clear()


class ControlRoutes:
    """The same over HTTP. A body that can't be read is answered 400, with a sentence that says why."""

    def __init__(self, control: SandboxControl) -> None:
        self._control = control
        self._routes: dict[tuple[str, str], Callable[[Exchange], Awaitable[Any]]] = {
            ("GET", "dials"): self._get_behaviour,
            ("PUT", "dials"): self._set_behaviour,
            ("GET", "accounts"): self._list_accounts,
            ("GET", "requests"): self._list_requests,
            ("POST", "reset"): self._reset,
        }

    async def handle(self, exchange: Exchange) -> None:
        """Answer a request to the control side."""
        resource = exchange.path.removeprefix(CONTROL_PATH)
        route = self._routes.get((exchange.method, resource))
        if exchange.method == "PUT" and resource.startswith("accounts/"):
            route = self._set_account
        if route is None:
            await exchange.respond(404, JSON_TYPE, b'{"error":"no such control"}')
            return
        try:
            status, content = 200, await route(exchange)
        except ClientDisconnectedError:
            return
        except msgspec.DecodeError as error:
            status, content = 400, {"error": str(error)}
        await exchange.respond(status, JSON_TYPE, msgspec.json.encode(content))

    async def _get_behaviour(self, _: Exchange) -> Behaviour:
        return await self._control.get_behaviour()

    async def _set_behaviour(self, exchange: Exchange) -> Behaviour:
        await self._control.set_behaviour(msgspec.json.decode(await _read_body(exchange), type=Behaviour))
        return await self._control.get_behaviour()

    async def _list_accounts(self, _: Exchange) -> dict[str, AccountBalance]:
        return await self._control.list_accounts()

    async def _set_account(self, exchange: Exchange) -> AccountBalance:
        balance = msgspec.json.decode(await _read_body(exchange), type=AccountBalance)
        await self._control.set_account(exchange.path.removeprefix(f"{CONTROL_PATH}accounts/"), balance)
        return balance

    async def _list_requests(self, _: Exchange) -> list[RequestRecord]:
        return await self._control.list_requests()

    async def _reset(self, _: Exchange) -> dict[str, AccountBalance]:
        await self._control.reset()
        return await self._control.list_accounts()


async def _read_body(exchange: Exchange) -> bytes:
    return b"".join([chunk async for chunk in exchange.body()])


__all__ = ["AccountBalance", "Sandbox", "SandboxConfig", "create_sandbox"]
_TEXT_TYPE: Final = "text/plain; charset=utf-8"
_POST_ONLY: Final = frozenset({"POST"})


class _Route(NamedTuple):
    """What answers under a path, or a path that ends in a slash, and to which methods."""

    methods: frozenset[str]
    handler: Callable[[Exchange], Awaitable[None]]


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a sandbox begins with.

    Attributes:
        folder: where tasks, balances and results outlive a restart; None for a temporary one, removed at the close.
        accounts: made at the start, by user key; those the folder already knows keep their balance.
        dials: in force until they are replaced, and after a reset.
        seconds: that a task takes at least, where the dials don't say.
        most_tasks: ended tasks that are kept with their results; older ones are forgotten.

    """

    folder: Path | None = None
    accounts: Mapping[str, AccountBalance] = {}
    behaviour: Behaviour = Behaviour()
    seconds: float = 2.0
    max_tasks: int = MAX_TASKS


class Sandbox:
    """The vendor's API under `/api/`, the results under `/files/`, the control side under `/_control/`."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._shutdown_event = asyncio.Event()
        self._routes: dict[str, _Route] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[SandboxControl]:
        """Open the folder and take up its unfinished tasks; at the end leave them and close everything.

        Raises:
            OSError: the folder can't be used.
            sqlite3.Error: likewise.

        """
        config = self._config
        with contextlib.ExitStack() as stack:
            folder = config.folder
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
            store = Store(folder, config.accounts, max_tasks=config.max_tasks)
            stack.callback(store.close)
            journal, panel = RequestLog(), FaultInjector(config.behaviour)
            workshop = Worker(store, panel)
            upstream = VendorApi(store, workshop, journal, self._shutdown_event, panel, config.seconds)
            control = SandboxControl(panel, store, workshop, journal, config.accounts)
            self._routes = {
                "/api/submit_task": _Route(_POST_ONLY, partial(upstream.submit, "upscale")),
                "/api/submit_vector_task": _Route(_POST_ONLY, partial(upstream.submit, "vector")),
                "/api/submit_face_enhance_task": _Route(_POST_ONLY, partial(upstream.submit, "face")),
                "/api/submit_seamless_task": _Route(_POST_ONLY, partial(upstream.submit, "seamless")),
                "/api/check_task_status": _Route(_POST_ONLY, upstream.check),
                FILES_PATH: _Route(frozenset({"GET", "HEAD"}), upstream.serve_file),
                CONTROL_PATH: _Route(frozenset({"GET", "PUT", "POST"}), ControlRoutes(control).handle),
            }
            workshop.resume()
            try:
                yield control
            finally:
                await workshop.close()

    def begin_shutdown(self) -> None:
        """Let no request wait any longer: the connections are gone, and the sandbox is about to be closed."""
        self._shutdown_event.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of a server."""
        if scope["type"] == "lifespan":
            await self._run_lifespan(receive, send)
            return
        exchange = Exchange(scope, receive, send)
        folder = exchange.path[: exchange.path.find("/", 1) + 1]
        route = self._routes.get(exchange.path) or self._routes.get(folder)
        if route is None:
            await exchange.respond(404, _TEXT_TYPE, b"not found\n")
        elif exchange.method not in route.methods:
            await exchange.respond(405, _TEXT_TYPE, b"method not allowed\n")
        else:
            await route.handler(exchange)

    async def _run_lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        async with self.open():
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


def create_sandbox(config: SandboxConfig) -> Sandbox:
    """Make a sandbox; it opens with the lifespan of its server, or by `Sandbox.open`.

    Connections are cut (resets, torn answers) only where the server is that of `service.sandbox.server`.
    """
    return Sandbox(config)


_NO_LINGER: Final = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class RunningSandbox:
    """A sandbox that listens.

    Attributes:
        url: its base address.
        control: its control side.

    """

    url: str
    control: SandboxControl


class _SandboxProtocol(HttpProtocol):
    """A connection that the application can reach."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {CONNECTION_EXTENSION: self}
        self.scope["extensions"] = extensions

    def reset(self) -> None:
        """Drop the connection; a socket that may not linger is closed by a TCP reset."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def close_gracefully(self) -> None:
        """Close the connection after what was written so far."""
        self.transport.close()


@contextlib.asynccontextmanager
async def open_sandbox(config: SandboxConfig, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[RunningSandbox]:
    """Run a sandbox in this event loop; at the end cut its connections and close it.

    Raises:
        OSError: the address or the folder can't be used.

    """
    sandbox = create_sandbox(config)
    async with sandbox.open() as control:
        server = HttpServer(sandbox, protocol=_SandboxProtocol)
        listening = listen(host, port)
        url = base_url(listening)
        server.start(listening)
        try:
            yield RunningSandbox(url, control)
        finally:
            sandbox.begin_shutdown()
            await server.stop()


async def serve(config: SandboxConfig, host: str, port: int, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a sandbox until the process is told to end (SIGINT, SIGTERM) or this is cancelled.

    Args:
        config: of the sandbox.
        host: to listen on.
        port: to listen on; 0 for any that is free.
        on_ready: called with the base address as soon as it listens.

    Raises:
        OSError: the address or the folder can't be used.

    """
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ended.set)
    try:
        async with open_sandbox(config, host, port) as sandbox:
            if on_ready is not None:
                on_ready(sandbox.url)
            await ended.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
