"""The ASGI application of the sandbox, its control interface and its server."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from service.sandbox.faults import Behaviour, FaultInjector, RequestLog, RequestRecord
from service.sandbox.http import (
    JSON_TYPE,
    TRANSPORT_EXTENSION,
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
_TEXT_TYPE: Final = "text/plain; charset=utf-8"
_POST_ONLY: Final = frozenset({"POST"})


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
        self._initial_behaviour = fault_injector.behaviour

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

    async def wait_for_requests(
        self, predicate: Callable[[Sequence[RequestRecord]], bool], *, timeout_seconds: float = 10.0
    ) -> list[RequestRecord]:
        """Wait until the predicate is true of the requests, and return them. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            return await self._request_log.wait_until(predicate)

    async def wait_until_idle(self, *, timeout_seconds: float = 30.0) -> None:
        """Wait until every task has finished. Raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            await self._worker.wait_until_idle()

    async def reset(self) -> None:
        """Delete all tasks and requests, and restore the configured accounts and behaviour."""
        self._fault_injector.behaviour = self._initial_behaviour
        await self._worker.cancel_all()
        self._store.clear(self._initial_accounts)
        self._request_log.clear()

    async def handle(self, exchange: Exchange) -> None:
        """Serve the control interface. An invalid body gets 400 with the reason."""
        try:
            status, content = await self._dispatch(exchange)
        except ClientDisconnectedError:
            return
        except msgspec.DecodeError as error:
            status, content = 400, {"error": str(error)}
        await exchange.respond(status, JSON_TYPE, msgspec.json.encode(content))

    async def _dispatch(self, exchange: Exchange) -> tuple[int, Any]:
        content: Any
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
                return 404, {"error": "no such control"}
        return 200, content


class _Route(NamedTuple):
    methods: frozenset[str]
    handler: Callable[[Exchange], Awaitable[None]]


class SandboxConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Configuration of a sandbox.

    Existing accounts of the folder keep their balance; without a folder, a temporary one is used. `seconds` is the
    minimum duration of a task, where `behaviour` has none. `max_tasks` limits the finished tasks.
    """

    folder: Path | None = None
    accounts: Mapping[str, AccountBalance] = {}
    behaviour: Behaviour = Behaviour()
    seconds: float = 2.0
    max_tasks: int = MAX_TASKS


class Sandbox:
    """ASGI application: the vendor's API at `/api/`, results at `/files/`, control interface at `/_control/`."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._shutdown_event = asyncio.Event()
        self._routes: dict[str, _Route] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[SandboxControl]:
        """Open the folder and resume its tasks; at the end interrupt them. Raises OSError and sqlite3.Error."""
        config = self._config
        with contextlib.ExitStack() as stack:
            folder = config.folder
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-")))
            store = Store(folder, config.accounts, max_tasks=config.max_tasks)
            stack.callback(store.close)
            request_log, fault_injector = RequestLog(), FaultInjector(config.behaviour)
            worker = Worker(store, fault_injector)
            vendor_api = VendorApi(store, worker, request_log, self._shutdown_event, fault_injector, config.seconds)
            control = SandboxControl(fault_injector, store, worker, request_log, config.accounts)
            self._routes = {
                "/api/submit_task": _Route(_POST_ONLY, partial(vendor_api.submit, "upscale")),
                "/api/submit_vector_task": _Route(_POST_ONLY, partial(vendor_api.submit, "vector")),
                "/api/submit_face_enhance_task": _Route(_POST_ONLY, partial(vendor_api.submit, "face")),
                "/api/submit_seamless_task": _Route(_POST_ONLY, partial(vendor_api.submit, "seamless")),
                "/api/check_task_status": _Route(_POST_ONLY, vendor_api.check),
                FILES_PATH: _Route(frozenset({"GET", "HEAD"}), vendor_api.serve_file),
                CONTROL_PATH: _Route(frozenset({"GET", "PUT", "POST"}), control.handle),
            }
            worker.resume()
            try:
                yield control
            finally:
                await worker.close()

    def begin_shutdown(self) -> None:
        """End every delay, since the connections are closed already."""
        self._shutdown_event.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, or the lifespan of a server."""
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
    """Run a sandbox in this event loop; at the end close its connections. Raises OSError and sqlite3.Error."""
    sandbox = Sandbox(config)
    async with sandbox.open() as control:
        server = HttpServer(sandbox, protocol=_SandboxProtocol)
        sock = listen(host, port)
        url = base_url(sock)
        server.start(sock)
        try:
            yield RunningSandbox(url, control)
        finally:
            sandbox.begin_shutdown()
            await server.stop()


async def serve(config: SandboxConfig, host: str, port: int, *, on_ready: Callable[[str], None] | None = None) -> None:
    """Run a sandbox until SIGINT, SIGTERM or cancellation. `on_ready` is called with the base address."""
    stop_requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop_requested.set)
    try:
        async with open_sandbox(config, host, port) as sandbox:
            if on_ready is not None:
                on_ready(sandbox.url)
            await stop_requested.wait()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
