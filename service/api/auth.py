"""Bearer tokens of tenants and of operators."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Any

from litestar.connection import ASGIConnection

from service.domain import tenants
from service.domain.errors import TenantDisabled, Unauthenticated
from service.domain.tenants import Tenant, TenantStatus
from service.usecases.caches import CachedRegistry

_MISSING_TOKEN = "Send your token as `Authorization: Bearer TOKEN`."  # noqa: S105 - a message
_INVALID_TOKEN = "This token is not valid or has expired. Request a new one from the operators of the gateway."  # noqa: S105 - a message


class TenantAuth:
    """Authenticates tenants against the registry in memory."""

    def __init__(self, registry: CachedRegistry, now: Callable[[], float]) -> None:
        self._registry = registry
        self._now = now

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any]) -> Tenant:
        """Return the tenant of the bearer token and record it for log and metrics.

        Raises Unauthenticated or TenantDisabled.
        """
        tenant = self.authenticate_token(_bearer_token(request))
        request.scope["state"]["tenant"] = tenant.name
        return tenant

    def authenticate_token(self, token: str) -> Tenant:
        """Return the tenant of a token. Raises Unauthenticated or TenantDisabled."""
        if not tenants.has_valid_checksum(token):
            raise Unauthenticated(_INVALID_TOKEN)
        owner = self._registry.current.tenant_by_token(tenants.hash_token(token))
        if owner is None or not owner[1].is_valid_at(self._now()):
            raise Unauthenticated(_INVALID_TOKEN)
        if owner[0].state is TenantStatus.DISABLED:
            raise TenantDisabled("This tenant is disabled. Ask the operators of the gateway.")
        return owner[0]


class AdminAuth:
    """Authenticates operators by the admin token."""

    def __init__(self, token: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any]) -> None:
        digest = hashlib.sha256(_bearer_token(request).encode()).digest()
        if not hmac.compare_digest(digest, self._digest):
            raise Unauthenticated("This is not the admin token.")


def _bearer_token(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated(_MISSING_TOKEN)
    return token
