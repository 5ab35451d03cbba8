"""Requests of webhook deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx2
import structlog

from service import __version__
from service.clients.egress import (
    AddressRefused,
    GuardedTransport,
    IpAddress,
    Resolver,
    UnknownHost,
    is_public,
    resolve_host,
)
from service.clients.http import Deadline, local_error_reason, parse_retry_after
from service.domain.errors import Overloaded
from service.domain.tenants import Webhook
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.ports import WebhookResponse

_log = structlog.get_logger(__name__)


TIMEOUT_SECONDS = 15.0


BODY_SECONDS = 1.0


MAX_BODY_BYTES = 2_048


_HEADERS = {
    "User-Agent": f"imaging-gateway/{__version__}",
    "Content-Type": "application/json",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}


class WebhookClient:
    """Posts to addresses that tenants chose, each within `seconds` all told."""

    def __init__(
        self,
        *,
        resolver: Resolver = resolve_host,
        timeout_seconds: float = TIMEOUT_SECONDS,
        tracer: Tracer = NOOP_TRACER,
    ) -> None:
        self._tracer = tracer
        self._resolver = resolver
        self._timeout_seconds = timeout_seconds
        self._tls = httpx2.create_ssl_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        """Send once, to an address that is public or that `webhook` lets be reached.

        Raises Overloaded if this machine lacks what a call needs: that must not count against the receiver.
        """

        def allowed(_host: str, ip: IpAddress) -> bool:
            return is_public(ip) or webhook.allows_address(ip)

        try:
            with self._tracer.start_client_span("POST", url) as span:
                async with Deadline(self._timeout_seconds):
                    # What may be reached is another matter for each tenant, and nothing is kept from call to call.
                    transport = GuardedTransport(allowed, tls=self._tls, resolver=self._resolver)
                    async with self._create_client(transport) as client:
                        # Whom a tenant has told the gateway to call may see what the call is a part of.
                        reply = await _send(client, url, {**headers, **span.propagation_headers}, body)
                if reply.status:
                    span.record_response(reply.status)
                return reply
        except Exception as error:
            if lacking := local_error_reason(error):
                raise Overloaded(f"The gateway can't call others just now: {lacking}.", retry_after=1) from error
            return WebhookResponse(error=_describe_error(error, self._timeout_seconds))

    def _create_client(self, transport: GuardedTransport) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            transport=transport,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(self._timeout_seconds, read=None),
            headers=_HEADERS,
        )


def _describe_error(error: Exception, seconds: float) -> str:
    """Why there is no answer, for operators."""
    match error:
        case TimeoutError() | httpx2.TimeoutException():
            return f"It took longer than {seconds:g} seconds."
        case AddressRefused():
            return "Its host is at an address that may not be reached."
        case UnknownHost():
            return "Its host has no address."
        case httpx2.ConnectError():
            return "No connection could be made."
        case httpx2.HTTPError():
            return "The connection broke, or what came was no HTTP."
        case _:
            _log.error("webhook.client_error", exc_info=error)
            return "It could not be called."


async def _send(client: httpx2.AsyncClient, url: str, headers: Mapping[str, str], body: bytes) -> WebhookResponse:
    async with client.stream("POST", url, content=body, headers=dict(headers)) as response:
        retry_after = parse_retry_after(response.headers.get("retry-after"))
        if response.is_success:  # whatever else it says, it took it
            return WebhookResponse(status=response.status_code)
        return WebhookResponse(
            status=response.status_code, retry_after_seconds=retry_after, excerpt=await _read_excerpt(response)
        )


async def _read_excerpt(response: httpx2.Response) -> str | None:
    """How an answer begins; None if it has no body that can be read."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) >= MAX_BODY_BYTES:
                    break
    except (TimeoutError, httpx2.HTTPError):  # its status is known, and that is what counts
        pass
    return read[:MAX_BODY_BYTES].decode(errors="replace") or None
