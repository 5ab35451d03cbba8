"""A receiver of webhooks that is dead at times; it keeps what it has confirmed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser

from tests.behaviour.webhook_receiver import ReceivedWebhook
from tests.contract.scripted_server import Connection, http_response, run_server


@dataclass
class Receiver:
    """While `is_dead`, it reads requests and resets their connections."""

    url: str = ""
    is_dead: bool = False
    confirmed: list[ReceivedWebhook] = field(default_factory=list)

    async def serve(self, connection: Connection) -> None:
        while head := await connection.receive():
            raw_head, body = connection.server.requests.pop()
            if self.is_dead:
                connection.reset()
                return
            fields = BytesParser().parsebytes(raw_head.partition(b"\r\n")[2])
            headers = {name.lower(): text for name, text in fields.items()}
            await connection.send(http_response(b"", 200))
            self.confirmed.append(ReceivedWebhook(head.split(" ", 2)[1], headers, body))


@asynccontextmanager
async def run_receiver() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    async with run_server(receiver.serve) as server:
        receiver.url = server.url
        yield receiver
