"""Accounts, tenants and tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec import Struct

from service.domain.tenants import Account, Registry, Tenant, Token


class RegistryChange(Struct, frozen=True, kw_only=True):
    """What is written over and taken out of version `version` of the registry, in one go.

    The version that comes of it is the next one, and later than `later_than`. The names of dropped tenants are kept by
    their ids, beside those of `former`.
    """

    version: int
    next_id: int
    later_than: int = 0
    tenants: tuple[Tenant, ...] = ()
    accounts: tuple[Account, ...] = ()
    tokens: tuple[Token, ...] = ()
    drop_tenants: tuple[Tenant, ...] = ()
    drop_accounts: tuple[Account, ...] = ()
    drop_tokens: tuple[Token, ...] = ()
    former: Mapping[int, str] = {}


class RegistryStore(Protocol):
    """Where the registry is kept."""

    async def write(self, change: RegistryChange) -> bool:
        """Carry out a change; False, with nothing done, if `change.version` is no longer the newest."""
        ...


class RegistryView(Protocol):
    """The registry as this process holds it in memory: reading `current` never waits."""

    @property
    def current(self) -> Registry:
        """The version held now."""
        ...

    @property
    def ready(self) -> bool:
        """Whether it was loaded at all."""
        ...

    async def refresh(self) -> None:
        """Take over the newest version."""
        ...
