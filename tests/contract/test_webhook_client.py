"""Webhooks to receivers that misbehave in every way."""

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
    """Send a webhook; returns the result and the requests that the receiver got."""
    async with run_server(serve) as peer:
        hook = Webhook(f"{peer.url}/ended?key=1", (allow,))
        reply = await WebhookClient(timeout_seconds=seconds).post(f"{peer.url}/ended?key=1", HEADERS, BODY, hook)
        return reply, peer


async def test_request() -> None:
    """The body is sent unchanged, with its signature and User-Agent, and without credentials."""
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
    """A local lack of resources is no failure of the receiver."""
    async with run_server(reply_with(http_response(b"thanks"))) as peer:
        client, hook = WebhookClient(), Webhook(peer.url, ("127.0.0.0/8",))
        with exhaust_descriptors(), pytest.raises(Overloaded):
            await client.post(peer.url, HEADERS, BODY, hook)
        assert await client.post(peer.url, HEADERS, BODY, hook) == WebhookResponse(status=200)
    assert peer.connections == 1


async def test_redirect() -> None:
    """A redirect is a response like others and is not followed."""
    async with run_server(reply_with(http_response(b"stolen"))) as elsewhere:
        reply, _ = await send_webhook(reply_with(http_response(b"go on", 307, Location=elsewhere.url)))
        assert (reply.status, elsewhere.connections) == (307, 0)


async def test_huge_response() -> None:
    """Of an endless response only the beginning is read."""

    async def endless(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 500 x\r\nContent-Length: 100000000000\r\n\r\n")
        with suppress(OSError):
            while True:
                await connection.send(b"no" * 10_000)

    reply, _ = await send_webhook(endless)
    assert (reply.status, reply.excerpt) == (500, "no" * (MAX_BODY_BYTES // 2))


async def test_success_is_not_read() -> None:
    """A status of success counts whatever the body."""

    async def talkative(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 200 x\r\nContent-Length: 100000000000\r\n\r\nand")
        await connection.wait_closed()

    assert (await send_webhook(talkative))[0] == WebhookResponse(status=200)


async def test_slow() -> None:
    """A response sent byte by byte fails at the total timeout."""

    async def slow(connection: Connection) -> None:
        await connection.receive()
        with suppress(OSError):
            while True:
                await connection.send(b"H")
                await asyncio.sleep(0.01)

    reply, _ = await send_webhook(slow, seconds=0.2)
    assert reply == WebhookResponse(error="It took longer than 0.2 seconds.")


async def test_silent() -> None:
    async def silent(connection: Connection) -> None:
        await connection.wait_closed()

    assert (await send_webhook(silent, seconds=0.1))[0].error == "It took longer than 0.1 seconds."


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 20", b"SSH-2.0-OpenSSH\r\n"])
async def test_broken(beginning: bytes) -> None:
    """Broken connections and servers of other protocols are failures."""

    async def broken(connection: Connection) -> None:
        await connection.receive()
        await connection.send(beginning)
        connection.reset()

    assert (await send_webhook(broken))[0].error == "The connection was lost, or the response was not HTTP."


async def test_broken_body() -> None:
    """A status received before the connection broke counts."""

    async def broken(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 410 x\r\nContent-Length: 100\r\n\r\ngone")
        await asyncio.sleep(0)
        connection.writer.close()

    assert (await send_webhook(broken))[0].status == 410


async def test_slow_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status counts even if the body never ends."""
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.1)

    async def slow(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 410 x\r\nContent-Length: 100\r\n\r\ngone")
        await connection.wait_closed()

    assert (await send_webhook(slow))[0] == WebhookResponse(status=410, excerpt="gone")


async def test_connection_refused() -> None:
    async with run_server(reply_with(b"")) as peer:
        url = peer.url
    reply = await WebhookClient().post(url, HEADERS, BODY, Webhook(url, ("127.0.0.0/8",)))
    assert reply == WebhookResponse(error="No connection could be made.")


async def test_loopback_is_refused() -> None:
    """Loopback is refused unless the tenant's networks include it, even if its host is allowed."""
    reply, peer = await send_webhook(reply_with(http_response(b"")), allow="127.0.0.1.example")
    assert reply.error == "The address of its host is not allowed."
    assert peer.connections == 0


async def test_rebinding() -> None:
    """A name is resolved for every call, and refused once it resolves to a private address."""
    answers: list[Sequence[IpAddress]] = [[ip_address("127.0.0.1")], [ip_address("127.0.0.2")]]

    async def resolver(host: str) -> Sequence[IpAddress]:
        assert host == "hooks.test"
        return answers.pop(0)

    async with run_server(reply_with(http_response(b""))) as peer:
        url = f"http://hooks.test:{urlsplit(peer.url).port}/"
        client, hook = WebhookClient(resolver=resolver), Webhook(url, ("127.0.0.1/32",))
        assert (await client.post(url, HEADERS, BODY, hook)).status == 200
        second = await client.post(url, HEADERS, BODY, hook)
        assert second.error == "The address of its host is not allowed."
        assert peer.connections == 1
        assert b"host: hooks.test" in peer.requests[0][0].lower()


async def test_unknown_host() -> None:
    async def resolver(host: str) -> Sequence[IpAddress]:
        raise UnknownHost(f"there is no {host}")

    reply = await WebhookClient(resolver=resolver).post("http://gone.test/", HEADERS, BODY, Webhook())
    assert reply == WebhookResponse(error="Its host has no address.")


async def test_internal_error() -> None:
    """An internal error is a failure that is retried."""

    async def resolver(host: str) -> Sequence[IpAddress]:
        raise RuntimeError(host)

    reply = await WebhookClient(resolver=resolver).post("http://hooks.test/", HEADERS, BODY, Webhook())
    assert reply == WebhookResponse(error="The request failed.")


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
    """A valid Retry-After is returned."""
    reply, _ = await send_webhook(reply_with(http_response(b"busy", 503, Retry_After=retry_after)))
    assert (reply.status, reply.retry_after_seconds, reply.excerpt) == (503, seconds, "busy")
