"""Bounded HTTP calls to the upstream: slots, kept connections, outcomes and decoding."""

from __future__ import annotations

import asyncio
import json
import math
import ssl
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any
from urllib.parse import quote, urlsplit

import msgspec
import structlog
from msgspec import Struct
from opentelemetry.trace import Tracer

from service.clients.breaker import Attempt, Breaker
from service.clients.connection import ConnectFailed, Connection, NotSent, connect
from service.clients.forms import FormBody
from service.clients.network import USER_AGENT, Deadline, parse_retry_after
from service.clients.response_parser import MAX_BODY_BYTES, ResponseParser
from service.domain.hosts import WEB_PORT, WEB_PORT_TLS, url_address
from service.telemetry import tracing

_log = structlog.get_logger(__name__)

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
_PATH_CHARS = "%/:=&~+!$,;'@()*"
"""Are sent unescaped in paths, as letters, digits and `_.-` are."""


class ResponseLost(Exception):
    """The request may have arrived, but there is no readable response."""


class UpstreamResponse(Struct, frozen=True):
    """A response. `truncation` is the reason why the body may be incomplete."""

    status: int
    body: bytes
    truncation: str = ""
    retry_after_seconds: float | None = None


class Target(Struct, frozen=True):
    """The server and the path of a base URL."""

    host: str
    port: int
    is_tls: bool
    path: str
    host_field: str


@lru_cache(maxsize=1_000)
def parse_target(base_url: str) -> Target:
    """Raises ValueError."""
    parts, (host, port) = urlsplit(base_url), url_address(base_url)
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("not a URL of HTTP")
    is_tls = parts.scheme == "https"
    host_field = f"[{host}]" if ":" in host else host
    if port != (WEB_PORT_TLS if is_tls else WEB_PORT):
        host_field += f":{port}"
    return Target(host, port, is_tls, quote(parts.path, safe=_PATH_CHARS), host_field)


class UpstreamPool:
    """A bounded pool of connections for one kind of request.

    Redirects, cookies and the proxies of the environment are not followed. Compression is not requested, and bodies are
    returned as received.
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
        self._tls.set_alpn_protocols(["http/1.1"])
        self._keep_alive = keep_alive
        self._idle = defaultdict[Target, list[Connection]](list)
        self._fields = (
            f"User-Agent: {USER_AGENT}\r\nAccept: application/json\r\nAccept-Encoding: identity\r\n"
            f"Connection: {'keep-alive' if keep_alive else 'close'}\r\n"
        )

    async def aclose(self) -> None:
        for connections in self._idle.values():
            while connections:
                connections.pop().abort()

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
        call = _Call(self._breakers[base_url])
        try:
            # No trace headers: they would reveal to a third party which requests belong together, and in
            # `tracestate` whatever the tools of our callers write there.
            with tracing.start_client_span(self._tracer, "POST", base_url + path, hide_path=False) as span:
                try:
                    async with Deadline(timeout_seconds) as deadline, self._acquire_slot():
                        await self._exchange(call, parse_target(base_url), path, form, deadline)
                except TimeoutError as error:
                    call.finish(error)  # what has arrived by the deadline counts
                if call.status is None:
                    tracing.record_error(span, call.failure)
                else:
                    tracing.record_status(span, call.status)
            return call.get_response()
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not hide that the request was sent
            if call.status is None:
                raise call.classify_error(error) from None
            _log.exception("upstream.close_error")
            return call.get_response()
        finally:
            call.release()

    @property
    def idle_count(self) -> int:
        return sum(connection.is_open for connections in self._idle.values() for connection in connections)

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

    async def _exchange(self, call: _Call, target: Target, path: str, form: FormBody, deadline: Deadline) -> None:
        head = (
            f"POST {target.path}{path} HTTP/1.1\r\nHost: {target.host_field}\r\n{self._fields}"
            f"Content-Type: {form.content_type}\r\nContent-Length: {form.size}\r\n\r\n"
        ).encode("ascii")
        call.start(deadline)
        connection = self._take_idle(target) or await connect(
            target.host, target.port, self._tls if target.is_tls else None
        )
        try:
            call.on_connected(connection, deadline)
            await connection.send(form.split(head), deadline)
            await connection.receive(deadline)
        finally:
            if self._keep_alive and connection.is_reusable:
                connection.keep()
                self._idle[target].append(connection)
            else:
                connection.end()

    def _take_idle(self, target: Target) -> Connection | None:
        # The connection used last is the most likely to be still open.
        connections = self._idle[target]
        while connections:
            connection = connections.pop()
            if connection.is_quiet:
                connection.reuse()
                return connection
            connection.abort()
        return None


class _Call:
    """One request: whether it was sent, and what has arrived of its response. Notifies the breaker."""

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._attempt: Attempt | None = None
        self._received: ResponseParser | None = None

    def start(self, deadline: Deadline) -> None:
        """Claim an attempt of the breaker. Raises NotSent if it is open or no time is left."""
        if not deadline.remaining_seconds:  # the process was suspended: the lease may have expired
            raise NotSent("no time left")
        self._attempt = self._breaker.admit()
        if self._attempt is None:
            raise NotSent("the breaker is open")

    def on_connected(self, connection: Connection, deadline: Deadline) -> None:
        """Note that the request may be sent from now on. Raises NotSent if no time is left."""
        self._notify_breaker(self._breaker.on_connected)
        if not deadline.remaining_seconds:
            raise NotSent("no time left")
        self._received = connection.response

    def finish(self, error: Exception) -> None:
        """End the response where it is. Raises the error if nothing was sent."""
        if self._received is None:
            raise error
        self._received.finish(error)

    @property
    def status(self) -> int | None:
        """The status of the response; None without one."""
        return self._received.status if self._received else None

    @property
    def failure(self) -> str:
        """The type of the error for which there is no response."""
        return (self._received and self._received.failure) or EOFError.__name__

    def get_response(self) -> UpstreamResponse:
        """Return what has arrived. Raises ResponseLost without a head."""
        received = self._received
        if received is None or received.status is None:
            raise ResponseLost(self.failure)
        retry_after = parse_retry_after(received.retry_after)
        return UpstreamResponse(received.status, bytes(received.body), received.failure, retry_after)

    def classify_error(self, error: Exception) -> NotSent | ResponseLost:
        """Return NotSent only if nothing was sent: a resent submission would be paid twice."""
        if self._received is not None:
            return error if isinstance(error, ResponseLost) else ResponseLost(type(error).__name__)
        if isinstance(error, ConnectFailed):
            self._notify_breaker(self._breaker.on_failed)
        return error if isinstance(error, NotSent) else NotSent(type(error).__name__)

    def release(self) -> None:
        self._notify_breaker(self._breaker.on_abandoned)

    def _notify_breaker(self, notify: Callable[[Attempt], None]) -> None:
        if self._attempt:
            notify(self._attempt)
            self._attempt = None
