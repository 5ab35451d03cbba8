"""Webhooks to receivers that misbehave in every way."""

from __future__ import annotations

from contextlib import suppress

import pytest

from service.clients import webhooks
from service.clients.webhooks import MAX_BODY_BYTES, WebhookClient
from service.domain.tenants import Webhook
from service.usecases.ports import WebhookResponse
from tests.contract.scripted_server import Connection, Handler, ScriptedServer, http_response, reply_with, run_server


async def send_webhook(serve: Handler, *, allow: str = "127.0.0.0/8") -> tuple[WebhookResponse, ScriptedServer]:
    async with run_server(serve) as peer:
        url = f"{peer.url}/ended?key=1"
        return await WebhookClient().post(url, {}, b"{}", Webhook(url, (allow,))), peer


async def test_redirect_is_not_followed() -> None:
    async with run_server(reply_with(http_response(b"stolen"))) as elsewhere:
        reply, _ = await send_webhook(reply_with(http_response(b"go on", 307, Location=elsewhere.url)))
        assert (reply.status, elsewhere.connections) == (307, 0)


async def test_only_the_beginning_of_an_endless_response_is_read() -> None:
    async def endless(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 500 x\r\nContent-Length: 100000000000\r\n\r\n")
        with suppress(OSError):
            while True:
                await connection.send(b"no" * 10_000)

    reply, _ = await send_webhook(endless)
    assert (reply.status, reply.excerpt) == (500, "no" * (MAX_BODY_BYTES // 2))


@pytest.mark.parametrize(("status", "excerpt"), [(200, None), (410, "gone")])
async def test_a_status_counts_even_if_the_body_never_ends(
    status: int, excerpt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.1)

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(f"HTTP/1.1 {status} x\r\nContent-Length: 100\r\n\r\ngone".encode())
        await connection.wait_closed()

    assert (await send_webhook(serve))[0] == WebhookResponse(status=status, excerpt=excerpt)


async def test_loopback_is_refused_even_if_its_host_is_allowed() -> None:
    reply, peer = await send_webhook(reply_with(http_response(b"")), allow="127.0.0.1.example")
    assert reply.error
    assert peer.connections == 0


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("120", 120),
        ("9" * 400, 999_999_999),
        ("-1", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("Wed, 21 Oct 2015 07:28:00 -0000", None),
        ("Mon, 01 Jan 99999999999 00:00:00 GMT", None),
    ],
)
async def test_retry_after(retry_after: str, seconds: float | None) -> None:
    reply, _ = await send_webhook(reply_with(http_response(b"busy", 503, Retry_After=retry_after)))
    assert (reply.status, reply.retry_after_seconds, reply.excerpt) == (503, seconds, "busy")
