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
from service.clients.egress import AddressRefused, GuardedTransport, IpAddress, Resolver, is_public, resolve_host
from service.clients.http import local_error_reason
from service.clients.vendor_api import unmask_key
from service.domain.errors import (
    GatewayError,
    Overloaded,
    RangeNotSatisfiable,
    UpstreamInvalidResponse,
    UpstreamUnavailable,
)
from service.domain.media import BITMAP_SNIFF_BYTES, OCTET_STREAM, SNIFF_BYTES, is_allowed_type, sniff_type
from service.domain.tasks import Artifact, Cipher
from service.domain.tenants import Account
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.ports import ArtifactStream, Coverage, RangeRequest, TransferAborted

RETRY_AFTER_SECONDS = 5.0


_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")


_UNSATISFIED_RANGE = re.compile(r"bytes \*/[0-9]{1,18}")


_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,200}"')


_HTTP_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")


class ArtifactMetadata(Struct, frozen=True, kw_only=True):
    """A file that can be passed on, as far as its head tells.

    `length` is of what is given, `exact` says the same where no Content-Length does. `from_start` says that the first
    byte given is the first of the file.
    """

    coverage: Coverage
    length: int | None
    exact_length: int | None
    is_from_start: bool
    content_range: str | None
    etag: str | None
    last_modified: str | None
    accept_ranges: str | None


def parse_metadata(
    status: int, headers: Headers, range_request: RangeRequest, *, max_bytes: int, is_recent: bool = False
) -> ArtifactMetadata:
    """What an answer that is no redirect gives of a file, of at most so many bytes.

    Labels are ignored: a Content-Encoding too, which stores replay though the bytes are plain. A `recent` file may not
    have arrived in its store yet.

    Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable.
    """
    portion = _classify_status(status, headers, range_request, is_recent=is_recent)
    # Beside a Transfer-Encoding, a Content-Length means nothing.
    length = None if "transfer-encoding" in headers else _parse_length(headers.get("content-length"))
    exact, size, first, content_range = length, length, 0, None
    if portion is Coverage.PARTIAL:
        content_range = headers.get("content-range", "")
        first, exact, size = _parse_content_range(content_range)
        if length not in {None, exact}:
            raise UpstreamInvalidResponse("The upstream gives out another range of this result than it says.")
    if max(size or 0, exact or 0) > max_bytes:
        raise UpstreamInvalidResponse(f"This result is larger than the {max_bytes} bytes that are passed on.")
    return ArtifactMetadata(
        coverage=portion,
        length=length,
        exact_length=exact,
        is_from_start=first == 0,
        content_range=content_range,
        etag=_match_or_none(_ETAG, headers.get("etag")),
        last_modified=_match_or_none(_HTTP_DATE, headers.get("last-modified")),
        accept_ranges="bytes" if headers.get("accept-ranges", "").lower() == "bytes" else None,
    )


