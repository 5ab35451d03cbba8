"""Reading of submissions from the connection."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.uploads import FORM_OVERHEAD_BYTES, MAX_FORM_BYTES, Upload, UploadReader
from service.domain.errors import (
    GatewayError,
    ImageTooLarge,
    InvalidImage,
    InvalidOptions,
    MalformedRequest,
    UnsupportedCoding,
    UnsupportedMediaType,
)
from service.domain.media import ImageInfo, inspect_image
from tests.unit.asgi_client import make_body_messages, make_http_scope, make_receive
from tests.unit.multipart_forms import (
    BOUNDARY,
    CONTENT_TYPE,
    MAX_BYTES,
    PNG,
    encode_field,
    encode_file,
    encode_form,
    encode_part,
    make_failing_receive,
    make_png,
    make_upload_scope,
    make_uploads,
    split_body,
)

URLENCODED = "application/x-www-form-urlencoded"


async def read_upload(
    body: bytes | Iterable[bytes],
    *,
    reader: UploadReader | None = None,
    name: str = "image",
    headers: Mapping[str, str] | None = None,
    has_length: bool = False,
) -> Upload:
    """Read an upload that arrives in chunks, with or without its length."""
    chunks = [body] if isinstance(body, bytes) else list(body)
    sent = {"content-type": CONTENT_TYPE} | dict(headers or {})
    if has_length:
        sent["content-length"] = str(sum(map(len, chunks)))
    scope: Any = make_http_scope("POST", "/v1/tasks/upscale", sent)
    receive = make_receive(make_body_messages(chunks))
    async with (reader or make_uploads()).receive(scope, receive, part=name) as submission:
        return submission


@given(st.lists(st.integers(0, 1200), max_size=30), st.booleans(), st.permutations(range(3)))
async def test_any_chunking_gives_the_same_upload(cuts: list[int], announced: bool, order: list[int]) -> None:
    parts = [encode_file("image", PNG), encode_field("prompt", "a café\r\n--\r\nwith 猫"), encode_field("scale", "")]
    body = encode_form(*[parts[item] for item in order])
    submission = await read_upload(split_body(body, cuts), has_length=announced)
    image = submission.image
    assert (image.data, image.sha256) == (PNG, hashlib.sha256(PNG).digest())
    assert (image.media_type, image.width, image.height) == ("image/png", 5, 3)
    assert sorted(submission.fields) == [("prompt", "a café\r\n--\r\nwith 猫"), ("scale", "")]


async def test_body_byte_by_byte() -> None:
    body = encode_form(encode_field("scale", "2"), encode_file("image", PNG))
    chunks = [chunk for byte in body for chunk in (bytes([byte]), b"")]
    assert (await read_upload(chunks)).fields == [("scale", "2")]


@pytest.mark.parametrize(
    "sent",
    [
        encode_file("image", PNG, 'filename=""'),
        encode_file("image", PNG, "filename*=utf-8''%E5%9B%BE.png"),
        encode_part("name=\"image\"; filename*=utf-8''%E5%9B%BE.png", PNG),
        encode_part('name="image"', PNG, "image/png"),
        encode_file("image", PNG, 'filename="图.png"').replace("图".encode(), "图".encode("gbk")),
        encode_part('filename="a.png"; name=image', PNG),
    ],
    ids=["no name", "extended name", "extended name alone", "type alone", "name in GBK", "other order"],
)
async def test_any_file_name_marks_a_file(sent: bytes) -> None:
    assert (await read_upload(encode_form(sent))).image.data == PNG


async def test_file_part_name_is_configurable() -> None:
    assert (await read_upload(encode_form(encode_file("input_image", PNG)), name="input_image")).image.data == PNG
    with pytest.raises(InvalidOptions, match="input_image: is required"):
        await read_upload(encode_form(), name="input_image")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (encode_form(encode_field("scale", "2")), "image: is required"),
        (encode_form(encode_file("image", PNG), encode_file("image", PNG)), "image: is given more than once"),
        (encode_form(encode_file("picture", PNG)), "picture: is a file: the only file belongs in the part image"),
        (encode_form(encode_field("image", ""), encode_file("image", PNG)), "image: is given more than once"),
        (encode_form(encode_part("name=\"prompt\"; filename*=utf-8''a", b"x", "text/plain")), "prompt: is a file"),
        (encode_form(encode_field("prompt", "x" * 65_537)), "prompt: must be at most 65536 bytes"),
        (encode_form(encode_field("prompt", b"\xff")), "prompt: must be text in utf-8"),
    ],
)
async def test_unexpected_parts_are_named(body: bytes, fault: str) -> None:
    with pytest.raises(InvalidOptions, match=fault):
        await read_upload(body)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (encode_form(encode_file("image", PNG), is_closed=False), "incomplete"),
        (encode_form(encode_file("image", PNG))[:-8], "incomplete"),
        (b"", "incomplete"),
        (b"no form at all", "incomplete"),
        (b"x" + encode_form(), "can't be read"),
        (encode_form(encode_field("prompt", "").replace(b"prompt", b"\xff")), "name of a field is not UTF-8"),
        (encode_form(encode_field("", "x")), "1 to 128 characters"),
        (encode_form(encode_field("x" * 129, "x")), "1 to 128 characters"),
        (encode_form(*[encode_field(f"f{n}", "") for n in range(65)]), "more than 64 fields"),
        (encode_form(*[encode_field(f"f{n}", "x" * 60_000) for n in range(5)]), "larger than 262144 bytes"),
        (encode_form(encode_field("x", "").replace(b": ", b"")), "can't be read"),
    ],
)
@pytest.mark.parametrize("announced", [True, False])
async def test_malformed_forms(body: bytes, why: str, announced: bool) -> None:
    with pytest.raises(MalformedRequest, match=why):
        await read_upload(body, has_length=announced)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (encode_form(encode_file("image", b"")), InvalidImage),
        (encode_form(encode_file("image", PNG[:-3])), InvalidImage),
        (encode_form(encode_file("image", b"GIF89a")), UnsupportedMediaType),
        (encode_form(encode_field("image", "aGVsbG8=")), UnsupportedMediaType),
        (encode_form(encode_part('name="image"', b"hello", "text/plain")), UnsupportedMediaType),
        (encode_form(encode_file("image", b"x" * (MAX_BYTES + 1))), ImageTooLarge),
    ],
)
async def test_invalid_images(body: bytes, error: type[GatewayError]) -> None:
    with pytest.raises(error):
        await read_upload(body)


async def test_image_at_the_limits_is_accepted() -> None:
    large = PNG + b"\0" * (MAX_BYTES - len(PNG))
    assert len((await read_upload(encode_form(encode_file("image", large)))).image.data) == MAX_BYTES
    assert (await read_upload(encode_form(encode_file("image", make_png(100, 100))))).image.width == 100
    with pytest.raises(ImageTooLarge, match=r"100 x 101 = 10100 pixels; at most 10000"):
        await read_upload(encode_form(encode_file("image", make_png(100, 101))))


async def test_large_images_are_inspected_in_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    inspecting: list[threading.Thread] = []

    def inspect_recording(data: bytes) -> ImageInfo:
        inspecting.append(threading.current_thread())
        return inspect_image(data)

    monkeypatch.setattr("service.api.uploads.inspect_image", inspect_recording)
    for size in (65_536, 65_537):
        image = PNG + b"\0" * (size - len(PNG))
        submission = await read_upload(
            encode_form(encode_file("image", image)), reader=make_uploads(max_image_bytes=100_000)
        )
        assert submission.image.width == 5
    at_once, beside = inspecting
    assert at_once is threading.current_thread()
    assert beside is not at_once


@pytest.mark.parametrize(
    ("content_type", "value", "expected"),
    [
        ("application/json", b'{"order": "4711"}', '{"order": "4711"}'),
        ("application/octet-stream", "猫".encode(), "猫"),
        ("image/png", b"2", "2"),
        ("text/plain; charset=GBK", "猫".encode("gbk"), "猫"),
        ('text/plain; charset="gb18030"', "猫𠀀".encode("gb18030"), "猫𠀀"),
        ("text/plain;charset=Big5", "貓".encode("big5"), "貓"),
        ("text/plain; charset=Shift_JIS", "猫".encode("shift_jis"), "猫"),
        ("application/json; charset=utf-16", "猫".encode("utf-16"), "猫"),
        ("text/plain; charset=ISO-8859-1", b"caf\xe9", "café"),
        ("text/plain; charset=windows-1252", b"5 \x80", "5 €"),
        ("text/plain; charset=US-ASCII", b"cat", "cat"),
        ("text/plain; charset=", b"cat", "cat"),
        ("text/plain; format=flowed", b"cat", "cat"),
    ],
)
async def test_fields_are_decoded_by_their_charset(content_type: str, value: bytes, expected: str) -> None:
    body = encode_form(encode_part('name="prompt"', value, content_type), encode_file("image", PNG))
    assert (await read_upload(split_body(body, range(0, len(body), 7)))).fields == [("prompt", expected)]


@pytest.mark.parametrize(
    ("headers", "value"),
    [
        ("text/plain; charset=klingon", b"cat"),
        ("text/plain; charset=unicode_escape", b"cat"),
        ("text/plain; charset=hex", b"00"),
        ("text/plain; charset=idna", b"cat"),
        ("text/plain; charset=../../x", b"cat"),
        ('text/plain; charset="\xe9"', b"cat"),
        ("text/plain; charset=us-ascii", b"caf\xe9"),
        ("text/plain; charset=GBK", b"\xff\xff"),
        ("text/plain; charset=utf-16", b"odd"),
        ("text/plain\r\nContent-Transfer-Encoding: base64", b"Y2F0"),
        ("text/plain\r\nContent-Transfer-Encoding: Quoted-Printable", b"=E7=8C=AB"),
    ],
)
async def test_undecodable_fields_are_named(headers: str, value: bytes) -> None:
    with pytest.raises(InvalidOptions) as caught:
        await read_upload(encode_form(encode_part('name="prompt"', value, headers), encode_file("image", PNG)))
    assert [error.field for error in caught.value.errors] == ["prompt"]


@pytest.mark.parametrize("encoding", ["7bit", "8bit", "binary"])
async def test_identity_transfer_encodings_are_ignored(encoding: str) -> None:
    """Old Java and C# clients send them."""
    plain = encode_part('name="prompt"', "猫".encode(), f"text/plain\r\nContent-Transfer-Encoding: {encoding}")
    assert (await read_upload(encode_form(plain, encode_file("image", PNG)))).fields == [("prompt", "猫")]


