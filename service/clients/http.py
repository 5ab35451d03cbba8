"""Bounded HTTP calls to the upstream: connections and decoding."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from typing import Any

import httpx2
import msgspec
import structlog
from msgspec import Struct
from opentelemetry.trace import Tracer

from service.clients.breaker import Attempt, Breaker
from service.clients.forms import FormBody
from service.clients.network import USER_AGENT, Deadline, local_error_reason, parse_retry_after
from service.domain.hosts import is_metadata
from service.telemetry import tracing

_log = structlog.get_logger(__name__)

MAX_BODY_BYTES = 65_536
"""Limit of a body, both before and after inflating."""
_MAX_INTEGER_DIGITS = 300
"""Python refuses to convert integers of a few thousand digits."""
_BOM = b"\xef\xbb\xbf"
_GZIP = b"\x1f\x8b"
_RAW_DEFLATE = -zlib.MAX_WBITS
_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32
_IGNORED_PREFIX = "\ufeff\ufffd\x00 \t\r\n"


def decode_object(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a body, or an empty mapping if there is none.

    A body that is not strict JSON is decoded leniently: inflated if compressed (the vendor does so unrequested, with or
    without a header), decoded by its byte order mark, as UTF-8, as GB18030 or with replacement characters, and parsed
    by the standard library as the vendor's sample client does.
    """
    try:
        value = msgspec.json.decode(body.removeprefix(_BOM))
    except (msgspec.DecodeError, ValueError, RecursionError):
        value = _decode_leniently(body)
    return value if isinstance(value, dict) else {}


def _decode_leniently(body: bytes) -> Any:
    for data in _inflate_candidates(body):
        for text in _decode_candidates(data):
            try:
                # Bytes after the object, such as a trailing NUL, are ignored.
                return _LENIENT_DECODER.raw_decode(text.lstrip(_IGNORED_PREFIX))[0]
            except (ValueError, RecursionError):
                continue
    return None


def _inflate_candidates(body: bytes) -> Iterator[bytes]:
    """Yield the body unless it is gzip, then what it inflates to: no JSON text inflates."""
    if not body.startswith(_GZIP):
        yield body
    for window in (_ZLIB_OR_GZIP, _RAW_DEFLATE):
        inflater = zlib.decompressobj(window)
        try:
            data = inflater.decompress(body, MAX_BODY_BYTES)
        except zlib.error:
            continue
        if data and not inflater.unconsumed_tail:  # else a decompression bomb
            yield data


def _decode_candidates(data: bytes) -> Iterator[str]:
    encoding = json.detect_encoding(data)
    try:
        yield data.decode(encoding)
    except UnicodeDecodeError:
        with suppress(UnicodeDecodeError):
            yield data.decode("gb18030")
        yield data.decode(encoding, errors="replace")


def _parse_integer(digits: str) -> float:
    return int(digits) if len(digits) <= _MAX_INTEGER_DIGITS else math.inf


_LENIENT_DECODER = json.JSONDecoder(strict=False, parse_int=_parse_integer)

MAX_REQUESTS = 64
"""Concurrent requests of one pool; further ones wait."""
ERROR_BODY_SECONDS = 5.0
"""Time limit of the body of an error response: it only explains the status."""
KEEP_ALIVE_SECONDS = 15
READ_SECONDS = 30.0
"""Time limit of the response head and of each part of the body."""
_BODY_TIME_RATIO = 0.9
"""Share of the remaining time for the body, so that an incomplete body can still be returned."""
_TIMEOUTS = httpx2.Timeout(connect=5, write=30, read=None, pool=None).as_dict()


class NotSent(Exception):
    """Nothing of the request was sent."""


class ResponseLost(Exception):
    """The request may have arrived, but there is no readable response."""


class UpstreamResponse(Struct, frozen=True):
    """A response. `truncation` is the reason why the body may be incomplete."""

    status: int
    body: bytes
    truncation: str = ""
    retry_after_seconds: float | None = None


