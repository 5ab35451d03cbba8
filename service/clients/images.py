"""HTTP client for images at URLs that tenants choose."""

from __future__ import annotations

import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass

import httpx2
import structlog
from opentelemetry.trace import Tracer

from service.clients.egress import GuardedTransport, Resolver, resolve_host
from service.clients.network import USER_AGENT, Deadline, default_tls, local_error_reason
from service.domain.errors import CallerFault, GatewayError, ImageUnreachable, InvalidOptions, Overloaded
from service.domain.errors import UnreachableReason as Reason
from service.domain.hosts import IpAddress, allows_address, is_public
from service.domain.image_urls import check_image_url, parse_image_url
from service.domain.tenants import Tenant
from service.telemetry import tracing
from service.telemetry.metrics import ImageFetchOutcome, Metrics
from service.usecases.ports import ImageStream

_log = structlog.get_logger(__name__)

MAX_REDIRECTS = 5
CONNECT_SECONDS = 5.0
_RETRY_AFTER_SECONDS = 5.0
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
_HEADERS = {
    "User-Agent": USER_AGENT,
    "Accept": "image/png, image/jpeg, image/webp",
    "Accept-Encoding": "identity",
}
_NO_CONNECTION = "No connection to its server could be made, or its certificate is not valid: check the host."
"""Also for names without an address, and addresses that are not called: a caller must not learn what a network has."""


class ImageClient:
    """Client for images at hosts allowed to their tenant, each within `seconds` and over connections of its own.

    The host of every redirect must be allowed too. An address that is not public is called only if a network allowed to
    the tenant has it.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        seconds: float,
        resolver: Resolver = resolve_host,
        tls: ssl.SSLContext | None = None,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self._metrics = metrics
        self._seconds = seconds
        self._resolver = resolver
        self._tls = tls or default_tls()
        self._tracer = tracer

    @asynccontextmanager
    async def fetch(self, url: str, tenant: Tenant) -> AsyncIterator[ImageStream]:
        """Fetch the image at a URL; its connection stays open within the block, which the time limit ends too.

        Raises ImageUnreachable and Overloaded, without any address.
        """
        destinations = tenant.image_destinations()

        def is_allowed(_host: str, port: int, ip: IpAddress) -> bool:
            return is_public(ip) or allows_address(destinations, ip, port)

        fetch = _Fetch(tenant, self._seconds, self._tracer, httpx2.URL(url))
        started_at = time.monotonic()
        try:
            async with (
                Deadline(self._seconds),
                GuardedTransport(is_allowed, tls=self._tls, resolver=self._resolver) as transport,
            ):
                response = await fetch.open(transport)
                try:
                    async with aclosing(fetch.read(response)) as chunks:
                        yield ImageStream(_parse_length(response), chunks)
                finally:
                    await response.aclose()
            fetch.outcome = ImageFetchOutcome.DONE
        except GatewayError as error:
            fetch.record_failure(error, error)
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise fetch.record_failure(fetch.to_gateway_error(error), error) from error
        finally:
            seconds = time.monotonic() - started_at
            self._metrics.image_fetches.labels(fetch.outcome).inc()
            self._metrics.image_fetch_duration_seconds.observe(seconds)
            _log.info(
                "image.fetch_ended",
                tenant=tenant.name,
                host=fetch.url.host,  # only the host: path and query may grant access
                outcome=fetch.outcome,
                bytes=fetch.received_bytes,
                seconds=round(seconds, 6),
                error=fetch.error_name,
            )


def _parse_length(response: httpx2.Response) -> int | None:
    length = response.headers.get("content-length", "")
    # Content-Length is void beside Transfer-Encoding (RFC 9112, 6.3).
    is_valid = length.isascii() and length.isdigit() and "transfer-encoding" not in response.headers
    return int(length[:19]) if is_valid else None


@dataclass
class _Fetch:
    """One fetch; `url` is that of its last request."""

    tenant: Tenant
    seconds: float
    tracer: Tracer
    url: httpx2.URL
    received_bytes: int = 0
    outcome: ImageFetchOutcome = ImageFetchOutcome.CANCELLED
    error_name: str | None = None

    async def open(self, transport: GuardedTransport) -> httpx2.Response:
        """Follow redirects to a success. Raises ImageUnreachable."""
        timeouts = {"connect": CONNECT_SECONDS, "write": CONNECT_SECONDS, "read": None, "pool": None}
        for resend_count in range(1 + MAX_REDIRECTS):
            # No trace headers: the server may belong to anyone.
            with tracing.start_client_span(self.tracer, "GET", str(self.url), resend_count=resend_count) as span:
                request = httpx2.Request("GET", self.url, headers=_HEADERS, extensions={"timeout": timeouts})
                response = await transport.handle_async_request(request)
                tracing.record_status(span, response.status_code)
            if response.status_code == httpx2.codes.OK:
                return response
            location = response.headers.get("location", "")
            await response.aclose()
            if response.status_code not in _REDIRECT_STATUSES:
                detail = f"Its server responded with HTTP {response.status_code}. Check the URL and its validity."
                raise ImageUnreachable(detail, reason=Reason.HTTP_STATUS)
            self.url = self._resolve_redirect(location)
        raise ImageUnreachable(f"Its server redirects more than {MAX_REDIRECTS} times.", reason=Reason.REDIRECT)

    def _resolve_redirect(self, location: str) -> httpx2.URL:
        try:
            target = parse_image_url(str(self.url.join(location).copy_with(fragment=None)))
            check_image_url(self.tenant, target)
        except (InvalidOptions, httpx2.InvalidURL, ValueError):
            target = ""
        if not target.startswith("https:" if self.url.scheme == "https" else "http"):
            detail = "Its server redirects to a URL that is not allowed to you, or not secure."
            raise ImageUnreachable(detail, reason=Reason.REDIRECT)
        return httpx2.URL(target)

    def to_gateway_error(self, error: Exception) -> GatewayError:
        if local_error_reason(error):
            detail = "The gateway can't fetch images at the moment. Try again."
            return Overloaded(detail, retry_after=_RETRY_AFTER_SECONDS)
        match error:
            case httpx2.ConnectError() | httpx2.ConnectTimeout() | httpx2.InvalidURL():
                return ImageUnreachable(_NO_CONNECTION, reason=Reason.NO_CONNECTION)
            case httpx2.TimeoutException() | TimeoutError():
                detail = f"It did not arrive within {self.seconds:g} seconds. Send the image itself."
                return ImageUnreachable(detail, reason=Reason.TIMEOUT)
        detail = "The connection to its server broke before its end. Send the request again, or the image itself."
        return ImageUnreachable(detail, reason=Reason.INTERRUPTED)

    def record_failure(self, failure: GatewayError, cause: Exception) -> GatewayError:
        # Not in the generator: a variable there would form a cycle error -> traceback -> frame, which keeps the bytes.
        self.error_name = type(cause).__name__
        match failure:
            case ImageUnreachable():
                self.outcome = ImageFetchOutcome(failure.reason.value)
            case CallerFault():
                self.outcome = ImageFetchOutcome.REFUSED
            case _:
                self.outcome = ImageFetchOutcome.OVERLOADED
        return failure

    async def read(self, response: httpx2.Response) -> AsyncGenerator[bytes]:
        async for chunk in response.aiter_raw():
            self.received_bytes += len(chunk)
            yield chunk
