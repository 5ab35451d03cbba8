"""The HTTP server on real connections: framing, limits, deadlines, rejections and shutdown."""

from __future__ import annotations

import asyncio
import errno
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import Any

import pytest

from service import server
from service.server import HttpServer, Limits, base_url, listen
from tests.contract.artifact_server import chunked_body
from tests.support.network import serve_app

IDLE_LIMITS = Limits(head_seconds=60, idle_seconds=60, discard_seconds=60, discard_idle_seconds=60)
SHORT_LIMITS = Limits(head_seconds=0.05, idle_seconds=60, discard_seconds=0.05)


@pytest.fixture(autouse=True)
def _frequent_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SWEEP_SECONDS", 0.01)


class Application:
    """Responds by path; `requests` holds the methods and paths received."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.call_started = asyncio.Event()
        self.release = asyncio.Event()
        self.disconnected = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.requests.append(f"{scope['method']} {scope['path']}")
        self.call_started.set()
        match scope["path"]:
            case "/body":
                status, body = 200, await self._body(receive) + b" ".join(name for name, _ in scope["headers"])
            case "/refuse":
                status, body = 413, b"too large"
            case "/large":
                status, body = 200, bytes(20_000_000)
            case "/held":
                await self._body(receive)
                leaving = asyncio.ensure_future(receive())
                await self.release.wait()
                leaving.cancel()
                status, body = 200, b"released"
            case "/unframed":
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"one ", "more_body": True})
                await send({"type": "http.response.body", "body": b"two"})
                return
            case _:
                status, body = 200, b"ok"
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _body(self, receive: Any) -> bytes:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected.set()
                return b""
            body += message["body"]
            more = message["more_body"]
        return body


@asynccontextmanager
async def run_http_server(
    app: Any, listening: socket.socket | None = None, *, limits: Limits = Limits()
) -> AsyncIterator[tuple[HttpServer, str]]:
    running, listening = HttpServer(app, limits=limits), listening or listen("127.0.0.1", 0)
    running.start(listening)
    try:
        yield running, base_url(listening)
    finally:
        await running.stop()


@asynccontextmanager
async def open_connection(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.close()


async def exchange(url: str, *pieces: bytes) -> bytes:
    """Send pieces, each in a packet of its own, and read until the server closes."""
    async with open_connection(url) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            for _ in range(10):  # the server reads it separately
                await asyncio.sleep(0)
        return await reader.read()


def build_request(target: str = "/", *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    host = () if version == "1.0" else ("Host: x",)
    return "\r\n".join([f"{method} {target} HTTP/{version}", *host, *fields, "", ""]).encode()


def parse_statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


LAST_REQUEST = build_request("/last", "Connection: close")


async def test_a_body_behind_an_offered_upgrade_is_a_body() -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA")
    body = build_request("/within-the-body")
    head = build_request("/body", *offer, f"Content-Length: {len(body)}", method="POST")
    for pieces in ([head + body], [head[:40], head[40:], body]):
        app = Application()
        async with serve_app(app) as url:
            received = await exchange(url, *pieces, build_request("/", *offer), LAST_REQUEST)
        assert app.requests == ["POST /body", "GET /", "GET /last"]
        assert body in received


async def test_http_1_0_gets_no_chunks() -> None:
    async with serve_app(Application()) as url:
        assert (await exchange(url, build_request("/unframed", version="1.0"))).endswith(b"\r\n\r\none two")


async def test_a_head_of_just_the_limit_is_served_and_a_larger_one_refused() -> None:
    limits = Limits(head_bytes=1_000, head_fields=10)
    room = limits.head_bytes - len("/") - len("Host: x\r\n") - len("Connection: close\r\n") - len("A: \r\n")
    async with serve_app(Application(), limits=limits) as url:
        for fields, status in (
            (["A: " + "a" * room], 200),
            (["A: " + "a" * (room + 1)], 431),
            (["A: b"] * 8, 200),
            (["A: b"] * 9, 431),
        ):
            head = build_request("/", "Connection: close", *fields)
            assert parse_statuses(await exchange(url, head)) == [status]
            assert parse_statuses(await exchange(url, head[:-1], head[-1:])) == [status]
        for before in (b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nA: ", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            assert parse_statuses(await exchange(url, before, *[b"a" * 400] * 20)) == [431]  # without an end


async def test_trailer_fields_are_bounded_and_no_header_fields() -> None:
    head = build_request("/body", "Transfer-Encoding: chunked", method="POST")
    app, body = Application(), chunked_body(b"x", end=False) + b"0\r\n"
    async with serve_app(app, limits=Limits(head_bytes=1_000, head_fields=10)) as url:
        received = await exchange(url, head + body + b"Admin: 1\r\n\r\n" + LAST_REQUEST)
        assert parse_statuses(received) == [200, 200]
        assert b"admin" not in received
        assert parse_statuses(await exchange(url, head + body + b"A: b\r\n" * 11 + b"\r\n")) == [431]
        assert parse_statuses(await exchange(url, head, body + b"A: ", *[b"a" * 200_000] * 10)) == [431]
    assert app.disconnected.is_set()


async def test_a_trailer_field_does_not_silence_a_connection() -> None:
    # Otherwise the requests behind it would never be answered: to the parser the connection is closed.
    head = build_request("/body", "Transfer-Encoding: chunked", method="POST")
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        body = chunked_body(b"x", end=False) + b"0\r\nConnection: close\r\n\r\n"
        received = await exchange(url, head + body, LAST_REQUEST)
    assert parse_statuses(received) == [400]


@pytest.mark.parametrize(
    "faulty",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        build_request("/body", "Transfer-Encoding: gzip, chunked") + chunked_body(b"x"),
        build_request("/body", "Transfer-Encoding: chunked", "Content-Length: 1") + chunked_body(b"x"),
        build_request("/body", "Transfer-Encoding: chunked", version="1.0") + chunked_body(b"x"),
        build_request("/body", "Content-Length: 1", "Content-Length: 2") + b"xy",
        build_request("/body", "Content-Length: +1") + b"x",
        build_request("/", "A: \x00"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_no_valid_http_1_1_is_refused(faulty: bytes) -> None:
    app = Application()
    async with serve_app(app, refuse=lambda status, _, client: ([], f"{status} {client}".encode())) as url:
        received = await exchange(url, faulty + LAST_REQUEST)
    assert received.endswith(b"\r\n\r\n400 127.0.0.1")
    assert (parse_statuses(received), app.requests) == ([400], [])
    assert b"\r\nconnection: close\r\n" in received


async def test_a_refusal_comes_last_and_nothing_behind_it_is_a_request() -> None:
    app = Application()
    async with serve_app(app) as url, open_connection(url) as (reader, writer):
        writer.write(build_request("/held") + build_request("/second") + b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.call_started.wait()
        writer.write(build_request("/tunnelled"))
        for _ in range(10):
            await asyncio.sleep(0)
        app.release.set()
        assert parse_statuses(await reader.read()) == [200, 200, 400]
    assert app.requests == ["GET /held", "GET /second"]


async def test_the_requests_that_wait_for_the_first_are_bounded() -> None:
    app = Application()
    async with serve_app(app, limits=Limits(pipelined_requests=2)) as url:
        assert parse_statuses(await exchange(url, build_request() * 3 + LAST_REQUEST)) == [200, 200, 200, 400]
        assert parse_statuses(await exchange(url, build_request() * 2 + LAST_REQUEST)) == [200, 200, 200]


async def test_a_pipelined_request_inherits_no_context() -> None:
    path = ContextVar("path", default="")
    inherited = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        inherited.append(path.get())
        path.set(scope["path"])
        await Application()(scope, receive, send)

    async with serve_app(app) as url:
        await exchange(url, build_request("/first") + LAST_REQUEST)
    assert inherited == ["", ""]


@pytest.mark.parametrize("expect", [(), ("Expect: 100-continue",)])
async def test_a_broken_body_is_refused_in_place_of_the_response(
    expect: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    app = Application()
    async with serve_app(app) as url:
        head = build_request("/body", "Transfer-Encoding: chunked", *expect, method="POST")
        pieces = [head + b"no chunk\r\n"] if expect else [head + b"1\r\nx\r\n", b"no chunk\r\n"]
        assert parse_statuses(await exchange(url, *pieces)) == [400]
    assert app.disconnected.is_set()
    assert caplog.records == []


async def test_silent_and_idle_connections_end_and_half_heads_are_refused() -> None:
    async with serve_app(Application(), limits=SHORT_LIMITS) as url, open_connection(url) as (reader, writer):
        writer.write(build_request())
        await reader.readuntil(b"ok")
        assert await exchange(url) == b""
        assert parse_statuses(await exchange(url, b"GET / HTTP/1.1\r\nHo")) == [400]
        received = await exchange(url, build_request("/first") + b"GET / HTTP/1.1\r\nHo")
        assert parse_statuses(received) == [200, 400]
        # It outlives the others.
        writer.write(build_request("/refuse", "Content-Length: 1000000", method="POST") + b"x")
        assert parse_statuses(await reader.read()) == [413]  # and ends although its body does not
    async with serve_app(Application(), limits=Limits(idle_seconds=0.05)) as url:
        assert parse_statuses(await exchange(url, build_request())) == [200]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_client_that_sends_all_before_it_reads_gets_the_early_response(version: str) -> None:
    framing = ("Content-Length: 20000000", "Connection: close")
    head = build_request("/refuse", *framing, method="POST", version=version)
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        assert parse_statuses(await exchange(url, head + bytes(20_000_000))) == [413]


async def test_a_kept_connection_goes_on_behind_a_refused_body() -> None:
    head = build_request("/refuse", "Transfer-Encoding: chunked", method="POST")
    async with serve_app(Application()) as url:
        assert parse_statuses(await exchange(url, head + chunked_body(bytes(1_000_000)), LAST_REQUEST)) == [413, 200]


async def test_a_client_that_expects_100_is_refused_without_it_and_the_connection_ends() -> None:
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        head = build_request("/refuse", "Expect: 100-continue", "Content-Length: 9", method="POST")
        received = await exchange(url, head)
        assert (parse_statuses(received), b"\r\nconnection: close\r\n" in received) == ([413], True)
        head = build_request("/body", "Expect: 100-continue", "Content-Length: 1", "Connection: close", method="POST")
        assert parse_statuses(await exchange(url, head, b"x")) == [100, 200]


async def test_connections_beyond_the_cap_replace_idle_ones_or_wait() -> None:
    app, held = Application(), build_request("/held", "Connection: close")
    async with serve_app(app, limits=Limits(connections=2)) as url, AsyncExitStack() as stack:
        connections = []
        for request in (held, build_request(), build_request()):
            connections.append(await stack.enter_async_context(open_connection(url)))
            connections[-1][1].write(request)
            await (app.call_started.wait() if request is held else connections[-1][0].readuntil(b"ok"))
        (first, _), (idle, _), (third, writer) = connections
        assert await idle.read() == b""
        writer.write(held)
        last = asyncio.create_task(exchange(url, LAST_REQUEST))
        while app.requests.count("GET /held") < 2:
            await asyncio.sleep(0)
        assert "GET /last" not in app.requests
        app.release.set()
        for received in (await last, await first.read(), await third.read()):
            assert parse_statuses(received) == [200]


class ExhaustedSocket(socket.socket):
    """A listening socket that fails twice for lack of a descriptor."""

    faults = 2

    def accept(self) -> Any:
        if self.faults:
            self.faults -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


async def test_connections_wait_while_descriptors_are_missing() -> None:
    listening = ExhaustedSocket(fileno=listen("127.0.0.1", 0).detach())
    async with run_http_server(Application(), listening) as (_, url):
        assert parse_statuses(await exchange(url, LAST_REQUEST)) == [200]
    assert listening.faults == 0


async def test_a_server_that_stops_finishes_what_was_begun() -> None:
    app = Application()
    async with (
        run_http_server(app, limits=IDLE_LIMITS) as (running, url),
        open_connection(url) as (reader, writer),
        open_connection(url) as (silent, _),
    ):
        writer.write(build_request("/held"))
        await app.call_started.wait()
        stopping = asyncio.create_task(running.stop(60))
        assert await silent.read() == b""
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        app.release.set()
        assert parse_statuses(await reader.read()) == [200]
        await stopping


async def test_a_server_that_stops_cuts_off_what_does_not_end() -> None:
    app = Application()
    async with run_http_server(app) as (running, url), open_connection(url) as (reader, writer):
        writer.write(build_request("/body", "Content-Length: 5", method="POST"))
        await app.call_started.wait()
        await running.stop()
        assert parse_statuses(await reader.read()) == []
    assert app.disconnected.is_set()


@pytest.mark.parametrize("field", ["A: b", "Connection: close"])
async def test_a_connection_whose_client_does_not_read_ends(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_USER_TIMEOUT_MS", 100)
    async with run_http_server(Application(), limits=SHORT_LIMITS) as (running, url):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(build_request("/large", field) + b"GET /")
            while not running.connections:
                await asyncio.sleep(0)
            while running.connections:
                await asyncio.sleep(0)


async def test_a_refused_body_does_not_delay_the_stop() -> None:
    async with run_http_server(Application(), limits=IDLE_LIMITS) as (running, url), open_connection(url) as pair:
        reader, writer = pair
        writer.write(build_request("/refuse", "Content-Length: 50001", method="POST") + bytes(50_000))
        await reader.readuntil(b"too large")
        stopping = asyncio.create_task(running.stop(60))
        await asyncio.sleep(0)
        writer.write(b"x")
        assert await reader.read() == b""
        await stopping
