"""Forms, without I/O: bytes in, in chunks of any size, fields and at most one file out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from encodings.aliases import aliases
from typing import Any
from urllib.parse import parse_qsl

from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from service.domain.errors import FieldError, ImageTooLarge, InvalidOptions, MalformedRequest, UnsupportedMediaType

MAX_FIELDS = 64
MAX_NAME = 128
MAX_FIELD_BYTES = 64 * 1024

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"

OnField = Callable[[str, str], None]
"""Told the name and the value of a field; what it raises ends the reading."""

_FILENAME = re.compile(r";\s*filename\*?\s*=", re.IGNORECASE)

_MOST_PADDING = 1_000
_ENCODED = frozenset({"base64", "quoted-printable", "x-uuencode"})
_CHARSETS = frozenset(
    {
        *("ascii", "utf_8", "utf_16", "utf_16_be", "utf_16_le", "gbk", "gb2312", "gb18030", "big5", "big5hkscs"),
        *("euc_jp", "iso2022_jp", "shift_jis", "cp932", "euc_kr", "cp949", "latin_1", "koi8_r", "koi8_u", "cp874"),
        *(f"iso8859_{part}" for part in (*range(2, 12), *range(13, 17))),
        *(f"cp{page}" for page in range(1250, 1259)),
    }
)
"""The codecs that a field may be in. Python knows others that are no charsets, and tries to import what it is given."""


class MultipartForm:
    """A multipart form as it arrives: feed it every chunk, then finish it.

    The only file it takes is of at most `max_file_bytes` in the part `file_part` (None: it takes none); all else
    together may be `max_other_bytes`. What is wrong with a form is raised as soon as it is known; `on_field` is told
    each field as soon as it is complete, and may find it wrong too.
    """

    def __init__(
        self,
        boundary: str,
        *,
        file_part: str | None,
        max_file_bytes: int,
        max_other_bytes: int,
        on_field: OnField | None = None,
    ) -> None:
        # Latin-1 decodes any header, so that a file's name in an odd encoding is no obstacle; names are told apart
        # from it below. Strict parsing would depend on how the body is split into chunks.
        self._parser: Any = _PaddedParser(boundary, header_charset="latin-1")
        self._file_part = file_part
        self._max_file_bytes = max_file_bytes
        self._max_other_bytes = max_other_bytes
        self._on_field = on_field
        self._received = 0
        self._digest = hashlib.sha256()
        self._name: str | None = None
        self._charset = ""
        self._value = bytearray()
        self._file = bytearray()
        self._has_file = False
        self.fields: list[tuple[str, str]] = []

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body.

        Raises MalformedRequest for what is no form or exceeds its limits, InvalidOptions for a part that is not
        welcome, ImageTooLarge.
        """
        if not chunk:
            return
        self._received += len(chunk)
        try:
            for event in self._parser.parse(chunk):
                if event is None:
                    self._end_part()
                elif isinstance(event, MultipartSegment):
                    self._begin_part(event)
                else:
                    self._take(event)
        except MultipartError as error:
            error.__traceback__ = None  # the parser holds its error
            raise MalformedRequest(f"The multipart form can't be read: {error.args[0]}.") from None
        if self._received - len(self._file) > self._max_other_bytes:
            raise MalformedRequest(f"The form without its file is larger than {self._max_other_bytes} bytes.")

    def finish(self) -> None:
        """The body has ended. Raises MalformedRequest if the form has not, InvalidOptions if its file is missing."""
        try:
            self._parser.close()
        except MultipartError as error:
            error.__traceback__ = None
            raise MalformedRequest("The form breaks off before its end. Send it again as a whole.") from None
        if self._file_part is not None and not self._has_file:
            raise _refused(self._file_part, "is required: send the image as a file in this part")

    def take_file(self) -> tuple[bytes, bytes]:
        """The file of a finished form and its SHA-256; the form keeps nothing of it."""
        data, self._file = bytes(self._file), bytearray()
        return data, self._digest.digest()

    def drop(self) -> None:
        """Keep nothing of the body: a traceback may hold this form."""
        self._parser, self._file, self._value = None, bytearray(), bytearray()

    def _begin_part(self, part: Any) -> None:
        name = _name(part.name)
        if name != self._file_part and not _has_file_name(part):
            if len(self.fields) == MAX_FIELDS:
                raise MalformedRequest(f"The form has more than {MAX_FIELDS} fields.")
            self._name = name
            self._charset = _charset(name, part)
            self._value.clear()
            return
        if self._file_part is None:
            raise _refused(name, "is a file, and this call takes none")
        if name != self._file_part:
            raise _refused(name, f"is a file: the only file belongs into the part {self._file_part}")
        if self._has_file:
            raise _refused(name, "is given more than once")
        self._name = None
        self._has_file = True

    def _take(self, content: bytes) -> None:
        if self._name is not None:
            if len(self._value) + len(content) > MAX_FIELD_BYTES:
                raise _refused(self._name, f"must be at most {MAX_FIELD_BYTES} bytes")
            self._value += content
            return
        if len(self._file) + len(content) > self._max_file_bytes:
            raise ImageTooLarge(f"The image is larger than {self._max_file_bytes} bytes, which is the limit.")
        self._file += content
        self._digest.update(content)

    def _end_part(self) -> None:
        if self._name is None:
            return
        try:
            value = self._value.decode(self._charset)
        except UnicodeDecodeError:
            declared = self._charset.replace("_", "-")
            raise _refused(self._name, f"must be text in {declared}, as its part declares") from None
        self.fields.append((self._name, value))
        if self._on_field is not None:
            self._on_field(self._name, value)


