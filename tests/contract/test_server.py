"""The HTTP server on real connections: framing, limits, deadlines, rejections and shutdown."""

from __future__ import annotations

import asyncio
import errno
import gc
import re
import socket
import sys
import weakref
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from contextvars import ContextVar
from typing import Any

import pytest

from service import http_protocol, server
from service.http_protocol import CLIENT_TOO_SLOW, Limits
from service.server import HttpServer, base_url, listen
from tests.contract.scripted_server import chunked_body
from tests.support.network import serve_app
from tests.unit.asgi_client import open_raw_connection

IDLE_LIMITS = Limits(head_seconds=60, idle_seconds=60, discard_seconds=60, discard_idle_seconds=60)
LARGE_BYTES = 20_000_000
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
                names = b" ".join(name for name, _ in scope["headers"])
                status, body = 200, names + await self._body(receive)
            case "/refuse":
                status, body = 413, b"too large"
            case "/left":
                while (await receive())["type"] != "http.disconnect":
                    pass
                self.disconnected.set()
                return
            case "/watched":
                await self._body(receive)
                leaving = asyncio.ensure_future(receive())
                await self.release.wait()
                leaving.cancel()
                status, body = 200, b"watched"
            case "/large":
                status, body = 200, bytes(LARGE_BYTES)
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