def _classify_status(status: int, headers: Headers, range_request: RangeRequest, *, is_recent: bool) -> Coverage:
    match status:
        case 200:
            return Coverage.FULL
        case 206 if range_request.range:
            return Coverage.PARTIAL
        case 304 if range_request.if_none_match or range_request.if_modified_since:
            return Coverage.NOT_MODIFIED
        case 416 if range_request.range:
            raise RangeNotSatisfiable(
                "This result has no bytes in that range.",
                content_range=_match_or_none(_UNSATISFIED_RANGE, headers.get("content-range")),
            )
        case 403 | 404 if is_recent:
            raise UpstreamUnavailable(
                f"The upstream does not give out this result yet (HTTP {status}): its task has just ended. Try again.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        case 401 | 403 | 404 | 410:
            raise UpstreamInvalidResponse(
                f"The upstream no longer gives out this result (HTTP {status}): it keeps results for a while only."
            )
        case 408 | 425 | 429 | 500 | 502 | 503 | 504:
            raise UpstreamUnavailable(
                f"The upstream can't give out this result just now (HTTP {status}). Try again.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        case _:
            raise UpstreamInvalidResponse(f"The upstream answered with HTTP {status} in place of this result.")


def _parse_content_range(content_range: str) -> tuple[int, int, int | None]:
    """The first byte of a range, how many it has, and how many the whole has if that is known."""
    found = _RANGE.fullmatch(content_range)
    if found is None or int(found[1]) > int(found[2]):
        raise UpstreamInvalidResponse("The upstream gives out a part of this result without saying which.")
    first, last, size = int(found[1]), int(found[2]), None if found[3] == "*" else int(found[3])
    return first, last - first + 1, size


def _parse_length(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() else None


def _match_or_none(pattern: re.Pattern[str], text: str | None) -> str | None:
    """What is passed on to others has the form it must have, or is left out."""
    return text if text and pattern.fullmatch(text) else None


_log = structlog.get_logger(__name__)


MAX_CONCURRENT_FETCHES = 100
"""So many fetches of a process are under way at once; more are refused, since each holds two connections or three."""


MAX_CACHED_TYPES = 10_000
"""So many files are remembered by their types, so that a part of one is not preceded by its beginning again."""


MAX_REDIRECTS = 5


_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})


OnCall = Callable[[StrEnum, StrEnum, float], None]
"""Is told of every fetch: its operation, its outcome, and the seconds it took."""


class ArtifactOperation(StrEnum):
    """What this client does."""

    FETCH = "fetch"


class FetchOutcome(StrEnum):
    """What became of a fetch."""

    DONE = "done"
    CANCELLED = "stopped"
    """The reader wanted no more of it."""
    INVALID = "invalid"
    UNREACHABLE = "unreachable"
    ABORTED = "transfer-aborted"


class FetchTimeouts(Struct, frozen=True):
    """How many seconds a connection may take, the first byte with all redirects before it, and each further chunk."""

    connect_seconds: float = 5
    first_byte_seconds: float = 30
    idle_seconds: float = 30


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
        on_call: OnCall,
        user_keys: Cipher | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver = resolve_host,
        timeouts: FetchTimeouts | None = None,
        tracer: Tracer = NOOP_TRACER,
    ) -> None:
        self._upstream_url = upstream_url
        self._max_bytes = max_bytes
        self._on_call = on_call
        self._user_keys = user_keys
        self._tls = tls or httpx2.create_ssl_context()
        self._resolver = resolver
        self._timeouts = timeouts or FetchTimeouts()
        self._tracer = tracer
        self._type_cache = _TypeCache()
        self._active_fetches = 0

    @staticmethod
    def register_metrics(metrics: Metrics) -> None:
        """Begin all outcomes of fetches at zero."""
        metrics.preregister_upstream_calls({ArtifactOperation.FETCH: FetchOutcome})

    @asynccontextmanager
    async def fetch(
        self, account: Account | None, artifact: Artifact, range_request: RangeRequest, *, is_recent: bool = False
    ) -> AsyncIterator[ArtifactStream]:
        """A result, from its server as long as the block lasts; it may not be there yet if it is `recent`.

        Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable or Overloaded before the block.
        """
        if self._active_fetches >= MAX_CONCURRENT_FETCHES:
            raise Overloaded("Too many results are being fetched at the moment. Try again.", retry_after=1)
        own = _url_host(account.base_url or self._upstream_url) if account else None
        user_key = self._user_keys.decrypt(account.user_key) if account and self._user_keys else None
        url = unmask_key(user_key.decode(), artifact.url) if user_key else artifact.url

        def allow(host: str, ip: IpAddress) -> bool:
            return host == own or is_public(ip)

        started = time.monotonic()
        fetch = _Fetch(
            range_request, self._max_bytes, self._timeouts, self._tracer, self._type_cache, is_recent=is_recent
        )
        self._active_fetches += 1
        try:
            async with GuardedTransport(allow, tls=self._tls, resolver=self._resolver) as transport, fetch.exit_stack:
                yield await fetch.start(transport, Artifact(artifact.name, url))
        finally:
            self._active_fetches -= 1
            self._on_call(ArtifactOperation.FETCH, fetch.outcome, time.monotonic() - started)


class _TypeCache:
    """The media types of files whose first bytes were seen, by address and version."""

    def __init__(self) -> None:
        self._types: OrderedDict[bytes, str] = OrderedDict()

    def put(self, url: str, etag: str | None, media_type: str) -> None:
        """Remember the type of a file."""
        self._types[_cache_key(url, etag)] = media_type
        if len(self._types) > MAX_CACHED_TYPES:
            self._types.popitem(last=False)

    def get(self, url: str, etag: str | None) -> str | None:
        """Return the type of a file, if it is remembered."""
        return self._types.get(_cache_key(url, etag))


def _cache_key(url: str, etag: str | None) -> bytes:
    return blake2b(f"{url}\n{etag}".encode(), digest_size=16).digest()


