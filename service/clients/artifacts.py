"""Downloads of results."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from enum import StrEnum
from hashlib import blake2b
from typing import NoReturn

import httpx2
import structlog
from httpx2 import Headers
from msgspec import Struct

from service import __version__
from service.clients.egress import Address, AddressRefused, CheckedTransport, Resolver, public, resolve
from service.clients.http import local_error
from service.clients.vendor_api import unmask_key
from service.domain.errors import (
    GatewayError,
    Overloaded,
    RangeNotSatisfiable,
    UpstreamInvalidResponse,
    UpstreamUnavailable,
)
from service.domain.media import BEGINNING, BITMAP_BEGINNING, OPAQUE, fits, seen_type
from service.domain.tasks import Artifact, Sealer
from service.domain.tenants import Account
from service.telemetry.logging import waiting
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.ports import Asked, BrokenOff, Fetched, Portion

TRY_AGAIN_AFTER = 5.0


_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


_NO_RANGE = re.compile(r"bytes \*/[0-9]{1,18}")


_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,200}"')


_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")


class Head(Struct, frozen=True, kw_only=True):
    """A file that can be passed on, as far as its head tells.

    `length` is of what is given, `exact` says the same where no Content-Length does. `from_start` says that the first
    byte given is the first of the file.
    """

    portion: Portion
    length: int | None
    exact: int | None
    from_start: bool
    content_range: str | None
    etag: str | None
    last_modified: str | None
    accept_ranges: str | None


def read(status: int, headers: Headers, asked: Asked, *, most: int, recent: bool = False) -> Head:
    """What an answer that is no redirect gives of a file, of at most so many bytes.

    Labels are ignored: a Content-Encoding too, which stores replay though the bytes are plain. A `recent` file may not
    have arrived in its store yet.

    Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable.
    """
    portion = _portion(status, headers, asked, recent=recent)
    # Beside a Transfer-Encoding, a Content-Length means nothing.
    length = None if "transfer-encoding" in headers else _number(headers.get("content-length"))
    exact, size, first, content_range = length, length, 0, None
    if portion is Portion.PART:
        content_range = headers.get("content-range", "")
        first, exact, size = _range(content_range)
        if length not in {None, exact}:
            raise UpstreamInvalidResponse("The upstream gives out another range of this result than it says.")
    if max(size or 0, exact or 0) > most:
        raise UpstreamInvalidResponse(f"This result is larger than the {most} bytes that are passed on.")
    return Head(
        portion=portion,
        length=length,
        exact=exact,
        from_start=first == 0,
        content_range=content_range,
        etag=_matching(_ETAG, headers.get("etag")),
        last_modified=_matching(_DATE, headers.get("last-modified")),
        accept_ranges="bytes" if headers.get("accept-ranges", "").lower() == "bytes" else None,
    )


def _portion(status: int, headers: Headers, asked: Asked, *, recent: bool) -> Portion:
    match status:
        case 200:
            return Portion.WHOLE
        case 206 if asked.range:
            return Portion.PART
        case 304 if asked.if_none_match or asked.if_modified_since:
            return Portion.NOTHING
        case 416 if asked.range:
            raise RangeNotSatisfiable(
                "This result has no bytes in that range.",
                content_range=_matching(_NO_RANGE, headers.get("content-range")),
            )
        case 403 | 404 if recent:
            raise UpstreamUnavailable(
                f"The upstream does not give out this result yet (HTTP {status}): its task has just ended. Try again.",
                retry_after=TRY_AGAIN_AFTER,
            )
        case 401 | 403 | 404 | 410:
            raise UpstreamInvalidResponse(
                f"The upstream no longer gives out this result (HTTP {status}): it keeps results for a while only."
            )
        case 408 | 425 | 429 | 500 | 502 | 503 | 504:
            raise UpstreamUnavailable(
                f"The upstream can't give out this result just now (HTTP {status}). Try again.",
                retry_after=TRY_AGAIN_AFTER,
            )
        case _:
            raise UpstreamInvalidResponse(f"The upstream answered with HTTP {status} in place of this result.")


def _range(content_range: str) -> tuple[int, int, int | None]:
    """The first byte of a range, how many it has, and how many the whole has if that is known."""
    found = _RANGE.fullmatch(content_range)
    if found is None or int(found[1]) > int(found[2]):
        raise UpstreamInvalidResponse("The upstream gives out a part of this result without saying which.")
    first, last, size = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    return first, last - first + 1, size


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _matching(pattern: re.Pattern[str], text: str | None) -> str | None:
    """What is passed on to others has the form it must have, or is left out."""
    return text if text and pattern.fullmatch(text) else None


_log = structlog.get_logger(__name__)


MOST_AT_ONCE = 100
"""So many fetches of a process are under way at once; more are refused, since each holds two connections or three."""


MOST_TYPES = 10_000
"""So many files are remembered by their types, so that a part of one is not preceded by its beginning again."""


MOST_REDIRECTS = 5


_REDIRECTS = frozenset({301, 302, 303, 307, 308})


Observer = Callable[[StrEnum, StrEnum, float], None]
"""Is told of every fetch: its operation, its outcome, and the seconds it took."""


class Operation(StrEnum):
    """What this client does."""

    FETCH = "fetch"


class Outcome(StrEnum):
    """What became of a fetch."""

    DONE = "done"
    STOPPED = "stopped"
    """The reader wanted no more of it."""
    UNUSABLE = "unusable"
    UNREACHABLE = "unreachable"
    BROKEN_OFF = "broken-off"


class Patience(Struct, frozen=True):
    """How many seconds a connection may take, the first byte with all redirects before it, and each further chunk."""

    connect: float = 5
    first_byte: float = 30
    idle: float = 30


class ArtifactClient:
    """Fetches results of at most `max_bytes`, each over a connection of its own.

    Private addresses are for accounts whose own upstream is there: the one they name, else that of `upstream_url`.
    `user_keys` opens the accounts' keys, which may belong into the addresses of their results.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        max_bytes: int,
        observe: Observer,
        user_keys: Sealer | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver = resolve,
        patience: Patience | None = None,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._upstream_url = upstream_url
        self._max_bytes = max_bytes
        self._observe = observe
        self._user_keys = user_keys
        self._tls = tls or httpx2.create_ssl_context()
        self._resolver = resolver
        self._patience = patience or Patience()
        self._tracer = tracer
        self._types = _Types()
        self._under_way = 0

    @staticmethod
    def tell(metrics: Metrics) -> None:
        """Begin all outcomes of fetches at zero."""
        metrics.expect_calls({Operation.FETCH: Outcome})

    @asynccontextmanager
    async def fetch(
        self, account: Account | None, artifact: Artifact, asked: Asked, *, recent: bool = False
    ) -> AsyncIterator[Fetched]:
        """A result, from its server as long as the block lasts; it may not be there yet if it is `recent`.

        Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable or Overloaded before the block.
        """
        if self._under_way >= MOST_AT_ONCE:
            raise Overloaded("Too many results are being fetched at the moment. Try again.", retry_after=1)
        own = _host(account.base_url or self._upstream_url) if account else None
        user_key = self._user_keys.open(account.user_key) if account and self._user_keys else None
        url = unmask_key(user_key.decode(), artifact.url) if user_key else artifact.url

        def allow(host: str, ip: Address) -> bool:
            return host == own or public(ip)

        started = time.monotonic()
        fetch = _Fetch(asked, self._max_bytes, self._patience, self._tracer, self._types, recent=recent)
        self._under_way += 1
        try:
            async with CheckedTransport(allow, tls=self._tls, resolver=self._resolver) as transport, fetch.opened:
                yield await fetch.begin(transport, Artifact(artifact.name, url))
        finally:
            self._under_way -= 1
            self._observe(Operation.FETCH, fetch.outcome, time.monotonic() - started)


