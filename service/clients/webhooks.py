"""HTTP client for webhook deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx2
import structlog
from opentelemetry.trace import Tracer

from service.clients.egress import (
    AddressRefused,
    GuardedTransport,
    Resolver,
    UnknownHost,
    resolve_host,
)
from service.clients.network import USER_AGENT, Deadline, default_tls, local_error_reason, parse_retry_after
from service.domain.errors import Overloaded
from service.domain.hosts import IpAddress, is_public
from service.domain.tenants import Webhook
from service.telemetry import tracing
from service.usecases.ports import WebhookResponse

_log = structlog.get_logger(__name__)
TIMEOUT_SECONDS = 15.0
BODY_SECONDS = 1.0
MAX_BODY_BYTES = 2_048
_HEADERS = {
    "User-Agent": USER_AGENT,
    "Content-Type": "application/json",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}


class WebhookClient:
    """Client for webhooks to URLs chosen by tenants, with one time limit per call.

    Neither the URL nor the receiver is trusted: each call goes to a checked address and reads only the start of the
    response.
    """

    def __init__(
        self,
        *,
        resolver: Resolver = resolve_host,
        timeout_seconds: float = TIMEOUT_SECONDS,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self._tracer = tracer
        self._resolver = resolver
        self._timeout_seconds = timeout_seconds
        self._tls = default_tls()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> WebhookResponse:
        """Send once, to an address that is public or allowed by `webhook`.

        Raises Overloaded if this machine lacks a resource for the call: that must not count against the receiver.
        """

        def is_allowed(_host: str, port: int, ip: IpAddress) -> bool:
            return is_public(ip) or webhook.allows_address(ip, port)

        try:
            with tracing.start_client_span(self._tracer, "POST", url) as span:
                # The tenant chose the receiver, so it may join the trace.
                headers = {**headers, **tracing.trace_headers()}
                async with (
                    Deadline(self._timeout_seconds),
                    # The allowed addresses depend on the tenant; no connection is reused.
                    httpx2.AsyncClient(
                        transport=GuardedTransport(is_allowed, tls=self._tls, resolver=self._resolver),
                        trust_env=False,
                        follow_redirects=False,
                        timeout=httpx2.Timeout(self._timeout_seconds, read=None),
                        headers=_HEADERS,
                    ) as client,
                    client.stream("POST", url, content=body, headers=headers) as response,
                ):
                    tracing.record_status(span, response.status_code)
                    return await _read_response(response)
        except Exception as error:
            if local_reason := local_error_reason(error):
                raise Overloaded(
                    f"The gateway can't send requests at the moment: {local_reason}.", retry_after=1
                ) from error
            return WebhookResponse(error=_describe_error(error, self._timeout_seconds))


def _describe_error(error: Exception, seconds: float) -> str:
    match error:
        case TimeoutError() | httpx2.TimeoutException():
            return f"It took longer than {seconds:g} seconds."
        case AddressRefused():
            return "The address of its host is not public, and no network allowed for the tenant has it with this port."
        case UnknownHost():
            return "Its host has no address."
        case httpx2.ConnectError():
            return "No connection could be made."
        case httpx2.HTTPError():
            return "The connection was lost, or the response was not HTTP."
        case _:
            _log.error("webhook.client_error", exc_info=error)
            return "The request failed."


async def _read_response(response: httpx2.Response) -> WebhookResponse:
    if response.is_success:  # accepted: the body does not matter
        return WebhookResponse(status=response.status_code)
    retry_after = parse_retry_after(response.headers.get("retry-after"))
    return WebhookResponse(
        status=response.status_code, retry_after_seconds=retry_after, excerpt=await _read_excerpt(response)
    )


async def _read_excerpt(response: httpx2.Response) -> str | None:
    """Return the start of the body; None if it is empty or unreadable."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) >= MAX_BODY_BYTES:
                    break
    except (TimeoutError, httpx2.HTTPError):  # the status is enough
        pass
    return body[:MAX_BODY_BYTES].decode(errors="replace") or None
