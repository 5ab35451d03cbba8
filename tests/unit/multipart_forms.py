"""Multipart submissions."""

from __future__ import annotations

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


def encode_form(*parts: bytes, is_closed: bool = True, paddings: tuple[bytes, ...] = ()) -> bytes:
    """Encode a multipart body of these parts; `paddings` follow the boundaries, one for each part and for the end."""
    delimiter = f"--{BOUNDARY}".encode()
    paddings = paddings or (b"",) * (len(parts) + 1)
    body = b"".join(
        delimiter + padding + b"\r\n" + part + b"\r\n" for padding, part in zip(paddings, parts, strict=False)
    )
    return body + (delimiter + b"--" + paddings[-1] + b"\r\n" if is_closed else b"")
