"""HTTP/1.1 connection of an ASGI application: uvicorn's httptools protocol with limits.

uvicorn reads the body of a request that offers an `Upgrade` as another request (Kludex/uvicorn#2722), sends chunks to
HTTP/1.0 clients (#1360), and limits neither size nor duration of a request head. This module imports nothing of the
package.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

App = Callable[[Any, Any, Any], Awaitable[None]]
BuildRefusal = Callable[[int, str, str], tuple[Iterable[tuple[bytes, bytes]], bytes]]
"""Builds the response to a request that never reaches the application.

Takes status, detail and client address; returns header fields, without those of the connection, and body.
"""
_SILENT_SECONDS = 1.0
_CHUNKS_TO_JOIN = 1_000
_DISCARD_DELAY_SECONDS = 0.25
CLIENT_TOO_SLOW = "client_too_slow"
"""Key in an ASGI scope: the connection was ended because the client read too slowly."""


@dataclass(frozen=True)
class Limits:
    """Limits of one port."""

    connections: int = 10_000
    """Further ones replace idle or silent ones, or wait in the kernel's queue."""
    head_bytes: int = 32 * 1024
    """Of request line and header fields together, and of the trailer fields."""
    head_fields: int = 100
    """Number of header fields, and of trailer fields."""
    pipelined_requests: int = 100
    """Requests that wait for the response to the one before them."""
    head_seconds: float = 10
    """From the opening of a connection, or the first byte of a further request, to the end of the head."""
    idle_seconds: float = 75
    """Longer than clients and load balancers keep an idle connection, which would send a request into its close."""
    discard_seconds: float = 30
    """How long the rest of a refused body is discarded: closing on unread bytes resets the connection, and the client
    would lose the response."""
    discard_idle_seconds: float = 5
    """How long discarding goes on without a byte."""
    last_request_seconds: float = 1
    """How long an idle connection stays open once the server stops: a client may have sent a request already."""
    reader_seconds: float = 30
    """How long a client may be behind `reader_bytes_per_second` with what is written but not sent."""
    reader_bytes_per_second: int = 32 * 1024


@dataclass(kw_only=True, eq=False, repr=False)
class ServerContext:
    """What the connections of a server share."""

    config: Config
    limits: Limits
    build_refusal: BuildRefusal
    on_connection_lost: Callable[[], None]
    state: ServerState = field(default_factory=ServerState)
    is_stopping: bool = False
    closes_idle: bool = False


def build_text_refusal(_status: int, detail: str, _client: str) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
    return [(b"content-type", b"text/plain; charset=utf-8")], f"{detail}\n".encode()


class _Cycle(RequestResponseCycle):
    """A request and its response. The body is passed on in the parts that the parser made: uvicorn copies it twice."""

    chunks: list[bytes] | None = None
    """What was received and not yet read by the application; no list is made for a request without a body."""
    _chunk_bytes = 0

    def add_chunk(self, chunk: bytes) -> None:
        if self.chunks is None:
            self.chunks = []
        self.chunks.append(chunk)
        if len(self.chunks) == _CHUNKS_TO_JOIN:
            self.chunks = [b"".join(self.chunks)]  # each has an overhead of some 40 bytes
        self._chunk_bytes += len(chunk)
        if self._chunk_bytes > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        self.message_event.set()

    async def receive(self) -> Any:
        message: Any = await super().receive()
        if message["type"] == "http.request" and self.chunks:
            message["body"] = self.chunks[0] if len(self.chunks) == 1 else b"".join(self.chunks)
            self.chunks, self._chunk_bytes = None, 0
        return message


