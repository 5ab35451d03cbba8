"""Who is asking: a tenant by its bearer token, or an operator by the admin token."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection

from service.domain import tenants
from service.domain.errors import Unauthenticated
from service.domain.tenants import Tenant
from service.usecases.ports import RegistryView

_MISSING_TOKEN = "Send your token as `Authorization: Bearer TOKEN`."  # noqa: S105 - a message
_INVALID_TOKEN = "This token is not valid (any more). Ask the operators of the gateway for a new one."  # noqa: S105 - a message


class TenantAuth:
    """Finds the tenant of a request, in memory."""

    def __init__(self, registry: RegistryView, now: Callable[[], float]) -> None:
        self._registry = registry
        self._now = now

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any]) -> Tenant:
        """The tenant whose token the request bears. Raises Unauthenticated."""
        tenant = self.authenticate_token(_bearer_token(request))
        request.scope["state"]["tenant"] = tenant.name
        return tenant

    def authenticate_token(self, token: str) -> Tenant:
        """The tenant of a token. Raises Unauthenticated for one that is mistyped, unknown, expired or revoked."""
        if not tenants.has_valid_checksum(token):
            raise Unauthenticated(_INVALID_TOKEN)
        found = self._registry.current.tenant_by_token(tenants.hash_token(token))
        if found is None or not found[1].is_valid_at(self._now()):
            raise Unauthenticated(_INVALID_TOKEN)
        return found[0]


class AdminAuth:
    """Lets operators in."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any]) -> None:
        """Raises Unauthenticated unless the request bears the admin token."""
        given = hashlib.sha256(_bearer_token(request).encode()).digest()
        if not hmac.compare_digest(given, self._digest):
            raise Unauthenticated("This is not the admin token.")


def _bearer_token(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated(_MISSING_TOKEN)
    return token
