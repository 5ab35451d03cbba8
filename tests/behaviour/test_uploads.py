"""Invalid images, and truncated, stalled and oversized bodies on raw connections."""

from __future__ import annotations

import asyncio
import gc
import struct
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from urllib.parse import urlsplit

import pytest
from PIL import Image

from service.api.form_parser import MultipartForm
from service.api.uploads import UploadReader
from service.app import create_app
from service.usecases.ports import SubmitOutcome
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import MAX_BYTES, MAX_PIXELS, RunningGateway
from tests.behaviour.requests import UNREACHABLE_POLICIES, assert_nothing_happened, expect_problem
from tests.support.images import draw_image, encode_image, make_png, png_claiming_size
from tests.support.network import serve_app
from tests.support.valkey import Valkey
from tests.unit.asgi_client import open_raw_connection, read_response
from tests.unit.multipart_forms import CONTENT_TYPE, encode_field, encode_file, encode_form

BODY = encode_form(encode_field("colors", "5"), encode_file("image", make_png()))
VECTORIZE, LEGACY = "/v1/tasks/vectorize", "/api/submit_vector_task"
ERROR = {"err_code": 1}
JPEG = encode_image(draw_image(), "JPEG")
WEBP = encode_image(draw_image(), "WEBP")
LARGE = MAX_BYTES - 100_000
BROKEN = 4
MAX_RETAINED_BYTES = LARGE * BROKEN // 2
"""Half of what the uploads of one kind hold together; the sandbox retains some."""


@pytest.fixture
async def guarded_gateway(gateway: RunningGateway, valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway and assert at the end that nothing was spent."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    yield gateway
    await assert_nothing_happened(gateway, valkey)


@pytest.fixture
async def port(guarded_gateway: RunningGateway) -> AsyncIterator[int]:
    """Serve the gateway with short timeouts."""
    guarded_gateway.services.uploads = UploadReader(
        max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, idle_seconds=0.1, total_seconds=0.4
    )
    async with serve_app(create_app(guarded_gateway.services)) as url:
        yield get_port(url)


def get_port(url: str) -> int:
    return urlsplit(url).port or 0


def make_request_head(gateway: RunningGateway, length: int | None, path: str = VECTORIZE) -> bytes:
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}"]
    return "\r\n".join([*lines, f"Content-Type: {CONTENT_TYPE}", framing, "", ""]).encode()


def make_blank_png(width: int, height: int) -> bytes:
    return encode_image(Image.new("1", (width, height)), "PNG")


