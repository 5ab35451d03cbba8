"""Bearer tokens of tenants and of operators, and the delay of responses to wrong ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, TypeVar

import structlog
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.types import Guard
from prometheus_client import Counter

from service.api.asgi import OPERATOR, TENANT, TOKEN_ID, run_until_disconnect
from service.domain import tenants
from service.domain.errors import (
    Forbidden,
    GatewayError,
    LedgerUnavailable,
    QuotaDenied,
    TenantDisabled,
    TooManyFailures,
    Unauthenticated,
    Violation,
)
from service.domain.ledger import READS_POLICY
from service.domain.tenants import Operator, OperatorRole, Tenant, TenantStatus, Token
from service.usecases.caches import CachedRegistry

READ_BURST_SECONDS = 5
"""A token that has not read for this long may send the reads of this time at once."""
_MAX_IDLE_TOKENS = 10_000
_START_RETRY_SECONDS = 1.0

T = TypeVar("T")


@dataclass(eq=False)
class _OpenRequest:
    """A request that lasts long: `refusal` is done once its token or its tenant has lost access."""

    token_id: str
    refusal: asyncio.Future[GatewayError]
    expiry: asyncio.TimerHandle | None = None


class TenantAuth:
    """Authenticates tenants against the registry in memory.

    One token may send `reads_per_second` to this process; 0 is no limit.
    """

    def __init__(self, registry: CachedRegistry, now: Callable[[], float], reads_per_second: int = 0) -> None:
        self._registry = registry
        self._now = now
        self._reads = ReadLimiter(reads_per_second, now) if reads_per_second else None
        self._open_requests: set[_OpenRequest] = set()
        registry.on_change.append(self._check_open_requests)

    def authenticate(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None = None) -> Tenant:
        """Return the tenant of a token, by default the bearer token, and record it for log and metrics.

        Raises Unauthenticated, TenantDisabled, or LedgerUnavailable while no token is known yet.
        """
        return self._authenticate(request.scope, _bearer_token(request) if token is None else token)[0]

    def authenticate_read(self, request: ASGIConnection[Any, Any, Any, Any], token: str | None = None) -> Tenant:
        """Authenticate a read, and count it. Raises QuotaDenied too."""
        tenant, known = self._authenticate(request.scope, _bearer_token(request) if token is None else token)
        self.count_read(known)
        return tenant

    def authenticate_header(self, scope: Any, authorization: bytes) -> tuple[Tenant, Token]:
        """Return the tenant and the token of an `Authorization` header, as `authenticate` does."""
        return self._authenticate(scope, _parse_bearer(authorization.decode("latin-1")))

    def count_read(self, token: Token) -> None:
        """Count a read with a token. Raises QuotaDenied."""
        if self._reads is not None:
            self._reads.count(token.id)

    def _authenticate(self, scope: Any, token: str) -> tuple[Tenant, Token]:
        has_form = tenants.has_valid_checksum(token)  # which redaction of the log relies on
        owner = self._registry.current.tenant_by_token(tenants.hash_token(token)) if has_form else None
        if owner is None:
            if not self._registry.is_ready and has_form:
                raise LedgerUnavailable(
                    "The gateway has just started and knows no token yet. Try again in a moment.",
                    retry_after=_START_RETRY_SECONDS,
                )
            raise _invalid_token()
        state = scope["state"]
        state[TENANT], state[TOKEN_ID] = owner[0].name, owner[1].id
        if refusal := self._find_refusal(*owner):
            raise refusal
        return owner

    async def run_while_authorized(self, request: Request[Any, Any, Any], work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`, which is cancelled if the client disconnects or loses its access.

        The request must have been authenticated. Raises ClientDisconnected, Unauthenticated or TenantDisabled.
        """
        with self._watch(request.scope["state"][TOKEN_ID]) as refusal:
            return await run_until_disconnect(request, work, refusal)

    @contextmanager
    def _watch(self, token_id: str) -> Iterator[asyncio.Future[GatewayError]]:
        watched = _OpenRequest(token_id, asyncio.get_running_loop().create_future())
        self._open_requests.add(watched)
        try:
            self._check(watched)
            yield watched.refusal
        finally:
            self._open_requests.discard(watched)
            if watched.expiry:
                watched.expiry.cancel()

    def _check_open_requests(self) -> None:
        for watched in self._open_requests:
            self._check(watched)

    def _check(self, watched: _OpenRequest) -> None:
        """Check an open request after a change of the registry, or when its token may have expired."""
        registry = self._registry.current
        token = registry.tokens.get(watched.token_id)
        tenant = registry.tenant_by_id(token.tenant) if token else None
        refusal = self._find_refusal(tenant, token) if tenant and token else _invalid_token()
        if watched.expiry:
            watched.expiry.cancel()
            watched.expiry = None
        if refusal:
            if not watched.refusal.done():
                watched.refusal.set_result(refusal)
        elif token and token.expires_at is not None:
            seconds = token.expires_at - self._now()
            watched.expiry = asyncio.get_running_loop().call_later(seconds, self._check, watched)

    def _find_refusal(self, tenant: Tenant, token: Token) -> GatewayError | None:
        if not token.is_valid_at(self._now()):
            return _invalid_token()
        if tenant.state is TenantStatus.DISABLED:
            return TenantDisabled("This tenant is disabled. Ask the operators of the gateway.")
        return None


