"""Submissions are read from the connection, bounded in bytes and in time."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.uploads import FORM_ALLOWANCE, MAX_FORM_BYTES, Submission, Uploads
from service.domain.errors import (
    GatewayError,
    ImageTooLarge,
    InvalidImage,
    InvalidOptions,
    MalformedRequest,
    UnsupportedMediaType,
)
from service.domain.image import ImageInfo, inspect
from tests.unit.asgi import body_messages, http_scope, receiving
from tests.unit.forms import (
    CONTENT_TYPE,
    MAX_BYTES,
    PNG,
    field,
    file,
    form,
    part,
    picture,
    scope_of,
    split,
    unread,
    uploads,
)


async def read(
    body: bytes | Iterable[bytes],
    *,
    reader: Uploads | None = None,
    name: str = "image",
    headers: Mapping[str, str] | None = None,
    announced: bool = False,
) -> Submission:
    """Submit a body that comes in chunks, with its length announced or not."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    sent = {"content-type": CONTENT_TYPE} | dict(headers or {})
    if announced:
        sent["content-length"] = str(sum(map(len, chunks)))
    scope: Any = http_scope("POST", "/v1/tasks/upscale", sent)
    receive = receiving(body_messages(chunks))
    async with (reader or uploads()).receive(scope, receive, part=name) as submission:
        return submission


@given(st.lists(st.integers(0, 1200), max_size=30), st.booleans(), st.permutations(range(3)))
async def test_any_split_gives_the_same_submission(cuts: list[int], announced: bool, order: list[int]) -> None:
    """However the body is cut into chunks, and wherever the file stands, image and fields are the same."""
    parts = [file("image", PNG), field("prompt", "a café\r\n--\r\nwith 猫"), field("scale", "")]
    body = form(*[parts[each] for each in order])
    submission = await read(split(body, cuts), announced=announced)
    image = submission.image
    assert (image.data, image.sha256) == (PNG, hashlib.sha256(PNG).digest())
    assert (image.media_type, image.width, image.height) == ("image/png", 5, 3)
    assert sorted(submission.fields) == [("prompt", "a café\r\n--\r\nwith 猫"), ("scale", "")]


async def test_a_body_byte_by_byte_is_read() -> None:
    """The smallest chunks there are, and empty ones, make no difference."""
    body = form(field("scale", "2"), file("image", PNG))
    chunks = [chunk for byte in body for chunk in (bytes([byte]), b"")]
    assert (await read(chunks)).fields == [("scale", "2")]


@pytest.mark.parametrize(
    "sent",
    [
        file("image", PNG, 'filename=""'),
        file("image", PNG, "filename*=utf-8''%E5%9B%BE.png"),
        part("name=\"image\"; filename*=utf-8''%E5%9B%BE.png", PNG),
        part('name="image"', PNG, "image/png"),
        file("image", PNG, 'filename="图.png"').replace("图".encode(), "图".encode("gbk")),
        part('filename="a.png"; name=image', PNG),
    ],
    ids=["no name", "extended name", "extended name alone", "type alone", "name in GBK", "other order"],
)
async def test_a_file_is_told_however_the_client_names_it(sent: bytes) -> None:
    """A file name that is missing, extended or in an odd encoding does not stop a file from being one."""
    assert (await read(form(sent))).image.data == PNG


async def test_the_part_of_the_file_is_an_argument() -> None:
    """Old clients send their file in a part of another name, and faults name that one."""
    assert (await read(form(file("input_image", PNG)), name="input_image")).image.data == PNG
    with pytest.raises(InvalidOptions, match="input_image: is required"):
        await read(form(), name="input_image")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (form(field("scale", "2")), "image: is required"),
        (form(file("image", PNG), file("image", PNG)), "image: is given more than once"),
        (form(file("picture", PNG)), "picture: is a file: the only file belongs into the part image"),
        (form(field("image", "aGVsbG8=")), "image: must be a file"),
        (form(part('name="image"', b"hello", "text/plain")), "image: must be a file"),
        (form(field("prompt", "x" * 65_537)), "prompt: must be at most 65536 bytes"),
    ],
)
async def test_a_part_that_is_not_welcome_is_named(body: bytes, fault: str) -> None:
    """A missing, doubled or misplaced file and too long a field are faults of the options, by name."""
    with pytest.raises(InvalidOptions, match=fault):
        await read(body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (form(file("image", PNG), closed=False), "breaks off"),
        (form(file("image", PNG))[:-8], "breaks off"),
        (b"", "breaks off"),
        (b"no form at all", "breaks off"),
        (b"x" + form(), "can't be read"),
        (form(field("prompt", b"\xff")), "field prompt is not UTF-8"),
        (form(field("prompt", "").replace(b"prompt", b"\xff")), "name of a field is not UTF-8"),
        (form(field("", "x")), "1 to 128 characters"),
        (form(field("x" * 129, "x")), "1 to 128 characters"),
        (form(*[field(f"f{n}", "") for n in range(65)]), "more than 64 fields"),
        (form(*[field(f"f{n}", "x" * 60_000) for n in range(5)]), "larger than 262144 bytes"),
        (form(field("x", "").replace(b": ", b"")), "can't be read"),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
async def test_what_is_no_form_is_malformed(body: bytes, why: str, announced: bool) -> None:
    """A form that breaks off, is not UTF-8, or holds too much of anything but its image, is malformed."""
    with pytest.raises(MalformedRequest, match=why):
        await read(body, announced=announced)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (form(file("image", b"")), InvalidImage),
        (form(file("image", PNG[:-3])), InvalidImage),
        (form(file("image", b"GIF89a")), UnsupportedMediaType),
        (form(file("image", b"x" * (MAX_BYTES + 1))), ImageTooLarge),
    ],
)
async def test_a_faulty_image_is_refused(body: bytes, error: type[GatewayError]) -> None:
    """An image that is empty, cut off, of another type or too large is told as what it is."""
    with pytest.raises(error):
        await read(body)


