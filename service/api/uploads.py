"""Bounded reading of submissions, whose image is in their body or at an `image_url`.

A body is read once it has been granted memory, so that many large uploads wait in the network instead of in memory. An
upload keeps its memory until its submission has been handled.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, Self

import structlog
from litestar.datastructures import Headers
from litestar.types import HTTPScope, Receive
from msgspec import Struct
from multipart import parse_options_header

from service.api.errors import BodyTimeout, ClientDisconnected
from service.api.form_parser import MAX_FORM_BYTES, Form, Identify, JsonForm, MultipartForm, UrlencodedForm, field_error
from service.api.upload_memory import Allocation, UploadMemory
from service.domain.errors import (
    ImageTooLarge,
    InvalidImage,
    MalformedRequest,
    UnsupportedCoding,
    UnsupportedMediaType,
)
from service.domain.image_urls import decode_data_url, is_data_url
from service.domain.media import BITMAP_SNIFF_BYTES, SNIFF_BYTES, check_bitmap_type, inspect_image
from service.telemetry.gauges import GaugeCollector, GaugeName
from service.usecases.ports import Image, ImageStream

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
JSON = "application/json"

_log = structlog.get_logger(__name__)

FORM_OVERHEAD_BYTES = 256 * 1024
"""Allowed for fields and framing beside the image."""


class _LongInspectionError(Exception):
    """The inspection of an image takes too long for the event loop."""


def _end_inspection() -> None:
    raise _LongInspectionError


class Upload(Struct, frozen=True):
    """An image, or the URL to fetch it from, and the other fields in their order: typed values of JSON, else texts."""

    source: Image | str
    fields: Sequence[tuple[str, Any]]
    is_typed: bool = False

    @property
    def image(self) -> Image:
        if isinstance(self.source, str):
            raise TypeError("the image is at a URL")
        return self.source


class UploadReader:
    """Reads the bodies of submissions and of small forms.

    One tenant may hold the part `tenant_share` of the `memory_bytes`, at least one largest upload. Callers that are not
    known yet have the memory of one largest upload beside it. No upload begins while
    `max_submissions` are under way, as many as the upstream takes; `max_waiting` wait.

    `idle_seconds` may pass between two chunks, `total_seconds` until the end of the body, `wait_seconds` until memory
    is granted. After `grace_seconds` a submission that is not small must average `min_bytes_per_second`. Only the time
    spent waiting for the client counts.
    """

    def __init__(
        self,
        *,
        max_image_bytes: int,
        max_image_pixels: int,
        memory_bytes: int = 64_000_000,
        tenant_share: float = 1,
        idle_seconds: float = 10,
        total_seconds: float = 120,
        wait_seconds: float = 10,
        max_submissions: int = 64,
        max_waiting: int = 256,
        grace_seconds: float = 5,
        min_bytes_per_second: float = 32 * 1024,
    ) -> None:
        self._max_image_bytes = max_image_bytes
        self._max_image_pixels = max_image_pixels
        self._limits = _TimeLimits(idle_seconds, total_seconds, grace_seconds, min_bytes_per_second)
        largest_bytes = min(max_image_bytes + FORM_OVERHEAD_BYTES, memory_bytes)
        self._turn = asyncio.Lock()
        self.memory = UploadMemory(
            memory_bytes,
            share_bytes=max(int(memory_bytes * tenant_share), largest_bytes),
            unknown_bytes=largest_bytes,
            wait_seconds=wait_seconds,
            max_submissions=max_submissions,
            max_waiting=max_waiting,
            share=tenant_share,
        )

    def register_metrics(self, gauges: GaugeCollector) -> None:
        gauges.register(GaugeName.UPLOAD_BYTES, lambda: self.memory.reserved_bytes)
        gauges.register(GaugeName.UPLOAD_LIMIT_BYTES, lambda: self.memory.limit_bytes)

    @asynccontextmanager
    async def receive(
        self,
        scope: HTTPScope,
        receive: Receive,
        *,
        part: str,
        url_field: str | None = None,
        owner: int | None,
        identify: Identify | None = None,
        has_digest: bool,
    ) -> AsyncIterator[Upload]:
        """Read a submission whose image is in the part `part`. Its memory stays reserved within the block.

        With a `url_field` the form may be urlencoded or JSON, and this field has the image or its URL instead. The
        memory of a tenant `owner` is reserved before the body is read. Otherwise `identify` returns the tenant from a
        field, or refuses the rest of the body by raising; bytes before that take the memory of unknown callers. Without
        `has_digest` the SHA-256 of the image stays empty: it takes 6 ms for 10 MB.
        Raises UnsupportedMediaType, ImageTooLarge, InvalidOptions, InvalidImage, MalformedRequest, Overloaded,
        ClientDisconnected.
        """
        headers = Headers.from_scope(scope)
        kind, boundary = _parse_form_type(headers)
        form: Form
        if kind == MULTIPART:
            form = MultipartForm(
                boundary,
                file_part=part,
                max_file_bytes=self._max_image_bytes,
                max_other_bytes=FORM_OVERHEAD_BYTES,
                owner=owner,
                identify=identify,
                has_digest=has_digest,
            )
        elif url_field and kind in {JSON, URLENCODED}:
            form = JsonForm(owner=owner) if kind == JSON else UrlencodedForm(owner=owner)
        else:
            other = f", or as {JSON} with {url_field}" if url_field else ""
            raise UnsupportedMediaType(f"Send the request as {MULTIPART}, with the image in the part {part}{other}.")
        length = _parse_content_length(headers)
        if length is not None:
            form.check_length(length)
        is_small = length is not None and length <= MAX_FORM_BYTES
        body = _BodyReader(receive, self._limits, has_min_rate=not is_small)
        size_bytes = (form.max_bytes if length is None else length) * form.memory_ratio
        chunk: bytes | None = b""
        stack = ExitStack()
        stack.callback(form.discard)
        allocation: Allocation | None = None
        try:
            async with body:
                while chunk is not None:
                    is_due = form.owner is not None or body.received_bytes > MAX_FORM_BYTES
                    if is_due and (allocation is None or allocation.owner != form.owner):
                        allocation = await self._reallocate(stack, allocation, form.owner, size_bytes)
                    if (chunk := await body.read_chunk()) is not None:
                        form.feed(chunk)
            if allocation:
                self.memory.shrink(allocation, body.received_bytes * form.memory_ratio)
            form.finish()
            source = await self._take_source(form, part, url_field, has_digest=has_digest)
            fields = [field for field in form.fields if field[0] != url_field]
            if allocation and not form.has_file:
                form.discard()
                self.memory.shrink(allocation, len(source.data) if isinstance(source, Image) else 0)
            yield Upload(source, fields, form.is_typed)
        finally:
            del chunk
            _close(stack)

    async def _reallocate(
        self, stack: ExitStack, previous: Allocation | None, owner: int | None, size_bytes: int
    ) -> Allocation:
        allocation = self.memory.request(owner, size_bytes)
        stack.callback(self.memory.shrink, allocation, 0)
        await self.memory.wait(allocation)
        if previous:
            self.memory.shrink(previous, 0)
        async with self._turn:
            # One upload begins in an iteration of the event loop: reads would wait behind the work of many.
            await asyncio.sleep(0)
        return allocation

    async def read_form(self, scope: HTTPScope, receive: Receive) -> list[tuple[str, str]]:
        """Read a form without a file, urlencoded or multipart.

        Raises UnsupportedMediaType, MalformedRequest, InvalidOptions, ClientDisconnected.
        """
        kind, boundary = _parse_form_type(Headers.from_scope(scope))
        body = _BodyReader(receive, self._limits)
        form: Form
        if kind == MULTIPART:
            form = MultipartForm(
                boundary, file_part=None, max_file_bytes=0, max_other_bytes=MAX_FORM_BYTES, has_digest=False
            )
        elif kind == URLENCODED:
            form = UrlencodedForm()
        else:
            raise UnsupportedMediaType(f"Send the form as {URLENCODED} or {MULTIPART}.")
        async with body:
            while (chunk := await body.read_chunk()) is not None:
                form.feed(chunk)
        form.finish()
        return form.fields

    @asynccontextmanager
    async def fetch(
        self, opening: AbstractAsyncContextManager[ImageStream], owner: int, *, has_digest: bool
    ) -> AsyncIterator[Image]:
        """Read an image from another server, within the bounds of an upload; `opening` opens it.

        Its memory is granted before its first byte is read, and stays reserved within the block. Raises what `opening`
        raises, ImageTooLarge, UnsupportedMediaType, InvalidImage and Overloaded.
        """
        stack = ExitStack()
        try:
            async with opening as stream:
                size_bytes = self._max_image_bytes if stream.length is None else stream.length
                self._check_size(size_bytes)
                allocation = await self._reallocate(stack, None, owner, size_bytes)
                data, sha256 = await self._read_stream(stream.chunks, has_digest=has_digest)
            self.memory.shrink(allocation, len(data))
            yield await self._inspect(data, sha256)
        finally:
            _close(stack)

    async def _read_stream(self, chunks: AsyncIterator[bytes], *, has_digest: bool) -> tuple[bytes, bytes]:
        """Return the content of a stream and its SHA-256."""
        digest, received = hashlib.sha256() if has_digest else None, bytearray()
        is_known = False
        async for chunk in chunks:
            received += chunk
            self._check_size(len(received))
            if not is_known and len(received) >= BITMAP_SNIFF_BYTES:
                check_bitmap_type(bytes(received[:SNIFF_BYTES]))  # the rest of what is no image is not read
                is_known = True
            if digest:
                digest.update(chunk)
        return bytes(received), digest.digest() if digest else b""

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self._max_image_bytes:
            raise ImageTooLarge(f"The image is larger than {self._max_image_bytes} bytes, which is the limit.")

    async def _take_source(self, form: Form, part: str, url_field: str | None, *, has_digest: bool) -> Image | str:
        """Return the image of a form, or the URL to fetch it from. Raises InvalidOptions unless it has just one."""
        urls = [value for name, value in form.fields if name == url_field and (value or form.is_typed)]
        if not urls:
            if not isinstance(form, MultipartForm):
                raise field_error(url_field or part, "is required: the URL of the image")
            if not form.has_file:
                other = f", or its URL in {url_field}" if url_field else ""
                raise field_error(part, f"is required: send the image as a file in this part{other}")
            if form.is_file_empty:
                detail = f"The file in the part {part} is empty: send the bytes of a PNG, JPEG or WebP image."
                raise InvalidImage(detail)
            return await self._inspect(*form.take_file())
        (url, *others), field = urls, url_field or ""
        if others:
            raise field_error(field, "is given more than once")
        if not form.is_file_empty:
            raise field_error(field, f"must not be given beside {part}")
        if not isinstance(url, str):
            raise field_error(field, "must be text")
        if not is_data_url(url):
            return url
        return await self._inspect(*await self._read_stream(_pace(decode_data_url(url)), has_digest=has_digest))

    async def _inspect(self, data: bytes, sha256: bytes) -> Image:
        try:
            info = inspect_image(data, _end_inspection)
        except _LongInspectionError:
            info = await asyncio.to_thread(inspect_image, data)
        if info.width * info.height > self._max_image_pixels:
            raise ImageTooLarge(
                f"The image has {info.width} x {info.height} = {info.width * info.height} pixels;"
                f" at most {self._max_image_pixels} are accepted."
            )
        return Image(data, sha256, info.media_type, info.width, info.height)


def _close(stack: ExitStack) -> None:
    try:
        stack.close()
    except Exception:  # noqa: BLE001 - must not turn the response to an accepted submission into an error
        _log.exception("upload.cleanup_error")


async def _pace(pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Yield pieces that are computed, each in an iteration of the event loop."""
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)


