"""The version of the data that a gateway keeps in Redis: no process touches data of another version than its own."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from service.domain.errors import LedgerUnavailable

DATA_VERSION = 1
"""Rises with every change after which an older gateway could misread the data, or this one the older data."""


class DataVersionError(LedgerUnavailable):
    """The store holds data of another version. `reason` is one line for operators."""

    def __init__(self, reason: str) -> None:
        super().__init__("The gateway can't use its store. Nothing was sent; ask its operators.")
        self.reason = reason


def version_error(found: bytes | None, version: int = DATA_VERSION) -> DataVersionError | None:
    """The error for a version as it was found in a store; None where that is this one.

    Unmarked data is of version 1, as the first gateways wrote it; so is an empty store, until it is marked.
    """
    if found is None or found == str(version).encode():
        return None
    shown = found[:20].decode("ascii", "replace")
    return DataVersionError(
        f"the data in Redis under GATEWAY_KEY_PREFIX has version {shown}, and this gateway uses version {version}: "
        "run `gateway export` with the gateway that wrote it, and `gateway apply` with this one under another "
        'GATEWAY_KEY_PREFIX (see "Upgrade to another data version" in deploy/OPERATIONS.md)'
    )


class DataVersion:
    """Guards a store by the key that holds its data version. `refused` is called once if that is another one."""

    def __init__(
        self,
        key: str,
        refused: Callable[[DataVersionError], None] = lambda _: None,
        *,
        version: int = DATA_VERSION,
    ) -> None:
        self.key = key
        self.version = version
        self._refused = refused
        self._error: DataVersionError | None = None
        self.is_checked = False

    @property
    def is_refused(self) -> bool:
        """Whether the store is not to be used any more."""
        return self._error is not None

    async def check(self, client: Redis | RedisCluster) -> None:
        """Compare the version, and mark a store without one; needed until `is_checked`. Raises DataVersionError."""
        if self._error:
            raise self._error
        found = await client.execute_command("GET", self.key)
        if found is None:
            # Of several processes that start on an empty store the first one decides. Where nothing can be written, the
            # data can be read all the same, and the first script marks it.
            with suppress(RedisError):
                await client.set(self.key, self.version, nx=True)
            found = await client.execute_command("GET", self.key)
        self.compare(found)

    def compare(self, found: bytes | None) -> None:
        """Take in the version as it was just read. Raises DataVersionError, from now on with every `check`."""
        error = version_error(found, self.version)
        if error:
            self.is_checked = False
            if self._error is None:
                self._error = error
                self._refused(error)
            raise self._error
        self.is_checked = found is not None
