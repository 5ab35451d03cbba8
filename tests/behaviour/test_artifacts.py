"""Artifact downloads: from the sandbox, and streamed from scripted servers."""

from __future__ import annotations

import asyncio
import hashlib
import re
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
from httpx2 import Response
from structlog.testing import capture_logs

from service.app import create_app
from service.clients.artifacts import ArtifactClient
from service.domain.tasks import Artifact
from service.domain.tenants import Account
from service.http_protocol import Limits
from service.usecases.ports import ArtifactStream, RangeRequest
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import expect_problem
from tests.contract.scripted_server import (
    PNG_IMAGE,
    Connection,
    Handler,
    ScriptedServer,
    chunked_body,
    file_response,
    reply_and_close,
    reply_and_hold,
    response_head,
    run_server,
)
from tests.support.images import make_png
from tests.support.network import serve_app
from tests.unit.asgi_client import open_raw_connection

MIB = 1 << 20
LARGE = 96 * MIB
STALL_SECONDS = 0.3
SAME_IN_PARTS = {"content-type", "content-disposition", "etag", "x-content-type-options", "cache-control"}


@pytest.fixture
async def href(gateway: RunningGateway) -> str:
    task = await gateway.wait_for_task((await gateway.submit(image=make_png(200, 200))).json()["id"])
    (artifact,) = task["artifacts"]
    assert artifact["href"] == f"/v1/tasks/{task['id']}/artifacts/image"
    return str(artifact["href"])


async def fetch_artifact(gateway: RunningGateway, href: str, **headers: str) -> Response:
    return await gateway.call("GET", href, headers={name.replace("_", "-"): text for name, text in headers.items()})


@pytest.mark.smoke
async def test_artifact_is_served_at_its_href(gateway: RunningGateway, href: str) -> None:
    response = await fetch_artifact(gateway, href)
    assert response.status_code == 200
    assert response.content.startswith(b"\x89PNG")
    expected = {
        "content-type": "image/png",
        "content-length": str(len(response.content)),
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
        "cache-control": "private, no-cache",
        "accept-ranges": "bytes",
    }
    assert response.headers.items() >= expected.items()
    name = r'attachment; filename="face-enhance-[0-9a-f]{12}-image\.png"'
    assert re.fullmatch(name, response.headers["content-disposition"])
    for headers in ({}, {"Range": "bytes=0-1"}):
        head = await gateway.call("HEAD", href, headers=headers)
        assert (head.status_code, head.content) == (200, b"")
        assert {head.headers[name] == response.headers[name] for name in SAME_IN_PARTS | {"content-length"}} == {True}


async def test_artifact_not_found(gateway: RunningGateway, href: str) -> None:
    for name in ("vector", "IMAGE", "..%2fimage"):
        expect_problem(await gateway.call("GET", href.replace("/image", f"/{name}")), 404, "not-found")
    await gateway.put_tenant("other")
    unrelated = await gateway.call("GET", href, token=await gateway.new_token("other"))
    altered = await gateway.call("GET", href.replace("task_", "task_A"))
    details = [expect_problem(response, 404, "not-found")["detail"] for response in (unrelated, altered)]
    assert details[0] == details[1]
    expect_problem(await gateway.call("GET", href, token=""), 401, "unauthenticated")
    expect_problem(await gateway.call("POST", href), 405, "method-not-allowed")
    running = (await gateway.submit()).json()["id"]
    expect_problem(await gateway.call("GET", f"/v1/tasks/{running}/artifacts/image"), 404, "not-found")


