"""One request and its answer; and where there is none, whether the request may have arrived.

A submit that is wrongly believed not to have been sent is paid for twice. So nothing counts as not sent unless
httpcore2's trace shows that it was still about the connection when it ended.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import IO, Any, Self

import httpx2
import structlog
from msgspec import Struct

from service import __version__
from service.clients.breaker import Attempt, Breaker
from service.clients.callbacks import retry_seconds
from service.clients.deadline import Deadline
from service.clients.decoder import LARGEST_BODY
from service.clients.local_errors import local_error
from service.telemetry.tracing import UNTRACED, Tracer

_log = structlog.get_logger(__name__)

MAX_REQUESTS = 64
"""So many requests of a line are under way at once; the others wait."""
BODY_SECONDS = 5.0
"""The body of a response whose status is no success is read for so long: it only explains the status."""
KEEP_ALIVE_SECONDS = 15
READ_SECONDS = 30.0
"""An answer, and each part of it, has to come within this."""
_BODY_SHARE = 0.9
"""Reading a body ends after this share of the time that is left, so that what came of it by then is still returned."""
_TIMEOUTS = httpx2.Timeout(connect=5, write=30, read=None, pool=None).as_dict()

File = tuple[str, IO[bytes], str]
"""A file of a form: its name, its bytes, its media type."""


class NotSent(Exception):
    """Nothing of the request was sent."""


class Lost(Exception):
    """The request may have arrived, and no answer came that can be read."""


class Answer(Struct, frozen=True):
    """An answer. `cut` says why its body may lack its end; `retry_after` is in seconds."""

    status: int
    body: bytes
    cut: str = ""
    retry_after: float | None = None


class Breakers:
    """The breaker of each base address."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._breakers: defaultdict[str, Breaker] = defaultdict(partial(Breaker, clock))

    def of(self, base_url: str) -> Breaker:
        """The breaker that all requests to an address share."""
        return self._breakers[base_url]

    def open(self) -> Mapping[str, bool]:
        """Whether the breaker is open, of each address that was called."""
        return {base_url: breaker.is_open for base_url, breaker in list(self._breakers.items())}


class Line:
    """Requests of one sort, open within its context.

    Redirects, cookies and the proxies of the environment are not followed. Compression is not requested, and bodies are
    returned as they came.

    Each request has a pool of its own while it lasts: a pool looks at all of its connections for every request, which
    with many at once costs more than the requests themselves. `busy` counts the requests under way, `waiting` those
    that wait for their turn.
    """

    def __init__(self, breakers: Breakers, tls: ssl.SSLContext, *, keep_alive: bool, tracer: Tracer = UNTRACED) -> None:
        self.busy = self.waiting = 0
        self._breakers = breakers
        self._tracer = tracer
        self._gate = asyncio.Semaphore(MAX_REQUESTS)
        self._tls = tls
        self._keeps = keep_alive
        self._idle: list[httpx2.AsyncHTTPTransport] = []
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
        while self._idle:
            await self._idle.pop().aclose()

    async def post(
        self,
        base_url: str,
        path: str,
        fields: Mapping[str, str],
        files: Mapping[str, File] | None = None,
        *,
        seconds: float,
    ) -> Answer:
        """Send a form once, within `seconds` all told, waiting for its turn included.

        Raises NotSent or Lost, whatever the network and the other side do.
        """
        if seconds <= 0:
            raise NotSent("no time left")
        sending, url = _Sending(self._breakers.of(base_url)), base_url + path
        try:
            # The context of the trace is not passed on: it tells a third party who belongs together, and in
            # `tracestate` whatever the tools of our callers write there, for nothing that we would get of it.
            with self._tracer.call("POST", url, private=False) as span:
                async with Deadline(seconds) as deadline, self._turn():
                    request = httpx2.Request(
                        "POST",
                        url,
                        data=fields,
                        files=files,
                        headers=self._headers,
                        extensions={"trace": sending, "timeout": _TIMEOUTS},
                    )
                    sending.begin(deadline)
                    answer = await self._answer(request, deadline, sending)
                span.answered(answer.status)
                return answer
        except Exception as error:  # noqa: BLE001 - what is below lets through more than it declares
            if sending.answer is None:
                raise sending.verdict(error) from None
            _log.exception("call.end-crashed")
            return sending.answer
        finally:
            sending.end()

    @property
    def idle(self) -> int:
        """How many connections are kept to be used again."""
        return len(self._idle)

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        self.waiting += 1
        try:
            await self._gate.acquire()
        finally:
            self.waiting -= 1
        self.busy += 1
        try:
            yield
        finally:
            self.busy -= 1
            self._gate.release()

    async def _answer(self, request: httpx2.Request, deadline: Deadline, sending: _Sending) -> Answer:
        # The one that was used last is the likeliest to be connected yet.
        transport = self._idle.pop() if self._idle else self._transport()
        keeps = False
        try:
            answer = await self._read(await transport.handle_async_request(request), deadline, sending)
            keeps = self._keeps and not answer.cut
            return answer
        finally:
            # What was broken off may have left its pool without a connection and without room for one.
            if keeps:
                self._idle.append(transport)
            else:
                await transport.aclose()

    async def _read(self, response: httpx2.Response, deadline: Deadline, sending: _Sending) -> Answer:
        """Read a response. What came of a body that breaks off or stalls may be all that is needed of it."""
        status, body, cut = response.status_code, bytearray(), ""
        limit = deadline.left * _BODY_SHARE
        deadline.next_within(deadline.left)  # the parts of the body have a limit of their own
        try:
            try:
                async with Deadline(limit if response.is_success else min(limit, BODY_SECONDS)) as parts:
                    parts.next_within(READ_SECONDS)
                    async for chunk in response.aiter_raw():
                        parts.next_within(READ_SECONDS)
                        body += chunk
                        if len(body) > LARGEST_BODY:
                            cut = "the answer is too large"
                            break
            except Exception as error:  # noqa: BLE001 - uvloop raises RuntimeError for a connection that was reset
                cut = type(error).__name__
            retry_after = retry_seconds(response.headers.get("retry-after"))
            sending.answer = Answer(status, bytes(body[:LARGEST_BODY]), cut, retry_after)
        finally:
            await response.aclose()
        return sending.answer

    def _transport(self) -> httpx2.AsyncHTTPTransport:
        kept = httpx2.Limits(
            max_connections=1, max_keepalive_connections=int(self._keeps), keepalive_expiry=KEEP_ALIVE_SECONDS
        )
        return httpx2.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=kept)