class _Types:
    """The media types of files whose first bytes were seen, by address and version."""

    def __init__(self) -> None:
        self._types: OrderedDict[bytes, str] = OrderedDict()

    def put(self, url: str, etag: str | None, media_type: str) -> None:
        """Remember the type of a file."""
        self._types[_version(url, etag)] = media_type
        if len(self._types) > MOST_TYPES:
            self._types.popitem(last=False)

    def get(self, url: str, etag: str | None) -> str | None:
        """Return the type of a file, if it is remembered."""
        return self._types.get(_version(url, etag))


def _version(url: str, etag: str | None) -> bytes:
    return blake2b(f"{url}\n{etag}".encode(), digest_size=16).digest()


class _Fetch:
    """One fetch. What it opens is closed with `opened`."""

    def __init__(
        self, asked: Asked, max_bytes: int, patience: Patience, tracer: Tracer, types: _Types, *, recent: bool
    ) -> None:
        self._asked = asked
        self._types = types
        self._recent = recent
        self._max_bytes = max_bytes
        self._patience = patience
        self._tracer = tracer
        self._host = ""  # the rest of an address may be what gives access to the file, and is not logged
        self.opened = AsyncExitStack()
        self.outcome = Outcome.STOPPED

    async def begin(self, transport: CheckedTransport, artifact: Artifact) -> Fetched:
        """Fetch until the first bytes are there and found good. Raises what the reader is told instead."""
        try:
            with _in_words(), waiting():
                async with asyncio.timeout(self._patience.first_byte):
                    return await self._begin(transport, artifact)
        except GatewayError as fault:
            self.outcome = _OUTCOMES[type(fault)]
            if self.outcome is not Outcome.DONE:
                why = fault.__cause__ or fault
                _log.warning("fetch.failed", host=self._host, error=type(why).__name__, detail=str(why))
            raise

    async def _begin(self, transport: CheckedTransport, artifact: Artifact) -> Fetched:
        response, head = await self._open(transport, artifact, self._asked)
        body = await self.opened.enter_async_context(aclosing(response.aiter_raw()))
        beginning, media_type = b"", OPAQUE
        if head.portion is Portion.NOTHING:
            self.outcome = Outcome.DONE
        else:
            beginning = await _beginning(body, BEGINNING if head.from_start else 1)
            _check_length(beginning, head, self._max_bytes)
            media_type = await self._judge(transport, artifact, head, beginning)
        chunks = await self.opened.enter_async_context(aclosing(self._chunks(beginning, body, head)))
        return Fetched(
            name=artifact.name,
            portion=head.portion,
            media_type=media_type,
            chunks=chunks,
            length=head.length,
            content_range=head.content_range,
            etag=head.etag,
            last_modified=head.last_modified,
            accept_ranges=head.accept_ranges,
        )

    async def _open(
        self, transport: CheckedTransport, artifact: Artifact, asked: Asked
    ) -> tuple[httpx2.Response, Head]:
        response = await self._follow(transport, httpx2.URL(artifact.url), asked)
        return response, read(response.status_code, response.headers, asked, most=self._max_bytes, recent=self._recent)

    async def _judge(self, transport: CheckedTransport, artifact: Artifact, head: Head, beginning: bytes) -> str:
        """Return the type of a file by its first bytes. They are fetched for a part that lacks them.

        Raises UpstreamInvalidResponse for what is no image, or not one that the result may be.
        """
        found = seen_type(beginning) if head.from_start else self._types.get(artifact.url, head.etag)
        if head.portion is Portion.PART and found in {None, OPAQUE}:
            first = await self._first_bytes(transport, artifact)
            if head.from_start and not first.startswith(beginning[: len(first)]):
                raise UpstreamInvalidResponse("The upstream changed this result while it was fetched.")
            found = seen_type(first)
        if found is None or not fits(artifact.name, found):
            raise UpstreamInvalidResponse(
                "The upstream gives out something else than an image in place of this result."
            )
        self._types.put(artifact.url, head.etag, found)
        return found

    async def _first_bytes(self, transport: CheckedTransport, artifact: Artifact) -> bytes:
        response, head = await self._open(transport, artifact, Asked(range=f"bytes=0-{BEGINNING - 1}"))
        try:
            async with aclosing(response.aiter_raw()) as body:
                return await _beginning(body, BEGINNING) if head.from_start else b""
        finally:
            await response.aclose()

    async def _follow(self, transport: CheckedTransport, url: httpx2.URL, asked: Asked) -> httpx2.Response:
        """The answer at the end of the redirects, each of which is checked by the transport like the first address."""
        for resent in range(1 + MOST_REDIRECTS):
            # As with all that is the upstream's, the context of the trace is not passed on.
            with self._tracer.call("GET", str(url), resent=resent) as span:
                response = await self._ask(transport, url, asked)
                span.answered(response.status_code)
            if response.status_code not in _REDIRECTS:
                return response
            target = url.join(response.headers.get("location", ""))
            await response.aclose()
            if target.scheme != "https" and (url.scheme == "https" or target.scheme != "http"):
                raise UpstreamInvalidResponse("The upstream sends on to an address that is less safe than its own.")
            url = target
        raise UpstreamInvalidResponse(f"The upstream sends on more than {MOST_REDIRECTS} times for this result.")

    async def _ask(self, transport: CheckedTransport, url: httpx2.URL, asked: Asked) -> httpx2.Response:
        self._host = url.host
        conditions = {
            "Range": asked.range,
            "If-Range": asked.if_range,
            "If-None-Match": asked.if_none_match,
            "If-Modified-Since": asked.if_modified_since,
        }
        patience = {"connect": self._patience.connect, "write": self._patience.connect, "read": None, "pool": None}
        request = httpx2.Request(
            "GET",
            url,
            headers=_HEADERS | {name: value for name, value in conditions.items() if value},
            extensions={"timeout": patience},
        )
        response = await transport.handle_async_request(request)
        self.opened.push_async_callback(response.aclose)
        return response

    async def _chunks(self, beginning: bytes, body: AsyncIterator[bytes], head: Head) -> AsyncGenerator[bytes]:
        most = self._max_bytes if head.exact is None else head.exact
        given, chunk = 0, beginning or None
        while chunk is not None:
            given += len(chunk)
            if given > most:
                self._break_off(f"it is longer than {most} bytes")
            yield chunk
            try:
                with waiting():
                    async with asyncio.timeout(self._patience.idle):
                        chunk = await anext(body, None)
            except (httpx2.HTTPError, OSError) as error:
                self._break_off(type(error).__name__)
        if head.exact is not None and given < head.exact:
            self._break_off(f"it has {given} of {head.exact} bytes")
        self.outcome = Outcome.DONE

    def _break_off(self, why: str) -> NoReturn:
        self.outcome = Outcome.BROKEN_OFF
        _log.warning("fetch.broken-off", host=self._host, detail=why)
        raise BrokenOff(why)


