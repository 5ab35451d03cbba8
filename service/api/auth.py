"""Bearer tokens of tenants and of operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import structlog
from litestar.connection import ASGIConnection

from service.domain import tenants
from service.domain.errors import Forbidden, TenantDisabled, Unauthenticated
from service.domain.tenants import Operator, OperatorRole, Tenant, TenantStatus
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


_READ_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class AdminAuth:
    """Authenticates operators by the hashes of their tokens; of two operators with one token, the last counts."""

    def __init__(self, operators: Iterable[Operator]) -> None:
        self._operators = {operator.digest: operator for operator in operators}

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any]) -> None:
        """Add the operator's name to what is logged from now on. Raises Unauthenticated or Forbidden."""
        operator = self._operators.get(tenants.hash_token(_bearer_token(request)))
        if operator is None:
            raise Unauthenticated("This is not the token of an operator.")
        structlog.contextvars.bind_contextvars(operator=operator.name)
        if operator.role is OperatorRole.READ_ONLY and request.scope.get("method") not in _READ_METHODS:
            raise Forbidden(f"The operator {operator.name} may read, but not change anything.")


def _bearer_token(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("Send your token as `Authorization: Bearer TOKEN`.")
    return token
