"""Streaming of artifacts: nothing is buffered, and a fetch ends with its client."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import resource
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from service.api import artifacts
from service.clients import artifacts as artifact_client
from service.clients.artifacts import ArtifactClient, FetchOutcome, FetchTimeouts
from service.domain.tasks import Artifact, ArtifactName
from service.usecases.ports import CheckOutcome, CheckResult
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.contract.artifact_server import (
    PNG_IMAGE,
    chunked_body,
    file_response,
    read_request,
    response_head,
    send_and_hold,
    send_pieces,
)
from tests.contract.scripted_server import Connection, Handler, ScriptedServer, run_server

MIB = 1 << 20
LARGE = 200 * MIB
STALL_SECONDS = 0.3


@dataclass
class ArtifactSetup:
    gateway: RunningGateway
    artifact_server: ScriptedServer
    href: str
    outcomes: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def open_download(self, method: str = "GET") -> AsyncIterator[tuple[asyncio.StreamReader, bytes]]:
        """Open a raw connection and read the head of the response."""
        address = urlsplit(self.gateway.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=64 * 1024)
        try:
            request = f"{method} {self.href} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.gateway.token}\r\n\r\n"
            writer.write(request.encode())
            yield reader, await reader.readuntil(b"\r\n\r\n")
        finally:
            writer.transport.abort()


@asynccontextmanager
async def run_artifact_setup(serve: Handler, *, timeouts: FetchTimeouts | None = None) -> AsyncIterator[ArtifactSetup]:
    outcomes: list[str] = []
    client = ArtifactClient(
        "http://127.0.0.1",
        max_bytes=LARGE,
        on_call=lambda _operation, outcome, _seconds: outcomes.append(outcome),
        timeouts=timeouts,
    )
    async with run_server(serve) as peer, run_fake_gateway(client.fetch) as (gateway, _, upstream):
        result = Artifact(ArtifactName.IMAGE, f"{peer.url}/1.png")
        upstream.next_checks = [CheckResult(outcome=CheckOutcome.SUCCEEDED, artifacts=(result,))]
        task = await gateway.wait_for_task((await gateway.submit()).json()["id"])
        yield ArtifactSetup(gateway, peer, task["artifacts"][0]["href"], outcomes)


def artifact_log_fields(logs: Sequence[Mapping[str, Any]]) -> tuple[int, str]:
    """Return status and outcome of the one artifact request in the log."""
    (line,) = [log for log in logs if log["event"] == "request.ended" and log["path"].endswith("/artifacts/image")]
    return line["status"], line["outcome"]


async def test_large_artifact_is_streamed_with_backpressure() -> None:
    """A 200 MB artifact takes little memory: a slow client slows its server down."""
    sent, stalled, digest = 0, asyncio.Event(), hashlib.sha256()

    async def serve(connection: Connection) -> None:
        nonlocal sent
        await read_request(connection)
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

    async with asyncio.timeout(120), run_artifact_setup(serve) as setup, setup.open_download() as (reader, response):
        assert f"content-length: {LARGE}\r\n".encode() in response
        await stalled.wait()
        assert sent < LARGE / 4
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        received, received_digest = 0, hashlib.sha256()
        while received < LARGE:
            chunk = await reader.read(MIB)
            received += len(chunk)
            received_digest.update(chunk)
        assert received_digest.digest() == digest.digest()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 * 1024  # KiB on Linux


async def test_client_disconnect_ends_the_fetch() -> None:
    disconnected = asyncio.Event()
    serve = send_and_hold(response_head(Content_Length="1000"), PNG_IMAGE, disconnected=disconnected)
    with capture_logs() as logs:
        async with asyncio.timeout(10), run_artifact_setup(serve) as setup:
            async with setup.open_download() as (reader, _):
                assert await reader.readexactly(len(PNG_IMAGE)) == PNG_IMAGE
            await disconnected.wait()
    assert setup.outcomes == [FetchOutcome.CANCELLED]
    assert artifact_log_fields(logs) == (200, "client-disconnected")


async def test_disconnect_before_the_first_byte_ends_the_fetch() -> None:
    disconnected = asyncio.Event()
    async with asyncio.timeout(10), run_artifact_setup(send_and_hold(disconnected=disconnected)) as setup:
        waiting = asyncio.create_task(setup.gateway.call("GET", setup.href))
        await setup.artifact_server.request_received.wait()
        waiting.cancel()
        await disconnected.wait()
    assert setup.outcomes == [FetchOutcome.CANCELLED]


async def test_stalled_client_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifacts, "READER_TIMEOUT_SECONDS", 0.1)
    disconnected = asyncio.Event()

    async def serve(connection: Connection) -> None:
        await read_request(connection)
        await connection.send(response_head(Content_Length=str(LARGE)))
        try:
            while True:
                await connection.send(PNG_IMAGE.ljust(MIB))
        except OSError:
            disconnected.set()

    with capture_logs() as logs:
        async with asyncio.timeout(10), run_artifact_setup(serve) as setup, setup.open_download():
            await disconnected.wait()
    assert setup.outcomes == [FetchOutcome.CANCELLED]
    assert artifact_log_fields(logs) == (200, "client-too-slow")


async def test_head_ends_the_fetch_after_the_headers() -> None:
    disconnected = asyncio.Event()
    serve = send_and_hold(response_head(Content_Length="1000", ETag='"v1"'), PNG_IMAGE, disconnected=disconnected)
    with capture_logs() as logs:
        async with (
            asyncio.timeout(10),
            run_artifact_setup(serve) as setup,
            setup.open_download("HEAD") as (_, response),
        ):
            assert response.startswith(b"HTTP/1.1 200")
            assert b"content-length: 1000\r\n" in response.lower()
            await disconnected.wait()
    assert artifact_log_fields(logs) == (200, "answered")


@pytest.mark.parametrize(
    "pieces",
    [
        (response_head(Content_Length="1000"), PNG_IMAGE),
        (response_head(Transfer_Encoding="chunked"), chunked_body(PNG_IMAGE, end=False)),
        (response_head(Transfer_Encoding="chunked"), chunked_body(PNG_IMAGE, end=False), b"zz\r\n"),
    ],
)
async def test_truncation_is_visible_to_the_client(pieces: tuple[bytes, ...]) -> None:
    with capture_logs() as logs:
        async with (
            asyncio.timeout(10),
            run_artifact_setup(send_pieces(*pieces)) as setup,
            setup.open_download() as (reader, response),
        ):
            body = await reader.read()
            assert PNG_IMAGE in body
            assert b"content-length: 1000" in response.lower() or not body.endswith(b"0\r\n\r\n")
    assert setup.outcomes == [FetchOutcome.ABORTED]
    assert artifact_log_fields(logs) == (200, "transfer-aborted")


async def test_stalled_server_is_disconnected() -> None:
    serve = send_and_hold(response_head(Content_Length="1000"), PNG_IMAGE)
    patience = FetchTimeouts(idle_seconds=0.1)
    async with (
        asyncio.timeout(10),
        run_artifact_setup(serve, timeouts=patience) as setup,
        setup.open_download() as (reader, _),
    ):
        assert await reader.read() == PNG_IMAGE


async def test_unchanged_artifact_is_304() -> None:
    async with run_artifact_setup(send_pieces(response_head(304, ETag='"v1"', Content_Length="5"))) as setup:
        response = await setup.gateway.call("GET", setup.href, headers={"If-None-Match": '"v0", W/"v1"'})
        assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", '"v1"')
        assert response.headers["cache-control"] == "private, no-cache"
        assert "content-type" not in response.headers
        assert b'\r\nif-none-match: "v0", w/"v1"\r\n' in setup.artifact_server.requests[0][0].lower()


async def test_server_headers_are_not_passed_on() -> None:
    response = file_response(
        Content_Disposition='attachment; filename="x.exe"',
        Set_Cookie="a=b",
        ETag='"a\tb"',
        Link="<http://x>",
        Content_Security_Policy="default-src *",
        Refresh="0; url=http://x",
    )
    async with run_artifact_setup(send_pieces(response)) as setup:
        answered = await setup.gateway.call("GET", setup.href)
        assert answered.content == PNG_IMAGE
        assert {"set-cookie", "etag", "link", "refresh"}.isdisjoint(answered.headers)
        assert "exe" not in answered.headers["content-disposition"]
        assert answered.headers.get_list("content-security-policy") == ["default-src 'none'; sandbox"]


async def test_token_is_not_sent_to_the_artifact_server() -> None:
    async with run_artifact_setup(send_pieces(file_response())) as setup:
        await setup.gateway.call("GET", setup.href, headers={"Cookie": "a=b", "X-Forwarded-For": "10.0.0.1"})
        ((sent, _),) = setup.artifact_server.requests
        names = {line.partition(b":")[0].lower() for line in sent.split(b"\r\n")[1:-2]}
        assert names == {b"host", b"user-agent", b"accept", b"accept-encoding", b"connection"}


async def test_html_is_rejected() -> None:
    for media_type in ("text/html", "application/octet-stream", ""):
        async with run_artifact_setup(send_pieces(file_response(b"<html><script>", Content_Type=media_type))) as setup:
            expect_problem(await setup.gateway.call("GET", setup.href), 502, "upstream-invalid-response")


async def test_failed_fetch_leaves_no_cycle() -> None:
    """What was read of a result that is no image is freed at once, not by a later garbage collection."""

    async def serve(connection: Connection) -> None:
        await read_request(connection)
        await connection.send(response_head(Content_Length="60000") + b"x" * 60_000)

    async with asyncio.timeout(20), run_artifact_setup(serve) as setup:
        await setup.gateway.call("GET", setup.href)
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                expect_problem(await setup.gateway.call("GET", setup.href), 502, "upstream-invalid-response")
            assert not [item for item in gc.get_objects() if type(item) is artifact_client._Fetch]
        finally:
            gc.enable()