class _TimeLimits(Struct, frozen=True):
    idle_seconds: float
    total_seconds: float
    grace_seconds: float
    min_bytes_per_second: float


class _BodyReader:
    """Reads a body in chunks within its time limits; a context manager, which raises BodyTimeout.

    One timer serves the whole body: it follows the time limit only when it is due, since a timer of its own for each
    chunk takes longer than the chunk.
    """

    def __init__(self, receive: Receive, limits: _TimeLimits, *, has_min_rate: bool = False) -> None:
        self._receive = receive
        self._limits = limits
        self._has_min_rate = has_min_rate
        self._waited_seconds = 0.0
        self._has_more = True
        self.received_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._timeout = asyncio.timeout(None)
        self._due_at = math.inf
        self._check_at = math.inf
        self._timer: asyncio.Handle | None = None  # uvloop returns no TimerHandle for a delay under 0.5 ms

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer:
            self._timer.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            raise BodyTimeout("The body of the request did not arrive in time. Send it again.") from None

    async def read_chunk(self) -> bytes | None:
        """Return the next bytes, None after the last. Raises ClientDisconnected."""
        if not self._has_more:
            return None
        started_at = self._loop.time()
        self._due_at = started_at + self._chunk_timeout_seconds()
        if self._check_at > self._due_at:
            self._schedule_check()
        message = await self._receive()
        if message["type"] != "http.request":
            raise ClientDisconnected
        self._due_at = math.inf
        self._waited_seconds += self._loop.time() - started_at
        chunk: bytes = message.get("body", b"")
        self.received_bytes += len(chunk)
        self._has_more = message.get("more_body", False)
        return chunk

    def _schedule_check(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._check_at = self._due_at
        self._timer = self._loop.call_at(self._check_at, self._check_time)

    def _check_time(self) -> None:
        self._check_at = math.inf
        if (now := self._loop.time()) >= self._due_at:
            self._timeout.reschedule(now)
        elif self._due_at < math.inf:
            self._schedule_check()

    def _chunk_timeout_seconds(self) -> float:
        # Zero or less if the time is already over.
        limits, allowed = self._limits, self._limits.total_seconds
        if self._has_min_rate:
            allowed = min(allowed, limits.grace_seconds + self.received_bytes / limits.min_bytes_per_second)
        return min(limits.idle_seconds, allowed - self._waited_seconds)


def _parse_form_type(headers: Headers) -> tuple[str, str]:
    """Return the media type of a form and its boundary, empty if there is none. Raises UnsupportedMediaType."""
    refuse_content_encoding(headers)
    media_type, options = parse_options_header(headers.get("Content-Type", ""))
    boundary = options.get("boundary", "")
    if media_type == MULTIPART and not boundary:
        raise UnsupportedMediaType(f"The content type {MULTIPART} has no boundary.")
    return media_type, boundary


def refuse_content_encoding(headers: Headers) -> None:
    """Reject a compressed or otherwise encoded body (RFC 9110, 15.5.16). Raises UnsupportedCoding."""
    codings = ",".join(headers.getall("Content-Encoding", [])).split(",")
    if any(coding.strip().lower() not in {"", "identity"} for coding in codings):
        raise UnsupportedCoding("Send the body of the request without a Content-Encoding.")


def _parse_content_length(headers: Headers) -> int | None:
    """Return the length of the body in bytes, None if it is chunked. Raises MalformedRequest."""
    text = headers.get("Content-Length", "")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedRequest("The Content-Length is not a number.")
    return int(text) if text else None
