"""Bodies of forms in few pieces, of which the file is not copied."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias
from urllib.parse import urlencode

from msgspec import Struct

PIECE_BYTES = 256 * 1024
"""Size of a piece, each of which has the full write timeout."""
Piece: TypeAlias = Sequence[bytes | memoryview]
"""What is written at once."""


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
            self.content_type = "application/x-www-form-urlencoded"
            self._head = urlencode(fields).encode()
        else:
            boundary = secrets.token_hex(16)
            self.content_type = f"multipart/form-data; boundary={boundary}"
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
        self.size = len(self._head) + len(self._content) + len(self._tail)

    def split(self, head: bytes) -> Iterator[Piece]:
        """Yield the pieces of a request, of which `head` comes before the form."""
        start = head + self._head
        if not self._content:
            yield (start + self._tail,)
            return
        content, size = memoryview(self._content), len(self._content)
        for begin in range(0, size, PIECE_BYTES):
            yield [
                *((start,) if begin == 0 else ()),
                content[begin : begin + PIECE_BYTES],
                *((self._tail,) if begin + PIECE_BYTES >= size else ()),
            ]
