"""Requests of webhook deliveries."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import httpx2
import structlog

from service import __version__
from service.clients.egress import Address, AddressRefused, CheckedTransport, Resolver, UnknownHost, public, resolve
from service.clients.http import Deadline, local_error, retry_seconds
from service.domain.errors import Overloaded
from service.domain.tenants import Webhook
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.ports import Reply

_log = structlog.get_logger(__name__)


SECONDS = 15.0


BODY_SECONDS = 1.0


MOST_READ = 2_048


_HEADERS = {
    "User-Agent": f"imaging-gateway/{__version__}",
    "Content-Type": "application/json",
    "Accept": "*/*",
    "Accept-Encoding": "identity",
}


class CallbackClient:
    """Posts to addresses that tenants chose, each within `seconds` all told."""

    def __init__(self, *, resolver: Resolver = resolve, seconds: float = SECONDS, tracer: Tracer = UNTRACED) -> None:
        self._tracer = tracer
        self._resolver = resolver
        self._seconds = seconds
        self._tls = httpx2.create_ssl_context()

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> Reply:
        """Send once, to an address that is public or that `webhook` lets be reached.

        Raises Overloaded if this machine lacks what a call needs: that must not count against the receiver.
        """

        def allowed(_host: str, ip: Address) -> bool:
            return public(ip) or webhook.may_reach(ip)

        try:
            with self._tracer.call("POST", url) as span:
                async with Deadline(self._seconds):
                    # What may be reached is another matter for each tenant, and nothing is kept from call to call.
                    transport = CheckedTransport(allowed, tls=self._tls, resolver=self._resolver)
                    async with self._client(transport) as client:
                        # Whom a tenant has told the gateway to call may see what the call is a part of.
                        reply = await _reply(client, url, {**headers, **span.context}, body)
                if reply.status:
                    span.answered(reply.status)
                return reply
        except Exception as error:
            if lacking := local_error(error):
                raise Overloaded(f"The gateway can't call others just now: {lacking}.", retry_after=1) from error
            return Reply(error=_why(error, self._seconds))

    def _client(self, transport: CheckedTransport) -> httpx2.AsyncClient:
        return httpx2.AsyncClient(
            transport=transport,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx2.Timeout(self._seconds, read=None),
            headers=_HEADERS,
        )


def _why(error: Exception, seconds: float) -> str:
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
            _log.error("callback.crashed", exc_info=error)
            return "It could not be called."


async def _reply(client: httpx2.AsyncClient, url: str, headers: Mapping[str, str], body: bytes) -> Reply:
    async with client.stream("POST", url, content=body, headers=dict(headers)) as response:
        retry_after = retry_seconds(response.headers.get("retry-after"))
        if response.is_success:  # whatever else it says, it took it
            return Reply(status=response.status_code)
        return Reply(status=response.status_code, retry_after=retry_after, answer=await _beginning(response))


async def _beginning(response: httpx2.Response) -> str | None:
    """How an answer begins; None if it has no body that can be read."""
    read = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in response.aiter_raw():
                read += chunk
                if len(read) >= MOST_READ:
                    break
    except (TimeoutError, httpx2.HTTPError):  # its status is known, and that is what counts
        pass
    return read[:MOST_READ].decode(errors="replace") or None