class _Sending:
    """Follows one request by its trace, and reports to the breaker.

    Events are named for what they are about. `connection` is the only thing that comes before the request; whatever
    else is named, or nothing at all, is taken for the request itself. `answer` is set once it was read: what fails
    later, such as the closing of the connection, does not undo it.
    """

    answer: Answer | None = None

    def __init__(self, breaker: Breaker) -> None:
        self._breaker = breaker
        self._attempt: Attempt | None = None
        self._deadline: Deadline | None = None
        self._begun = False
        self._connecting = False
        self._sent = False
        self._failed = False

    def begin(self, deadline: Deadline) -> None:
        """The request is about to be sent. Raises NotSent where that is not worth trying."""
        self._deadline = deadline
        if not deadline.left:  # after a pause of the process, in which the lease may have run out
            raise NotSent("no time left")
        self._attempt = self._breaker.admit()
        if self._attempt is None:
            raise NotSent("the breaker is open")
        self._begun = True

    async def __call__(self, event: str, _: Mapping[str, Any]) -> None:
        if event.startswith("connection."):
            self._connecting = True
        elif not self._sent:
            self._sent = True
            self._report(self._breaker.connected)
        if self._deadline and event.endswith("receive_response_headers.started"):
            self._deadline.next_within(READ_SECONDS)

    def verdict(self, error: Exception) -> NotSent | Lost:
        """What an error means for the request."""
        if isinstance(error, NotSent | Lost):
            return error
        if self._sent or not (self._connecting or self._is_harmless(error)):
            return Lost(type(error).__name__)
        lacking = local_error(error)
        # A want of this machine is no reason to stop calling the upstream.
        self._failed = not lacking and isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout)
        return NotSent(lacking or type(error).__name__)

    def _is_harmless(self, error: Exception) -> bool:
        """Whether it comes before anything that is traced.

        What is imported at first use, before any connection, fails for want of a descriptor. Errors of the network are
        translated by httpcore2, so that one that is not comes from elsewhere.
        """
        if not self._begun or isinstance(error, httpx2.UnsupportedProtocol):
            return True
        return not isinstance(error, httpx2.HTTPError) and local_error(error) is not None

    def end(self) -> None:
        """The request has ended in whatever way."""
        self._report(self._breaker.failed if self._failed else self._breaker.withdrawn)

    def _report(self, report: Callable[[Attempt], None]) -> None:
        if self._attempt:
            report(self._attempt)
            self._attempt = None
