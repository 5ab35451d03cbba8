"""Truncated and malformed request bodies on raw connections."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

import pytest

from service.api.uploads import UploadReader
from service.app import create_app
from service.usecases.ports import SubmitOutcome
from tests.behaviour.audit import UNREACHABLE_POLICIES, assert_nothing_happened
from tests.behaviour.gateway_fixture import MAX_BYTES, MAX_PIXELS, RunningGateway, run_real_gateway
from tests.support.app_server import serve_app
from tests.support.images import make_png
from tests.support.valkey import Valkey
from tests.unit.asgi_client import AsgiResponse, open_raw_connection, read_response
from tests.unit.multipart_forms import CONTENT_TYPE, encode_field, encode_file, encode_form

BODY = encode_form(encode_field("colors", "5"), encode_file("image", make_png()))


@pytest.fixture
async def port(gateway: RunningGateway, valkey: Valkey) -> AsyncIterator[int]:
    """Serve a gateway with short timeouts; assert at the end that nothing was spent."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    gateway.services.uploads = UploadReader(
        max_image_bytes=MAX_BYTES, max_image_pixels=MAX_PIXELS, idle_seconds=0.1, total_seconds=0.4
    )
    async with serve_app(create_app(gateway.services)) as url:
        yield get_port(url)
    await assert_nothing_happened(gateway, valkey)


def get_port(url: str) -> int:
    return urlsplit(url).port or 0


def make_request_head(gateway: RunningGateway, *framing: str, path: str = "/v1/tasks/vectorize") -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: gateway", f"Authorization: Bearer {gateway.token}"]
    return "\r\n".join([*lines, f"Content-Type: {CONTENT_TYPE}", *framing, "", ""]).encode()


def content_length_header(length: int) -> str:
    return f"Content-Length: {length}"


def assert_problem(response: AsgiResponse, status: int, code: str) -> None:
    assert (response.status, response.json()["code"]) == (status, code)
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["instance"] == response.headers["x-request-id"]


