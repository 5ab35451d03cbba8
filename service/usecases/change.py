"""Changing the registry: from its newest version, written only if it still is, so that nobody undoes anybody else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import structlog

from service.domain.errors import LedgerUnavailable, Overloaded
from service.domain.tenants import Registry
from service.usecases.ports import RegistryChange, RegistryStore, RegistryView

_log = structlog.get_logger(__name__)

_TRIES = 10

R = TypeVar("R")


class Change:
    """Changes the registry. There is one of it in a process."""

    def __init__(self, store: RegistryStore, registry: RegistryView) -> None:
        self._store = store
        self._registry = registry
        self._changing = asyncio.Lock()

    async def __call__(self, what: str, make: Callable[[Registry], tuple[RegistryChange, R]], **about: Any) -> R:
        """Write what `make` makes of the newest version, again if another process was faster, and log it.

        Raises LedgerUnavailable or Overloaded, and what `make` raises.
        """
        async with self._changing:  # those of one process need not race each other
            for _ in range(_TRIES):
                await self._registry.refresh()
                change, result = make(self._registry.current)
                if await self._store.write(change):
                    _log.info(what, version=change.version + 1, **about)
                    with suppress(LedgerUnavailable):  # it was done all the same, and is followed in the background
                        await self._registry.refresh()
                    return result
        raise Overloaded("The registry is being changed by others. Try again.", retry_after=1)