async def test_ranges(gateway: RunningGateway, href: str) -> None:
    whole = await fetch_artifact(gateway, href)
    size, tag = len(whole.content), whole.headers["etag"]
    for headers, first, last in (
        ({"Range": "bytes=0-9"}, 0, 9),
        ({"Range": "bytes=10-", "If_Range": tag}, 10, size - 1),
        ({"Range": "bytes=-5"}, size - 5, size - 1),
    ):
        part = await fetch_artifact(gateway, href, **headers)
        assert (part.status_code, part.headers["content-range"]) == (206, f"bytes {first}-{last}/{size}")
        assert part.content == whole.content[first : last + 1]
        assert {part.headers[name] == whole.headers[name] for name in SAME_IN_PARTS} == {True}
    for headers in (
        {"Range": "bytes=0-1,4-5"},
        {"Range": "bytes=10-", "If_Range": '"other"'},
        dict.fromkeys(("Range", "If_Range", "If_None_Match", "If_Modified_Since"), "x" * 1_000),
    ):
        response = await fetch_artifact(gateway, href, **headers)
        assert (response.status_code, response.content) == (200, whole.content)
    unsatisfiable = await fetch_artifact(gateway, href, Range=f"bytes={size}-")
    expect_problem(unsatisfiable, 416, "range-not-satisfiable")
    assert unsatisfiable.headers["content-range"] == f"bytes */{size}"
    await gateway.upstream.set_fault(on="file", times=1, reply="cut")
    with pytest.raises(httpx2.RemoteProtocolError):
        await fetch_artifact(gateway, href)
    rest = await fetch_artifact(gateway, href, Range="bytes=10-", If_Range=tag)
    assert rest.content == whole.content[10:]


async def test_failure_before_the_first_byte_is_a_problem(gateway: RunningGateway, href: str) -> None:
    for fault, status, code in (
        ({"reply": "reset"}, 502, "upstream-invalid-response"),
        ({"reply": "page", "status": 410}, 502, "upstream-invalid-response"),
        ({"reply": "page", "status": 404}, 503, "upstream-unavailable"),
        ({"reply": "page", "status": 503}, 503, "upstream-unavailable"),
    ):
        await gateway.upstream.set_fault(on="file", times=1, **fault)
        response = await fetch_artifact(gateway, href)
        expect_problem(response, status, code)
        assert "127.0.0.1" not in response.text
        assert ("retry-after" in response.headers) == (status == 503)
    assert (await fetch_artifact(gateway, href)).status_code == 200
    for passed, status in ((299, 503), (2, 502)):  # a missing artifact is gone some minutes after the end
        await gateway.advance(passed)
        await gateway.upstream.set_fault(on="file", times=1, reply="page", status=404)
        assert (await fetch_artifact(gateway, href)).status_code == status
    # Private addresses are reached only for the account that paid, whose upstream has one.
    await gateway.call_admin("DELETE", "/accounts/main?force=true")
    expect_problem(await fetch_artifact(gateway, href), 502, "upstream-invalid-response")


@asynccontextmanager
async def serve_artifact(gateway: RunningGateway, serve: Handler) -> AsyncIterator[ScriptedServer]:
    """Have the artifact of the finished task on a scripted server."""
    async with asyncio.timeout(60), run_server(serve) as server:
        client = ArtifactClient(server.url, max_bytes=LARGE, on_call=lambda *_: None)

        def fetch(
            account: Account | None, artifact: Artifact, requested: RangeRequest, is_recent: bool = False
        ) -> AbstractAsyncContextManager[ArtifactStream]:
            return client.fetch(account, Artifact(artifact.name, f"{server.url}/1.png"), requested, is_recent)

        gateway.services.task_reader.fetch_artifact = fetch
        yield server


@asynccontextmanager
async def download(gateway: RunningGateway, href: str) -> AsyncIterator[asyncio.StreamReader]:
    """Download the artifact on a raw connection; yield it after the head of the response."""
    async with open_raw_connection(urlsplit(gateway.url).port or 0) as (reader, writer):
        request = f"GET {href} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.token}\r\n\r\n"
        writer.write(request.encode())
        await reader.readuntil(b"\r\n\r\n")
        try:
            yield reader
        finally:
            writer.transport.abort()


