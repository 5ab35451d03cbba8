"""Uploads over real connections."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog
from litestar import Litestar, Request, post
from prometheus_client import CollectorRegistry

from service.api.asgi import RequestMiddleware
from service.api.errors import exception_handlers
from service.api.uploads import UploadReader
from service.telemetry.metrics import Metrics, Port
from tests.unit.asgi_client import AsgiResponse, open_raw_connection, read_response, serve_on_port
from tests.unit.multipart_forms import CONTENT_TYPE, PNG, encode_field, encode_file, encode_form

MAX_BYTES = 3_000_000


class UploadServer:
    def __init__(self, **limits: Any) -> None:
        self.log_events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        logger = structlog.wrap_logger(None, processors=[self._collect])
        uploads = UploadReader(**({"max_image_bytes": MAX_BYTES, "max_image_pixels": 1000} | limits))
        self.received = asyncio.Event()
        self.release = asyncio.Event()

        @post("/v1/tasks")
        async def submit(request: Request[Any, Any, Any]) -> dict[str, int]:
            async with uploads.receive(request.scope, request.receive, part="image") as submission:
                self.received.set()
                if submission.fields:
                    await self.release.wait()
                return {"bytes": len(submission.image.data)}

        handlers: dict[Any, Any] = dict(exception_handlers(logger))
        app = Litestar(
            [submit],
            exception_handlers=handlers,
            openapi_config=None,
            logging_config=None,
            request_max_body_size=None,
        )
        self.app = RequestMiddleware(app, Metrics(CollectorRegistry()), logger, Port.TENANTS)

    def _collect(self, _logger: object, _method: str, event: Any) -> Any:
        self.log_events.put_nowait(dict(event))
        raise structlog.DropEvent


def make_request_head(length: int | None) -> bytes:
    """Make the head of a submission, chunked without a length."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST /v1/tasks HTTP/1.1\r\nHost: x\r\nContent-Type: {CONTENT_TYPE}\r\n{framing}\r\n\r\n".encode()


def encode_chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def problem_code(response: AsgiResponse) -> tuple[int, str]:
    return response.status, response.json()["code"]


async def test_two_submissions_on_one_connection() -> None:
    body = encode_form(encode_file("image", PNG + b"\0" * 1_000_000))
    gateway = UploadServer()
    async with serve_on_port(gateway.app) as port, open_raw_connection(port) as (reader, writer):
        writer.write(make_request_head(len(body)) + body)
        assert (await read_response(reader)).json() == {"bytes": len(PNG) + 1_000_000}
        writer.write(
            make_request_head(None) + encode_chunk(body[:500_000]) + encode_chunk(body[500_000:]) + encode_chunk(b"")
        )
        assert (await read_response(reader)).json() == {"bytes": len(PNG) + 1_000_000}


@pytest.mark.parametrize("chunked", [True, False])
async def test_a_413_reaches_a_client_that_is_still_sending(chunked: bool) -> None:
    body = encode_form(encode_file("image", b"x" * (MAX_BYTES * 3)))
    gateway = UploadServer()
    async with serve_on_port(gateway.app) as port, open_raw_connection(port) as (reader, writer):
        writer.write(
            make_request_head(None) + encode_chunk(body) + encode_chunk(b"")
            if chunked
            else make_request_head(len(body)) + body
        )
        await writer.drain()
        assert problem_code(await read_response(reader)) == (413, "image-too-large")


async def test_expect_100_continue_refuses_oversized_bodies() -> None:
    expecting = make_request_head(MAX_BYTES * 9).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    async with serve_on_port(UploadServer().app) as port, open_raw_connection(port) as (reader, writer):
        writer.write(expecting)
        assert problem_code(await read_response(reader)) == (413, "image-too-large")


async def test_idle_client_is_answered_and_disconnected() -> None:
    body = encode_form(encode_file("image", PNG))
    async with (
        serve_on_port(UploadServer(idle_seconds=0.05).app) as port,
        open_raw_connection(port) as (reader, writer),
    ):
        writer.write(make_request_head(len(body)) + body[:100])
        response = await read_response(reader)
        assert problem_code(response) == (400, "malformed-request")
        assert response.headers["connection"] == "close"
        assert await reader.read() == b""


async def test_trickling_client_is_answered_and_disconnected() -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        while not writer.is_closing():
            writer.write(encode_chunk(b"x"))
            await asyncio.sleep(0.005)

    async with (
        serve_on_port(UploadServer(total_seconds=0.1).app) as port,
        open_raw_connection(port) as (reader, writer),
    ):
        writer.write(make_request_head(None) + encode_chunk(encode_form(encode_field("prompt", "x"), is_closed=False)))
        trickling = asyncio.create_task(trickle(writer))
        try:
            assert problem_code(await read_response(reader)) == (400, "malformed-request")
        finally:
            trickling.cancel()


async def test_client_disconnect_is_499() -> None:
    body = encode_form(encode_file("image", PNG))
    gateway = UploadServer()
    async with serve_on_port(gateway.app) as port:
        async with open_raw_connection(port) as (_, writer):
            writer.write(make_request_head(len(body)) + body[:100])
        line = await gateway.log_events.get()
    assert (line["status"], line["outcome"], line["route"]) == (499, "client-disconnected", "/v1/tasks")
    assert gateway.log_events.empty()


async def test_upload_without_memory_is_503() -> None:
    body = encode_form(encode_file("image", PNG))
    slow = encode_form(encode_file("image", PNG), encode_field("scale", "2"))
    gateway = UploadServer(memory_bytes=len(slow), wait_seconds=0.05)
    async with (
        serve_on_port(gateway.app) as port,
        open_raw_connection(port) as (first_reader, first),
        open_raw_connection(port) as (second_reader, second),
    ):
        first.write(make_request_head(len(slow)) + slow)
        await gateway.received.wait()
        second.write(make_request_head(len(body)) + body)
        refused = await read_response(second_reader)
        assert (*problem_code(refused), refused.headers["retry-after"]) == (503, "overloaded", "1")
        gateway.release.set()
        assert (await read_response(first_reader)).status == 201
        second.write(make_request_head(len(body)) + body)
        assert (await read_response(second_reader)).status == 201