def _invalid_token() -> Unauthenticated:
    return Unauthenticated(
        "This token is not valid or has expired. Request a new one from the operators of the gateway."
    )


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
            raise Unauthenticated(
                "This is not the token of an operator. The command `gateway` sends GATEWAY_ADMIN_TOKEN, else the one "
                "in the data folder."
            )
        structlog.contextvars.bind_contextvars(operator=operator.name)
        request.scope["state"][OPERATOR] = operator.name
        if operator.role is OperatorRole.READ_ONLY and request.scope.get("method") not in _READ_METHODS:
            raise Forbidden(f"The operator {operator.name} may read, but not change anything.")


def _bearer_token(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    return _parse_bearer(request.headers.get("Authorization", ""))


def _parse_bearer(authorization: str) -> str:
    scheme, _, token = authorization.partition(" ")
    token = token.strip()
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("Send your token as `Authorization: Bearer TOKEN`.")
    return token


FREE_FAILURES = 10
"""Failed authentications of one address in FAILURE_SECONDS whose response is not delayed."""
FAILURE_SECONDS = 60.0
DELAY_SECONDS = 1.0
_MAX_DELAYED = 100
_MAX_SOURCES = 10_000


class FailureLimiter:
    """Delays the responses to failed authentications, by address, on one port of this process.

    A valid token is never delayed. Only the latest sources are remembered.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._failures: dict[str, tuple[float, int]] = {}
        self._delayed = 0

    async def delay(self, request: ASGIConnection[Any, Any, Any, Any]) -> None:
        """Count a failure; return at once, or after a delay. Raises TooManyFailures if too many are delayed."""
        self._counter.inc()
        source, now = _find_source(request), time.monotonic()
        began_at, count = self._failures.pop(source, (now, 0))
        if now - began_at >= FAILURE_SECONDS:
            began_at, count = now, 0
        if len(self._failures) >= _MAX_SOURCES:
            del self._failures[next(iter(self._failures))]
        self._failures[source] = began_at, count + 1  # the latest one comes last
        if count < FREE_FAILURES:
            return
        if self._delayed >= _MAX_DELAYED:
            raise TooManyFailures(
                "Too many requests without a valid token come from your address. Correct the token.",
                retry_after=began_at + FAILURE_SECONDS - now,
            )
        self._delayed += 1
        try:
            await asyncio.sleep(DELAY_SECONDS)
        finally:
            self._delayed -= 1


def _find_source(request: ASGIConnection[Any, Any, Any, Any]) -> str:
    """Return the client's address, of an IPv6 host its network: it may have all of the addresses there."""
    host = request.client.host if request.client else ""
    try:
        address = ip_address(host)
    except ValueError:  # a proxy has forwarded some text
        return ""
    if address.version == 4 or address.ipv4_mapped:
        return host
    return str(ip_network((address, 64), strict=False))


def metrics_guard(token: str, failures: FailureLimiter) -> Guard:
    """Return a guard for metrics, which one token opens; it raises Unauthenticated or TooManyFailures."""
    digest = tenants.hash_token(token)

    async def guard(connection: ASGIConnection[Any, Any, Any, Any], _: BaseRouteHandler) -> None:
        try:
            if tenants.hash_token(_bearer_token(connection)) != digest:  # the time to compare hashes reveals no token
                raise Unauthenticated("This is not the token of GATEWAY_METRICS_TOKEN.")
        except Unauthenticated:
            await failures.delay(connection)
            raise

    return guard