async def test_an_image_of_the_very_limits_is_accepted() -> None:
    """The limits are what is allowed, in bytes and in pixels."""
    large = PNG + b"\0" * (MAX_BYTES - len(PNG))
    assert len((await read(form(file("image", large)))).image.data) == MAX_BYTES
    assert (await read(form(file("image", picture(100, 100))))).image.width == 100
    with pytest.raises(ImageTooLarge, match=r"100 x 101 = 10100 pixels; at most 10000"):
        await read(form(file("image", picture(100, 101))))


async def test_only_a_small_image_is_inspected_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of up to 64 KiB is inspected at once, a larger one in a thread, with the same result."""
    inspecting: list[threading.Thread] = []

    def seen(data: bytes) -> ImageInfo:
        inspecting.append(threading.current_thread())
        return inspect(data)

    monkeypatch.setattr("service.api.uploads.inspect", seen)
    for size in (65_536, 65_537):
        image = PNG + b"\0" * (size - len(PNG))
        submission = await read(form(file("image", image)), reader=uploads(max_image_bytes=100_000))
        assert submission.image.width == 5
    at_once, beside = inspecting
    assert at_once is threading.current_thread()
    assert beside is not at_once


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
async def test_only_multipart_forms_are_taken(content_type: str) -> None:
    """A request of another type, or without a boundary, is not supported."""
    with pytest.raises(UnsupportedMediaType):
        await read(form(file("image", PNG)), headers={"content-type": content_type})


@pytest.mark.parametrize(
    ("length", "error"),
    [(str(MAX_BYTES + FORM_ALLOWANCE + 1), ImageTooLarge), ("abc", MalformedRequest), ("²", MalformedRequest)],
)
async def test_a_length_that_cannot_be_right_is_refused_unread(length: str, error: type[GatewayError]) -> None:
    """Too long a body is refused by its announced length, before a byte of it is read."""
    scope: Any = http_scope("POST", "/", {"content-type": CONTENT_TYPE})
    scope["headers"].append((b"content-length", length.encode("latin-1")))
    with pytest.raises(error):
        async with uploads().receive(scope, unread(), part="image"):
            pass


URLENCODED = "application/x-www-form-urlencoded"


async def fields_of(body: bytes, content_type: str = URLENCODED, cut: int = 3) -> list[tuple[str, str]]:
    """The fields of a form without a file."""
    receive = receiving(body_messages(split(body, [cut])))
    return await uploads().read_form(scope_of(content_type=content_type), receive)


@given(st.lists(st.integers(0, 300), max_size=5))
async def test_a_form_without_a_file_is_read_in_both_encodings(cuts: list[int]) -> None:
    """An urlencoded form and a multipart one of the same fields are the same."""
    expected = [("user_key", "k +&"), ("task_id", "任务"), ("empty", "")]
    for body, content_type in (
        (b"user_key=k+%2B%26&task_id=%E4%BB%BB%E5%8A%A1&empty=", f"{URLENCODED}; charset=utf-8"),
        (form(*[field(*each) for each in expected]), CONTENT_TYPE),
    ):
        receive = receiving(body_messages(split(body, cuts)))
        assert await uploads().read_form(scope_of(content_type=content_type), receive) == expected


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"a=%ff", URLENCODED, MalformedRequest),
        (b"a=\xff", URLENCODED, MalformedRequest),
        (b"a=b&" * 65, URLENCODED, MalformedRequest),
        (b"a" * (MAX_FORM_BYTES + 1), URLENCODED, MalformedRequest),
        (form(*[field(f"f{n}", "x" * 40_000) for n in range(2)]), CONTENT_TYPE, MalformedRequest),
        (form(field("a", "b"), closed=False), CONTENT_TYPE, MalformedRequest),
        (form(file("image", PNG)), CONTENT_TYPE, InvalidOptions),
        (b"{}", "application/json", UnsupportedMediaType),
        (b"a=b", "", UnsupportedMediaType),
    ],
)
async def test_a_form_that_is_none_is_refused(body: bytes, content_type: str, error: type[GatewayError]) -> None:
    """Forms that can't be decoded, are too large, hold a file or are of another type are refused."""
    with pytest.raises(error):
        await fields_of(body, content_type)
