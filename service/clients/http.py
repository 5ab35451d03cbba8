"""Bounded HTTP calls to the upstream: connections, deadlines, circuit breaker and decoding."""

from __future__ import annotations

import asyncio
import errno
import json
import math
import os
import socket
import ssl
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from types import TracebackType
from typing import IO, Any, Self

import httpx2
import msgspec
import structlog
from msgspec import Struct

from service import __version__
from service.telemetry.tracing import NOOP_TRACER, Tracer

_LOCAL_ERRNOS = frozenset(
    {errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM},
)


def local_error_reason(error: BaseException | None) -> str | None:
    """The reason, where a call failed for want of something on this machine alone; None for any other failure.

    Of an error with causes the outermost one with an error number counts. Of several attempts all must have failed so:
    a machine without IPv6 has no address to call one from, while IPv4 shows whether the other side answers.
    """
    if isinstance(error, BaseExceptionGroup):
        reasons = [local_error_reason(each) for each in error.exceptions]
        return reasons[0] if all(reasons) else None
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    if isinstance(error, socket.gaierror):
        return os.strerror(errno.ENOMEM) if error.errno == socket.EAI_MEMORY else _socket_error_reason()
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno) if error.errno in _LOCAL_ERRNOS else None
    return None if error is None else local_error_reason(error.__cause__ or error.__context__)


def _socket_error_reason() -> str | None:
    """Why no socket can be opened just now. A resolver that lacks one may report an unknown name."""
    try:
        socket.socket().close()
    except OSError as error:
        return local_error_reason(error)
    return None


GRACE_SECONDS = 0.1
"""How long the event loop gets to read what has arrived by the end; longer if it was late for that too."""


MAX_GRACES = 10