class UpstreamPool:
    """A bounded pool of connections for one kind of request.

    Redirects, cookies and the proxies of the environment are not followed. Compression is not requested, and bodies are
    returned as received. Each request uses a transport of its own: the pool of httpx2 scans all of its connections for
    every request, which costs more than the requests themselves when there are many.
    """

    def __init__(
        self,
        breakers: Mapping[str, Breaker],
        tls: ssl.SSLContext,
        *,
        keep_alive: bool,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self.busy_count = self.waiting_count = 0
        self._breakers = breakers
        self._tracer = tracer
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._tls = tls
        self._keep_alive = keep_alive
        self._idle_transports: list[httpx2.AsyncHTTPTransport] = []
        self._headers = {
            "User-Agent": USER_AGENT,
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive" if keep_alive else "close",
        }

    async def aclose(self) -> None:
        while self._idle_transports:
            await self._idle_transports.pop().aclose()

    async def post(
        self,
        base_url: str,
        path: str,
        form: FormBody,
        *,
        timeout_seconds: float,
    ) -> UpstreamResponse:
        """Send a form once, within `timeout_seconds` including the wait for a slot. Raises NotSent or ResponseLost."""
        if timeout_seconds <= 0:
            raise NotSent("no time left")
        request_trace, url = RequestTrace(self._breakers[base_url]), base_url + path
        try:
            # No trace headers: they would reveal to a third party which requests belong together, and in
            # `tracestate` whatever the tools of our callers write there.
            with tracing.start_client_span(self._tracer, "POST", url, hide_path=False) as span:
                async with Deadline(timeout_seconds) as deadline, self._acquire_slot():
                    request = httpx2.Request(
                        "POST",
                        url,
                        headers=self._headers | form.headers,
                        content=form,
                        extensions={"trace": request_trace, "timeout": _TIMEOUTS},
                    )
                    request_trace.start(deadline)
                    response = await self._send_request(request, deadline, request_trace)
                tracing.record_status(span, response.status)
                return response
        except Exception as error:  # noqa: BLE001 - the libraries raise more than they declare
            if request_trace.response is None:
                raise request_trace.classify_error(error) from None
            _log.exception("upstream.close_error")
            return request_trace.response
        finally:
            request_trace.finish()

    @property
    def idle_count(self) -> int:
        return len(self._idle_transports)

    @asynccontextmanager
    async def _acquire_slot(self) -> AsyncIterator[None]:
        self.waiting_count += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting_count -= 1
        self.busy_count += 1
        try:
            yield
        finally:
            self.busy_count -= 1
            self._slots.release()

    async def _send_request(
        self, request: httpx2.Request, deadline: Deadline, request_trace: RequestTrace
    ) -> UpstreamResponse:
        # The transport used last is the most likely to be still connected.
        if self._idle_transports:
            transport = self._idle_transports.pop()
        else:
            keep = int(self._keep_alive)
            limits = httpx2.Limits(
                max_connections=1, max_keepalive_connections=keep, keepalive_expiry=KEEP_ALIVE_SECONDS
            )
            transport = httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=limits)
        is_reusable = False
        try:
            response = await self._read_response(await transport.handle_async_request(request), deadline, request_trace)
            is_reusable = self._keep_alive and not response.truncation
            return response
        finally:
            # An aborted request may leave the pool of the transport full and without a connection.
            if is_reusable:
                self._idle_transports.append(transport)
            else:
                await transport.aclose()

    async def _read_response(
        self, response: httpx2.Response, deadline: Deadline, request_trace: RequestTrace
    ) -> UpstreamResponse:
        """Read a response; an incomplete body may still contain all that is needed."""
        status, body, truncation = response.status_code, bytearray(), ""
        limit = deadline.remaining_seconds * _BODY_TIME_RATIO
        deadline.reset_idle_timeout(deadline.remaining_seconds)  # `body_deadline` limits the parts of the body
        try:
            try:
                async with Deadline(limit if response.is_success else min(limit, ERROR_BODY_SECONDS)) as body_deadline:
                    body_deadline.reset_idle_timeout(READ_SECONDS)
                    async for chunk in response.aiter_raw():
                        body_deadline.reset_idle_timeout(READ_SECONDS)
                        body += chunk
                        if len(body) > MAX_BODY_BYTES:
                            truncation = "the response is too large"
                            break
            except Exception as error:  # noqa: BLE001 - uvloop raises RuntimeError for a connection that was reset
                truncation = type(error).__name__
            retry_after = parse_retry_after(response.headers.get("retry-after"))
            request_trace.response = UpstreamResponse(status, bytes(body[:MAX_BODY_BYTES]), truncation, retry_after)
        finally:
            await response.aclose()
        return request_trace.response


