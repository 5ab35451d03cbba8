"""The sandbox as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from service.sandbox.accounts import Balance
from service.sandbox.asgi import Exchange, Receive, Scope, Send
from service.sandbox.control import CONTROL, Control, ControlRoutes
from service.sandbox.dials import Dials, Panel
from service.sandbox.journal import Journal
from service.sandbox.store import MOST_TASKS, Store
from service.sandbox.upstream import FILES, Upstream
from service.sandbox.workshop import Workshop

__all__ = ["Balance", "Sandbox", "SandboxConfig", "create_sandbox"]

_TEXT: Final = "text/plain; charset=utf-8"
_POST: Final = frozenset({"POST"})


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
    accounts: Mapping[str, Balance] = {}
    dials: Dials = Dials()
    seconds: float = 2.0
    most_tasks: int = MOST_TASKS


class Sandbox:
    """The vendor's API under `/api/`, the results under `/files/`, the control side under `/_control/`."""

    def __init__(self, config: SandboxConfig) -> None:
        self._config = config
        self._closing = asyncio.Event()
        self._routes: dict[str, _Route] = {}

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[Control]:
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
            store = Store(folder, config.accounts, most_tasks=config.most_tasks)
            stack.callback(store.close)
            journal, panel = Journal(), Panel(config.dials)
            workshop = Workshop(store, panel)
            upstream = Upstream(store, workshop, journal, self._closing, panel, config.seconds)
            control = Control(panel, store, workshop, journal, config.accounts)
            self._routes = {
                "/api/submit_task": _Route(_POST, partial(upstream.submit, "upscale")),
                "/api/submit_vector_task": _Route(_POST, partial(upstream.submit, "vector")),
                "/api/submit_face_enhance_task": _Route(_POST, partial(upstream.submit, "face")),
                "/api/submit_seamless_task": _Route(_POST, partial(upstream.submit, "seamless")),
                "/api/check_task_status": _Route(_POST, upstream.check),
                FILES: _Route(frozenset({"GET", "HEAD"}), upstream.file),
                CONTROL: _Route(frozenset({"GET", "PUT", "POST"}), ControlRoutes(control).handle),
            }
            workshop.resume()
            try:
                yield control
            finally:
                await workshop.close()

    def hurry(self) -> None:
        """Let no request wait any longer: the connections are gone, and the sandbox is about to be closed."""
        self._closing.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the life of a server."""
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        exchange = Exchange(scope, receive, send)
        folder = exchange.path[: exchange.path.find("/", 1) + 1]
        route = self._routes.get(exchange.path) or self._routes.get(folder)
        if route is None:
            await exchange.respond(404, _TEXT, b"not found\n")
        elif exchange.method not in route.methods:
            await exchange.respond(405, _TEXT, b"method not allowed\n")
        else:
            await route.handler(exchange)

    async def _live(self, receive: Receive, send: Send) -> None:
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
