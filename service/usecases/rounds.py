"""Doing something over and over, whatever happens to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog

from service.domain.errors import LedgerUnavailable

_log = structlog.get_logger(__name__)

TICK_SECONDS = 0.25
"""How long a round waits that found nothing more to do. What is due is late by at most this."""
AWAY_SECONDS = 1.0


async def rounds(what: str, begin: Callable[[], Awaitable[bool]]) -> NoReturn:
    """Begin one round after the other until cancelled; `begin` says whether there may be more to do at once.

    Neither the store being away, which is logged elsewhere, nor a fault of ours ends it.
    """
    while True:
        try:
            more = await begin()
        except LedgerUnavailable:
            await asyncio.sleep(AWAY_SECONDS)
        except Exception:  # noqa: BLE001 - one fault must not end all that is to come
            _log.exception("round.crashed", job=what)
            await asyncio.sleep(AWAY_SECONDS)
        else:
            if not more:
                await asyncio.sleep(TICK_SECONDS)