class RequestTrace:
    """Trace callback of one request that decides whether it was sent and notifies the breaker.

    Only `connection.*` events precede the request; any other event, even an unknown one, means that it may have been
    sent. `response` is set once the body was read: a later failure, such as of closing, does not undo it.
    """

    response: UpstreamResponse | None = None

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._attempt: Attempt | None = None
        self._deadline: Deadline | None = None
        self._is_connecting = False
        self._is_sent = False
        self._has_failed_to_connect = False

    def start(self, deadline: Deadline) -> None:
        """Claim an attempt of the breaker. Raises NotSent if it is open or no time is left."""
        self._deadline = deadline
        if not deadline.remaining_seconds:  # the process was suspended: the lease may have expired
            raise NotSent("no time left")
        self._attempt = self._breaker.admit()
        if self._attempt is None:
            raise NotSent("the breaker is open")

    async def __call__(self, event: str, info: Mapping[str, Any]) -> None:
        if event.startswith("connection."):
            self._is_connecting = True
            if event == "connection.connect_tcp.complete":
                await self._check_address(info["return_value"])
        elif not self._is_sent:
            self._is_sent = True
            self._notify_breaker(self._breaker.on_connected)
        if self._deadline and event.endswith("receive_response_headers.started"):
            self._deadline.reset_idle_timeout(READ_SECONDS)

    @staticmethod
    async def _check_address(stream: Any) -> None:
        """Close a connection to a metadata service, whatever name led there. Raises NotSent."""
        address = stream.get_extra_info("server_addr")  # none if the server has reset the connection already
        if address and is_metadata(ip_address(address[0])):
            await stream.aclose()
            raise NotSent("its address is a metadata service")

    def classify_error(self, error: Exception) -> NotSent | ResponseLost:
        """Return NotSent only if the trace proves it: a resent submission would be paid twice."""
        if isinstance(error, NotSent | ResponseLost):
            return error
        if self._is_sent or not (self._is_connecting or self._is_before_sending(error)):
            return ResponseLost(type(error).__name__)
        local_reason = local_error_reason(error)
        # An error of this machine must not open the breaker.
        self._has_failed_to_connect = not local_reason and isinstance(
            error, httpx2.ConnectError | httpx2.ConnectTimeout
        )
        return NotSent(local_reason or type(error).__name__)

    def _is_before_sending(self, error: Exception) -> bool:
        """Return whether an error occurred before any traced event.

        A lazy import before the connection fails if no descriptor is free. httpcore2 maps network errors, so an
        unmapped local error does not come from the network.
        """
        if self._attempt is None or isinstance(error, httpx2.UnsupportedProtocol):
            return True
        return not isinstance(error, httpx2.HTTPError) and local_error_reason(error) is not None

    def finish(self) -> None:
        self._notify_breaker(self._breaker.on_failed if self._has_failed_to_connect else self._breaker.on_abandoned)

    def _notify_breaker(self, notify: Callable[[Attempt], None]) -> None:
        if self._attempt:
            notify(self._attempt)
            self._attempt = None