def parse_urlencoded(body: bytes) -> list[tuple[str, str]]:
    """The fields of an urlencoded form. Raises MalformedRequest."""
    try:
        return parse_qsl(body.decode(), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
    except UnicodeDecodeError:
        raise MalformedRequest("The form is not UTF-8.") from None
    except ValueError:
        raise MalformedRequest(f"The form has more than {MAX_FIELDS} fields.") from None


def media_type(content_type: str) -> tuple[str, str]:
    """The media type of a form and its boundary, which is empty if there is none. Raises UnsupportedMediaType."""
    found, options = parse_options_header(content_type)
    boundary = options.get("boundary", "")
    if found == MULTIPART and not boundary:
        raise UnsupportedMediaType(f"The content type {MULTIPART} lacks its boundary.")
    return found, boundary


def _has_file_name(part: Any) -> bool:
    """Whether a part has a file name.

    The parser does not know `filename*`, which is all that some clients send of a name that is not ASCII.
    """
    return part.filename is not None or _FILENAME.search(part.header("Content-Disposition")) is not None


def _charset(name: str, part: Any) -> str:
    """The codec that decodes a field (RFC 7578, 4.5). Raises InvalidOptions for a field that can't be decoded."""
    encoding = part.header("Content-Transfer-Encoding", "").strip().lower()
    if encoding in _ENCODED:
        raise _refused(name, f"must be sent as it is, without the transfer encoding {encoding}")
    if not part.charset:
        return "utf_8"
    charset = part.charset.strip().lower().replace("-", "_")
    charset = aliases.get(charset, charset)
    if charset not in _CHARSETS:
        raise _refused(name, "must be in a charset that is known here, best UTF-8")
    return str(charset)


def _name(raw: str) -> str:
    try:
        name = raw.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise MalformedRequest("The name of a field is not UTF-8.") from None
    if not 0 < len(name) <= MAX_NAME:
        raise MalformedRequest(f"The name of a field must have 1 to {MAX_NAME} characters.")
    return name


def _refused(field: str, detail: str) -> InvalidOptions:
    return InvalidOptions([FieldError(field, detail)])


class _PaddedParser(PushMultipartParser):  # type: ignore[misc]
    """Takes blanks after a boundary for padding (RFC 2046, 5.1.1), which the library calls an error."""

    _buffer: bytes

    def parse(self, chunk: bytes) -> Iterator[Any]:
        """The events of a chunk."""
        held = self._buffer
        try:
            yield from super().parse(chunk)
        except MultipartError:
            self.error = None  # by its traceback it would keep the parser alive, and all that was uploaded
            delimiter = self._delimiter
            before = rb"\r\n" if self._segment_count else rb"(?:\A|\r\n)"
            padded = re.search(before + re.escape(delimiter[2:]) + rb"([ \t]+)", held + chunk)
            rest = padded.string[padded.end() :] if padded else b""
            if padded is None or len(padded[1]) > _MOST_PADDING or rest[:1] not in {b"", b"\r"}:
                raise
            # What came before the boundary was parsed. It is parsed again without its padding, or with more bytes.
            self.closed = False
            if rest:
                yield from self.parse(delimiter + rest)
            else:
                self._buffer = delimiter + padded[1]