def artifact_log_fields(logs: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Return status and outcome of the one artifact request in the log."""
    (line,) = [log for log in logs if log["event"] == "request.ended" and log["path"].endswith("/artifacts/image")]
    return line["status"], line["outcome"]


async def test_large_artifact_is_streamed_with_backpressure(gateway: RunningGateway, href: str) -> None:
    sent, stalled, digest = 0, asyncio.Event(), hashlib.sha256()

    async def serve(connection: Connection) -> None:
        nonlocal sent
        await connection.receive()
        await connection.send(response_head(Content_Length=str(LARGE)))
        for number in range(LARGE // MIB):
            piece = PNG_IMAGE.ljust(MIB, bytes([number % 256]))
            digest.update(piece)
            connection.writer.write(piece)
            sent += MIB
            draining = asyncio.ensure_future(connection.writer.drain())
            if not (await asyncio.wait({draining}, timeout=STALL_SECONDS))[0]:
                stalled.set()
            await draining

    async with serve_artifact(gateway, serve), download(gateway, href) as reader:
        await stalled.wait()
        assert sent < LARGE / 2
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        received, received_digest = 0, hashlib.sha256()
        while received < LARGE:
            chunk = await reader.read(MIB)
            received += len(chunk)
            received_digest.update(chunk)
        assert received_digest.digest() == digest.digest()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB on Linux


async def test_disconnect_ends_the_fetch(gateway: RunningGateway, href: str) -> None:
    disconnected = asyncio.Event()
    serve = reply_and_hold(response_head(Content_Length="1000"), PNG_IMAGE, disconnected=disconnected)
    with capture_logs() as logs:
        async with serve_artifact(gateway, serve):
            async with download(gateway, href) as reader:
                assert await reader.readexactly(len(PNG_IMAGE)) == PNG_IMAGE
            await disconnected.wait()
    assert artifact_log_fields(logs) == (200, "client-disconnected")


async def test_revoked_token_closes_the_download(gateway: RunningGateway, href: str) -> None:
    disconnected = asyncio.Event()
    serve = reply_and_hold(response_head(Content_Length="1000"), PNG_IMAGE, disconnected=disconnected)
    with capture_logs() as logs:
        async with serve_artifact(gateway, serve), download(gateway, href) as reader:
            assert await reader.readexactly(len(PNG_IMAGE)) == PNG_IMAGE
            await gateway.call_admin("POST", "/tenants/shop/revoke-all")
            assert await reader.read() == b""
            await disconnected.wait()
    assert artifact_log_fields(logs) == (200, "unauthenticated")


async def test_slow_client_is_disconnected(gateway: RunningGateway, href: str) -> None:
    disconnected = asyncio.Event()
    limits = Limits(reader_seconds=0.1, reader_bytes_per_second=10**9)

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(response_head(Content_Length=str(LARGE)))
        try:
            while True:
                await connection.send(PNG_IMAGE.ljust(MIB))
        except OSError:
            disconnected.set()

    with capture_logs() as logs:
        async with (
            serve_artifact(gateway, serve),
            serve_app(create_app(gateway.services), limits=limits) as gateway.url,
            download(gateway, href),
        ):
            await disconnected.wait()
    assert artifact_log_fields(logs) == (200, "client-too-slow")


async def test_truncation_is_visible_to_the_client(gateway: RunningGateway, href: str) -> None:
    serve = reply_and_close(response_head(Transfer_Encoding="chunked"), chunked_body(PNG_IMAGE, end=False))
    with capture_logs() as logs:
        async with serve_artifact(gateway, serve), download(gateway, href) as reader:
            body = await reader.read()
            assert PNG_IMAGE in body
            assert not body.endswith(b"0\r\n\r\n")
    assert artifact_log_fields(logs) == (200, "transfer-aborted")


async def test_unchanged_artifact_is_304(gateway: RunningGateway, href: str) -> None:
    async with serve_artifact(gateway, reply_and_close(response_head(304, ETag='"v1"', Content_Length="5"))) as server:
        response = await gateway.call("GET", href, headers={"If-None-Match": '"v0", W/"v1"'})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", '"v1"')
        assert response.headers["cache-control"] == "private, no-cache"
        assert "content-type" not in response.headers
        assert b'\r\nif-none-match: "v0", w/"v1"\r\n' in server.requests[0][0].lower()


async def test_headers_are_not_passed_on(gateway: RunningGateway, href: str) -> None:
    answer = file_response(
        Content_Disposition='attachment; filename="x.exe"',
        Set_Cookie="a=b",
        ETag='"a\tb"',
        Content_Security_Policy="default-src *",
    )
    async with serve_artifact(gateway, reply_and_close(answer)) as server:
        headers = {"Cookie": "a=b", "X-Forwarded-For": "10.0.0.1"}
        response = await gateway.call("GET", href, headers=headers)
        assert response.content == PNG_IMAGE
        assert {"set-cookie", "etag"}.isdisjoint(response.headers)
        assert "exe" not in response.headers["content-disposition"]
        assert response.headers.get_list("content-security-policy") == ["default-src 'none'; sandbox"]
        names = {line.partition(b":")[0].lower() for line in server.requests[0][0].split(b"\r\n")[1:-2]}
        assert names == {b"host", b"user-agent", b"accept", b"accept-encoding", b"connection"}
