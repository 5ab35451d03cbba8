"""Compression of responses."""

from __future__ import annotations

import gzip
import re
from typing import Any

import pytest

from service.api.compression import CompressionMiddleware
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.unit.asgi_client import make_http_scope, open_raw_connection, read_response

GZIP = {"Accept-Encoding": "br, gzip;q=0.5"}
LONG = {
    "tenants": ["/v1/tasks", "/v1/usage", "/openapi.json", "/docs/problems"],
    "operators": ["/admin/v1/tasks?tenant=shop", "/metrics", "/openapi.json"],
}


@pytest.fixture
async def tasks(gateway: RunningGateway) -> list[str]:
    """Ids of tasks, of several kinds so that lists are long."""
    return [(await gateway.submit(kind)).json()["id"] for kind in ("face-enhance", "seamless", "upscale")]


@pytest.mark.parametrize("port", ["tenants", "operators"])
async def test_long_texts(gateway: RunningGateway, tasks: list[str], port: str) -> None:
    assert tasks
    base, token = (gateway.url, gateway.token) if port == "tenants" else (gateway.ops_url, ADMIN_TOKEN)
    for path in LONG[port]:
        authorization = {"Authorization": f"Bearer {token}"}
        url = base + path
        plain = await gateway.http.get(url, headers=authorization | {"Accept-Encoding": "br, gzip;q=0"})
        assert "content-encoding" not in plain.headers
        for method in ("GET", "HEAD"):
            packed = await gateway.http.request(method, url, headers=authorization | GZIP)
            assert packed.headers["content-encoding"] == "gzip", path
            assert "Accept-Encoding" in packed.headers["vary"]
            assert int(packed.headers["content-length"]) < len(plain.content)
            assert packed.content == (plain.content if method == "GET" else b"") or path == "/metrics"


async def test_other_responses(gateway: RunningGateway, tasks: list[str]) -> None:
    """What is short, has an ETag, is an image, a stream or the response to a change stays as it is."""
    task = f"/v1/tasks/{tasks[0]}"
    await gateway.wait_for_task(tasks[0])
    for path in (task, f"{task}/artifacts/image", f"{task}/events", "/v1/quota", "/v1/tasks?state=failed"):
        response = await gateway.call("GET", path, headers=GZIP)
        assert (response.status_code, response.headers.get("content-encoding")) == (200, None), path
    limits = [{"window": window, "tasks": 100, "money": 100} for window in ("hour", "day", "month")]
    for method, path in (("PUT", "/tenants/shop"), ("GET", "/tenants/shop")):
        body = {"accounts": ["main"], "limits": limits} if method == "PUT" else None
        response = await gateway.call_admin(method, path, json=body, headers=GZIP)
        assert len(response.content) > 1_000
        assert "content-encoding" not in response.headers


@pytest.mark.parametrize(("method", "more_body"), [("POST", False), ("GET", True)])
async def test_change_and_stream(method: str, more_body: bool) -> None:
    """Responses to changes may show secrets, and a stream would be held back."""
    body = {"type": "http.response.body", "body": b"x" * 100_000, "more_body": more_body}
    sent = [{"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}, body, body]
    received: list[Any] = []

    async def app(_scope: Any, _receive: Any, send: Any) -> None:
        for message in sent:
            await send(message)

    async def send(message: Any) -> None:
        received.append(message)

    await CompressionMiddleware(app)(make_http_scope(method, headers=GZIP), None, send)  # type: ignore[arg-type]
    assert received == sent


async def test_compressed_file(gateway: RunningGateway) -> None:
    """The viewer of the documents is a compressed file, and is not compressed again."""
    page = await gateway.call("GET", "/docs")
    (path,) = re.findall(r'"(docs/scalar-[^"]*)"', page.text)
    async with open_raw_connection(int(gateway.url.rpartition(":")[2])) as (reader, writer):
        writer.write(f"GET /{path} HTTP/1.1\r\nHost: gateway\r\nAccept-Encoding: gzip\r\n\r\n".encode())
        response = await read_response(reader)
    assert b"Scalar" in gzip.decompress(response.body)
