"""Incremental parsing of forms: multipart, urlencoded, and JSON objects in place of one."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from encodings.aliases import aliases
from typing import Any
from urllib.parse import parse_qsl

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser

from service.domain.errors import FieldError, ImageTooLarge, InvalidOptions, MalformedRequest, check_json
from service.domain.image_urls import IMAGE_URL_FIELD

MAX_FORM_BYTES = 64 * 1024
"""Of a form without a file."""
MAX_JSON_BYTES = 8 * 1024 * 1024
"""Of a JSON body. Up to three copies are in memory, and its parser keeps the event loop for some 30 ms."""
MAX_FIELDS = 64
MAX_NAME_CHARS = 128
MAX_FIELD_BYTES = 64 * 1024
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

    It takes `memory_ratio` times the bytes of its body. The only file accepted is of at most `max_file_bytes` in the
    part `file_part` (None: no file); everything else together may be `max_other_bytes`. Errors are raised as early as
    possible. `identify` is called with each complete field until it returns the `owner`, and may raise too.
    """

    memory_ratio = 1
    is_typed = False

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
        self.has_file = False
        self.owner = owner
        self.fields: list[tuple[str, str]] = []

    @property
    def max_bytes(self) -> int:
        return self._max_file_bytes + self._max_other_bytes

    @property
    def is_file_empty(self) -> bool:
        return not self._file_bytes

    def check_length(self, length: int) -> None:
        """Raise ImageTooLarge for a body of this length."""
        if length > self.max_bytes:
            limit = self._max_file_bytes
            raise ImageTooLarge(f"The request has {length} bytes; an image may have at most {limit} bytes.")

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
        """End the form. Raises MalformedRequest if it is incomplete."""
        try:
            self._parser.close()
        except MultipartError as error:
            error.__traceback__ = None
            raise MalformedRequest("The form is incomplete. Send it again.") from None

    def take_file(self) -> tuple[bytes, bytes]:
        """Return the file of a finished form and its SHA-256, empty without `has_digest`; drop it from the form."""
        data = b"".join((*self._file, *self._latest_parts))
        self._file, self._latest_parts = [], []
        return data, self._digest.digest() if self._digest else b""

    def discard(self) -> None:
        # A traceback may hold this form.
        self._parser, self._file, self._latest_parts, self._value = None, [], [], bytearray()
        self.fields = []

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
            raise field_error(name, "is a file, and this call accepts none")
        if name != self._file_part:
            raise field_error(name, f"is a file: the only file belongs in the part {self._file_part}")
        if self.has_file:
            raise field_error(name, "is given more than once")
        self._name = None
        self.has_file = True

    def _append_content(self, content: bytes) -> None:
        if self._name is not None:
            if len(self._value) + len(content) > MAX_FIELD_BYTES:
                raise field_error(self._name, f"must be at most {MAX_FIELD_BYTES} bytes")
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
            raise field_error(self._name, f"must be text in {declared}, as its part declares") from None
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
        raise field_error(name, f"must be sent without the transfer encoding {encoding}")
    if not part.charset:
        return "utf_8"
    charset = part.charset.strip().lower().replace("-", "_")
    charset = aliases.get(charset, charset)
    if charset not in _CHARSETS:
        raise field_error(name, "must be in a supported charset, best UTF-8")
    return str(charset)


def _decode_name(encoded: str) -> str:
    try:
        name = encoded.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise MalformedRequest("The name of a field is not UTF-8.") from None
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise MalformedRequest(f"The name of a field must have 1 to {MAX_NAME_CHARS} characters.")
    return name


def field_error(field: str, detail: str) -> InvalidOptions:
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


class UrlencodedForm:
    """A form without a file, collected until its end; see MultipartForm."""

    memory_ratio = 1
    is_typed = False
    has_file, is_file_empty = False, True

    def __init__(self, max_bytes: int = MAX_FORM_BYTES, *, owner: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.owner = owner
        self.fields: list[tuple[str, Any]] = []
        self._body = bytearray()

    def check_length(self, length: int) -> None:
        """Raise MalformedRequest for a body of this length."""
        if length > self.max_bytes:
            raise MalformedRequest(f"The form is larger than {self.max_bytes} bytes.")

    def feed(self, chunk: bytes) -> None:
        """Add the next bytes. Raises as `check_length` does."""
        self.check_length(len(self._body) + len(chunk))
        self._body += chunk

    def finish(self) -> None:
        """End the form. Raises MalformedRequest."""
        body, self._body = self._body, bytearray()
        try:
            text = body.decode()
            self.fields = parse_qsl(text, keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS)
        except UnicodeDecodeError:
            raise MalformedRequest("The form is not UTF-8.") from None
        except ValueError:
            raise MalformedRequest(f"The form has more than {MAX_FIELDS} fields.") from None

    def take_file(self) -> tuple[bytes, bytes]:
        return b"", b""

    def discard(self) -> None:
        self._body, self.fields = bytearray(), []


class JsonForm(UrlencodedForm):
    """A JSON object in place of a form: its values have the types of the options. One may be long: IMAGE_URL_FIELD."""

    memory_ratio = 3
    is_typed = True

    def __init__(self, *, owner: int | None = None) -> None:
        super().__init__(MAX_JSON_BYTES, owner=owner)

    def check_length(self, length: int) -> None:
        """Raise ImageTooLarge for a body of this length."""
        if length > self.max_bytes:
            detail = f"A JSON body may have at most {self.max_bytes} bytes: send a larger image as the file of a form."
            raise ImageTooLarge(detail)

    def finish(self) -> None:
        """End the object. Raises MalformedRequest."""
        body, self._body = bytes(self._body), bytearray()
        long_value = b""
        try:
            if len(body) > 2 * MAX_FORM_BYTES:
                # Cut out, since millions of small values would take many times the memory of their text. It is too
                # long to occur twice.
                long_value = bytes(msgspec.json.decode(body, type=_LongValue).image_url)
                body = body.replace(long_value, b'""', 1)
                if len(body) > MAX_FORM_BYTES:
                    raise MalformedRequest(f"The JSON without {IMAGE_URL_FIELD} is larger than {MAX_FORM_BYTES} bytes.")
            check_json(body.decode())
            fields = msgspec.json.decode(body, type=dict[str, Any])
            if long_value:
                fields[IMAGE_URL_FIELD] = msgspec.json.decode(long_value, type=str)
        except UnicodeDecodeError:
            raise MalformedRequest("The body of the request is not UTF-8.") from None
        except (ValueError, RecursionError):  # includes msgspec.DecodeError
            raise MalformedRequest(
                "The body of the request must be a JSON object, not deeply nested, with each name once."
            ) from None
        self.fields = [*fields.items()]


class _LongValue(msgspec.Struct):
    image_url: msgspec.Raw = msgspec.Raw(b'""')


Form = MultipartForm | UrlencodedForm
