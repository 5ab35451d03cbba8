"""Clients of several gateways behind a load balancer, which judge every response and every lost connection."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from tests.process.gateway import TIMEOUT_SECONDS, GatewayProcess
from tests.support.images import make_png

_FINAL_STATES = {"succeeded", "failed"}
_MAX_ATTEMPTS = 100
_MAX_HELD_UPLOADS = 10
_PAUSE_SECONDS = 1.0
"""Between two bytes of a held upload."""
_BOUNDARY = "end-of-part"
_FORM = (
    f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n%s\r\n--{_BOUNDARY}\r\n'
    'Content-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s'
    f"\r\n--{_BOUNDARY}--\r\n"
).encode()
_IMAGE = make_png()
_EVENT = re.compile(rb"event: state\nid: ([0-9]+)-([a-z]+)\ndata: (\{.*\})\n\n")


class ClosedBeforeResponseError(Exception):
    """The server closed the connection without a byte of the response."""


@dataclass(eq=False)
class Site:
    """A gateway behind the load balancer."""

    gateway: GatewayProcess
    is_signalled: bool = False
    is_draining: bool = False
    """Its readiness has shown it."""
    has_refused: bool = False
    """It has refused a connection."""
    held_uploads: int = 0
    last_submission_at: float = 0.0
    """Monotonic time of the last response to a submission."""
    idle: list[Connection] = field(default_factory=list)


class Connection:
    """A connection whose responses must be complete."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.is_used = False
        self.is_last = False
        """The server has announced that it closes the connection."""

    @property
    def is_closed(self) -> bool:
        """Whether the close of the server has arrived."""
        return self._reader.at_eof()

    async def write(self, data: bytes) -> None:
        with suppress(ConnectionError):  # the response may be there all the same
            self.writer.write(data)
            await self.writer.drain()

    async def read_response(self) -> tuple[int, dict[str, str], bytes]:
        """Read status, headers and body. Raises ClosedBeforeResponseError."""
        try:
            head = await self._reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if getattr(error, "partial", b""):
                raise AssertionError("the head of a response was cut off") from error
            raise ClosedBeforeResponseError from error
        status_line, *lines = head.decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status = int(status_line.split()[1])
        async with aclosing(self._read_chunks(status, headers)) as chunks:
            body = b"".join([chunk async for chunk in chunks])
        self.is_used, self.is_last = True, headers.get("connection") == "close"
        return status, headers, body

    async def _read_chunks(self, status: int, headers: dict[str, str]) -> AsyncGenerator[bytes, None]:
        if status == 204:
            return
        if "content-length" in headers:
            yield await self._reader.readexactly(int(headers["content-length"]))
            return
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        assert await self._reader.readexactly(2) == b"\r\n"


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    site: Site

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(eq=False)
class Load:
    """Clients that work until `is_ending`, and what they have seen.

    Each request goes to any site, and to another one if the connection is refused, if it was kept and is closed without
    a byte of a response, or if the response is 503.
    """

    sites: list[Site]
    token: str
    is_ending: bool = False
    uploads_released: asyncio.Event = field(default_factory=asyncio.Event)
    counts: Counter[str] = field(default_factory=Counter)
    unanswered: list[str] = field(default_factory=list)
    """Ids of the requests whose kept connection was closed."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Paths of the accepted tasks by the prompts of their submissions."""
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    async def run_client(self) -> None:
        """Submit and follow one task after the other."""
        while not self.is_ending:
            path = await self._submit_accepted()
            reply, last_event = await self.call("GET", path), ""
            while reply.json()["state"] not in _FINAL_STATES and not self.is_ending:
                if random.random() < 0.5:
                    reply = await self.call("GET", path, "Prefer: wait=20")
                    self.counts["unfinished waits"] += reply.json()["state"] not in _FINAL_STATES
                else:
                    reply, last_event = await self._follow(path, last_event)
            if reply.json()["state"] == "succeeded":
                file = await self.call("GET", f"{path}/artifacts/image")
                assert (file.headers["content-type"], file.body[:4]) == ("image/png", b"\x89PNG")
                self.counts["downloads"] += 1

    async def _submit_accepted(self) -> str:
        prompt = uuid4().hex
        fields = ["Prefer: wait=20"] if random.random() < 0.3 else []
        reply = await self.submit(prompt, *fields, is_held=random.random() < 0.25)
        assert reply.status == 201, reply
        path = self.tasks[prompt] = reply.headers["location"]
        return path

    async def submit(
        self, prompt: str, *fields: str, is_held: bool = False, only: Site | None = None, token: str = ""
    ) -> Reply:
        """Submit an image; if `is_held`, the second half of the upload waits for its release."""
        fields = (f"Content-Type: multipart/form-data; boundary={_BOUNDARY}", *fields)
        body = _FORM % (prompt.encode(), _IMAGE)
        reply = await self.call(
            "POST", "/v1/tasks/upscale", *fields, body=body, is_held=is_held, only=only, token=token
        )
        reply.site.last_submission_at = time.monotonic()
        return reply

    async def _follow(self, path: str, last_event: str) -> tuple[Reply, str]:
        """Stream events to the end of the stream; return the task and the id of its last event."""
        reply = await self.call("GET", f"{path}/events", *[f"Last-Event-ID: {last_event}"] * bool(last_event))
        events = _EVENT.findall(reply.body)
        assert reply.body.count(b"event:") == len(events), reply.body
        self.counts["resumed streams"] += bool(last_event)
        for version, state, _ in events:
            assert not last_event or int(version) > int(last_event.partition("-")[0]), (last_event, reply.body)
            last_event = f"{int(version)}-{state.decode()}"
        if not events or events[-1][1].decode() not in _FINAL_STATES:
            assert reply.site.is_signalled, "a stream ended before its task"
            self.counts["unfinished streams"] += 1
        if not events:
            return await self.call("GET", path), last_event
        return Reply(200, {}, events[-1][2], reply.site), last_event

    async def call(
        self,
        method: str,
        path: str,
        *fields: str,
        body: bytes = b"",
        is_held: bool = False,
        only: Site | None = None,
        token: str = "",
    ) -> Reply:
        site = None
        for _ in range(_MAX_ATTEMPTS):
            site = only or random.choice([item for item in self.sites if item is not site])
            try:
                connection = await self._connect(site)
            except ConnectionRefusedError:
                site.has_refused = True
                continue
            request_id, is_late = uuid4().hex, site.is_draining
            lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {token or self.token}"]
            lines += [f"X-Request-Id: {request_id}", f"Content-Length: {len(body)}", *fields, "", ""]
            try:
                async with asyncio.timeout(TIMEOUT_SECONDS):
                    reply = await self._exchange(connection, site, "\r\n".join(lines).encode(), body, is_held=is_held)
            except ClosedBeforeResponseError:
                assert connection.is_used, f"a new connection was reset: {request_id}"
                assert site.is_signalled, f"an idle connection was closed: {request_id}"
                self.unanswered.append(request_id)
                continue
            finally:
                if connection not in site.idle:
                    connection.writer.close()
            assert connection.is_last or not is_late, f"a late response without `Connection: close`: {request_id}"
            self.counts["late responses"] += is_late
            self.counts["responses"] += 1
            if reply.status == 503:
                assert reply.json()["code"] in {"overloaded", "ledger-unavailable", "upstream-unavailable"}
                continue
            assert reply.status < 300 or only, reply
            return reply
        raise AssertionError(f"{method} {path} has no response")

    async def _connect(self, site: Site) -> Connection:
        site.idle = [connection for connection in site.idle if not connection.is_closed]
        if site.idle and random.random() < 0.7:
            return site.idle.pop(random.randrange(len(site.idle)))
        connection = Connection(*await asyncio.open_connection("127.0.0.1", int(site.gateway.environ["GATEWAY_PORT"])))
        self._writers.add(connection.writer)
        return connection

    async def _exchange(self, connection: Connection, site: Site, head: bytes, body: bytes, *, is_held: bool) -> Reply:
        can_hold = sum(item.held_uploads for item in self.sites) < _MAX_HELD_UPLOADS
        if is_held and can_hold and not (site.is_signalled or self.is_ending):
            released, sent = self.uploads_released, len(body) // 2
            site.held_uploads += 1
            await connection.write(head + body[:sent])
            while not released.is_set():
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_SECONDS):
                        await released.wait()
                await connection.write(body[sent : sent + 1])
                sent += 1
            site.held_uploads -= 1
            await connection.write(body[sent:])
        else:
            await connection.write(head + body)
        reply = Reply(*await connection.read_response(), site)
        if not connection.is_last:
            site.idle.append(connection)
        return reply

    def release_uploads(self) -> None:
        """Let the uploads that are held now go on."""
        self.uploads_released.set()
        self.uploads_released = asyncio.Event()

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
        for writer in self._writers:
            with suppress(ConnectionError):
                await writer.wait_closed()
