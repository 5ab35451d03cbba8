"""Invalid images are refused before anything is spent."""

from __future__ import annotations

import struct
import zlib
from collections.abc import AsyncIterator

import pytest

from tests.behaviour.audit import UNREACHABLE_POLICIES, assert_nothing_happened, expect_problem
from tests.behaviour.gateway_fixture import MAX_BYTES, MAX_PIXELS, RunningGateway
from tests.support.images import draw_image, encode_image, make_png
from tests.support.valkey import Valkey

JPEG = encode_image(draw_image(), "JPEG")
WEBP = encode_image(draw_image(), "WEBP")


@pytest.fixture
async def guarded_gateway(gateway: RunningGateway, valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway and assert at the end that nothing was spent."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    yield gateway
    await assert_nothing_happened(gateway, valkey)


def make_decompression_bomb(width: int, height: int) -> bytes:
    """Make a small PNG that decompresses to this many pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    row = b"\0" * (1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(min(height, 10_000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


async def test_unsupported_type_is_415(guarded_gateway: RunningGateway) -> None:
    files = {
        "GIF": encode_image(draw_image(), "GIF"),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "BMP": encode_image(draw_image(), "BMP"),
        "TIFF": encode_image(draw_image(), "TIFF"),
        "HTML": b"<!doctype html><title>Not found</title>",
        "a text": b"data:image/png;base64,iVBORw0KGgo=",
        "one byte": b"\x89",
        "zeroes": b"\0" * 5_000,
        "a PNG after a space": b" " + make_png(),
    }
    for name, image in files.items():
        problem = expect_problem(await guarded_gateway.submit(image=image), 415, "unsupported-media-type")
        assert "PNG, JPEG or WebP" in problem["detail"], name


async def test_broken_image_is_422(guarded_gateway: RunningGateway) -> None:
    files = {
        "empty": b"",
        "a PNG without its end": make_png()[:-12],
        "a PNG without its last byte": make_png()[:-1],
        "half a PNG": make_png()[: len(make_png()) // 2],
        "the signature of a PNG": make_png()[:8],
        "a PNG whose header was altered": make_png()[:17] + b"\xff" + make_png()[18:],
        "a JPEG without its end": JPEG[:-2],
        "half a JPEG": JPEG[: len(JPEG) // 2],
        "the signature of a JPEG": JPEG[:3],
        "half a WebP": WEBP[: len(WEBP) // 2],
        "a PNG of no size": make_decompression_bomb(0, 0),
    }
    for name, image in files.items():
        problem = expect_problem(await guarded_gateway.submit(image=image), 422, "invalid-image")
        assert "image" in problem["detail"], name


async def test_too_many_bytes_is_413(guarded_gateway: RunningGateway) -> None:
    image = make_png() + b"\0" * (MAX_BYTES + 1 - len(make_png()))
    problem = expect_problem(await guarded_gateway.submit(image=image), 413, "image-too-large")
    assert str(MAX_BYTES) in problem["detail"]
    expect_problem(await guarded_gateway.submit(image=image + b"\0" * MAX_BYTES), 413, "image-too-large")

    head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'

    async def chunks() -> AsyncIterator[bytes]:
        yield head
        for start in range(0, len(image), 100_000):
            yield image[start : start + 100_000]
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = await guarded_gateway.call("POST", "/v1/tasks/face-enhance", content=chunks(), headers=headers)
    assert response.request.headers["transfer-encoding"] == "chunked"
    expect_problem(response, 413, "image-too-large")


async def test_too_many_pixels_is_413(guarded_gateway: RunningGateway) -> None:
    for width, height in ((MAX_PIXELS + 1, 1), (2_001, 2_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1)):
        image = make_decompression_bomb(width, height) if width * height < 10**10 else make_decompression_bomb(1, 1)
        if width == 2**31 - 1:
            header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
            image = image[:12] + header + struct.pack(">I", zlib.crc32(header)) + image[33:]
        assert len(image) < 200_000
        problem = expect_problem(await guarded_gateway.submit(image=image), 413, "image-too-large")
        assert f"{width} x {height}" in problem["detail"]


async def test_image_at_the_limits_is_accepted(gateway: RunningGateway) -> None:
    largest = make_png() + b"\0" * (MAX_BYTES - len(make_png()))
    for image in (largest, make_decompression_bomb(2_000, MAX_PIXELS // 2_000), JPEG, WEBP):
        response = await gateway.submit("seamless", image=image)
        assert response.status_code != 413, response.text
    assert await gateway.upstream.count_submits() == 4
