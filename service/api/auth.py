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


class TenantAuth:
    """Authenticates tenants against the registry in memory."""

    def __init__(self, registry: CachedRegistry, now: Callable[[], float]) -> None:
        self._registry = registry
        self._now = now

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None = None) -> Tenant:
        """Return the tenant of a token, by default the bearer token, and record it for log and metrics.

        Raises Unauthenticated or TenantDisabled.
        """
        token = _bearer_token(request) if token is None else token
        is_well_formed = tenants.has_valid_checksum(token)
        owner = self._registry.current.tenant_by_token(tenants.hash_token(token)) if is_well_formed else None
        if owner is None or not owner[1].is_valid_at(self._now()):
            raise Unauthenticated(
                "This token is not valid or has expired. Request a new one from the operators of the gateway."
            )
        tenant = owner[0]
        request.scope["state"]["tenant"] = tenant.name
        if tenant.state is TenantStatus.DISABLED:
            raise TenantDisabled("This tenant is disabled. Ask the operators of the gateway.")
        return tenant


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
        raise Unauthenticated("Send your token as `Authorization: Bearer TOKEN`.")
    return token
