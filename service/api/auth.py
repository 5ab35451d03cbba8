"""Who is asking: a tenant by its bearer token, or an operator by the admin token."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from litestar.connection import ASGIConnection

from service.domain import tenants
from service.domain.errors import Unauthenticated
from service.domain.tenants import Tenant
from service.usecases.ports import Clock, RegistryView

_MISSING = "Send your token as `Authorization: Bearer TOKEN`."
_WRONG = "This token is not valid (any more). Ask the operators of the gateway for a new one."


class Tenants:
    """Finds the tenant of a request, in memory."""

    def __init__(self, registry: RegistryView, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock

    def by_request(self, request: ASGIConnection[Any, Any, Any, Any]) -> Tenant:
        """The tenant whose token the request bears. Raises Unauthenticated."""
        tenant = self.by_token(_bearer(request))
        request.scope["state"]["tenant"] = tenant.name
        return tenant

    def by_token(self, token: str) -> Tenant:
        """The tenant of a token. Raises Unauthenticated for one that is mistyped, unknown, expired or revoked."""
        if not tenants.well_formed(token):
            raise Unauthenticated(_WRONG)
        found = self._registry.current.tenant_by_token(tenants.digest(token))
        if found is None or not found[1].valid_at(self._clock.now()):
            raise Unauthenticated(_WRONG)
        return found[0]


class AdminToken:
    """Lets operators in."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    def check(self, request: ASGIConnection[Any, Any, Any, Any]) -> None:
        """Raises Unauthenticated unless the request bears the admin token."""
        given = hashlib.sha256(_bearer(request).encode()).digest()
        if not hmac.compare_digest(given, self._digest):
            raise Unauthenticated("This is not the admin token.")


def _bearer(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated(_MISSING)
    return token