def pad_boundaries(*parts: bytes, paddings: list[bytes]) -> bytes:
    """Encode a form with padding after each boundary."""
    delimiter = f"--{BOUNDARY}".encode()
    first, *others = (delimiter + padding for padding in paddings)
    body = b"".join(item + b"\r\n" + content + b"\r\n" for item, content in zip([first, *others], parts, strict=False))
    return body + delimiter + b"--" + paddings[-1] + b"\r\n"


@given(
    st.lists(st.sampled_from([b"", b" ", b"\t", b"  ", b" \t \t "]), min_size=4, max_size=4),
    st.lists(st.integers(0, 700), max_size=30),
)
async def test_padding_after_a_boundary(paddings: list[bytes], cuts: list[int]) -> None:
    text = f"x--{BOUNDARY} \r\n\r\n --{BOUNDARY}"
    body = pad_boundaries(
        encode_field("prompt", text), encode_file("image", PNG), encode_field("scale", "2"), paddings=paddings
    )
    submission = await read_upload(split_body(body, cuts))
    assert submission.image.data == PNG
    assert submission.fields == [("prompt", text), ("scale", "2")]


async def test_padding_byte_by_byte() -> None:
    body = pad_boundaries(encode_file("image", PNG), encode_field("scale", "2"), paddings=[b" \t ", b"   ", b" "])
    assert (await read_upload([bytes([item]) for item in body])).fields == [("scale", "2")]