async def test_unsupported_or_broken_image(guarded_gateway: RunningGateway) -> None:
    gif, space = encode_image(draw_image(), "GIF"), b" " + make_png()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    for image in (gif, svg, b"\x89", b"\0" * 5_000, space):
        problem = expect_problem(await guarded_gateway.submit(image=image), 415, "unsupported-media-type")
        assert "PNG, JPEG or WebP" in problem["detail"]
    altered = make_png()[:17] + b"\xff" + make_png()[18:]
    for image in (b"", make_png()[:-12], make_png()[:8], altered, JPEG[: len(JPEG) // 2], WEBP[: len(WEBP) // 2]):
        expect_problem(await guarded_gateway.submit(image=image), 422, "invalid-image")


async def test_image_at_the_limits_is_accepted(gateway: RunningGateway) -> None:
    largest = make_png() + b"\0" * (MAX_BYTES - len(make_png()))
    for image in (largest, make_blank_png(2_000, MAX_PIXELS // 2_000), JPEG, WEBP):
        assert (await gateway.submit("seamless", image=image)).status_code != 413
    assert await gateway.upstream.count_submits() == 4


async def test_too_many_bytes_or_pixels(guarded_gateway: RunningGateway) -> None:
    image = make_png() + b"\0" * (MAX_BYTES + 1 - len(make_png()))
    problem = expect_problem(await guarded_gateway.submit(image=image), 413, "image-too-large")
    assert str(MAX_BYTES) in problem["detail"]

    async def chunks() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for start in range(0, len(image), 100_000):
            yield image[start : start + 100_000]
        yield b"\r\n--b--\r\n"

    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    response = await guarded_gateway.call("POST", "/v1/tasks/face-enhance", content=chunks(), headers=headers)
    assert response.request.headers["transfer-encoding"] == "chunked"
    expect_problem(response, 413, "image-too-large")
    largest = 2**31 - 1
    for bomb in (make_blank_png(MAX_PIXELS + 1, 1), make_blank_png(2_001, 2_000), png_claiming_size(largest, largest)):
        assert len(bomb) < 200_000
        problem = expect_problem(await guarded_gateway.submit(image=bomb), 413, "image-too-large")
        assert " x ".join(map(str, struct.unpack(">II", bomb[16:24]))) in problem["detail"]


async def test_stalled_or_trickling_body_closes_the_connection(guarded_gateway: RunningGateway, port: int) -> None:
    refused = {"code": "malformed-request"}
    for path, end, expected in ((VECTORIZE, 0, refused), (VECTORIZE, len(BODY) - 1, refused), (LEGACY, 50, ERROR)):
        async with open_raw_connection(port) as (reader, writer):
            writer.write(make_request_head(guarded_gateway, len(BODY), path) + BODY[:end])
            response = await read_response(reader)
            assert response.status == (400 if path == VECTORIZE else 200)
            assert response.json().items() >= expected.items()
            assert await reader.read() == b""
    async with open_raw_connection(port) as (reader, writer):
        writer.write(make_request_head(guarded_gateway, None))
        async with asyncio.timeout(20):
            answering = asyncio.ensure_future(read_response(reader))
            for byte in BODY + b"\0" * 100_000:
                writer.write(b"1\r\n%c\r\n" % byte)
                done, _ = await asyncio.wait([answering], timeout=0.02)
                if done:
                    break
            response = await answering
        assert (response.status, response.json()["code"]) == (400, "malformed-request")
        with suppress(ConnectionResetError):  # of a byte that met the closed connection
            assert await reader.read() == b""


async def test_legacy_client_with_wrong_key_is_refused_early(guarded_gateway: RunningGateway) -> None:
    body = encode_form(encode_field("user_key", "unknown"), encode_file("input_image", make_png()))
    head, half = make_request_head(guarded_gateway, len(body), path=LEGACY), body.index(make_png())
    async with open_raw_connection(get_port(guarded_gateway.url)) as (reader, writer):
        for _ in range(2):
            writer.write(head + body[:half])
            assert (await read_response(reader)).json() == {"err_code": 1, "err_msg": "账户不存在"}
            writer.write(body[half:])


async def test_submissions_beyond_the_queue_are_refused_unread(guarded_gateway: RunningGateway) -> None:
    gateway = guarded_gateway
    gateway.services.uploads = UploadReader(
        max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, memory_bytes=1_500, max_waiting=1
    )
    memory, head = gateway.services.uploads.memory, make_request_head(gateway, 1_000)
    async with serve_app(create_app(gateway.services)) as url, AsyncExitStack() as stack:
        for _ in range(2):  # one is read, and the other waits
            _, writer = await stack.enter_async_context(open_raw_connection(get_port(url)))
            stack.callback(writer.transport.abort)
            writer.write(head)
        await wait_until(lambda: memory.is_waiting)
        for path, token, status, code in (
            (VECTORIZE, gateway.token, 503, "overloaded"),
            (VECTORIZE, "wrong", 401, "unauthenticated"),
            (LEGACY, gateway.token, 200, None),
        ):
            reader, writer = await stack.enter_async_context(open_raw_connection(get_port(url)))
            body = encode_field("user_key", token) if path == LEGACY else b""
            writer.write(make_request_head(gateway, 1_000, path).replace(gateway.token.encode(), token.encode()) + body)
            writer.write(b"\r\n--b" if path == LEGACY else b"")
            response = await read_response(reader)
            assert (response.status, response.json().get("code")) == (status, code)
            assert ("retry-after" in response.headers) == (status == 503)
        assert (await gateway.http.get(f"{url}/healthz")).status_code == 200


async def count_client_disconnects(gateway: RunningGateway) -> float:
    lines = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text.splitlines()
    counted = [line for line in lines if "_requests_total{" in line and 'status="499"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counted)


async def disconnect_within_the_body(gateway: RunningGateway, path: str) -> None:
    before = await count_client_disconnects(gateway)
    part = "input_image" if path == LEGACY else "image"
    body = encode_form(encode_field("user_key", gateway.token), encode_file(part, b"x" * LARGE))
    received, feed = 0, MultipartForm.feed

    def feed_counting(form: MultipartForm, chunk: bytes) -> None:
        nonlocal received
        received += len(chunk)
        feed(form, chunk)

    async with asyncio.timeout(20):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(MultipartForm, "feed", feed_counting)
            async with open_raw_connection(get_port(gateway.url)) as (_, writer):
                writer.write(make_request_head(gateway, len(body), path=path) + body[:-1])
                await writer.drain()
                while received < LARGE:
                    await asyncio.sleep(0)
        while await count_client_disconnects(gateway) <= before:
            pass


async def submit_in_vain(gateway: RunningGateway, status: int) -> None:
    if status == 504:
        await gateway.upstream.lose_next_response()
    elif status == 502:
        await gateway.upstream.refuse_next(SubmitOutcome.REJECTED)
    fields = {"colors": "x" if status == 422 else "5"}
    response = await gateway.submit("vectorize", fields, image=make_png() + b"\0" * LARGE)
    assert response.status_code == status


@pytest.mark.slow
async def test_failed_uploads_release_their_memory(gateway: RunningGateway) -> None:
    """Without a collection of cycles, which a quiet process rarely makes."""
    await gateway.wait_for_task((await gateway.submit("vectorize")).json()["id"])  # the sandbox imports modules for it
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for failure in (VECTORIZE, LEGACY, 422, 502, 504):
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(BROKEN):
                if isinstance(failure, str):
                    await disconnect_within_the_body(gateway, failure)
                else:
                    await submit_in_vain(gateway, failure)
            assert tracemalloc.get_traced_memory()[0] - before < MAX_RETAINED_BYTES, failure
    finally:
        tracemalloc.stop()
        gc.enable()
