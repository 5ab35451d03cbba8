"""A real HTTP server for an application, in the event loop of the test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.server import App, BuildRefusal, HttpServer, Limits, base_url, build_text_refusal, listen


@asynccontextmanager
async def serve_app(
    app: App, *, limits: Limits = Limits(), refuse: BuildRefusal = build_text_refusal
) -> AsyncIterator[str]:
    """Serve an application on a free port of 127.0.0.1; yield its base URL."""
    server = HttpServer(app, limits=limits, build_refusal=refuse)
    listening = listen("127.0.0.1", 0)
    address = base_url(listening)
    server.start(listening)
    try:
        yield address
    finally:
        await server.stop()