class _Fetch:
    """One fetch. What it opens is closed with `opened`."""

    def __init__(
        self,
        range_request: RangeRequest,
        max_bytes: int,
        timeouts: FetchTimeouts,
        tracer: Tracer,
        type_cache: _TypeCache,
        *,
        is_recent: bool,
    ) -> None:
        self._range_request = range_request
        self._type_cache = type_cache
        self._is_recent = is_recent
        self._max_bytes = max_bytes
        self._timeouts = timeouts
        self._tracer = tracer
        self._host = ""  # the rest of an address may be what gives access to the file, and is not logged
        self.exit_stack = AsyncExitStack()
        self.outcome = FetchOutcome.CANCELLED

    async def start(self, transport: GuardedTransport, artifact: Artifact) -> ArtifactStream:
        """Fetch until the first bytes are there and found good. Raises what the reader is told instead."""
        try:
            with _map_transport_errors(), upstream_wait():
                async with asyncio.timeout(self._timeouts.first_byte_seconds):
                    return await self._open_stream(transport, artifact)
        except GatewayError as fault:
            self.outcome = _OUTCOME_OF_ERROR[type(fault)]
            if self.outcome is not FetchOutcome.DONE:
                why = fault.__cause__ or fault
                _log.warning("artifact.fetch_failed", host=self._host, error=type(why).__name__, detail=str(why))
            raise

    async def _open_stream(self, transport: GuardedTransport, artifact: Artifact) -> ArtifactStream:
        response, head = await self._request_metadata(transport, artifact, self._range_request)
        body = await self.exit_stack.enter_async_context(aclosing(response.aiter_raw()))
        beginning, media_type = b"", OCTET_STREAM
        if head.coverage is Coverage.NOT_MODIFIED:
            self.outcome = FetchOutcome.DONE
        else:
            beginning = await _read_first_bytes(body, SNIFF_BYTES if head.is_from_start else 1)
            _check_length(beginning, head, self._max_bytes)
            media_type = await self._determine_type(transport, artifact, head, beginning)
        chunks = await self.exit_stack.enter_async_context(aclosing(self._stream_chunks(beginning, body, head)))
        return ArtifactStream(
            name=artifact.name,
            coverage=head.coverage,
            media_type=media_type,
            chunks=chunks,
            length=head.length,
            content_range=head.content_range,
            etag=head.etag,
            last_modified=head.last_modified,
            accept_ranges=head.accept_ranges,
        )

    async def _request_metadata(
        self, transport: GuardedTransport, artifact: Artifact, range_request: RangeRequest
    ) -> tuple[httpx2.Response, ArtifactMetadata]:
        response = await self._follow_redirects(transport, httpx2.URL(artifact.url), range_request)
        return response, parse_metadata(
            response.status_code, response.headers, range_request, max_bytes=self._max_bytes, is_recent=self._is_recent
        )

    async def _determine_type(
        self, transport: GuardedTransport, artifact: Artifact, metadata: ArtifactMetadata, first_bytes: bytes
    ) -> str:
        """Return the type of a file by its first bytes. They are fetched for a part that lacks them.

        Raises UpstreamInvalidResponse for what is no image, or not one that the result may be.
        """
        found = sniff_type(first_bytes) if metadata.is_from_start else self._type_cache.get(artifact.url, metadata.etag)
        if metadata.coverage is Coverage.PARTIAL and found in {None, OCTET_STREAM}:
            first = await self._fetch_first_bytes(transport, artifact)
            if metadata.is_from_start and not first.startswith(first_bytes[: len(first)]):
                raise UpstreamInvalidResponse("The upstream changed this result while it was fetched.")
            found = sniff_type(first)
        if found is None or not is_allowed_type(artifact.name, found):
            raise UpstreamInvalidResponse(
                "The upstream gives out something else than an image in place of this result."
            )
        self._type_cache.put(artifact.url, metadata.etag, found)
        return found

    async def _fetch_first_bytes(self, transport: GuardedTransport, artifact: Artifact) -> bytes:
        response, head = await self._request_metadata(
            transport, artifact, RangeRequest(range=f"bytes=0-{SNIFF_BYTES - 1}")
        )
        try:
            async with aclosing(response.aiter_raw()) as body:
                return await _read_first_bytes(body, SNIFF_BYTES) if head.is_from_start else b""
        finally:
            await response.aclose()

    async def _follow_redirects(
        self, transport: GuardedTransport, url: httpx2.URL, range_request: RangeRequest
    ) -> httpx2.Response:
        """The answer at the end of the redirects, each of which is checked by the transport like the first address."""
        for resent in range(1 + MAX_REDIRECTS):
            # As with all that is the upstream's, the context of the trace is not passed on.
            with self._tracer.start_client_span("GET", str(url), resend_count=resent) as span:
                response = await self._send_request(transport, url, range_request)
                span.record_response(response.status_code)
            if response.status_code not in _REDIRECT_STATUSES:
                return response
            target = url.join(response.headers.get("location", ""))
            await response.aclose()
            if target.scheme != "https" and (url.scheme == "https" or target.scheme != "http"):
                raise UpstreamInvalidResponse("The upstream sends on to an address that is less safe than its own.")
            url = target
        raise UpstreamInvalidResponse(f"The upstream sends on more than {MAX_REDIRECTS} times for this result.")

    async def _send_request(
        self, transport: GuardedTransport, url: httpx2.URL, range_request: RangeRequest
    ) -> httpx2.Response:
        self._host = url.host
        conditions = {
            "Range": range_request.range,
            "If-Range": range_request.if_range,
            "If-None-Match": range_request.if_none_match,
            "If-Modified-Since": range_request.if_modified_since,
        }
        patience = {
            "connect": self._timeouts.connect_seconds,
            "write": self._timeouts.connect_seconds,
            "read": None,
            "pool": None,
        }
        request = httpx2.Request(
            "GET",
            url,
            headers=_HEADERS | {name: value for name, value in conditions.items() if value},
            extensions={"timeout": patience},
        )
        response = await transport.handle_async_request(request)
        self.exit_stack.push_async_callback(response.aclose)
        return response

    async def _stream_chunks(
        self, first_bytes: bytes, body: AsyncIterator[bytes], metadata: ArtifactMetadata
    ) -> AsyncGenerator[bytes]:
        most = self._max_bytes if metadata.exact_length is None else metadata.exact_length
        given, chunk = 0, first_bytes or None
        while chunk is not None:
            given += len(chunk)
            if given > most:
                self._abort(f"it is longer than {most} bytes")
            yield chunk
            try:
                with upstream_wait():
                    async with asyncio.timeout(self._timeouts.idle_seconds):
                        chunk = await anext(body, None)
            except (httpx2.HTTPError, OSError) as error:
                self._abort(type(error).__name__)
        if metadata.exact_length is not None and given < metadata.exact_length:
            self._abort(f"it has {given} of {metadata.exact_length} bytes")
        self.outcome = FetchOutcome.DONE

    def _abort(self, reason: str) -> NoReturn:
        self.outcome = FetchOutcome.ABORTED
        _log.warning("artifact.transfer_aborted", host=self._host, detail=reason)
        raise TransferAborted(reason)