_HEADERS = {
    "User-Agent": f"imaging-gateway/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}


_OUTCOMES: Mapping[type[GatewayError], Outcome] = {
    UpstreamInvalidResponse: Outcome.UNUSABLE,
    UpstreamUnavailable: Outcome.UNREACHABLE,
    Overloaded: Outcome.UNREACHABLE,
    RangeNotSatisfiable: Outcome.DONE,
}


@contextmanager
def _in_words() -> Iterator[None]:
    """Say to the reader what went wrong on the way to the first byte, without any address."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _error_for_reader(error) from error


def _error_for_reader(error: Exception) -> GatewayError:
    if local_error(error):
        return Overloaded("The gateway can't fetch results just now. Try again.", retry_after=TRY_AGAIN_AFTER)
    if isinstance(error, AddressRefused):
        return UpstreamInvalidResponse("The upstream keeps this result where the gateway does not fetch from.")
    if isinstance(error, httpx2.ConnectError | httpx2.TimeoutException | TimeoutError):
        return UpstreamUnavailable(
            "Where the upstream keeps this result can't be reached just now. Try again.",
            retry_after=TRY_AGAIN_AFTER,
        )
    return UpstreamInvalidResponse("The upstream broke off before the first byte of this result.")


async def _beginning(body: AsyncIterator[bytes], least: int) -> bytes:
    """The first bytes: at least so many, unless there are fewer, or fewer tell what it is."""
    found = bytearray()
    while len(found) < least and seen_type(bytes(found[:BITMAP_BEGINNING])) == OPAQUE:
        if (chunk := await anext(body, None)) is None:
            break
        found += chunk
    return bytes(found)


def _check_length(beginning: bytes, head: Head, most: int) -> None:
    if not beginning:
        raise UpstreamInvalidResponse("The upstream gives out nothing in place of this result.")
    if len(beginning) > (most if head.exact is None else head.exact):
        raise UpstreamInvalidResponse("The upstream gives out more of this result than it says, or than is passed on.")


def _host(base_url: str) -> str:
    return httpx2.URL(base_url).raw_host.decode("ascii").lower()
