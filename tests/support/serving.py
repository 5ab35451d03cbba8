"""A real HTTP server for an application, in the event loop of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.edge import App


@asynccontextmanager
async def serving(app: App) -> AsyncIterator[str]:
    """Serve an application on a free port of 127.0.0.1, with the protocol that `gateway serve` uses; its address.

    Uvicorn's own server would install signal handlers and sleep a tenth of a second at its end.
    """
    config = Config(cast("Any", app), lifespan="off", ws="none", log_config=None, access_log=False)
    config.load()
    state = ServerState()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: HttpToolsProtocol(config, state, {}), "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        while state.connections or state.tasks:
            for connection in list(state.connections):
                connection.transport.abort()
            await asyncio.wait({*state.tasks, asyncio.ensure_future(asyncio.sleep(0))})
        await server.wait_closed()
