"""A receiver of webhooks."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

import msgspec
from standardwebhooks.webhooks import Webhook as Verifier

from tests.support.network import serve_app


@dataclass
class ReceivedWebhook:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        return msgspec.json.decode(self.body, type=dict[str, Any])

    def is_signed_with(self, secret: str) -> bool:
        """Check the signature with the library of Standard Webhooks."""
        at = datetime.fromtimestamp(int(self.headers["webhook-timestamp"]), UTC)
        expected = Verifier(secret).sign(self.headers["webhook-id"], at, self.body.decode())
        return expected in self.headers["webhook-signature"].split(" ")


@dataclass
class WebhookReceiver:
    """An ASGI app that responds with `statuses`, then 204."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    requests: list[ReceivedWebhook] = field(default_factory=list)

    @property
    def network(self) -> str:
        """Return the entry of an allow list that permits its address and port."""
        return f"127.0.0.0/8:{urlsplit(self.url).port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        body = message["body"]
        while message["more_body"]:
            message = await receive()
            body += message["body"]
        query = "?" + scope["query_string"].decode() if scope["query_string"] else ""
        self.requests.append(ReceivedWebhook(scope["path"] + query, headers, body))
        status = self.statuses.pop(0) if self.statuses else 204
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"" if status == 204 else b"no"})


@asynccontextmanager
async def run_receiver() -> AsyncIterator[WebhookReceiver]:
    receiver = WebhookReceiver()
    async with serve_app(receiver) as url:
        receiver.url = f"{url}/ended"
        yield receiver


def make_secret(letter: bytes = b"s") -> str:
    return "whsec_" + base64.b64encode(letter * 32).decode()
