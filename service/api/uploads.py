"""Submissions in: a multipart form is read from the connection as it comes, bounded in bytes and in time.

Nothing is read before there is room for it, so that many large uploads at once queue up in the network instead of in
memory. The room is held until the submission has been dealt with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from litestar.types import HTTPScope, Receive
from msgspec import Struct

from service.api.forms import MULTIPART, URLENCODED, MultipartForm, media_type, parse_urlencoded
from service.api.inflight import InFlight
from service.domain.errors import ImageTooLarge, InvalidImage, MalformedRequest, UnsupportedMediaType
from service.domain.image import inspect
from service.usecases.ports import Image

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
    is room among the `in_flight_bytes`.
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
    ) -> None:
        self._max_image_bytes = max_image_bytes
        self._max_image_pixels = max_image_pixels
        self._idle_seconds = idle_seconds
        self._total_seconds = total_seconds
        self._in_flight = InFlight(in_flight_bytes, wait_seconds)

    @asynccontextmanager
    async def receive(self, scope: HTTPScope, receive: Receive, *, part: str) -> AsyncIterator[Submission]:
        """Read a submission whose image is in the part named `part`; its memory is accounted for within the block.

        Raises UnsupportedMediaType, ImageTooLarge, InvalidOptions, InvalidImage, MalformedRequest for what was sent,
        Overloaded if there is no room for it, ClientLeft if the rest never came.
        """
        kind, boundary = media_type(_header(scope, b"content-type"))
        if kind != MULTIPART:
            raise UnsupportedMediaType(f"Send the request as {MULTIPART}, with the image in the part {part}.")
        most = self._max_image_bytes + FORM_ALLOWANCE
        length = _content_length(scope)
        if length is not None and length > most:
            raise ImageTooLarge(
                f"The request has {length} bytes; an image may have at most {self._max_image_bytes} bytes."
            )
        form = MultipartForm(
            boundary, file_part=part, max_file_bytes=self._max_image_bytes, max_other_bytes=FORM_ALLOWANCE
        )
        async with self._in_flight.hold(most if length is None else length):
            await self._read(receive, form.feed)
            form.finish()
            image = await self._image(form, part)
            yield Submission(image, form.fields)

    async def read_form(self, scope: HTTPScope, receive: Receive) -> list[tuple[str, str]]:
        """Read a form without a file, urlencoded or multipart.

        Raises UnsupportedMediaType, MalformedRequest, InvalidOptions for what was sent, ClientLeft if the rest never
        came.
        """
        kind, boundary = media_type(_header(scope, b"content-type"))
        if kind == MULTIPART:
            form = MultipartForm(boundary, file_part=None, max_file_bytes=0, max_other_bytes=MAX_FORM_BYTES)
            await self._read(receive, form.feed)
            form.finish()
            return form.fields
        if kind != URLENCODED:
            raise UnsupportedMediaType(f"Send the form as {URLENCODED} or {MULTIPART}.")
        body = bytearray()

        def take(chunk: bytes) -> None:
            if len(body) + len(chunk) > MAX_FORM_BYTES:
                raise MalformedRequest(f"The form is larger than {MAX_FORM_BYTES} bytes.")
            body.extend(chunk)

        await self._read(receive, take)
        return parse_urlencoded(bytes(body))

    async def _read(self, receive: Receive, take: Callable[[bytes], None]) -> None:
        """Pass the body on, chunk by chunk, as it comes."""
        clock = asyncio.get_running_loop().time
        end = clock() + self._total_seconds
        more = True
        while more:
            try:
                async with asyncio.timeout_at(min(end, clock() + self._idle_seconds)):
                    message = await receive()
            except TimeoutError:
                raise TooSlow("The body of the request did not arrive in time. Send it again.") from None
            if message["type"] != "http.request":
                raise ClientLeft
            take(message.get("body", b""))
            more = message.get("more_body", False)

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


def _header(scope: HTTPScope, name: bytes) -> str:
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == name), "")


def _content_length(scope: HTTPScope) -> int | None:
    """The length of the body in bytes, None if it comes in chunks. Raises MalformedRequest."""
    text = _header(scope, b"content-length")
    if text and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise MalformedRequest("The Content-Length is not a number.")
    return int(text) if text else None
