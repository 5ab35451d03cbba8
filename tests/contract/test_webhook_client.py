"""Calls to receivers that behave badly in every way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

import pytest

from service.clients import webhooks
from service.clients.egress import IpAddress, UnknownHost
from service.clients.webhooks import MAX_BODY_BYTES, WebhookClient
from service.domain.errors import Overloaded
from service.domain.tenants import Webhook
from service.usecases.ports import WebhookResponse
from tests.contract.scripted_server import Connection, Handler, ScriptedServer, http_response, reply_with, run_server
from tests.support.file_descriptors import exhaust_descriptors

BODY = b'{"type":"task.succeeded"}'
HEADERS = {"webhook-id": "msg_1", "webhook-signature": "v1,x", "webhook-timestamp": "1"}


async def send_webhook(
    serve: Handler, *, allow: str = "127.0.0.0/8", seconds: float = 15
) -> tuple[WebhookResponse, ScriptedServer]:
    """What comes of a call to a receiver, and what it was sent."""
    async with run_server(serve) as peer:
        hook = Webhook(f"{peer.url}/ended?key=1", (allow,))
        reply = await WebhookClient(timeout_seconds=seconds).post(f"{peer.url}/ended?key=1", HEADERS, BODY, hook)
        return reply, peer


async def test_request() -> None:
    """The body is posted as it is, with its signature, under the gateway's name and without credentials of any kind."""
    reply, peer = await send_webhook(reply_with(http_response(b"thanks", 202, Set_Cookie="a=b")))
    assert reply == WebhookResponse(status=202)
    ((head, body),) = peer.requests
    assert body == BODY
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "post /ended?key=1 http/1.1"
    assert {"webhook-id: msg_1", "webhook-signature: v1,x", "content-type: application/json"} <= set(lines)
    assert any(line.startswith("user-agent: imaging-gateway/") for line in lines)
    assert not any(line.startswith(("cookie:", "authorization:")) for line in lines)


async def test_no_descriptor() -> None:
    """What this machine lacks is no failure of the receiver."""
    async with run_server(reply_with(http_response(b"thanks"))) as peer:
        client, hook = WebhookClient(), Webhook(peer.url, ("127.0.0.0/8",))
        with exhaust_descriptors(), pytest.raises(Overloaded):
            await client.post(peer.url, HEADERS, BODY, hook)
        assert await client.post(peer.url, HEADERS, BODY, hook) == WebhookResponse(status=200)
    assert peer.connections == 1


async def test_redirect() -> None:
    """A redirect is an answer like others, and leads nowhere."""
    async with run_server(reply_with(http_response(b"stolen"))) as elsewhere:
        reply, _ = await send_webhook(reply_with(http_response(b"go on", 307, Location=elsewhere.url)))
        assert (reply.status, elsewhere.connections) == (307, 0)


