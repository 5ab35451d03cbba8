"""Parsing of the vendor's forms. The text of a `RejectedError` is the reason in the vendor's language."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final, TypeVar
from urllib.parse import parse_qsl

import msgspec
from multipart import MultipartError, MultipartSegment, PushMultipartParser, parse_options_header

from service.sandbox.faults import Kind

FILE_FIELD: Final = "input_image"
MAX_FILE_BYTES: Final = 64 * 1024 * 1024
_MAX_TEXT_BYTES: Final = 256 * 1024
_MAX_PARTS: Final = 64
Number = TypeVar("Number", int, float)


class RejectedError(Exception):
    """A rejected submit; the text is the reason, in Chinese."""


class Form(msgspec.Struct):
    """A parsed body. Of several fields of one name, the last is kept; `error` is in Chinese."""

    fields: dict[str, str]
    image: bytes | None = None
    error: str | None = None


async def read_form(content_type: str, chunks: AsyncIterator[bytes]) -> Form:
    """Read multipart or urlencoded form data. Parse errors are returned in the form, with the fields before them."""
    media_type, options = parse_options_header(content_type)
    if media_type == "multipart/form-data":
        return await _read_multipart(options.get("boundary", ""), chunks)
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > _MAX_TEXT_BYTES:
            return Form({}, error="请求内容过大")
    if media_type != "application/x-www-form-urlencoded":
        return Form({}, error="不支持的请求格式")
    try:
        pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=_MAX_PARTS)
    except ValueError:
        return Form({}, error="请求格式错误")
    return Form(dict(pairs))


async def _read_multipart(boundary: str, chunks: AsyncIterator[bytes]) -> Form:
    form = Form({})
    try:
        parser = PushMultipartParser(boundary, max_segment_size=MAX_FILE_BYTES, max_segment_count=_MAX_PARTS)
        with parser:
            part: MultipartSegment | None = None
            content = bytearray()
            async for chunk in chunks:
                for event in parser.parse(chunk):
                    if isinstance(event, MultipartSegment):
                        part, content = event, bytearray()
                    elif event is not None:
                        content += event
                    elif part is not None:
                        _add_part(form, part, content)
    except (MultipartError, UnicodeDecodeError):
        form.error = "请求格式错误或文件过大"
    return form


def _add_part(form: Form, part: MultipartSegment, content: bytearray) -> None:
    name = part.name or ""
    if name == FILE_FIELD and part.filename is not None:
        form.image = bytes(content)
    elif len(content) > _MAX_TEXT_BYTES:
        form.error = "请求内容过大"
    else:
        form.fields[name] = content.decode()


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a task; each kind reads its own."""

    upscale: float = 1.0
    s_noise: float = 1.0
    steps: float = 20.0
    high_fidelity: bool = False
    strong_inpaint: bool = False
    strong_inpaint_intensity: float = 0.5
    vector_switch: bool = False
    color_count: int = 5
    fit: float = 0.5


def parse_options(kind: Kind, fields: Mapping[str, str]) -> Options:
    """Parse the fields of this kind; others are ignored. Raises RejectedError."""
    if kind == "vector":
        return Options(color_count=_parse_number(fields, "color_count", int, 2, 16, 5))
    if kind == "seamless":
        return Options(fit=_parse_number(fields, "fit", float, 0.1, 0.9, 0.5))
    if kind == "face":
        return Options()
    for name in ("sdxl_model_dropdown", "style_dropdown"):
        if not fields.get(name):
            raise RejectedError(f"缺少参数{name}")
    return Options(
        upscale=_parse_number(fields, "upscale", float, 1, 8),
        s_noise=_parse_number(fields, "s_noise", float, 1, 1.1),
        steps=_parse_number(fields, "steps", float, 20, 40),
        high_fidelity=_parse_flag(fields, "high_fidelity"),
        strong_inpaint=_parse_flag(fields, "strong_inpaint"),
        strong_inpaint_intensity=_parse_number(fields, "strong_inpaint_intensity", float, 0, 1, 0.5),
        vector_switch=_parse_flag(fields, "vector_switch", "false"),
        color_count=_parse_number(fields, "color_count", int, 2, 16, 5),
    )


def _parse_number(
    fields: Mapping[str, str],
    name: str,
    convert: Callable[[str], Number],
    minimum: float,
    maximum: float,
    default: Number | None = None,
) -> Number:
    text = fields.get(name)
    if text is None:
        if default is None:
            raise RejectedError(f"缺少参数{name}")
        return default
    try:
        value = convert(text)
    except ValueError:
        raise RejectedError(f"参数{name}格式错误") from None
    if not minimum <= value <= maximum:
        raise RejectedError(f"参数{name}超出范围({minimum:g}-{maximum:g})")
    return value


def _parse_flag(fields: Mapping[str, str], name: str, default: str | None = None) -> bool:
    text = fields.get(name, default)
    if text is None:
        raise RejectedError(f"缺少参数{name}")
    if text.lower() in {"true", "1"}:
        return True
    if text.lower() in {"false", "0"}:
        return False
    raise RejectedError(f"参数{name}格式错误")