async def test_stalled_body_is_400_and_closes_the_connection(gateway: RunningGateway, port: int) -> None:
    for end in (0, 1, len(BODY) // 2, len(BODY) - 1):
        async with open_raw_connection(port) as (reader, writer):
            writer.write(make_request_head(gateway, content_length_header(len(BODY))) + BODY[:end])
            response = await read_response(reader)
            assert_problem(response, 400, "malformed-request")
            assert response.headers["connection"] == "close"
            assert await reader.read() == b""


async def test_stalled_legacy_body_closes_the_connection(gateway: RunningGateway, port: int) -> None:
    for call in ("submit_vector_task", "check_task_status"):
        async with open_raw_connection(port) as (reader, writer):
            writer.write(make_request_head(gateway, content_length_header(len(BODY)), path=f"/api/{call}") + BODY[:50])
            response = await read_response(reader)
            assert (response.status, response.json()["err_code"]) == (200, 1)
            assert "did not arrive in time" in response.json()["err_msg"]
            assert response.headers["connection"] == "close"
            assert await reader.read() == b""


async def test_legacy_client_with_wrong_key_is_refused_early(gateway: RunningGateway, port: int) -> None:
    body = encode_form(encode_field("user_key", "unknown"), encode_file("input_image", make_png()))
    async with open_raw_connection(port) as (reader, writer):
        for _ in range(2):
            half = body.index(make_png())
            writer.write(
                make_request_head(gateway, content_length_header(len(body)), path="/api/submit_vector_task")
                + body[:half]
            )
            assert (await read_response(reader)).json() == {"err_code": 1, "err_msg": "账户不存在"}
            writer.write(body[half:])


async def test_trickling_body_is_400_and_closes_the_connection(gateway: RunningGateway, port: int) -> None:
    async with open_raw_connection(port) as (reader, writer):
        writer.write(make_request_head(gateway, "Transfer-Encoding: chunked"))
        async with asyncio.timeout(10):
            answering = asyncio.ensure_future(read_response(reader))
            for byte in BODY + b"\0" * 100_000:
                writer.write(b"1\r\n%c\r\n" % byte)
                done, _ = await asyncio.wait([answering], timeout=0.02)
                if done:
                    break
            response = await answering
        assert_problem(response, 400, "malformed-request")
        with suppress(ConnectionResetError):  # of a byte that met the closed connection
            assert await reader.read() == b""


async def test_disconnect_within_the_body_is_counted(gateway: RunningGateway, port: int) -> None:
    for end in (0, len(BODY) // 2, len(BODY) - 1):
        async with open_raw_connection(port) as (_, writer):
            writer.write(make_request_head(gateway, content_length_header(len(BODY))) + BODY[:end])
            await writer.drain()
    async with asyncio.timeout(10):
        while await count_client_disconnects(gateway) < 3:
            pass


async def count_client_disconnects(gateway: RunningGateway) -> float:
    """Return how many clients disconnected during a submission, by the metrics."""
    lines = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text.splitlines()
    counted = [line for line in lines if "_requests_total{" in line and 'status="499"' in line]
    return sum(float(line.rpartition(" ")[2]) for line in counted)


async def test_incomplete_form_is_400(gateway: RunningGateway, port: int) -> None:
    async with open_raw_connection(port) as (reader, writer):
        for end in (len(BODY) - 5, len(BODY) // 2):
            writer.write(make_request_head(gateway, content_length_header(end)) + BODY[:end])
            assert_problem(await read_response(reader), 400, "malformed-request")


async def test_conflicting_lengths_are_refused(gateway: RunningGateway, port: int) -> None:
    for framing in (
        (content_length_header(len(BODY)), content_length_header(3)),
        (content_length_header(len(BODY)), "Transfer-Encoding: chunked"),
        ("Content-Length: -1",),
        (f"Content-Length: {'9' * 40}",),
        ("Content-Length: 0x10",),
    ):
        async with open_raw_connection(port) as (reader, writer):
            writer.write(make_request_head(gateway, *framing) + BODY)
            status = (await reader.readline()).split()[1]
            assert status == b"400", framing


async def test_pipelined_submissions(gateway: RunningGateway) -> None:
    request = make_request_head(gateway, content_length_header(len(BODY))) + BODY
    async with open_raw_connection(get_port(gateway.url)) as (reader, writer):
        writer.write(request + request)
        responses = [await read_response(reader) for _ in range(2)]
    assert [response.status for response in responses] == [201, 201]
    assert len({response.json()["id"] for response in responses}) == 2
    assert await gateway.upstream.count_submits() == 2


BROKEN = 60
LARGE = MAX_BYTES - 100_000
MAX_RETAINED_BYTES = 15_000_000
"""A quarter of what all uploads hold together; the sandbox retains some."""


@contextmanager
def assert_memory_released() -> Iterator[None]:
    """Fail if memory allocated in the block is not released without a collection of cycles."""
    gc.collect()
    gc.disable()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] - before < MAX_RETAINED_BYTES
    finally:
        tracemalloc.stop()
        gc.enable()


@pytest.mark.parametrize("path", ["/v1/tasks/vectorize", "/api/submit_vector_task"])
async def test_disconnect_releases_upload_memory(gateway: RunningGateway, path: str) -> None:
    """Without a collection of cycles, which a quiet process rarely makes."""
    before, port = await count_client_disconnects(gateway), get_port(gateway.url)
    part = "image" if path.startswith("/v1") else "input_image"
    body = encode_form(encode_field("user_key", gateway.token), encode_file(part, b"x" * LARGE))
    if path.startswith("/v1"):
        body = encode_form(encode_file(part, b"x" * LARGE))
    with assert_memory_released():
        for count in range(BROKEN):
            async with open_raw_connection(port) as (_, writer):
                writer.write(make_request_head(gateway, content_length_header(len(body)), path=path) + body[:-1])
                await writer.drain()
                await _wait_for_upload_bytes(gateway, LARGE)
            while await count_client_disconnects(gateway) <= before + count:
                pass


async def _wait_for_upload_bytes(gateway: RunningGateway, size: int) -> None:
    while gateway.services.uploads._memory.reserved_bytes < size:
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (402, SubmitOutcome.EXHAUSTED),
        (422, None),
        (502, SubmitOutcome.REJECTED),
        (504, SubmitOutcome.UNKNOWN),
    ],
)
async def test_refusal_releases_upload_memory(valkey: Valkey, status: int, outcome: SubmitOutcome | None) -> None:
    fields = () if outcome else (encode_field("colors", "x"),)
    body = encode_form(encode_file("image", make_png() + b"\0" * LARGE), *fields)
    async with run_real_gateway(valkey) as gateway, open_raw_connection(get_port(gateway.url)) as (reader, writer):
        with assert_memory_released():
            for _ in range(BROKEN):
                if outcome is SubmitOutcome.UNKNOWN:
                    await gateway.upstream.lose_next_response()
                elif outcome:
                    await gateway.upstream.refuse_next(outcome)
                writer.write(make_request_head(gateway, content_length_header(len(body))) + body)
                assert (await read_response(reader)).status == status