async def test_huge_answer() -> None:
    """Of an answer without end only its beginning is read."""

    async def endless(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 500 x\r\nContent-Length: 100000000000\r\n\r\n")
        with suppress(OSError):
            while True:
                await connection.send(b"no" * 10_000)

    reply, _ = await send_webhook(endless)
    assert (reply.status, reply.excerpt) == (500, "no" * (MAX_BODY_BYTES // 2))


async def test_success_is_not_read() -> None:
    """Who says that it took it took it, whatever else it goes on to say."""

    async def talkative(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200 x\r\nContent-Length: 100000000000\r\n\r\nand")
        await connection.wait_closed()

    assert (await send_webhook(talkative))[0] == WebhookResponse(status=200)


async def test_slow() -> None:
    """A receiver that answers byte by byte is given up at the time limit for all of it."""

    async def slow(connection: Connection) -> None:
        await connection.receive()
        with suppress(OSError):
            while True:
                await connection.send(b"H")
                await asyncio.sleep(0.01)

    reply, _ = await send_webhook(slow, seconds=0.2)
    assert reply == WebhookResponse(error="It took longer than 0.2 seconds.")


async def test_silent() -> None:
    """A receiver that answers nothing is given up at the time limit."""

    async def silent(connection: Connection) -> None:
        await connection.wait_closed()

    assert (await send_webhook(silent, seconds=0.1))[0].error == "It took longer than 0.1 seconds."


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 20", b"SSH-2.0-OpenSSH\r\n"])
async def test_broken(beginning: bytes) -> None:
    """A connection that breaks, and a server of another kind, are failures."""

    async def broken(connection: Connection) -> None:
        await connection.receive()
        await connection.send(beginning)
        connection.reset()

    assert (await send_webhook(broken))[0].error == "The connection broke, or what came was no HTTP."


async def test_broken_body() -> None:
    """What was answered before the connection broke counts."""

    async def broken(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 410 x\r\nContent-Length: 100\r\n\r\ngone")
        await asyncio.sleep(0)
        connection.writer.close()

    assert (await send_webhook(broken))[0].status == 410


async def test_slow_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was answered counts, even if the rest never comes."""
    monkeypatch.setattr(webhooks, "ERROR_BODY_SECONDS", 0.1)

    async def slow(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 410 x\r\nContent-Length: 100\r\n\r\ngone")
        await connection.wait_closed()

    assert (await send_webhook(slow))[0] == WebhookResponse(status=410, excerpt="gone")


async def test_nobody_there() -> None:
    """A port on which nobody listens is a failure."""
    async with run_server(reply_with(b"")) as peer:
        url = peer.url
    reply = await WebhookClient().post(url, HEADERS, BODY, Webhook(url, ("127.0.0.0/8",)))
    assert reply == WebhookResponse(error="No connection could be made.")


async def test_loopback_is_refused() -> None:
    """This machine is not called unless a network of the tenant's list has it, though the host is on that list."""
    reply, peer = await send_webhook(reply_with(http_response(b"")), allow="127.0.0.1.example")
    assert reply.error == "Its host is at an address that may not be reached."
    assert peer.connections == 0


async def test_rebinding() -> None:
    """A name is looked up for every call, and one that has come to lead elsewhere is not called there."""
    answers: list[Sequence[IpAddress]] = [[ip_address("127.0.0.1")], [ip_address("127.0.0.2")]]

    async def resolver(host: str) -> Sequence[IpAddress]:
        assert host == "hooks.test"
        return answers.pop(0)

    async with run_server(reply_with(http_response(b""))) as peer:
        url = f"http://hooks.test:{urlsplit(peer.url).port}/"
        client, hook = WebhookClient(resolver=resolver), Webhook(url, ("127.0.0.1/32",))
        assert (await client.post(url, HEADERS, BODY, hook)).status == 200
        second = await client.post(url, HEADERS, BODY, hook)
        assert second.error == "Its host is at an address that may not be reached."
        assert peer.connections == 1
        assert b"host: hooks.test" in peer.requests[0][0].lower()


async def test_unknown_host() -> None:
    """A name that does not exist is a failure."""

    async def resolver(host: str) -> Sequence[IpAddress]:
        raise UnknownHost(f"there is no {host}")

    reply = await WebhookClient(resolver=resolver).post("http://gone.test/", HEADERS, BODY, Webhook())
    assert reply == WebhookResponse(error="Its host has no address.")


async def test_own_fault() -> None:
    """A fault of the gateway's own is one more failure, and is tried again."""

    async def resolver(host: str) -> Sequence[IpAddress]:
        raise RuntimeError(host)

    reply = await WebhookClient(resolver=resolver).post("http://hooks.test/", HEADERS, BODY, Webhook())
    assert reply == WebhookResponse(error="It could not be called.")


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", 120),
        ("9" * 400, 999_999_999),
        ("soon", None),
        ("-1", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", None),
    ],
)
async def test_retry_after(retry_after: str, seconds: float | None) -> None:
    """What a receiver that is busy asks for is told, if it can be understood."""
    reply, _ = await send_webhook(reply_with(http_response(b"busy", 503, Retry_After=retry_after)))
    assert (reply.status, reply.retry_after_seconds, reply.excerpt) == (503, seconds, "busy")