@pytest.mark.parametrize("padding", [b" x", b" --", b"x", b" " * 2_000, b" \n", b"\x0b"])
async def test_invalid_padding_is_malformed(padding: bytes) -> None:
    for paddings in ([padding, b"", b""], [b"", padding, b""]):
        body = pad_boundaries(encode_field("scale", "2"), encode_file("image", PNG), paddings=paddings)
        for size in (3, len(body)):
            with pytest.raises(MalformedRequest):
                await read_upload(split_body(body, range(0, len(body), size)))


@pytest.mark.parametrize(
    ("codings", "fine"),
    [
        (["identity"], True),
        (["Identity, identity", ""], True),
        (["gzip"], False),
        (["identity", "gzip"], False),
        (["identity, br"], False),
        (["utf-8"], False),
    ],
)
async def test_content_encoding_is_not_supported(codings: list[str], fine: bool) -> None:
    for content_type, form_only in ((CONTENT_TYPE, False), (CONTENT_TYPE, True), (URLENCODED, True)):
        body = (
            b"a=b"
            if content_type == URLENCODED
            else encode_form(encode_field("a", "b"), *([] if form_only else [encode_file("image", PNG)]))
        )
        scope: Any = make_upload_scope(content_type=content_type)
        scope["headers"] += [(b"content-encoding", coding.encode()) for coding in codings]
        receive = make_receive(make_body_messages([body])) if fine else make_failing_receive()
        with nullcontext() if fine else pytest.raises(UnsupportedCoding):
            if form_only:
                assert await make_uploads().read_form(scope, receive) == [("a", "b")]
            else:
                async with make_uploads().receive(scope, receive, part="image") as submission:
                    assert submission.fields == [("a", "b")]