def open_connection(url: str) -> AbstractAsyncContextManager[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    return open_raw_connection(int(url.rpartition(":")[2]))


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


@pytest.mark.parametrize("target", ["/body", "/refuse", "/"])
async def test_a_body_behind_an_offered_upgrade_is_a_body(target: str) -> None:
    offer = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AA")
    body = build_request("/within-the-body")
    head = build_request(target, *offer, f"Content-Length: {len(body)}", method="POST")
    for pieces in ([head + body], [head[:40], head[40:], body]):
        app = Application()
        async with serve_app(app) as url:
            received = await exchange(url, *pieces, LAST_REQUEST)
            offer_alone = build_request("/", "Connection: upgrade", "Upgrade: websocket")
            assert parse_statuses(await exchange(url, offer_alone + LAST_REQUEST)) == [200, 200]
        assert app.requests[:2] == [f"POST {target}", "GET /last"]
        assert target != "/body" or body in received


async def test_http_1_0_gets_no_chunks() -> None:
    async with serve_app(Application()) as url:
        head, _, body = (await exchange(url, build_request("/unframed", version="1.0"))).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert body == b"one two"


async def test_a_head_of_just_the_limit_is_served_and_a_larger_one_refused() -> None:
    limits = Limits(head_bytes=1_000, head_fields=10)
    size_limit = limits.head_bytes - len("/") - len("Host: x\r\n") - len("Connection: close\r\n") - len("A: \r\n")
    async with serve_app(Application(), limits=limits) as url:
        for size, status in ((size_limit, 200), (size_limit + 1, 431)):
            head = build_request("/", "Connection: close", "A: " + "a" * size)
            assert parse_statuses(await exchange(url, head)) == [status]
            assert parse_statuses(await exchange(url, head[:-1], head[-1:])) == [status]
        for size, status in ((limits.head_bytes, 200), (limits.head_bytes + 1, 431)):
            assert parse_statuses(await exchange(url, build_request("/" + "a" * (size - 1), version="1.0"))) == [status]
        for count, status in ((8, 200), (9, 431)):
            fields = ["A: b"] * count
            assert parse_statuses(await exchange(url, build_request("/", "Connection: close", *fields))) == [status]
        for before in (b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nA: ", b"GET / HTTP/1.1\r\nHost: x\r\n"):
            assert parse_statuses(await exchange(url, before, *[b"a" * 400] * 20)) == [431]  # without an end


async def test_trailer_fields_are_bounded_and_no_header_fields() -> None:
    head = build_request("/body", "Transfer-Encoding: chunked", method="POST")
    app = Application()
    async with serve_app(app, limits=Limits(head_bytes=1_000, head_fields=10)) as url:
        received = await exchange(url, head + chunked_body(b"x", trailer=b"Admin: 1\r\n") + LAST_REQUEST)
        assert parse_statuses(received) == [200, 200]
        assert b"admin" not in received
        assert parse_statuses(await exchange(url, head + chunked_body(b"x", trailer=b"A: b\r\n" * 11))) == [431]
        assert parse_statuses(await exchange(url, head, b"1\r\nx\r\n0\r\nA: ", *[b"a" * 200_000] * 10)) == [431]
    assert app.disconnected.is_set()


async def test_a_trailer_field_does_not_silence_a_connection() -> None:
    """Otherwise the requests behind it would never be answered: to the parser the connection is closed."""
    fields = ("Transfer-Encoding: chunked",)
    body = chunked_body(b"x", trailer=b"Connection: close\r\n")
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        assert parse_statuses(
            await exchange(url, build_request("/body", *fields, method="POST") + body, LAST_REQUEST)
        ) == [400]
        async with open_connection(url) as (reader, writer):
            writer.write(build_request("/refuse", *fields, method="POST"))
            await reader.readuntil(b"too large")
            writer.write(body + LAST_REQUEST)
            assert await reader.read() == b""


@pytest.mark.parametrize(
    "faulty",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET / HTTP/2.0\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
        build_request("/body", "Transfer-Encoding: gzip, chunked") + chunked_body(b"x"),
        build_request("/body", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + chunked_body(b"x"),
        build_request("/body", "Transfer-Encoding: identity", "Content-Length: 1") + b"x",
        build_request("/body", "Transfer-Encoding: chunked", "Content-Length: 1") + chunked_body(b"x"),
        build_request("/body", "Transfer-Encoding: chunked", version="1.0") + chunked_body(b"x"),
        build_request("/body", "Content-Length: 1", "Content-Length: 2") + b"xy",
        build_request("/body", "Content-Length: +1") + b"x",
        build_request("/", "Spaced name: x"),
        build_request("/", "A: \x00"),
        build_request("/\xff"),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
async def test_what_is_no_valid_http_1_1_is_refused(faulty: bytes) -> None:
    app = Application()
    async with serve_app(app) as url:
        received = await exchange(url, faulty + LAST_REQUEST)
    assert (parse_statuses(received), app.requests) == ([400], [])
    assert b"\r\nconnection: close\r\n" in received


async def test_a_refusal_comes_last_and_nothing_behind_it_is_a_request() -> None:
    app = Application()
    async with serve_app(app) as url, open_connection(url) as (reader, writer):
        writer.write(build_request("/watched") + build_request("/second") + b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n")
        await app.call_started.wait()
        writer.write(build_request("/tunnelled"))
        for _ in range(10):
            await asyncio.sleep(0)
        app.release.set()
        assert parse_statuses(await reader.read()) == [200, 200, 400]
    assert app.requests == ["GET /watched", "GET /second"]


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


async def test_the_broken_body_of_a_refused_request_gets_no_second_response() -> None:
    async with serve_app(Application()) as url, open_connection(url) as (reader, writer):
        writer.write(build_request("/refuse", "Transfer-Encoding: chunked", method="POST") + b"1\r\nx\r\n")
        assert parse_statuses(await reader.readuntil(b"too large")) == [413]
        writer.write(b"no chunk\r\n")
        assert await reader.read() == b""


async def test_silent_and_idle_connections_end_and_half_heads_are_refused() -> None:
    async with serve_app(Application(), limits=SHORT_LIMITS) as url, open_connection(url) as (reader, writer):
        writer.write(build_request())
        await reader.readuntil(b"ok")
        assert await exchange(url) == b""
        assert parse_statuses(await exchange(url, b"GET / HTTP/1.1\r\nHo")) == [400]
        received = await exchange(url, build_request("/first") + b"GET / HTTP/1.1\r\nHo")
        assert parse_statuses(received) == [200, 400]
        # It outlives the others, and ends although its body does not.
        writer.write(build_request("/refuse", "Content-Length: 1000000", method="POST") + b"x")
        assert parse_statuses(await reader.read()) == [413]
    async with serve_app(Application(), limits=Limits(idle_seconds=0.05)) as url:
        assert parse_statuses(await exchange(url, build_request())) == [200]


@pytest.mark.parametrize(("version", "chunked"), [("1.1", False), ("1.1", True), ("1.0", False)])
async def test_a_client_that_sends_all_before_it_reads_gets_the_early_response(version: str, chunked: bool) -> None:
    body = b"x" * 20_000_000
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"
    sent = chunked_body(body) if chunked else body
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        head = build_request("/refuse", framing, "Connection: close", method="POST", version=version)
        assert parse_statuses(await exchange(url, head + sent)) == [413]
        if version == "1.1":  # a kept connection goes on behind the refused body
            head = build_request("/refuse", framing, method="POST")
            assert parse_statuses(await exchange(url, head + sent, LAST_REQUEST)) == [413, 200]


async def test_a_client_that_expects_100_is_refused_without_it_and_the_connection_ends() -> None:
    async with serve_app(Application(), limits=IDLE_LIMITS) as url:
        head = build_request("/refuse", "Expect: 100-continue", "Content-Length: 9", method="POST")
        received = await exchange(url, head)
        assert (parse_statuses(received), b"\r\nconnection: close\r\n" in received) == ([413], True)
        head = build_request("/body", "Expect: 100-continue", "Content-Length: 1", "Connection: close", method="POST")
        assert parse_statuses(await exchange(url, head, b"x")) == [100, 200]


async def test_connections_beyond_the_cap_replace_idle_ones_or_wait() -> None:
    app = Application()
    async with serve_app(app, limits=Limits(connections=2)) as url, AsyncExitStack() as stack:
        held_reader, held = await stack.enter_async_context(open_connection(url))
        held.write(build_request("/watched", "Connection: close"))
        await app.call_started.wait()
        idle_reader, idle = await stack.enter_async_context(open_connection(url))
        for _ in range(2):  # with as many connections as allowed none is closed
            idle.write(build_request())
            await idle_reader.readuntil(b"ok")
        third_reader, third = await stack.enter_async_context(open_connection(url))
        third.write(build_request())
        await third_reader.readuntil(b"ok")
        assert await idle_reader.read() == b""
        third.write(build_request("/watched", "Connection: close"))
        fourth_reader, fourth = await stack.enter_async_context(open_connection(url))
        fourth.write(LAST_REQUEST)
        while app.requests.count("GET /watched") < 2:
            await asyncio.sleep(0)
        assert "GET /last" not in app.requests
        app.release.set()
        for reader in (fourth_reader, held_reader, third_reader):
            assert parse_statuses(await reader.read()) == [200]


async def test_unread_responses_keep_no_connection_beyond_the_cap() -> None:
    app, limits = Application(), Limits(connections=2)
    async with (
        run_http_server(app, limits=limits) as (running, url),
        AsyncExitStack() as stack,
        asyncio.timeout(20),
    ):
        for count in range(1, 7):
            _, writer = await stack.enter_async_context(open_connection(url))
            writer.write(build_request("/large"))
            while len(app.requests) < count:
                await asyncio.sleep(0)
        while len(running.connections) > limits.connections:  # an ended connection is counted until the loop goes on
            await asyncio.sleep(0)


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
        writer.write(build_request("/watched"))
        await app.call_started.wait()
        stopping = asyncio.create_task(running.stop(60))
        assert await silent.read() == b""
        with pytest.raises(OSError, match="Connect"):
            await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        app.release.set()
        assert parse_statuses(await reader.read()) == [200]
        await stopping


async def test_a_server_that_stops_serves_what_clients_have_sent() -> None:
    """Connections in the kernel's queue, without a request yet, or within a head get their last response."""
    async with run_http_server(Application(), limits=IDLE_LIMITS) as (running, url), AsyncExitStack() as stack:
        port = int(url.rpartition(":")[2])
        opened = [await stack.enter_async_context(open_connection(url)) for _ in range(3)]
        (kept, keeper), (_, silent), (_, slow) = opened
        keeper.write(build_request())
        await kept.readuntil(b"ok")
        slow.write(b"GET / HTTP/1.1\r\n")
        while len(running.connections) < 3:
            await asyncio.sleep(0)
        queued = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(200)]
        for connection in queued:
            connection.sendall(build_request())
        stopping = asyncio.create_task(running.stop(60))
        await asyncio.sleep(0)  # it begins
        for writer, piece in ((keeper, build_request()), (silent, build_request()), (slow, b"Host: x\r\n\r\n")):
            writer.write(piece)
        for reader, _ in opened:
            received = await reader.read()
            assert (parse_statuses(received), b"connection: close" in received) == ([200], True)
        for connection in queued:
            reader, writer = await asyncio.open_connection(sock=connection)
            assert parse_statuses(await reader.read()) == [200]
            writer.close()
        await stopping


async def test_a_server_that_stops_cuts_off_what_does_not_end() -> None:
    app = Application()
    async with run_http_server(app) as (running, url), open_connection(url) as (reader, writer):
        writer.write(build_request("/body", "Content-Length: 5", method="POST"))
        await app.call_started.wait()
        await running.stop()
        assert parse_statuses(await reader.read()) == []
    assert app.disconnected.is_set()


@pytest.mark.parametrize("fields", [(), ("Connection: close",)])
async def test_a_client_that_reads_nothing_is_dropped(fields: tuple[str, ...]) -> None:
    limits = Limits(reader_seconds=0.05, reader_bytes_per_second=10**9, idle_seconds=60)
    async with (
        run_http_server(Application(), limits=limits) as (running, url),
        open_connection(url) as (_, writer),
        asyncio.timeout(20),
    ):
        writer.write(build_request("/large", *fields))
        while not running.connections:
            await asyncio.sleep(0)
        while running.connections:
            await asyncio.sleep(0)


async def test_a_client_that_always_reads_too_slowly_is_dropped() -> None:
    scopes = []

    async def app(scope: Any, _: Any, send: Any) -> None:
        scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(100_000):
            await send({"type": "http.response.body", "body": bytes(65_536), "more_body": True})

    limits = Limits(reader_seconds=0.5, reader_bytes_per_second=10**12)
    async with serve_app(app, limits=limits) as url, open_connection(url) as (reader, writer), asyncio.timeout(20):
        writer.write(build_request())
        with suppress(ConnectionResetError):
            while await reader.read(4_096):
                pass
    assert [CLIENT_TOO_SLOW in scope for scope in scopes] == [True]


async def test_a_client_has_more_time_for_more_bytes() -> None:
    limits = Limits(reader_seconds=0, reader_bytes_per_second=LARGE_BYTES // 60)
    async with serve_app(Application(), limits=limits) as url:
        received = await exchange(url, build_request("/large", "Connection: close"))
    assert len(received.partition(b"\r\n\r\n")[2]) == LARGE_BYTES


async def test_a_rest_that_stays_unread_does_not_keep_a_closed_connection() -> None:
    limits = Limits(reader_seconds=0, reader_bytes_per_second=10**9, idle_seconds=0.05)
    async with (
        run_http_server(Application(), limits=limits) as (running, url),
        open_connection(url) as (_, writer),
        asyncio.timeout(20),
    ):
        while not running.connections:
            await asyncio.sleep(0)
        (connection,) = running.connections
        connection.transport.set_write_buffer_limits(high=2 * LARGE_BYTES)  # as if it were a small rest
        writer.write(build_request("/large"))
        while running.connections:
            await asyncio.sleep(0)


async def test_a_client_that_disconnects_is_noticed_also_with_requests_behind_the_first() -> None:
    app = Application()
    async with serve_app(app) as url:
        async with open_connection(url) as (_, writer):
            writer.write(build_request("/left") + build_request())
            await app.call_started.wait()
        await app.disconnected.wait()


async def test_an_ended_connection_leaves_nothing_to_the_garbage_collector() -> None:
    async with run_http_server(Application()) as (running, url):
        gc.disable()
        try:
            async with open_connection(url) as (reader, writer):
                writer.write(build_request())
                await reader.readuntil(b"ok")
                connections = [weakref.ref(connection) for connection in running.connections]
            while running.connections:
                await asyncio.sleep(0)
            assert [connection() for connection in connections] == [None]
        finally:
            gc.enable()


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


async def test_a_refused_body_neither_stays_in_memory_nor_delays_the_stop() -> None:
    async with (
        run_http_server(Application(), limits=IDLE_LIMITS) as (running, url),
        open_connection(url) as (reader, writer),
    ):
        writer.write(build_request("/refuse", "Content-Length: 50001", method="POST") + bytes(50_000))
        await reader.readuntil(b"too large")
        assert [connection.cycle.chunks for connection in running.connections] == [None]
        stopping = asyncio.create_task(running.stop(60))
        await asyncio.sleep(0)
        writer.write(b"x")
        assert await reader.read() == b""
        await stopping


async def test_the_rest_of_a_refused_body_is_left_to_a_client_that_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_DISCARD_DELAY_SECONDS", 60)
    async with run_http_server(Application()) as (running, url), open_connection(url) as (reader, writer):
        head = build_request("/refuse", f"Content-Length: {LARGE_BYTES}", "Connection: close", method="POST")
        writer.write(head + bytes(LARGE_BYTES))
        await reader.readuntil(b"too large")
        assert [connection.flow.read_paused for connection in running.connections] == [True]


async def test_a_body_of_tiny_chunks_takes_little_memory_until_it_is_read() -> None:
    is_called, has_left, messages = asyncio.Event(), asyncio.Event(), asyncio.Queue[Any]()

    async def app(_scope: Any, receive: Any, _send: Any) -> None:
        is_called.set()
        await has_left.wait()
        messages.put_nowait(await receive())

    async with run_http_server(app) as (running, url):
        async with open_connection(url) as (_, writer):
            head = build_request("/", "Transfer-Encoding: chunked", method="POST")
            writer.write(head + chunked_body(*[b"xy"] * 20_000, end=False))
            await is_called.wait()
            (cycle,) = [connection.cycle for connection in running.connections]
            while sum(map(len, cycle.chunks or ())) < 40_000:
                await asyncio.sleep(0)
            assert sum(map(sys.getsizeof, cycle.chunks or ())) < 100_000
        while running.connections:
            await asyncio.sleep(0)
        has_left.set()
        assert await messages.get() == {"type": "http.disconnect"}


async def test_a_fault_in_a_refusal_does_not_end_the_deadlines() -> None:
    failed, clients = asyncio.Event(), []

    def refuse(_status: int, _detail: str, client: str) -> tuple[Iterable[tuple[bytes, bytes]], bytes]:
        clients.append(client)
        failed.set()
        raise RuntimeError

    asyncio.get_running_loop().set_exception_handler(lambda _loop, _context: None)
    async with serve_app(Application(), limits=SHORT_LIMITS, refuse=refuse) as url, open_connection(url) as (_, writer):
        writer.write(b"GET /")
        await failed.wait()
        assert await exchange(url) == b""
    assert clients == ["127.0.0.1"]
