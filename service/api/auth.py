"""Bearer tokens of tenants and of operators."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import structlog
from litestar.connection import ASGIConnection

from service.domain import tenants
from service.domain.errors import Forbidden, QuotaDenied, TenantDisabled, Unauthenticated, Violation
from service.domain.ledger import READS_POLICY
from service.domain.tenants import Operator, OperatorRole, Tenant, TenantStatus, Token
from service.usecases.caches import CachedRegistry

READ_BURST_SECONDS = 5
"""A token that has not read for this long may send the reads of this time at once."""
_MAX_IDLE_TOKENS = 10_000


class TenantAuth:
    """Authenticates tenants against the registry in memory.

    One token may send `reads_per_second` to this process; 0 is no limit.
    """

    def __init__(self, registry: CachedRegistry, now: Callable[[], float], reads_per_second: int = 0) -> None:
        self._registry = registry
        self._now = now
        self._reads = ReadLimiter(reads_per_second, now) if reads_per_second else None

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None = None) -> Tenant:
        """Return the tenant of a token, by default the bearer token, and record it for log and metrics.

        Raises Unauthenticated or TenantDisabled.
        """
        return self._authenticate(request, token)[0]

    def authenticate_read(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None = None) -> Tenant:
        """Authenticate a read, and count it. Raises QuotaDenied too."""
        tenant, known = self._authenticate(request, token)
        if self._reads is not None:
            self._reads.count(known.id)
        return tenant

    def _authenticate(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None) -> tuple[Tenant, Token]:
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
        return owner


class ReadLimiter:
    """A token bucket for each token, of which only the time is kept at which it is full again."""

    def __init__(
        self, per_second: int, now: Callable[[], float], monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_second = per_second
        self._now = now
        self._monotonic = monotonic
        self._full_at: dict[str, float] = {}

    def count(self, token_id: str) -> None:
        """Take one read from the bucket of a token. Raises QuotaDenied if it is empty."""
        now = self._monotonic()
        full_at = max(self._full_at.get(token_id, now), now) + 1 / self._per_second
        if (wait := full_at - now - READ_BURST_SECONDS) > 0:
            raise QuotaDenied(
                f"This token has sent more than {self._per_second} reads per second. Read less often: wait with"
                " `Prefer: wait`, follow the events of a task, or use webhooks.",
                violations=[Violation(READS_POLICY, self._per_second, int((self._now() + wait) * 1000) + 1)],
                retry_after=wait,
            )
        if len(self._full_at) > _MAX_IDLE_TOKENS:
            self._full_at = {token: end for token, end in self._full_at.items() if end > now}
        self._full_at[token_id] = full_at


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