_HEADERS = {
    "User-Agent": f"imaging-gateway/{__version__}",
    "Accept": "image/*",
    "Accept-Encoding": "identity",
}


_OUTCOME_OF_ERROR: Mapping[type[GatewayError], FetchOutcome] = {
    UpstreamInvalidResponse: FetchOutcome.INVALID,
    UpstreamUnavailable: FetchOutcome.UNREACHABLE,
    Overloaded: FetchOutcome.UNREACHABLE,
    RangeNotSatisfiable: FetchOutcome.DONE,
}


@contextmanager
def _map_transport_errors() -> Iterator[None]:
    """Say to the reader what went wrong on the way to the first byte, without any address."""
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise _to_gateway_error(error) from error


def _to_gateway_error(error: Exception) -> GatewayError:
    if local_error_reason(error):
        return Overloaded("The gateway can't fetch results just now. Try again.", retry_after=RETRY_AFTER_SECONDS)
    if isinstance(error, AddressRefused):
        return UpstreamInvalidResponse("The upstream keeps this result where the gateway does not fetch from.")
    if isinstance(error, httpx2.ConnectError | httpx2.TimeoutException | TimeoutError):
        return UpstreamUnavailable(
            "Where the upstream keeps this result can't be reached just now. Try again.",
            retry_after=RETRY_AFTER_SECONDS,
        )
    return UpstreamInvalidResponse("The upstream broke off before the first byte of this result.")


async def _read_first_bytes(body: AsyncIterator[bytes], min_bytes: int) -> bytes:
    """The first bytes: at least so many, unless there are fewer, or fewer tell what it is."""
    found = bytearray()
    while len(found) < min_bytes and sniff_type(bytes(found[:BITMAP_SNIFF_BYTES])) == OCTET_STREAM:
        if (chunk := await anext(body, None)) is None:
            break
        found += chunk
    return bytes(found)


def _check_length(first_bytes: bytes, metadata: ArtifactMetadata, max_bytes: int) -> None:
    if not first_bytes:
        raise UpstreamInvalidResponse("The upstream gives out nothing in place of this result.")
    if len(first_bytes) > (max_bytes if metadata.exact_length is None else metadata.exact_length):
        raise UpstreamInvalidResponse("The upstream gives out more of this result than it says, or than is passed on.")


def _url_host(base_url: str) -> str:
    return httpx2.URL(base_url).raw_host.decode("ascii").lower()
