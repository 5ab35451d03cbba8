"""Bodies of forms in few pieces: each piece costs the client a timeout and a call of the kernel."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlencode

from msgspec import Struct

PIECE_BYTES = 256 * 1024
"""Size of a piece, each of which has the full write timeout."""


class FormFile(Struct, frozen=True):
    """A file of a form. The names are constants or need no escapes."""

    field_name: str
    file_name: str
    media_type: str
    content: bytes


class FormBody:
    """A form, as multipart if it has a file: the fields and the head of the file are in the first piece."""

    def __init__(self, fields: Mapping[str, str], file: FormFile | None = None) -> None:
        self._content = self._tail = b""
        if file is None:
            content_type = "application/x-www-form-urlencoded"
            self._head = urlencode(fields).encode()
        else:
            boundary = secrets.token_hex(16)
            content_type = f"multipart/form-data; boundary={boundary}"
            parts = [
                f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                for name, value in fields.items()
            ]
            parts.append(
                f'--{boundary}\r\nContent-Disposition: form-data; name="{file.field_name}"; filename="{file.file_name}"'
                f"\r\nContent-Type: {file.media_type}\r\n\r\n"
            )
            self._head = "".join(parts).encode()
            self._content = file.content
            self._tail = f"\r\n--{boundary}--\r\n".encode()
        size = len(self._head) + len(self._content) + len(self._tail)
        self.headers = {"Content-Type": content_type, "Content-Length": str(size)}

    async def __aiter__(self) -> AsyncIterator[Any]:  # of bytes-like objects: slices are not copied
        content, size = memoryview(self._content), len(self._content)
        end = min(max(PIECE_BYTES - len(self._head), 0), size)
        first = (self._head, content[:end])
        if end == size:
            yield b"".join((*first, self._tail))
            return
        yield b"".join(first)
        while end < size:
            start, end = end, min(end + PIECE_BYTES, size)
            yield content[start:end] if end < size else b"".join((content[start:], self._tail))
