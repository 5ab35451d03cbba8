"""Clients that wait, and clients that leave: nothing is done any longer that only they waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from litestar import Request

from service.api.uploads import ClientLeft

HELD = "held"
"""Where the state of an ASGI scope says that a request was held open on purpose, which tells nothing of our speed."""

T = TypeVar("T")


async def held_open(request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, which may take its time and is cancelled if the client leaves before. Raises ClientLeft then.

    The body of the request has to be read already.
    """
    request.scope["state"][HELD] = True
    doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientLeft
    finally:
        for task in (doing, leaving):
            task.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)
        del doing, task  # which hold their error, whose traceback holds this frame


async def _left(request: Request[Any, Any, Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