class _GuardedCycle(_Cycle):
    """A response to HTTP/1.0, or to a client that waits for `100 Continue`."""

    _ends_with_connection = False

    async def send(self, message: Any) -> None:
        if not self.response_started:
            if self.waiting_for_100_continue:
                self.keep_alive = False  # the client may send the body or the next request
            header_names = {name.lower() for name, _ in message.get("headers", ())}
            if self.scope["http_version"] == "1.0" and b"content-length" not in header_names:
                self.chunked_encoding = False
                self._ends_with_connection = True
        elif self._ends_with_connection:
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class _RefusedError(Exception):
    """A refusal on its way through the callbacks of the parser."""

    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class HttpProtocol(HttpToolsProtocol):
    """One connection; also the transport of its responses."""

    cycle: _Cycle

    def __init__(self, context: ServerContext) -> None:
        super().__init__(context.config, context.state, {})
        self.access_log = False
        self.deadline = self.read_deadline = float("inf")  # expiry in seconds of the loop's clock
        self._context = context
        self._limits = context.limits
        self._active_cycle: _Cycle | None = None
        self._has_had_request = False
        self._is_in_head = False
        self._is_request_complete = True  # no request is being received
        self._offers_upgrade = False
        self._is_lingering = False
        self._discard_ends_at = float("inf")
        self._head_bytes = self._head_fields = 0
        self._framing_bytes = 0  # received since the last head or part of a body
        self._pending_refusal: tuple[int, str] | None = None  # sent after the responses in progress
        self._reader_seconds = context.limits.reader_seconds  # what is left of them

    @property
    def is_idle(self) -> bool:
        """Whether no request is expected at once: a new connection is idle after a second without a byte."""
        return (
            (self._has_had_request or self.deadline - self.loop.time() < self._limits.head_seconds - _SILENT_SECONDS)
            and self._active_cycle is None
            and self._is_request_complete
            and not self.transport.is_closing()
        )

    @property
    def has_unread_data(self) -> bool:
        return self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self.write = transport.write
        self.deadline = self.loop.time() + self._limits.head_seconds
        if self._context.closes_idle:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.pipeline.clear()
        if self._active_cycle:  # uvicorn handles only the last received cycle
            self._active_cycle.disconnected = True
            self._active_cycle.message_event.set()
        self.cycle = self._active_cycle = None  # type: ignore[assignment] # break the reference cycle
        self._context.on_connection_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._limit_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._reader_seconds = min(self.read_deadline - self.loop.time(), self._limits.reader_seconds)
        self.read_deadline = float("inf")
        if self.transport.is_closing():
            self._limit_reader()

    def _limit_reader(self) -> None:
        """Set the time by which the client must have read what is written."""
        seconds = self.transport.get_write_buffer_size() / self._limits.reader_bytes_per_second
        self.read_deadline = self.loop.time() + self._reader_seconds + seconds

    def drop_slow_reader(self) -> None:
        if self._active_cycle:
            cast("dict[str, Any]", self._active_cycle.scope)[CLIENT_TOO_SLOW] = True
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._is_lingering:
            self._extend_discard_deadline()
            return
        if self._pending_refusal:
            return
        self._framing_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            # The error of a callback is the context of the parser's error.
            if isinstance(error.__context__, _RefusedError):
                self._refuse_request(error.__context__.status, error.__context__.detail)
            else:
                self._refuse_request(400, "The request is not valid HTTP/1.1.")
        else:
            if self._framing_bytes > 2 * self._limits.head_bytes:  # a head has more bytes than are counted
                self._refuse_request(*self._head_too_large())
            elif self._active_cycle is None and not self._is_request_complete and not self._is_in_head:
                self._extend_discard_deadline()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True
        self._is_request_complete = False
        self._head_bytes = self._head_fields = 0
        if self._active_cycle is None:
            self.deadline = self.loop.time() + self._limits.head_seconds

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)
        if self._head_bytes > self._limits.head_bytes:
            raise _RefusedError(*self._head_too_large())

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_fields += 1
        self._head_bytes += len(name) + len(value) + 4
        if self._head_bytes > self._limits.head_bytes or self._head_fields > self._limits.head_fields:
            raise _RefusedError(*self._head_too_large())
        if self._is_in_head:  # a trailer field must not become a header field
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            self._offers_upgrade = True  # and the parser raises HttpParserUpgrade after the head
            return
        version, method = self.parser.get_http_version(), self.parser.get_method()
        self._check_head(version)
        url = httptools.parse_url(self.url)
        raw_path = url.path or b"/"
        path = raw_path.decode("ascii")
        self._has_had_request = True
        self._is_in_head = False
        self._head_bytes = self._head_fields = self._framing_bytes = 0
        self.scope["method"] = method.decode("ascii")
        self.scope["http_version"] = version
        self.scope["path"] = unquote(path) if "%" in path else path
        self.scope["raw_path"] = raw_path
        self.scope["query_string"] = url.query or b""
        cycle = _GuardedCycle if version == "1.0" or self.expect_100_continue else _Cycle
        self.cycle = cycle(
            scope=self.scope,
            transport=cast("Any", self),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=version != "1.0" and self.parser.should_keep_alive() and not self._context.is_stopping,
            on_response=self.on_response_complete,
        )
        if self._active_cycle:
            self.flow.pause_reading()
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._start_asgi_task(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        if not self.cycle.response_complete:
            self.cycle.add_chunk(body)

    def on_message_complete(self) -> None:
        if self._offers_upgrade:
            return
        if self.cycle.keep_alive and not self.parser.should_keep_alive():  # the parser would ignore further requests
            raise _RefusedError(400, "Connection must not be a trailer field.")
        self._framing_bytes = 0
        self._is_request_complete = True
        super().on_message_complete()
        if self._active_cycle is None:
            self._wait_for_client()

    def on_response_complete(self) -> None:
        if self._active_cycle:
            self._active_cycle.chunks = None  # nothing will read it
        self._active_cycle = None
        self.server_state.total_requests += 1
        if self.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._pending_refusal:
            self._send_refusal(*self._pending_refusal)
        else:
            self._wait_for_client()

    def end_after_response(self) -> None:
        """Close after the response in progress, if any."""
        if self._active_cycle:
            self.cycle.keep_alive = False

    def close_if_idle(self) -> None:
        """Close unless a request is in progress."""
        if self._active_cycle is None and (self._is_request_complete or self._is_in_head):
            self._close_transport()

    def is_closing(self) -> bool:
        return self._is_lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close after a response."""
        if self._is_request_complete:
            self._close_transport()
        else:
            self._linger()

    def _close_transport(self) -> None:
        """Close after the written data, which the client must read in time."""
        self.transport.close()
        if self.read_deadline == float("inf"):
            self._limit_reader()

    def abort(self) -> None:
        self.transport.abort()

    def expire(self) -> None:
        """End a connection whose deadline has passed; once, since written data may take time to leave."""
        self.deadline = float("inf")
        if self._is_in_head and not self._is_lingering:
            seconds = f"{self._limits.head_seconds:g}"
            self._send_refusal(400, f"The head of the request did not arrive within {seconds} s.", linger=False)
        elif self._is_request_complete:
            self._close_transport()
        else:
            self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._active_cycle = cast("_Cycle", cycle)
        self.deadline = float("inf")  # the application limits the time of body and response
        super()._start_asgi_task(cycle, app)

    def _wait_for_client(self) -> None:
        """Set a deadline for the client's next data while no response is in progress."""
        now = self.loop.time()
        if self._context.closes_idle:
            self.close_if_idle()
        if self._is_in_head:
            self.deadline = now + self._limits.head_seconds
        elif self._is_request_complete:
            self.deadline = now + self._limits.idle_seconds
        else:
            self._discard_ends_at = now + self._limits.discard_seconds
            self._extend_discard_deadline()

    def _extend_discard_deadline(self) -> None:
        self.deadline = min(self._discard_ends_at, self.loop.time() + self._limits.discard_idle_seconds)

    def _linger(self) -> None:
        """Close after the written data, discarding input so that the client can read the response."""
        if self.transport.is_closing():
            return
        self._is_lingering = True
        self._discard_ends_at = self.loop.time() + self._limits.discard_seconds
        self._extend_discard_deadline()
        # Most clients read the response and close meanwhile, instead of sending all that they have.
        self.flow.pause_reading()
        self.loop.call_later(_DISCARD_DELAY_SECONDS, self._resume_discarding)
        self.transport.write_eof()

    def _resume_discarding(self) -> None:
        if not self.transport.is_closing():
            self.flow.resume_reading()

    def _head_too_large(self) -> tuple[int, str]:
        limits = self._limits
        return 431, f"The header fields exceed {limits.head_bytes} bytes or {limits.head_fields} fields."

    def _check_head(self, version: str) -> None:
        """Refuse excessive requests and those that a proxy in front might frame or route differently."""
        if len(self.pipeline) >= self._limits.pipelined_requests:
            raise _RefusedError(400, f"More than {self._limits.pipelined_requests} requests wait for their responses.")
        if version not in {"1.0", "1.1"}:
            raise _RefusedError(400, "Use HTTP/1.1.")
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (version == "1.1" and not hosts):
            raise _RefusedError(400, "The request must have one Host field.")
        codings = [value for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (version == "1.0" or [coding.lower() for coding in codings] != [b"chunked"]):
            raise _RefusedError(400, "The only transfer coding supported is chunked, in HTTP/1.1.")

    def _decline_upgrade(self, rest: bytes) -> None:
        """Parse the head again without the offer, as an ordinary request (RFC 9110, 7.8).

        httptools takes the body for the other protocol (MagicStack/httptools#124).
        """
        self._offers_upgrade = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            self._refuse_request(400, "CONNECT is not supported.")
            return
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        head = b"".join([method, b" ", self.url, b" HTTP/", version, b"\r\n", *fields, b"\r\n"])
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._framing_bytes = 0
        self.data_received(head)
        if rest and not self.transport.is_closing():
            self.data_received(rest)

    def _refuse_request(self, status: int, detail: str) -> None:
        """Respond in place of the application, after the responses to earlier requests."""
        # Otherwise the error is in the body of the last received request.
        is_in_next = self._is_in_head or self._is_request_complete
        self._is_request_complete = False
        if self._active_cycle and (is_in_next or self._active_cycle is not self.cycle):
            if not is_in_next:
                self.pipeline.popleft()
            self._pending_refusal = status, detail
            self.flow.pause_reading()
        elif not is_in_next and self.cycle.response_complete:
            self._linger()
        elif not is_in_next and self.cycle.response_started:
            self.transport.abort()
        else:
            if self._active_cycle:
                self._active_cycle.disconnected = True
                self._active_cycle.message_event.set()
            self._send_refusal(status, detail)

    def _send_refusal(self, status: int, detail: str, *, linger: bool = True) -> None:
        fields, body = self._context.build_refusal(status, detail, self.client[0] if self.client else "")
        length = (b"content-length", str(len(body)).encode())
        head = [*self.server_state.default_headers, *fields, length, (b"connection", b"close")]
        self.transport.write(b"".join([STATUS_LINE[status], *(b"%s: %s\r\n" % field for field in head), b"\r\n", body]))
        if linger:
            self._linger()
        else:
            self._close_transport()