@pytest.mark.parametrize("content_type", ["", "application/json", "multipart/form-data", "multipart/mixed; boundary=x"])
async def test_only_multipart_forms_are_accepted(content_type: str) -> None:
    with pytest.raises(UnsupportedMediaType):
        await read_upload(encode_form(encode_file("image", PNG)), headers={"content-type": content_type})


@pytest.mark.parametrize(
    ("length", "error"),
    [(str(MAX_BYTES + FORM_OVERHEAD_BYTES + 1), ImageTooLarge), ("abc", MalformedRequest), ("²", MalformedRequest)],
)
async def test_oversized_length_is_refused_unread(length: str, error: type[GatewayError]) -> None:
    scope: Any = make_http_scope("POST", "/", {"content-type": CONTENT_TYPE})
    scope["headers"].append((b"content-length", length.encode("latin-1")))
    with pytest.raises(error):
        async with make_uploads().receive(scope, make_failing_receive(), part="image"):
            pass


async def read_fields(body: bytes, content_type: str = URLENCODED, cut: int = 3) -> list[tuple[str, str]]:
    receive = make_receive(make_body_messages(split_body(body, [cut])))
    return await make_uploads().read_form(make_upload_scope(content_type=content_type), receive)


@given(st.lists(st.integers(0, 300), max_size=5))
async def test_plain_form_in_both_encodings(cuts: list[int]) -> None:
    expected = [("user_key", "k +&"), ("task_id", "任务"), ("empty", "")]
    for body, content_type in (
        (b"user_key=k+%2B%26&task_id=%E4%BB%BB%E5%8A%A1&empty=", f"{URLENCODED}; charset=utf-8"),
        (encode_form(*[encode_field(*item) for item in expected]), CONTENT_TYPE),
    ):
        receive = make_receive(make_body_messages(split_body(body, cuts)))
        assert await make_uploads().read_form(make_upload_scope(content_type=content_type), receive) == expected


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"a=%ff", URLENCODED, MalformedRequest),
        (b"a=\xff", URLENCODED, MalformedRequest),
        (b"a=b&" * 65, URLENCODED, MalformedRequest),
        (b"a" * (MAX_FORM_BYTES + 1), URLENCODED, MalformedRequest),
        (encode_form(*[encode_field(f"f{n}", "x" * 40_000) for n in range(2)]), CONTENT_TYPE, MalformedRequest),
        (encode_form(encode_field("a", "b"), is_closed=False), CONTENT_TYPE, MalformedRequest),
        (encode_form(encode_file("image", PNG)), CONTENT_TYPE, InvalidOptions),
        (b"{}", "application/json", UnsupportedMediaType),
        (b"a=b", "", UnsupportedMediaType),
    ],
)
async def test_invalid_plain_forms(body: bytes, content_type: str, error: type[GatewayError]) -> None:
    with pytest.raises(error):
        await read_fields(body, content_type)
