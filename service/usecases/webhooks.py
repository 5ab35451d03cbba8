"""Operators' work on webhooks: their secrets, the addresses that are gone, and what could not be delivered."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from msgspec import Struct
from msgspec.structs import replace

from service.domain import tenants, webhooks
from service.domain.errors import Conflict, NotFound
from service.domain.tasks import Sealer
from service.domain.tenants import Registry, Signing, Tenant
from service.usecases.change import Change
from service.usecases.ports import Agenda, Clock, Delivery, RegistryChange, RegistryView

_log = structlog.get_logger(__name__)


class NewSecret(Struct, frozen=True):
    """A secret that was just made, the only time its text is known. The one before signs until `until` (seconds)."""

    text: str
    until: float


class Owned(Struct, frozen=True):
    """A delivery, and what its tenant is or was called; None if nobody remembers."""

    delivery: Delivery
    tenant: str | None


class Webhooks:
    """Everything raises LedgerUnavailable while Redis is away."""

    def __init__(
        self, *, change: Change, registry: RegistryView, agenda: Agenda, secrets: Sealer, clock: Clock
    ) -> None:
        self._change = change
        self._registry = registry
        self._agenda = agenda
        self._secrets = secrets
        self._clock = clock

    async def rotate(self, name: str, grace: float) -> NewSecret:
        """Give a tenant a new secret, beside which the one it has signs for `grace` seconds more.

        Raises NotFound, or Conflict if it has none.
        """
        text, until = webhooks.new_secret(), self._clock.now() + grace
        sealed = self._secrets.seal(webhooks.parse_secret(text))

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenants.get(name)
            if tenant is None:
                raise NotFound(f"There is no tenant {name}.")
            if tenant.webhook.signing is None:
                raise Conflict(f"Tenant {name} has no webhook secret. It gets one with its webhook.")
            signing = Signing(sealed, tenant.webhook.signing.secret if grace else None, until)
            return _put(now, replace(tenant, webhook=replace(tenant.webhook, signing=signing))), None

        await self._change("webhook.rotated", change, tenant=name, grace=grace)
        return NewSecret(text, until)

    async def switch_off(self, tenant_id: int, url: str) -> None:
        """Send no more to an address of a tenant, until the tenant is put again. Raises Overloaded."""

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenant(tenant_id)
            if tenant is None:  # it was deleted meanwhile
                return RegistryChange(version=now.version, next_id=now.next_id), None
            return _put(now, replace(tenant, webhook=tenant.webhook.switched_off(url))), None

        await self._change(
            "webhook.switched-off",
            change,
            tenant=self._registry.current.tenant_name(tenant_id),
            address=tenants.without_query(url),
        )

    async def failed(self, most: int) -> Sequence[Owned]:
        """Up to `most` deliveries that were given up in the last 30 days, the newest first."""
        return [self._owned(each) for each in await self._agenda.failed(most)]

    async def redeliver(self, event: str) -> Owned:
        """Send an event again from the start, now. Raises NotFound if it is not known (any more)."""
        reservation = webhooks.reservation_of(event)
        delivery = await self._agenda.redeliver(reservation) if reservation else None
        if delivery is None:
            raise NotFound(f"There is no delivery {event}, or it was forgotten since.")
        owned = self._owned(delivery)
        _log.info("delivery.revived", delivery=event, tenant=owned.tenant)
        return owned

    def _owned(self, delivery: Delivery) -> Owned:
        return Owned(delivery, self._registry.current.tenant_name(delivery.tenant))


def _put(now: Registry, tenant: Tenant) -> RegistryChange:
    return RegistryChange(version=now.version, next_id=now.next_id, tenants=(tenant,))
