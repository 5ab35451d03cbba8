"""Sealing the secrets of the registry anew, so that a secret key can be taken away."""

from __future__ import annotations

from msgspec import Struct
from msgspec.structs import replace

from service.domain.errors import dotted
from service.domain.tasks import Sealer
from service.domain.tenants import Account, Registry, Signing, Tenant
from service.usecases.change import Change
from service.usecases.ports import Clock, RegistryChange, RegistryView


class Resealed(Struct, frozen=True):
    """The accounts and tenants whose secrets were sealed anew, by name; and where there is what no key opens."""

    accounts: tuple[str, ...]
    tenants: tuple[str, ...]
    lost: tuple[str, ...]


class Reseal:
    """Brings under the first secret key what was sealed with others."""

    def __init__(
        self, *, change: Change, registry: RegistryView, user_keys: Sealer, webhook_secrets: Sealer, clock: Clock
    ) -> None:
        self._change = change
        self._registry = registry
        self._user_keys = user_keys
        self._webhook_secrets = webhook_secrets
        self._clock = clock

    async def __call__(self) -> Resealed:
        """Seal anew what is not sealed with the first key, and leave what no key opens as it is.

        Where all is, nothing is written. Raises LedgerUnavailable or Overloaded.
        """
        await self._registry.refresh()
        change, found = self._make(self._registry.current)
        if not change.accounts and not change.tenants:
            return found
        return await self._change("registry.resealed", self._make)

    def _make(self, now: Registry) -> tuple[RegistryChange, Resealed]:
        lost: list[str] = []
        accounts, tenants = list[Account](), list[Tenant]()
        for name, account in sorted(now.accounts.items()):
            sealed = _anew(self._user_keys, account.user_key)
            if sealed is None:
                lost.append(dotted("accounts", name, "user_key"))
            elif sealed != account.user_key:
                accounts.append(replace(account, user_key=sealed))
        for name, tenant in sorted(now.tenants.items()):
            before = tenant.webhook.signing
            signing = before and self._signing(before)
            if before and signing is None:
                lost.append(dotted("tenants", name, "webhook", "secret"))
            elif signing != before:
                tenants.append(replace(tenant, webhook=replace(tenant.webhook, signing=signing)))
        change = RegistryChange(
            version=now.version, next_id=now.next_id, accounts=tuple(accounts), tenants=tuple(tenants)
        )
        names = (tuple(each.name for each in accounts), tuple(each.name for each in tenants))
        return change, Resealed(*names, tuple(lost))

    def _signing(self, before: Signing) -> Signing | None:
        """The secrets that are in force, sealed anew; one that is no longer goes. None if no key opens one of them."""
        secret, *former = [_anew(self._webhook_secrets, each) for each in before.in_force(self._clock.now())]
        if secret is None or None in former:
            return None
        return replace(before, secret=secret, former=former[0] if former else None)


def _anew(sealer: Sealer, sealed: bytes) -> bytes | None:
    """The same sealed with the first key; None if no key opens it."""
    plain = sealer.open(sealed)
    return None if plain is None else sealer.seal(plain)
