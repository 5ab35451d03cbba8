"""The server of the sandbox and its control interface."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeAlias

import msgspec

from service.http_protocol import HttpProtocol
from service.sandbox.faults import Behaviour, FaultInjector, RequestLog, RequestRecord
from service.sandbox.http import (
    JSON_TYPE,
    TEXT_TYPE,
    TRANSPORT_EXTENSION,
    ClientDisconnectedError,
    Exchange,
    Receive,
    Scope,
    Send,
)
from service.sandbox.store import AccountBalance, Store
from service.sandbox.vendor_api import CALL_PATHS, FILES_PATH, VendorApi
from service.sandbox.worker import Worker
from service.server import HttpServer, base_url, listen

CONTROL_PATH: Final = "/_control/"
_Routes: TypeAlias = Mapping[str, tuple[set[str], Callable[[Exchange], Awaitable[None]]]]
"""Methods and handler by path, or by the first segment of the path."""


class SandboxControl:
    """Controls a sandbox: its behaviour, its accounts and the log of its requests."""

    def __init__(
        self,
        fault_injector: FaultInjector,
        store: Store,
        worker: Worker,
        request_log: RequestLog,
        accounts: Mapping[str, AccountBalance],
    ) -> None:
        self._fault_injector = fault_injector
        self._store = store
        self._worker = worker
        self._request_log = request_log
        self._initial_accounts = accounts

    async def get_behaviour(self) -> Behaviour:
        """Return the current behaviour, with the remaining faults."""
        return self._fault_injector.behaviour

    async def set_behaviour(self, behaviour: Behaviour) -> None:
        self._fault_injector.behaviour = behaviour

    async def list_accounts(self) -> dict[str, AccountBalance]:
        return self._store.list_accounts()

    async def set_account(self, user_key: str, balance: AccountBalance) -> None:
        self._store.set_account(user_key, balance)

    async def list_requests(self) -> list[RequestRecord]:
        """Return the requests since the start or the last reset, oldest first."""
        return self._request_log.records()

    async def wait_for_requests(self, predicate: Callable[[Sequence[RequestRecord]], bool]) -> list[RequestRecord]:
        """Wait until the predicate is true of the requests, and return them. Raises TimeoutError after 10 s."""
        async with asyncio.timeout(10):
            return await self._request_log.wait_until(predicate)

    async def wait_until_idle(self) -> None:
        """Wait until every task has finished. Raises TimeoutError after 30 s."""
        async with asyncio.timeout(30):
            await self._worker.wait_until_idle()

    async def reset(self) -> None:
        """Delete all tasks and requests, and restore the configured accounts and the default behaviour."""
        self._fault_injector.behaviour = Behaviour()
        await self._worker.cancel_all()
        self._store.clear(self._initial_accounts)
        self._request_log.clear()

    async def handle(self, exchange: Exchange) -> None:
        """Serve the control interface. An invalid body gets 400 with the reason."""
        status = 200
        content: Any
        try:
            match exchange.method, *exchange.path.removeprefix(CONTROL_PATH).split("/", 1):
                case "GET", "behaviour":
                    content = await self.get_behaviour()
                case "PUT", "behaviour":
                    content = msgspec.json.decode(await exchange.read_body(), type=Behaviour)
                    await self.set_behaviour(content)
                case "GET", "accounts":
                    content = await self.list_accounts()
                case "PUT", "accounts", user_key:
                    content = msgspec.json.decode(await exchange.read_body(), type=AccountBalance)
                    await self.set_account(user_key, content)
                case "GET", "requests":
                    content = await self.list_requests()
                case "POST", "reset":
                    await self.reset()
                    content = await self.list_accounts()
                case _:
                    status, content = 404, {"error": "no such control"}
        except ClientDisconnectedError:
            return
        except msgspec.DecodeError as error:
            status, content = 400, {"error": str(error)}
        await exchange.respond(status, JSON_TYPE, msgspec.json.encode(content))


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a sandbox.

    Existing accounts of the folder keep their balance; without a folder, a temporary one is used. `seconds` is the
    minimum duration of a task, where the behaviour has none.
    """

    folder: Path | None = None
    accounts: Mapping[str, AccountBalance] = {}
    seconds: float = 2.0


@dataclass(frozen=True)
class RunningSandbox:
    url: str
    control: SandboxControl


class _SandboxProtocol(HttpProtocol):
    """A connection that the application can close."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = {TRANSPORT_EXTENSION: self.transport}
        self.scope["extensions"] = extensions


@contextlib.asynccontextmanager
async def open_sandbox(config: SandboxConfig, host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[RunningSandbox]:
    """Run a sandbox in this event loop. Raises OSError and sqlite3.Error.

    It resumes the tasks of its folder, and at the end interrupts them and closes its connections.
    """
    async with contextlib.AsyncExitStack() as stack:
        folder = config.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
        store = Store(folder, config.accounts)
        stack.callback(store.close)
        request_log, fault_injector, shutdown_event = RequestLog(), FaultInjector(), asyncio.Event()
        worker = Worker(store, fault_injector)
        stack.push_async_callback(worker.close)
        worker.resume()
        vendor_api = VendorApi(store, worker, request_log, shutdown_event, fault_injector, config.seconds)
        control = SandboxControl(fault_injector, store, worker, request_log, config.accounts)
        routes: _Routes = {
            **dict.fromkeys(CALL_PATHS, ({"POST"}, vendor_api.handle_call)),
            FILES_PATH: ({"GET", "HEAD"}, vendor_api.serve_file),
            CONTROL_PATH: ({"GET", "PUT", "POST"}, control.handle),
        }
        server = HttpServer(partial(_handle_request, routes), protocol=_SandboxProtocol)
        sock = listen(host, port)
        url = base_url(sock)
        server.start(sock)
        stack.push_async_callback(server.stop)
        stack.callback(shutdown_event.set)
        yield RunningSandbox(url, control)


async def _handle_request(routes: _Routes, scope: Scope, receive: Receive, send: Send) -> None:
    exchange = Exchange(scope, receive, send)
    folder = exchange.path[: exchange.path.find("/", 1) + 1]
    route = routes.get(exchange.path) or routes.get(folder)
    if route is None:
        await exchange.respond(404, TEXT_TYPE, b"not found\n")
        return
    methods, handle = route
    if exchange.method in methods:
        await handle(exchange)
    else:
        await exchange.respond(405, TEXT_TYPE, b"method not allowed\n")


async def serve(config: SandboxConfig, host: str, port: int, on_ready: Callable[[str], None]) -> None:
    """Run a sandbox until SIGINT, SIGTERM or cancellation. `on_ready` is called with the base address."""
    stop_requested = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop_requested.set)
    async with open_sandbox(config, host, port) as sandbox:
        on_ready(sandbox.url)
        await stop_requested.wait()
