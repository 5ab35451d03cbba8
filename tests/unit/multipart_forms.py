"""Multipart submissions, and a reader with small limits."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from PIL import Image

from service.api.uploads import UploadReader
from tests.unit.asgi_client import Message, make_http_scope

MAX_BYTES = 50_000
BOUNDARY = "----FormBoundary7MA4YWxk"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY}"


def encode_field(name: str, value: str | bytes) -> bytes:
    content = value.encode() if isinstance(value, str) else value
    return encode_part(f'name="{name}"', content)


def encode_file(name: str, content: bytes, disposition: str = 'filename="a.png"') -> bytes:
    return encode_part(f'name="{name}"; {disposition}', content, "application/octet-stream")


def encode_part(disposition: str, content: bytes, content_type: str | None = None) -> bytes:
    more = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"Content-Disposition: form-data; {disposition}\r\n{more}\r\n".encode() + content


def encode_form(*parts: bytes, is_closed: bool = True) -> bytes:
    """Encode a multipart body of these parts."""
    delimiter = f"--{BOUNDARY}".encode()
    body = b"".join(delimiter + b"\r\n" + part + b"\r\n" for part in parts)
    return body + (delimiter + b"--\r\n" if is_closed else b"")


def split_body(body: bytes, cuts: Iterable[int]) -> list[bytes]:
    """Cut a body into chunks at these offsets."""
    places = [0, *sorted({min(cut, len(body)) for cut in cuts}), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(places)]


def make_png(width: int = 5, height: int = 3) -> bytes:
    target = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(target, "PNG")
    return target.getvalue()


PNG = make_png()


def make_uploads(**limits: Any) -> UploadReader:
    return UploadReader(**({"max_image_bytes": MAX_BYTES, "max_image_pixels": 10_000, "wait_seconds": 0.01} | limits))


def make_failing_receive() -> Any:
    """Make a `receive` that fails the test when called."""

    async def receive() -> Message:
        pytest.fail("the body was read")

    return receive


def make_upload_scope(length: int | None = None, content_type: str = CONTENT_TYPE) -> Any:
    announced = {} if length is None else {"content-length": str(length)}
    return make_http_scope("POST", "/", {"content-type": content_type} | announced)
