"""Submissions in: a multipart form is read from the connection as it comes, bounded in bytes and in time.

What comes is kept only as far as there is room for it, so that many large uploads at once queue up in the network
instead of in memory. The room is held until the submission has been dealt with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager

import structlog
from litestar.types import HTTPScope, Receive, Scope
from msgspec import Struct

from service.api.forms import MULTIPART, URLENCODED, MultipartForm, OnField, media_type, parse_urlencoded
from service.api.inflight import InFlight
from service.domain.errors import ImageTooLarge, InvalidImage, MalformedRequest, UnsupportedCoding, UnsupportedMediaType
from service.domain.media import inspect
from service.telemetry.gauges import Level, Levels
from service.usecases.ports import Image

_log = structlog.get_logger(__name__)

FORM_ALLOWANCE = 256 * 1024
"""What a submission may have in bytes beside its image: fields, and what frames them."""
MAX_FORM_BYTES = 64 * 1024
"""How large a form without a file may be."""
_INSPECTED_AT_ONCE = 64 * 1024
"""A larger image is inspected in a thread: one made of very many tiny pieces takes a while."""


class ClientLeft(Exception):
    """The client closed the connection, so there is nobody to answer."""


class TooSlow(MalformedRequest):
    """The body did not arrive in time; the connection is of no more use."""


class Submission(Struct, frozen=True):
    """What was uploaded: the image, and the form's fields in their order."""

    image: Image
    fields: Sequence[tuple[str, str]]


class Uploads:
    """Reads the bodies of submissions and of small forms.

    `idle_seconds` may pass between two chunks, `total_seconds` until the end of the body, `wait_seconds` until there
    is room among the `in_flight_bytes`. Of a submission that is not small, `least_rate` bytes a second have to come
    once `grace_seconds` have passed. Only the time in which the client is waited for counts as its own.
    """

    def __init__(
        self,
        *,
        max_image_bytes: int,
        max_image_pixels: int,
        in_flight_bytes: int = 80_000_000,
        idle_seconds: float = 10,
        total_seconds: float = 120,
        wait_seconds: float = 10,
        grace_seconds: float = 5,
        least_rate: float = 32 * 1024,
    ) -> None:
        self._max_image_bytes = max_image_bytes
        self._max_image_pixels = max_image_pixels
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds
        self._grace_seconds = grace_seconds
        self._least_rate = least_rate
        self._in_flight = InFlight(in_flight_bytes, wait_seconds)

    def tell(self, levels: Levels) -> None:
        """Show how many bytes are held in memory."""
        levels.tell(Level.UPLOADS, lambda: {(): self._in_flight.held})
        levels.tell(Level.UPLOADS_LIMIT, lambda: {(): self._in_flight.total})

    @asynccontextmanager
    async def receive(
        self, scope: HTTPScope, receive: Receive, *, part: str, on_field: OnField | None = None
    ) -> AsyncIterator[Submission]:
        """Read a submission whose image is in the part named `part`; its memory is accounted for within the block.

        `on_field` is told each field as soon as it is there, and may refuse the rest of the body by raising.
        Raises UnsupportedMediaType, ImageTooLarge, InvalidOptions, InvalidImage, MalformedRequest for what was sent,
        Overloaded if there is no room for it, ClientLeft if the rest never came.
        """
        kind, boundary = _media_type(scope)
        if kind != MULTIPART:
            raise UnsupportedMediaType(f"Send the request as {MULTIPART}, with the image in the part {part}.")
        most = self._max_image_bytes + FORM_ALLOWANCE
        length = _content_length(scope)
        if length is not None and length > most:
            raise ImageTooLarge(
                f"The request has {length} bytes; an image may have at most {self._max_image_bytes} bytes."
            )
        form = MultipartForm(
            boundary,
            file_part=part,
            max_file_bytes=self._max_image_bytes,
            max_other_bytes=FORM_ALLOWANCE,
            on_field=on_field,
        )
        small = length is not None and length <= MAX_FORM_BYTES
        body = self._body(receive, least_rate=0 if small else self._least_rate)
        chunk: bytes | None = b""
        cleaning = ExitStack()
        cleaning.callback(form.drop)
        share = cleaning.enter_context(self._in_flight.share(most if length is None else length))
        try:
            while (chunk := await body.next()) is not None:
                await self._in_flight.grow(share, body.received)
                form.feed(chunk)
            self._in_flight.complete(share, body.received)
            form.finish()
            yield Submission(await self._image(form, part), form.fields)
        finally:
            del chunk
            _clean_up(cleaning)

    async def read_form(self, scope: HTTPScope, receive: Receive) -> list[tuple[str, str]]:
        """Read a form without a file, urlencoded or multipart.

        Raises UnsupportedMediaType, MalformedRequest, InvalidOptions for what was sent, ClientLeft if the rest never
        came.
        """
        kind, boundary = _media_type(scope)
        body = self._body(receive)
        if kind == MULTIPART:
            form = MultipartForm(boundary, file_part=None, max_file_bytes=0, max_other_bytes=MAX_FORM_BYTES)
            while (chunk := await body.next()) is not None:
                form.feed(chunk)
            form.finish()
            return form.fields
        if kind != URLENCODED:
            raise UnsupportedMediaType(f"Send the form as {URLENCODED} or {MULTIPART}.")
        text = bytearray()
        while (chunk := await body.next()) is not None:
            if body.received > MAX_FORM_BYTES:
                raise MalformedRequest(f"The form is larger than {MAX_FORM_BYTES} bytes.")
            text += chunk
        return parse_urlencoded(bytes(text))

    def _body(self, receive: Receive, least_rate: float = 0) -> _Body:
        return _Body(
            receive,
            idle_seconds=self._idle_seconds,
            total_seconds=self._total_seconds,
            grace_seconds=self._grace_seconds,
            least_rate=least_rate,
        )

    async def _image(self, form: MultipartForm, part: str) -> Image:
        """The file of a finished form, inspected."""
        data, sha256 = form.take_file()
        if not data:
            raise InvalidImage(f"The file in the part {part} is empty: send the bytes of a PNG, JPEG or WebP image.")
        info = inspect(data) if len(data) <= _INSPECTED_AT_ONCE else await asyncio.to_thread(inspect, data)
        if info.width * info.height > self._max_image_pixels:
            raise ImageTooLarge(
                f"The image has {info.width} x {info.height} = {info.width * info.height} pixels;"
                f" at most {self._max_image_pixels} are accepted."
            )
        return Image(data, sha256, info.media_type, info.width, info.height)


