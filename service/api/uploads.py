"""Bounded reading of multipart uploads.

A body is read once it has been granted memory, so that many large uploads wait in the network instead of in memory. An
upload keeps its memory until its submission has been handled.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from encodings.aliases import aliases
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl

import structlog
from litestar.datastructures import Headers
from litestar.types import HTTPScope, Receive
from msgspec import Struct
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from service.api.errors import BodyTimeout, ClientDisconnected
from service.api.upload_memory import Allocation, UploadMemory
from service.domain.errors import (
    FieldError,
    ImageTooLarge,
    InvalidImage,
    InvalidOptions,
    MalformedRequest,
    UnsupportedCoding,
    UnsupportedMediaType,
)
from service.domain.media import inspect_image
from service.telemetry.gauges import GaugeCollector, GaugeName
from service.usecases.ports import Image

MAX_FIELDS = 64
MAX_NAME_CHARS = 128
MAX_FIELD_BYTES = 64 * 1024
MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
Identify = Callable[[str, str], int | None]
"""Returns the id of the tenant that a field (name, value) names, if it does. What it raises ends the reading."""

_FILENAME_PARAMETER = re.compile(r";\s*filename\*?\s*=", re.IGNORECASE)
_MAX_PADDING = 1_000
_PARTS_TO_JOIN = 256
_REFUSED_TRANSFER_ENCODINGS = frozenset({"base64", "quoted-printable", "x-uuencode"})
_CHARSETS = frozenset(
    {
        *("ascii", "utf_8", "utf_16", "utf_16_be", "utf_16_le", "gbk", "gb2312", "gb18030", "big5", "big5hkscs"),
        *("euc_jp", "iso2022_jp", "shift_jis", "cp932", "euc_kr", "cp949", "latin_1", "koi8_r", "koi8_u", "cp874"),
        *(f"iso8859_{part}" for part in (*range(2, 12), *range(13, 17))),
        *(f"cp{page}" for page in range(1250, 1259)),
    }
)
"""The codecs of fields. Python has others that are no charsets, and would import a module of any name given."""


class MultipartForm:
    """Incremental parser of a multipart form: feed every chunk, then finish.

    The only file accepted is of at most `max_file_bytes` in the part `file_part` (None: no file); everything else
    together may be `max_other_bytes`. Errors are raised as early as possible. `identify` is called with each complete
    field until it returns the `owner`, and may raise too.
    """

    def __init__(
        self,
        boundary: str,
        *,
        file_part: str | None,
        max_file_bytes: int,
        max_other_bytes: int,
        owner: int | None = None,
        identify: Identify | None = None,
        has_digest: bool,
    ) -> None:
        # Latin-1 decodes any header, so a file name in another encoding does no harm; field names are decoded below.
        # Strict parsing would depend on how the body is split into chunks.
        self._parser: Any = _PaddingTolerantParser(boundary, header_charset="latin-1")
        self._file_part = file_part
        self._max_file_bytes = max_file_bytes
        self._max_other_bytes = max_other_bytes
        self._identify = identify
        self._received_bytes = 0
        self._digest = hashlib.sha256() if has_digest else None
        self._name: str | None = None
        self._charset = ""
        self._value = bytearray()
        # The file in parts: a growing buffer would be copied again and again. Small ones are joined from time to time,
        # since each has an overhead of some 40 bytes.
        self._file: list[bytes] = []
        self._latest_parts: list[bytes] = []
        self._file_bytes = 0
        self._has_file = False
        self.owner = owner
        self.fields: list[tuple[str, str]] = []

    def feed(self, chunk: bytes) -> None:
        """Parse the next bytes. Raises MalformedRequest, InvalidOptions, ImageTooLarge."""
        if not chunk:
            return
        self._received_bytes += len(chunk)
        try:
            for event in self._parser.parse(chunk):
                if event is None:
                    self._end_part()
                elif isinstance(event, MultipartSegment):
                    self._begin_part(event)
                else:
                    self._append_content(event)
        except MultipartError as error:
            error.__traceback__ = None  # the parser holds its error
            raise MalformedRequest(f"The multipart form can't be read: {error.args[0]}.") from None
        if self._received_bytes - self._file_bytes > self._max_other_bytes:
            raise MalformedRequest(f"The form without its file is larger than {self._max_other_bytes} bytes.")

    def finish(self) -> None:
        """End the form. Raises MalformedRequest if it is incomplete, InvalidOptions if its file is missing."""
        try:
            self._parser.close()
        except MultipartError as error:
            error.__traceback__ = None
            raise MalformedRequest("The form is incomplete. Send it again.") from None
        if self._file_part is not None and not self._has_file:
            raise _field_error(self._file_part, "is required: send the image as a file in this part")

    def take_file(self) -> tuple[bytes, bytes]:
        """Return the file of a finished form and its SHA-256, empty without `has_digest`; drop it from the form."""
        data = b"".join((*self._file, *self._latest_parts))
        self._file, self._latest_parts = [], []
        return data, self._digest.digest() if self._digest else b""

    def discard(self) -> None:
        # A traceback may hold this form.
        self._parser, self._file, self._latest_parts, self._value = None, [], [], bytearray()

    def _begin_part(self, part: Any) -> None:
        name = _decode_name(part.name)
        if name != self._file_part and not _has_file_name(part):
            if len(self.fields) == MAX_FIELDS:
                raise MalformedRequest(f"The form has more than {MAX_FIELDS} fields.")
            self._name = name
            self._charset = _resolve_charset(name, part)
            self._value.clear()
            return
        if self._file_part is None:
            raise _field_error(name, "is a file, and this call accepts none")
        if name != self._file_part:
            raise _field_error(name, f"is a file: the only file belongs in the part {self._file_part}")
        if self._has_file:
            raise _field_error(name, "is given more than once")
        self._name = None
        self._has_file = True

    def _append_content(self, content: bytes) -> None:
        if self._name is not None:
            if len(self._value) + len(content) > MAX_FIELD_BYTES:
                raise _field_error(self._name, f"must be at most {MAX_FIELD_BYTES} bytes")
            self._value += content
            return
        self._file_bytes += len(content)
        if self._file_bytes > self._max_file_bytes:
            raise ImageTooLarge(f"The image is larger than {self._max_file_bytes} bytes, which is the limit.")
        self._latest_parts.append(content)
        if len(self._latest_parts) == _PARTS_TO_JOIN:
            self._file.append(b"".join(self._latest_parts))
            self._latest_parts.clear()
        if self._digest:
            self._digest.update(content)

    def _end_part(self) -> None:
        if self._name is None:
            return
        try:
            value = self._value.decode(self._charset)
        except UnicodeDecodeError:
            declared = self._charset.replace("_", "-")
            raise _field_error(self._name, f"must be text in {declared}, as its part declares") from None
        self.fields.append((self._name, value))
        if self._identify is not None and self.owner is None:
            self.owner = self._identify(self._name, value)


def _has_file_name(part: Any) -> bool:
    # The parser does not know `filename*`, and some clients send only that for names that are not ASCII.
    return part.filename is not None or _FILENAME_PARAMETER.search(part.header("Content-Disposition")) is not None


def _resolve_charset(name: str, part: Any) -> str:
    """Return the codec of a field (RFC 7578, 4.5). Raises InvalidOptions for an unsupported one."""
    encoding = part.header("Content-Transfer-Encoding", "").strip().lower()
    if encoding in _REFUSED_TRANSFER_ENCODINGS:
        raise _field_error(name, f"must be sent without the transfer encoding {encoding}")
    if not part.charset:
        return "utf_8"
    charset = part.charset.strip().lower().replace("-", "_")
    charset = aliases.get(charset, charset)
    if charset not in _CHARSETS:
        raise _field_error(name, "must be in a supported charset, best UTF-8")
    return str(charset)


def _decode_name(encoded: str) -> str:
    try:
        name = encoded.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise MalformedRequest("The name of a field is not UTF-8.") from None
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise MalformedRequest(f"The name of a field must have 1 to {MAX_NAME_CHARS} characters.")
    return name


def _field_error(field: str, detail: str) -> InvalidOptions:
    return InvalidOptions([FieldError(field, detail)])


class _PaddingTolerantParser(PushMultipartParser):  # type: ignore[misc]
    """Accepts padding after a boundary (RFC 2046, 5.1.1), which the library treats as an error."""

    _buffer: bytes

    def parse(self, chunk: bytes) -> Iterator[Any]:
        buffered = self._buffer
        try:
            yield from super().parse(chunk)
        except MultipartError:
            self.error = None  # its traceback would keep the parser alive, and with it the upload
            delimiter = self._delimiter
            prefix = rb"\r\n" if self._segment_count else rb"(?:\A|\r\n)"
            padded = re.search(prefix + re.escape(delimiter[2:]) + rb"([ \t]+)", buffered + chunk)
            rest = padded.string[padded.end() :] if padded else b""
            if padded is None or len(padded[1]) > _MAX_PADDING or rest[:1] not in {b"", b"\r"}:
                raise
            # Everything before the boundary was parsed. Parse the boundary again without padding, or with more bytes.
            self.closed = False
            if rest:
                yield from self.parse(delimiter + rest)
            else:
                self._buffer = delimiter + padded[1]


_log = structlog.get_logger(__name__)

FORM_OVERHEAD_BYTES = 256 * 1024
"""Allowed for fields and framing beside the image."""
MAX_FORM_BYTES = 64 * 1024
"""Allowed for a form without a file."""


class _LongInspectionError(Exception):
    """The inspection of an image takes too long for the event loop."""


def _end_inspection() -> None:
    raise _LongInspectionError


class Upload(Struct, frozen=True):
    """An image, and the form's fields in their order."""

    image: Image
    fields: Sequence[tuple[str, str]]


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
        owner: int | None,
        identify: Identify | None = None,
        has_digest: bool,
    ) -> AsyncIterator[Upload]:
        """Read a submission whose image is in the part `part`. Its memory stays reserved within the block.

        That of a tenant `owner` is reserved before the body is read. Otherwise `identify` returns the tenant from a
        field, or refuses the rest of the body by raising; bytes before that take the memory of unknown callers.
        Without `has_digest` the SHA-256 of the image stays empty: it takes 6 ms for 10 MB.
        Raises UnsupportedMediaType, ImageTooLarge, InvalidOptions, InvalidImage, MalformedRequest, Overloaded,
        ClientDisconnected.
        """
        headers = Headers.from_scope(scope)
        kind, boundary = _parse_form_type(headers)
        if kind != MULTIPART:
            raise UnsupportedMediaType(f"Send the request as {MULTIPART}, with the image in the part {part}.")
        max_bytes = self._max_image_bytes + FORM_OVERHEAD_BYTES
        length = _parse_content_length(headers)
        if length is not None and length > max_bytes:
            raise ImageTooLarge(
                f"The request has {length} bytes; an image may have at most {self._max_image_bytes} bytes."
            )
        form = MultipartForm(
            boundary,
            file_part=part,
            max_file_bytes=self._max_image_bytes,
            max_other_bytes=FORM_OVERHEAD_BYTES,
            owner=owner,
            identify=identify,
            has_digest=has_digest,
        )
        is_small = length is not None and length <= MAX_FORM_BYTES
        body = _BodyReader(receive, self._limits, has_min_rate=not is_small)
        size_bytes = max_bytes if length is None else length
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
                self.memory.shrink(allocation, body.received_bytes)
            form.finish()
            yield Upload(await self._inspect_file(form, part), form.fields)
        finally:
            del chunk
            try:
                stack.close()
            except Exception:  # noqa: BLE001 - must not turn the response to an accepted submission into an error
                _log.exception("upload.cleanup_error")

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
        if kind == MULTIPART:
            form = MultipartForm(
                boundary, file_part=None, max_file_bytes=0, max_other_bytes=MAX_FORM_BYTES, has_digest=False
            )
            async with body:
                while (chunk := await body.read_chunk()) is not None:
                    form.feed(chunk)
            form.finish()
            return form.fields
        if kind != URLENCODED:
            raise UnsupportedMediaType(f"Send the form as {URLENCODED} or {MULTIPART}.")
        text = bytearray()
        async with body:
            while (chunk := await body.read_chunk()) is not None:
                if body.received_bytes > MAX_FORM_BYTES:
                    raise MalformedRequest(f"The form is larger than {MAX_FORM_BYTES} bytes.")
                text += chunk
        try:
            return parse_qsl(text.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
        except UnicodeDecodeError:
            raise MalformedRequest("The form is not UTF-8.") from None
        except ValueError:
            raise MalformedRequest(f"The form has more than {MAX_FIELDS} fields.") from None

    async def _inspect_file(self, form: MultipartForm, part: str) -> Image:
        data, sha256 = form.take_file()
        if not data:
            raise InvalidImage(f"The file in the part {part} is empty: send the bytes of a PNG, JPEG or WebP image.")
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
