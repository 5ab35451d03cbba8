"""HTTP client for the files that tasks result in."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import blake2b
from typing import NoReturn

import httpx2
import structlog
from httpx2 import Headers
from msgspec import Struct
from opentelemetry.trace import Tracer

from service.clients.egress import AddressRefused, GuardedTransport, Resolver, resolve_host
from service.clients.network import USER_AGENT, OnCall, default_tls, local_error_reason
from service.crypto import AesSivCipher, UserKeyCipher
from service.domain.errors import (
    GatewayError,
    Overloaded,
    RangeNotSatisfiable,
    UpstreamInvalidResponse,
    UpstreamUnavailable,
)
from service.domain.hosts import DEFAULT_PRIVATE_DOMAINS, IpAddress, is_private_host, is_public, url_address
from service.domain.media import BITMAP_SNIFF_BYTES, OCTET_STREAM, SNIFF_BYTES, is_allowed_type, sniff_type
from service.domain.tasks import Artifact
from service.domain.tenants import Account
from service.telemetry import tracing
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics, preregister
from service.telemetry.redaction import replace_secret
from service.usecases.ports import ArtifactStream, Coverage, RangeRequest, TransferAborted

_log = structlog.get_logger(__name__)

RETRY_AFTER_SECONDS = 5.0
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_UNSATISFIED_RANGE = re.compile(r"bytes \*/[0-9]{1,18}")
_ETAG = re.compile(r'(?:W/)?"[!#-~]{0,200}"')
_HTTP_DATE = re.compile(r"[A-Za-z0-9 ,:+-]{1,64}")


class ArtifactMetadata(Struct, frozen=True, kw_only=True):
    """The description of a file in the head of a response.

    `length` is the Content-Length of this response; `exact_length` is also known from a Content-Range. `is_from_start`
    is True if the first byte of the response is the first of the file.
    """

    coverage: Coverage
    length: int | None
    exact_length: int | None
    is_from_start: bool
    content_range: str | None
    etag: str | None
    last_modified: str | None
    accept_ranges: str | None


def _parse_metadata(
    response: httpx2.Response, range_request: RangeRequest, max_bytes: int, *, is_recent: bool, user_key: str
) -> ArtifactMetadata:
    """Check the head of a response that is no redirect.

    Content-Type and Content-Encoding are ignored: stores repeat them for bytes that are plain; validators with the
    account's key are left out. A file that `is_recent` may not have arrived in its store yet. Raises
    UpstreamInvalidResponse, UpstreamUnavailable or RangeNotSatisfiable.
    """
    headers = response.headers
    coverage = _classify_status(response.status_code, headers, range_request, is_recent=is_recent)
    length, announced = None, headers.get("content-length", "")
    # Content-Length is void beside Transfer-Encoding (RFC 9112, 6.3).
    if announced.isascii() and announced.isdigit() and "transfer-encoding" not in headers:
        length = int(announced)
    exact, size, first, content_range = length, length, 0, None
    if coverage is Coverage.PARTIAL:
        content_range = headers.get("content-range", "")
        first, exact, size = _parse_content_range(content_range)
        if length not in {None, exact}:
            raise UpstreamInvalidResponse("The Content-Range of this result contradicts its Content-Length.")
    if max(size or 0, exact or 0) > max_bytes:
        raise UpstreamInvalidResponse(f"This result is larger than the limit of {max_bytes} bytes.")
    return ArtifactMetadata(
        coverage=coverage,
        length=length,
        exact_length=exact,
        is_from_start=first == 0,
        content_range=content_range,
        etag=_match_or_none(_ETAG, headers.get("etag"), user_key),
        last_modified=_match_or_none(_HTTP_DATE, headers.get("last-modified"), user_key),
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
                f"This result is not available yet (HTTP {status}): its task has just ended. Try again.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        case 401 | 403 | 404 | 410:
            raise UpstreamInvalidResponse(
                f"This result is no longer available (HTTP {status}): the upstream keeps results for a limited time."
            )
        case 408 | 425 | 429 | 500 | 502 | 503 | 504:
            raise UpstreamUnavailable(
                f"This result is temporarily unavailable (HTTP {status}). Try again.",
                retry_after=RETRY_AFTER_SECONDS,
            )
        case _:
            raise UpstreamInvalidResponse(f"The upstream responded with HTTP {status} instead of this result.")


def _parse_content_range(content_range: str) -> tuple[int, int, int | None]:
    """Return first byte, length, and the size of the whole file if known."""
    match = _RANGE.fullmatch(content_range)
    if match is None or int(match[1]) > int(match[2]):
        raise UpstreamInvalidResponse("The upstream returned a part of this result without a valid Content-Range.")
    first, last, size = int(match[1]), int(match[2]), None if match[3] == "*" else int(match[3])
    return first, last - first + 1, size


def _match_or_none(pattern: re.Pattern[str], text: str | None, user_key: str = "") -> str | None:
    is_shown = text and pattern.fullmatch(text) and replace_secret(user_key, "", text) == text
    return text if is_shown else None


MAX_CACHED_TYPES = 10_000
"""Files whose type is cached, so that a partial fetch need not read the start of the file again."""
MAX_REDIRECTS = 5
_REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})


class ArtifactOperation(StrEnum):
    FETCH = "fetch"


class FetchOutcome(StrEnum):
    DONE = "done"
    CANCELLED = "stopped"
    """The reader stopped early."""
    INVALID = "invalid"
    UNREACHABLE = "unreachable"
    ABORTED = "transfer-aborted"


class FetchTimeouts(Struct, frozen=True):
    """Limits for connecting, for the first byte including all redirects, and for each further chunk."""

    connect_seconds: float = 5
    first_byte_seconds: float = 30
    idle_seconds: float = 30


class ArtifactClient:
    """Client for results of at most `max_bytes`, each over connections of its own.

    An address that is not public is allowed only for host and port of the account's own upstream, and only if that is
    a private address or a name in one of the `private_domains`. `user_keys` decrypts the accounts' keys, which no
    header of a result shows, and `links` the URLs that contain one.
    """

    def __init__(
        self,
        upstream_url: str,
        *,
        max_bytes: int,
        on_call: OnCall,
        private_domains: Sequence[str] = DEFAULT_PRIVATE_DOMAINS,
        user_keys: UserKeyCipher | None = None,
        links: AesSivCipher | None = None,
        tls: ssl.SSLContext | None = None,
        resolver: Resolver = resolve_host,
        timeouts: FetchTimeouts | None = None,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self._upstream_url = upstream_url
        self._max_bytes = max_bytes
        self._on_call = on_call
        self._private_domains = private_domains
        self._user_keys = user_keys
        self._links = links
        self._tls = tls or default_tls()
        self._resolver = resolver
        self._timeouts = timeouts or FetchTimeouts()
        self._tracer = tracer
        self._types: OrderedDict[bytes, str] = OrderedDict()

    @staticmethod
    def register_metrics(metrics: Metrics) -> None:
        preregister(metrics.upstream_requests, ArtifactOperation, FetchOutcome)

    @asynccontextmanager
    async def fetch(
        self, account: Account | None, artifact: Artifact, range_request: RangeRequest, is_recent: bool = False
    ) -> AsyncIterator[ArtifactStream]:
        """Fetch a result; the connection stays open within the block.

        Raises UpstreamInvalidResponse, UpstreamUnavailable, RangeNotSatisfiable or Overloaded on entry.
        """
        # A public name may resolve to any address: only a host that is known to be private may be at a private one.
        own = url_address(account.base_url or self._upstream_url) if account else None
        own = own if own and is_private_host(own[0], self._private_domains) else None
        user_key = self._user_keys.decrypt(account) if account and self._user_keys else None
        url = self._decrypt_url(artifact)

        def is_allowed(host: str, port: int, ip: IpAddress) -> bool:
            return is_public(ip) or (host, port) == own

        started_at = time.monotonic()
        fetch = _Fetch(
            range_request=range_request,
            is_recent=is_recent,
            max_bytes=self._max_bytes,
            timeouts=self._timeouts,
            tracer=self._tracer,
            types=self._types,
            user_key=user_key.decode() if user_key else "",
        )
        try:
            async with (
                GuardedTransport(is_allowed, tls=self._tls, resolver=self._resolver) as transport,
                fetch.exit_stack,
            ):
                yield await fetch.start(transport, Artifact(artifact.name, url))
        finally:
            self._on_call(ArtifactOperation.FETCH, fetch.outcome, time.monotonic() - started_at)

    def _decrypt_url(self, artifact: Artifact) -> str:
        if artifact.encrypted_url is None:
            return artifact.url
        url = self._links and self._links.decrypt(artifact.encrypted_url)
        if not url:
            raise UpstreamInvalidResponse("The URL of this result can't be decrypted any more.")
        return url.decode()


@dataclass(kw_only=True)
class _Fetch:
    """One fetch; its responses are closed with `exit_stack`. `types` has media types by the hash of URL and ETag."""

    range_request: RangeRequest
    is_recent: bool
    max_bytes: int
    timeouts: FetchTimeouts
    tracer: Tracer
    types: OrderedDict[bytes, str]
    user_key: str
    host: str = ""  # only the host is logged: path and query may grant access
    exit_stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    outcome: FetchOutcome = FetchOutcome.CANCELLED

    async def start(self, transport: GuardedTransport, artifact: Artifact) -> ArtifactStream:
        """Fetch up to the first bytes and check them."""
        try:
            with upstream_wait():
                async with asyncio.timeout(self.timeouts.first_byte_seconds):
                    return await self._open_stream(transport, artifact)
        except GatewayError as error:
            self._record_failure(error, error)
            raise
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise self._record_failure(_to_gateway_error(error), error) from error

    def _record_failure(self, failure: GatewayError, cause: Exception) -> GatewayError:
        # Not in `start`: a variable there would form a cycle error -> traceback -> frame, which keeps the first bytes.
        self.outcome = _OUTCOME_OF_ERROR[type(failure)]
        if self.outcome is not FetchOutcome.DONE:
            _log.warning("artifact.fetch_failed", host=self.host, error=type(cause).__name__, detail=str(cause))
        return failure

    async def _open_stream(self, transport: GuardedTransport, artifact: Artifact) -> ArtifactStream:
        response, metadata = await self._request_file(transport, artifact.url, self.range_request)
        body = await self.exit_stack.enter_async_context(aclosing(response.aiter_raw()))
        first_bytes, media_type = b"", OCTET_STREAM
        if metadata.coverage is Coverage.NOT_MODIFIED:
            self.outcome = FetchOutcome.DONE
        else:
            first_bytes = await _read_first_bytes(body, SNIFF_BYTES if metadata.is_from_start else 1)
            if not first_bytes:
                raise UpstreamInvalidResponse("The upstream returned an empty file for this result.")
            if len(first_bytes) > (self.max_bytes if metadata.exact_length is None else metadata.exact_length):
                raise UpstreamInvalidResponse("This result is longer than the upstream announced, or than the limit.")
            media_type = await self._determine_type(transport, artifact, metadata, first_bytes)
        chunks = await self.exit_stack.enter_async_context(aclosing(self._stream_chunks(first_bytes, body, metadata)))
        return ArtifactStream(
            name=artifact.name,
            coverage=metadata.coverage,
            media_type=media_type,
            chunks=chunks,
            length=metadata.length,
            content_range=metadata.content_range,
            etag=metadata.etag,
            last_modified=metadata.last_modified,
            accept_ranges=metadata.accept_ranges,
        )

    async def _determine_type(
        self, transport: GuardedTransport, artifact: Artifact, metadata: ArtifactMetadata, first_bytes: bytes
    ) -> str:
        """Return the type of a file by its first bytes, fetching them if this part lacks them.

        Raises UpstreamInvalidResponse unless it is an image type allowed for this artifact.
        """
        cache_key = blake2b(f"{artifact.url}\n{metadata.etag}".encode(), digest_size=16).digest()
        media_type = sniff_type(first_bytes) if metadata.is_from_start else self.types.get(cache_key)
        if metadata.coverage is Coverage.PARTIAL and media_type in {None, OCTET_STREAM}:
            start = await self._fetch_first_bytes(transport, artifact)
            if metadata.is_from_start and not start.startswith(first_bytes[: len(start)]):
                raise UpstreamInvalidResponse("The upstream changed this result while it was fetched.")
            media_type = sniff_type(start)
        if media_type is None or not is_allowed_type(artifact.name, media_type):
            raise UpstreamInvalidResponse("The upstream returned something other than an image for this result.")
        self.types[cache_key] = media_type
        if len(self.types) > MAX_CACHED_TYPES:
            self.types.popitem(last=False)
        return media_type

    async def _fetch_first_bytes(self, transport: GuardedTransport, artifact: Artifact) -> bytes:
        start = RangeRequest(range=f"bytes=0-{SNIFF_BYTES - 1}")
        response, metadata = await self._request_file(transport, artifact.url, start)
        try:
            async with aclosing(response.aiter_raw()) as body:
                return await _read_first_bytes(body, SNIFF_BYTES) if metadata.is_from_start else b""
        finally:
            await response.aclose()

    async def _request_file(
        self, transport: GuardedTransport, file_url: str, range_request: RangeRequest
    ) -> tuple[httpx2.Response, ArtifactMetadata]:
        """Follow redirects to a file; the transport checks the address of every hop."""
        url = httpx2.URL(file_url)
        conditions = {
            "Range": range_request.range,
            "If-Range": range_request.if_range,
            "If-None-Match": range_request.if_none_match,
            "If-Modified-Since": range_request.if_modified_since,
        }
        headers = _HEADERS | {name: value for name, value in conditions.items() if value}
        connect_seconds = self.timeouts.connect_seconds
        timeouts = {"connect": connect_seconds, "write": connect_seconds, "read": None, "pool": None}
        for resend_count in range(1 + MAX_REDIRECTS):
            # No trace headers are sent to the upstream's servers.
            with tracing.start_client_span(self.tracer, "GET", str(url), resend_count=resend_count) as span:
                self.host = url.host
                request = httpx2.Request("GET", url, headers=headers, extensions={"timeout": timeouts})
                response = await transport.handle_async_request(request)
                self.exit_stack.push_async_callback(response.aclose)
                tracing.record_status(span, response.status_code)
            if response.status_code not in _REDIRECT_STATUSES:
                metadata = _parse_metadata(
                    response, range_request, self.max_bytes, is_recent=self.is_recent, user_key=self.user_key
                )
                return response, metadata
            target = url.join(response.headers.get("location", ""))
            await response.aclose()
            if target.scheme != "https" and (url.scheme == "https" or target.scheme != "http"):
                raise UpstreamInvalidResponse("The upstream redirects this result to an insecure URL.")
            url = target
        raise UpstreamInvalidResponse(f"The upstream redirects more than {MAX_REDIRECTS} times for this result.")

    async def _stream_chunks(
        self, first_bytes: bytes, body: AsyncIterator[bytes], metadata: ArtifactMetadata
    ) -> AsyncGenerator[bytes]:
        max_bytes = self.max_bytes if metadata.exact_length is None else metadata.exact_length
        received, chunk = 0, first_bytes or None
        while chunk is not None:
            received += len(chunk)
            if received > max_bytes:
                self._abort(f"it is longer than {max_bytes} bytes")
            yield chunk
            try:
                with upstream_wait():
                    async with asyncio.timeout(self.timeouts.idle_seconds):
                        chunk = await anext(body, None)
            except (httpx2.HTTPError, OSError) as error:
                self._abort(type(error).__name__)
        if metadata.exact_length is not None and received < metadata.exact_length:
            self._abort(f"it has {received} of {metadata.exact_length} bytes")
        self.outcome = FetchOutcome.DONE

    def _abort(self, reason: str) -> NoReturn:
        self.outcome = FetchOutcome.ABORTED
        _log.warning("artifact.transfer_aborted", host=self.host, detail=reason)
        raise TransferAborted(reason)


_HEADERS = {"User-Agent": USER_AGENT, "Accept": "image/*", "Accept-Encoding": "identity"}
_OUTCOME_OF_ERROR: Mapping[type[GatewayError], FetchOutcome] = {
    UpstreamInvalidResponse: FetchOutcome.INVALID,
    UpstreamUnavailable: FetchOutcome.UNREACHABLE,
    Overloaded: FetchOutcome.UNREACHABLE,
    RangeNotSatisfiable: FetchOutcome.DONE,
}


def _to_gateway_error(error: Exception) -> GatewayError:
    """Return the error for the tenant, without any address, of an error before the first byte."""
    if local_error_reason(error):
        return Overloaded("The gateway can't fetch results at the moment. Try again.", retry_after=RETRY_AFTER_SECONDS)
    if isinstance(error, AddressRefused):
        return UpstreamInvalidResponse("The URL of this result leads to an address that is not allowed.")
    if isinstance(error, httpx2.ConnectError | httpx2.TimeoutException | TimeoutError):
        return UpstreamUnavailable(
            "The server of this result is unreachable at the moment. Try again.",
            retry_after=RETRY_AFTER_SECONDS,
        )
    return UpstreamInvalidResponse("The connection was lost before the first byte of this result.")


async def _read_first_bytes(body: AsyncIterator[bytes], min_bytes: int) -> bytes:
    """Read at least `min_bytes`, or fewer if they already show the type."""
    data = bytearray()
    while len(data) < min_bytes and sniff_type(bytes(data[:BITMAP_SNIFF_BYTES])) == OCTET_STREAM:
        if (chunk := await anext(body, None)) is None:
            break
        data += chunk
    return bytes(data)