class Deadline:
    """As `asyncio.timeout`, but for a process that may be stopped for longer than its timers, or be short of CPU.

    When it goes on, all timers are due at once and run before anything is read: a response that arrived in the meantime
    would be given up unread. So the end is put off until the event loop has had time to read it.
    """

    def __init__(self, seconds: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._ends_at = self._loop.time() + seconds
        self._timeout = asyncio.timeout(None)
        self._grace_count = 0
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        self._schedule_check(self._ends_at)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer:
            self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    @property
    def remaining_seconds(self) -> float:
        """The seconds until its end; never below zero."""
        return max(self._ends_at - self._loop.time(), 0)

    def reset_idle_timeout(self, seconds: float) -> None:
        """End already after so many seconds from now, unless this is called again before."""
        now = self._loop.time()
        if now < self._ends_at:
            self._grace_count = 0
            self._schedule_check(min(self._ends_at, now + seconds))

    def _schedule_check(self, due: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._check_expiry, due)

    def _check_expiry(self, due: float) -> None:
        now = self._loop.time()
        late = now - due > GRACE_SECONDS
        if self._grace_count == 0 or (late and self._grace_count < MAX_GRACES):
            self._grace_count += 1
            self._schedule_check(now + GRACE_SECONDS)
        else:
            self._timeout.reschedule(now)


MAX_BODY_BYTES = 65_536
"""A body is decoded up to this many bytes, before and after it was inflated."""


_MAX_INTEGER_DIGITS = 300
"""Digits of an integer; Python refuses to convert a few thousand."""


_BOM = b"\xef\xbb\xbf"


_GZIP = b"\x1f\x8b"


_ZLIB, _RAW = zlib.MAX_WBITS, -zlib.MAX_WBITS


_ZLIB_OR_GZIP = zlib.MAX_WBITS | 32


_IGNORED_PREFIX = "\ufeff\ufffd\x00 \t\r\n"


def decode_object(body: bytes) -> Mapping[str, Any]:
    """Return the JSON object of a body; empty where there is none.

    Only a body that is not strictly JSON takes the slow way: it is inflated if it is compressed (which a response is
    although it was not requested, with or without a header that says so), decoded by its byte order mark, as UTF-8, as
    GB18030 and with replacement characters, and parsed by the standard library, as the vendor's sample client does.
    """
    try:
        found = msgspec.json.decode(body.removeprefix(_BOM))
    except (msgspec.DecodeError, ValueError, RecursionError):
        found = _decode_leniently(body)
    return found if isinstance(found, dict) else {}


def _decode_leniently(body: bytes) -> Any:
    for data in _inflate_candidates(body):
        for text in _decode_candidates(data):
            try:
                # Bytes behind the object, such as a trailing NUL, do not make it less of an object.
                return _LENIENT_DECODER.raw_decode(text.lstrip(_IGNORED_PREFIX))[0]
            except (ValueError, RecursionError):
                continue
    return None


def _inflate_candidates(body: bytes) -> Iterator[bytes]:
    """Yield the body, or what it may inflate to: no JSON begins like gzip, and none inflates."""
    if not body.startswith(_GZIP):
        yield body
    for window in (_ZLIB_OR_GZIP, _RAW):
        inflater = zlib.decompressobj(window)
        try:
            data = inflater.decompress(body, MAX_BODY_BYTES)
        except zlib.error:
            continue
        if data and not inflater.unconsumed_tail:  # a bomb is not JSON
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

BREAKER_THRESHOLD = 5
"""So many failures to connect in a row open it."""


FIRST_PAUSE_SECONDS = 10.0


MAX_PAUSE_SECONDS = 60.0
"""Seconds that it stays open at first, and at most: each trial that fails doubles the pause."""


class Attempt:
    """One attempt to connect, for which `Breaker` wants to hear what became of it."""


class Breaker:
    """Whether it is worth trying to connect. It counts failures to connect only, since they alone cost nothing,
    and of these not the ones that are the fault of this machine.

    While it is open nobody is admitted. After the pause one attempt is, as a trial, and no other until it is known what
    became of that. Attempts from before it opened may still be reported at any time.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failure_count = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._open_until: float | None = None
        self._trial: Attempt | None = None

    @property
    def is_open(self) -> bool:
        """Whether an attempt is not admitted just now; no longer once the pause is over, though nobody may try then."""
        until = self._open_until  # once, as another thread asks
        return until is not None and (self._trial is not None or self._clock() < until)

    def admit(self) -> Attempt | None:
        """An attempt, to be reported once by one of the methods below; None where it is not worth trying."""
        if self.is_open:
            return None
        attempt = Attempt()
        if self._open_until is not None:
            self._trial = attempt
        return attempt

    def on_connected(self, _: Attempt) -> None:
        """A connection was made: all is well again, whoever made it."""
        self._failure_count = 0
        self._pause_seconds = FIRST_PAUSE_SECONDS
        self._open_until = self._trial = None

    def on_failed(self, attempt: Attempt) -> None:
        """No connection could be made."""
        self._failure_count += 1
        if attempt is self._trial:
            self._pause_seconds = min(self._pause_seconds * 2, MAX_PAUSE_SECONDS)
            self._trial = None
        elif self._open_until is not None or self._failure_count < BREAKER_THRESHOLD:
            return
        self._open_until = self._clock() + self._pause_seconds

    def on_abandoned(self, attempt: Attempt) -> None:
        """It was given up before it came to a connection or a failure, so another one may be the trial."""
        if attempt is self._trial:
            self._trial = None


def parse_retry_after(retry_after: str | None) -> float | None:
    """Return what a `Retry-After` asks for, be it seconds or a date; None for anything else."""
    if retry_after is None:
        return None
    if retry_after.isascii() and retry_after.isdigit():
        return float(retry_after[:9])
    try:
        at = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return None
    return max((at - datetime.now(UTC)).total_seconds(), 0) if at.tzinfo else None


_log = structlog.get_logger(__name__)


MAX_REQUESTS = 64
"""So many requests of a line are under way at once; the others wait."""


ERROR_BODY_SECONDS = 5.0
"""The body of a response whose status is no success is read for so long: it only explains the status."""


KEEP_ALIVE_SECONDS = 15


READ_SECONDS = 30.0
"""An answer, and each part of it, has to come within this."""


_BODY_TIME_RATIO = 0.9
"""Reading a body ends after this share of the time that is left, so that what came of it by then is still returned."""


_TIMEOUTS = httpx2.Timeout(connect=5, write=30, read=None, pool=None).as_dict()


FormFile = tuple[str, IO[bytes], str]
"""A file of a form: its name, its bytes, its media type."""


class NotSent(Exception):
    """Nothing of the request was sent."""


class ResponseLost(Exception):
    """The request may have arrived, and no answer came that can be read."""


class UpstreamResponse(Struct, frozen=True):
    """An answer. `cut` says why its body may lack its end; `retry_after` is in seconds."""

    status: int
    body: bytes
    truncation: str = ""
    retry_after_seconds: float | None = None


class BreakerRegistry:
    """The breaker of each base address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._breakers: defaultdict[str, Breaker] = defaultdict(partial(Breaker, clock))

    def get(self, base_url: str) -> Breaker:
        """The breaker that all requests to an address share."""
        return self._breakers[base_url]

    def open_states(self) -> Mapping[str, bool]:
        """Whether the breaker is open, of each address that was called."""
        return {base_url: breaker.is_open for base_url, breaker in list(self._breakers.items())}


class UpstreamPool:
    """Requests of one sort, open within its context.

    Redirects, cookies and the proxies of the environment are not followed. Compression is not requested, and bodies are
    returned as they came.

    Each request has a pool of its own while it lasts: a pool looks at all of its connections for every request, which
    with many at once costs more than the requests themselves. `busy` counts the requests under way, `waiting` those
    that wait for their turn.
    """

    def __init__(
        self, breakers: BreakerRegistry, tls: ssl.SSLContext, *, keep_alive: bool, tracer: Tracer = NOOP_TRACER
    ) -> None:
        self.busy_count = self.waiting_count = 0
        self._breakers = breakers
        self._tracer = tracer
        self._slots = asyncio.Semaphore(MAX_REQUESTS)
        self._tls = tls
        self._keep_alive = keep_alive
        self._idle_transports: list[httpx2.AsyncHTTPTransport] = []
        self._headers = {
            "User-Agent": f"imaging-gateway/{__version__}",
            "Accept": "application/json",
            "Accept-Encoding": "identity",
            "Connection": "keep-alive" if keep_alive else "close",
        }

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._idle_transports:
            await self._idle_transports.pop().aclose()

    async def post(
        self,
        base_url: str,
        path: str,
        fields: Mapping[str, str],
        files: Mapping[str, FormFile] | None = None,
        *,
        seconds: float,
    ) -> UpstreamResponse:
        """Send a form once, within `seconds` all told, waiting for its turn included.

        Raises NotSent or Lost, whatever the network and the other side do.
        """
        if seconds <= 0:
            raise NotSent("no time left")
        sending, url = RequestTrace(self._breakers.get(base_url)), base_url + path
        try:
            # The context of the trace is not passed on: it tells a third party who belongs together, and in
            # `tracestate` whatever the tools of our callers write there, for nothing that we would get of it.
            with self._tracer.start_client_span("POST", url, hide_path=False) as span:
                async with Deadline(seconds) as deadline, self._acquire_slot():
                    request = httpx2.Request(
                        "POST",
                        url,
                        data=fields,
                        files=files,
                        headers=self._headers,
                        extensions={"trace": sending, "timeout": _TIMEOUTS},
                    )
                    sending.start(deadline)
                    answer = await self._send_request(request, deadline, sending)
                span.record_response(answer.status)
                return answer
        except Exception as error:  # noqa: BLE001 - what is below lets through more than it declares
            if sending.response is None:
                raise sending.classify_error(error) from None
            _log.exception("upstream.close_error")
            return sending.response
        finally:
            sending.finish()

    @property
    def idle_count(self) -> int:
        """How many connections are kept to be used again."""
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
        self, request: httpx2.Request, deadline: Deadline, sending: RequestTrace
    ) -> UpstreamResponse:
        # The one that was used last is the likeliest to be connected yet.
        transport = self._idle_transports.pop() if self._idle_transports else self._create_transport()
        keeps = False
        try:
            answer = await self._read_response(await transport.handle_async_request(request), deadline, sending)
            keeps = self._keep_alive and not answer.truncation
            return answer
        finally:
            # What was broken off may have left its pool without a connection and without room for one.
            if keeps:
                self._idle_transports.append(transport)
            else:
                await transport.aclose()

    async def _read_response(
        self, response: httpx2.Response, deadline: Deadline, sending: RequestTrace
    ) -> UpstreamResponse:
        """Read a response. What came of a body that breaks off or stalls may be all that is needed of it."""
        status, body, cut = response.status_code, bytearray(), ""
        limit = deadline.remaining_seconds * _BODY_TIME_RATIO
        deadline.reset_idle_timeout(deadline.remaining_seconds)  # the parts of the body have a limit of their own
        try:
            try:
                async with Deadline(limit if response.is_success else min(limit, ERROR_BODY_SECONDS)) as parts:
                    parts.reset_idle_timeout(READ_SECONDS)
                    async for chunk in response.aiter_raw():
                        parts.reset_idle_timeout(READ_SECONDS)
                        body += chunk
                        if len(body) > MAX_BODY_BYTES:
                            cut = "the answer is too large"
                            break
            except Exception as error:  # noqa: BLE001 - uvloop raises RuntimeError for a connection that was reset
                cut = type(error).__name__
            retry_after = parse_retry_after(response.headers.get("retry-after"))
            sending.response = UpstreamResponse(status, bytes(body[:MAX_BODY_BYTES]), cut, retry_after)
        finally:
            await response.aclose()
        return sending.response

    def _create_transport(self) -> httpx2.AsyncHTTPTransport:
        kept = httpx2.Limits(
            max_connections=1, max_keepalive_connections=int(self._keep_alive), keepalive_expiry=KEEP_ALIVE_SECONDS
        )
        return httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=kept)