def _clean_up(cleaning: ExitStack) -> None:
    """Close it. A fault in that is no reason to answer a submission that was accepted with an error."""
    try:
        cleaning.close()
    except Exception:  # noqa: BLE001 - whatever it is
        _log.exception("upload.cleanup-crashed")


class _Body:
    """A body as it comes, given up when it comes too slowly. A `least_rate` of 0 asks for none."""

    def __init__(
        self,
        receive: Receive,
        *,
        idle_seconds: float,
        total_seconds: float,
        grace_seconds: float,
        least_rate: float,
    ) -> None:
        self._receive = receive
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds
        self._grace_seconds = grace_seconds
        self._least_rate = least_rate
        self._waited = 0.0
        self._more = True
        self.received = 0

    async def next(self) -> bytes | None:
        """The next bytes, None after the last. Raises TooSlow, ClientLeft."""
        if not self._more:
            return None
        clock = asyncio.get_running_loop().time
        asked = clock()
        try:
            async with asyncio.timeout(self._patience()):
                message = await self._receive()
        except TimeoutError:
            raise TooSlow("The body of the request did not arrive in time. Send it again.") from None
        if message["type"] != "http.request":
            raise ClientLeft
        self._waited += clock() - asked
        chunk: bytes = message.get("body", b"")
        self.received += len(chunk)
        self._more = message.get("more_body", False)
        return chunk

    def _patience(self) -> float:
        """How many seconds the next bytes may take; none if it is over already."""
        allowed = self._total_seconds
        if self._least_rate:
            allowed = min(allowed, self._grace_seconds + self.received / self._least_rate)
        return min(self._idle_seconds, allowed - self._waited)


def _media_type(scope: HTTPScope) -> tuple[str, str]:
    """The media type of a form, which is not encoded, and its boundary. Raises UnsupportedMediaType."""
    check_coding(scope)
    return media_type(_header(scope, b"content-type"))


def check_coding(scope: Scope) -> None:
    """Refuse a body that is compressed, or encoded otherwise (RFC 9110, 15.5.16). Raises UnsupportedCoding."""
    codings = b",".join(value for key, value in scope["headers"] if key == b"content-encoding")
    if codings and any(each.strip().lower() not in {b"", b"identity"} for each in codings.split(b",")):
        raise UnsupportedCoding("Send the body of the request as it is, without a Content-Encoding.")


def _header(scope: HTTPScope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _content_length(scope: HTTPScope) -> int | None:
    """The length of the body in bytes, None if it comes in chunks. Raises MalformedRequest."""
    text = _header(scope, b"content-length")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedRequest("The Content-Length is not a number.")
    return int(text) if text else None