class RequestTrace:
    """Follows one request by its trace, and reports to the breaker.

    Events are named for what they are about. `connection` is the only thing that comes before the request; whatever
    else is named, or nothing at all, is taken for the request itself. `answer` is set once it was read: what fails
    later, such as the closing of the connection, does not undo it.
    """

    response: UpstreamResponse | None = None

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._attempt: Attempt | None = None
        self._deadline: Deadline | None = None
        self._is_admitted = False
        self._is_connecting = False
        self._is_sent = False
        self._has_failed_to_connect = False

    def start(self, deadline: Deadline) -> None:
        """The request is about to be sent. Raises NotSent where that is not worth trying."""
        self._deadline = deadline
        if not deadline.remaining_seconds:  # after a pause of the process, in which the lease may have run out
            raise NotSent("no time left")
        self._attempt = self._breaker.admit()
        if self._attempt is None:
            raise NotSent("the breaker is open")
        self._is_admitted = True

    async def __call__(self, event: str, _: Mapping[str, Any]) -> None:
        if event.startswith("connection."):
            self._is_connecting = True
        elif not self._is_sent:
            self._is_sent = True
            self._notify_breaker(self._breaker.on_connected)
        if self._deadline and event.endswith("receive_response_headers.started"):
            self._deadline.reset_idle_timeout(READ_SECONDS)

    def classify_error(self, error: Exception) -> NotSent | ResponseLost:
        """What an error means for the request."""
        if isinstance(error, NotSent | ResponseLost):
            return error
        if self._is_sent or not (self._is_connecting or self._is_before_sending(error)):
            return ResponseLost(type(error).__name__)
        lacking = local_error_reason(error)
        # A want of this machine is no reason to stop calling the upstream.
        self._has_failed_to_connect = not lacking and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        return NotSent(lacking or type(error).__name__)

    def _is_before_sending(self, error: Exception) -> bool:
        """Whether it comes before anything that is traced.

        What is imported at first use, before any connection, fails for want of a descriptor. Errors of the network are
        translated by httpcore2, so that one that is not comes from elsewhere.
        """
        if not self._is_admitted or isinstance(error, httpx2.UnsupportedProtocol):
            return True
        return not isinstance(error, httpx2.HTTPError) and local_error_reason(error) is not None

    def finish(self) -> None:
        """The request has ended in whatever way."""
        self._notify_breaker(self._breaker.on_failed if self._has_failed_to_connect else self._breaker.on_abandoned)

    def _notify_breaker(self, notify: Callable[[Attempt], None]) -> None:
        if self._attempt:
            notify(self._attempt)
            self._attempt = None
