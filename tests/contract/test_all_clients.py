"""All clients: servers that are broken, silent or unreachable, responses to webhooks, and the spans of calls."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from service.clients import upstream, webhooks
from service.clients.artifacts import FetchTimeouts
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import MAX_BODY_BYTES, WebhookClient
from service.domain.errors import (
    GatewayError,
    LedgerUnavailable,
    Overloaded,
    UpstreamInvalidResponse,
    UpstreamUnavailable,
)
from service.domain.tasks import DEFAULT_CATALOGUE, FaceEnhanceOptions
from service.domain.tenants import Webhook
from service.storage.redis import RedisScripts
from service.telemetry import tracing
from service.usecases.ports import CheckOutcome, SubmitOutcome, WebhookResponse
from tests.contract.client import (
    ACCOUNT,
    CIPHER,
    IMAGE,
    LARGE,
    LINKS,
    USER_KEY,
    Caller,
    Fetcher,
    make_fetcher,
    open_caller,
)
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Connection,
    Handler,
    ScriptedServer,
    file_response,
    http_response,
    never_reply,
    reply_and_close,
    reply_and_hold,
    reply_with,
    reset_after_request,
    reset_immediately,
    run_server,
)
from tests.support.network import create_certificate, exhaust_descriptors, reserve_port
from tests.support.traces import RecordedSpan, SpanRecorder
from tests.support.valkey import Valkey
from tests.unit.asgi_client import make_http_scope

pytestmark = pytest.mark.usefixtures("public_loopback")
NO_RESPONSE = CheckOutcome.NO_RESPONSE
NOT_SENT = (SubmitOutcome.NOT_SENT, NO_RESPONSE, "failed", UpstreamUnavailable)
LOST = (SubmitOutcome.UNKNOWN, NO_RESPONSE, "failed", UpstreamInvalidResponse)
NO_DESCRIPTOR = (SubmitOutcome.NOT_SENT, NO_RESPONSE, Overloaded, Overloaded)

Results = tuple[SubmitOutcome, CheckOutcome, int | str | type[GatewayError], type]


def network(url: str) -> str:
    """Return the entry of an allow list for a URL on loopback."""
    return f"127.0.0.0/8:{url.rpartition(':')[2].partition('/')[0]}"


@dataclass
class Clients:
    upstream: Caller
    webhooks: WebhookClient
    artifacts: Fetcher

    async def call(self, url: str, *, seconds: float = 10) -> Results:
        """Submit, check, send a webhook and fetch an artifact, one after the other."""
        submitted = await self.upstream.submit(image=LARGE, seconds=seconds)
        checked = await self.upstream.check()
        webhook: int | str | type[GatewayError]
        try:
            response = await self.webhooks.post(url, {}, b"{}", Webhook(url, (network(url), "::1/128")))
            webhook = response.status or "failed"
        except GatewayError as error:
            webhook = type(error)
        fetched: GatewayError | None = None
        try:
            await self.artifacts.fetch_all(url)
        except GatewayError as error:
            fetched = error
        assert "127.0.0.1" not in str(fetched)
        return submitted.outcome, checked.outcome, webhook, type(fetched)


@asynccontextmanager
async def open_clients(url: str, *, seconds: float = 10) -> AsyncIterator[Clients]:
    artifacts = make_fetcher(timeouts=FetchTimeouts(first_byte_seconds=seconds, idle_seconds=seconds))
    async with open_caller(url) as caller:
        yield Clients(caller, WebhookClient(timeout_seconds=seconds), artifacts)


async def call_all(url: str, *, seconds: float = 10) -> Results:
    async with open_clients(url, seconds=seconds) as clients:
        return await clients.call(url, seconds=seconds)


@pytest.mark.parametrize(
    "serve",
    [
        pytest.param(reset_immediately, id="reset"),
        pytest.param(reset_after_request, id="reset-after-the-request"),
        pytest.param(reply_and_close(), id="closed"),
        pytest.param(reply_and_close(ACCEPTED_RESPONSE[:20]), id="half-a-head"),
        pytest.param(reply_and_close(b"SSH-2.0-x\r\n\r\n"), id="not-http"),
        pytest.param(reply_and_close(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000), id="endless-head"),
        pytest.param(
            reply_with(ACCEPTED_RESPONSE.replace(b"Content-Length: ", b"Content-Length: 9-")), id="invalid-length"
        ),
    ],
)
async def test_broken_responses(serve: Handler) -> None:
    with capture_logs() as logs:
        async with run_server(serve) as peer:
            assert await call_all(peer.url) == LOST
    assert peer.connections == 4
    assert [log["sent"] for log in logs if log["event"] == "upstream.request_failed"] == [True, True]


async def drip(connection: Connection) -> None:
    """Send a response head byte by byte, without an end."""
    await connection.receive()
    await connection.send(b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(60_000):
        await connection.send(b"y")
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("serve", [never_reply, drip])
async def test_deadlines(serve: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CHECK_SECONDS", 0.25)
    async with run_server(serve) as peer, asyncio.timeout(30):
        assert await call_all(peer.url, seconds=0.25) == (*LOST[:3], UpstreamUnavailable)


async def test_connection_refused() -> None:
    assert await call_all(f"http://127.0.0.1:{reserve_port()}") == NOT_SENT


@pytest.mark.parametrize("url", ["", "ftp://127.0.0.1", "http://[::1", "http://a..b", "http://x:99999"])
async def test_unusable_urls(url: str) -> None:
    with capture_logs():  # a traceback on the console is slow
        submitted, checked, webhook, fetched = await call_all(url)
    assert (submitted, checked, webhook) == NOT_SENT[:3]
    assert fetched in {UpstreamInvalidResponse, UpstreamUnavailable}


async def reply_in_plain_http(connection: Connection) -> None:
    await connection.send(b"HTTP/1.1 400 Bad\r\n\r\n")


async def test_nothing_is_sent_to_untrusted_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trusted, context = create_certificate(tmp_path)
    async with run_server(reply_with(ACCEPTED_RESPONSE), tls=context) as peer:
        assert await call_all(peer.url) == NOT_SENT
        assert peer.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        monkeypatch.setattr(upstream, "default_tls", httpx2.create_ssl_context)
        async with open_caller(peer.url) as caller:
            for image in (IMAGE, LARGE):
                assert (await caller.submit(image=image)).outcome is SubmitOutcome.ACCEPTED
            for _ in range(2):
                assert (await caller.check()).outcome is not NO_RESPONSE
        assert (len(peer.requests), peer.connections) == (4, 3)
    for serve in (reply_in_plain_http, reset_immediately):
        async with run_server(serve) as peer:
            assert await call_all(peer.url.replace("http://", "https://")) == NOT_SENT


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_lack_of_descriptors_is_not_sent_and_does_not_count_against_the_server(host: str) -> None:
    async with run_server(reply_with(http_response(b"x", 500))) as peer:
        url = peer.url.replace("127.0.0.1", host)
        async with open_clients(url) as clients:
            with exhaust_descriptors():
                for _ in range(6):
                    assert await clients.call(url) == NO_DESCRIPTOR
            assert peer.connections == 0
            assert await clients.call(url) == (SubmitOutcome.UNKNOWN, NO_RESPONSE, 500, UpstreamUnavailable)


async def test_no_proxy_of_the_environment_and_no_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    replies = reply_with(http_response(b"{}", Set_Cookie="a=b; Path=/"))
    async with run_server(never_reply) as proxy, run_server(replies) as peer:
        for name in ("HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with open_clients(peer.url) as clients:
            for _ in range(2):
                await clients.call(peer.url)
    assert (proxy.connections, len(peer.requests)) == (0, 8)
    assert not [head for head, _ in peer.requests if b"cookie" in head.lower() or b"authorization" in head.lower()]


async def send_webhook(serve: Handler, *, allow: str | None = None) -> tuple[WebhookResponse, ScriptedServer]:
    async with run_server(serve) as peer:
        url = f"{peer.url}/ended?key=1"
        return await WebhookClient().post(url, {}, b"{}", Webhook(url, (allow or network(url),))), peer


async def test_redirect_is_not_followed() -> None:
    async with run_server(reply_with(http_response(b"stolen"))) as elsewhere:
        reply, _ = await send_webhook(reply_with(http_response(b"go on", 307, Location=elsewhere.url)))
        assert (reply.status, elsewhere.connections) == (307, 0)


async def test_only_the_beginning_of_an_endless_response_is_read() -> None:
    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(b"HTTP/1.1 500 x\r\nContent-Length: 100000000000\r\n\r\n")
        while True:
            await connection.send(b"no" * 10_000)

    reply, _ = await send_webhook(serve)
    assert (reply.status, reply.excerpt) == (500, "no" * (MAX_BODY_BYTES // 2))


@pytest.mark.parametrize(("status", "excerpt"), [(200, None), (410, "gone")])
async def test_a_status_counts_even_if_the_body_never_ends(
    status: int, excerpt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "BODY_SECONDS", 0.1)

    serve = reply_and_hold(f"HTTP/1.1 {status} x\r\nContent-Length: 100\r\n\r\ngone".encode())
    assert (await send_webhook(serve))[0] == WebhookResponse(status=status, excerpt=excerpt)


@pytest.mark.parametrize("allow", ["127.0.0.1.example", "10.0.0.0/8", "127.0.0.0/8", "127.0.0.0/8:1"])
async def test_loopback_is_refused_without_its_network_and_port(allow: str) -> None:
    reply, peer = await send_webhook(reply_with(http_response(b"")), allow=allow)
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


@pytest.fixture
def recorder() -> SpanRecorder:
    return SpanRecorder()


@contextmanager
def record_request(recorder: SpanRecorder) -> Iterator[list[RecordedSpan]]:
    """Record a request; the list has the spans of its calls after the block."""
    calls: list[RecordedSpan] = []
    with tracing.start_request_span(recorder.tracer, make_http_scope()):
        yield calls
    *calls[:], request = recorder.spans
    assert {(call.parent_id, call.kind) for call in calls} == {(request.span_id, "client")}
    assert "secret" not in str(recorder.spans)
    assert USER_KEY not in str(recorder.spans)


@pytest.mark.parametrize(
    ("serve", "attributes"),
    [
        (reply_with(ACCEPTED_RESPONSE), {"http.response.status_code": 200, "error.type": None}),
        (reply_with(http_response(b"", 404)), {"http.response.status_code": 404, "error.type": "404"}),
        (reset_after_request, {"error.type": "ConnectionResetError"}),
        (never_reply, {"error.type": "TimeoutError"}),
    ],
)
async def test_submit(serve: Handler, attributes: Mapping[str, Any], recorder: SpanRecorder) -> None:
    async with (
        run_server(serve) as peer,
        UpstreamClient(
            peer.url, CIPHER, DEFAULT_CATALOGUE, on_call=lambda *_: None, links=LINKS, tracer=recorder.tracer
        ) as client,
    ):
        with record_request(recorder) as calls:
            seconds = 0.2 if serve is never_reply else 10
            await client.submit(ACCOUNT, FaceEnhanceOptions(), IMAGE, timeout_seconds=seconds)
    (span,) = calls
    assert span.attributes["url.full"] == f"{peer.url}/api/submit_face_enhance_task"
    assert {name: span.attributes.get(name) for name in attributes} == attributes
    assert (span.is_error, span.status_message) == ("error.type" in span.attributes, "")
    assert b"\r\ntrace" not in peer.requests[0][0].lower()


async def test_webhook_carries_the_trace_and_its_url_is_recorded_without_the_path(recorder: SpanRecorder) -> None:
    async with run_server(reply_with(http_response(b"", 204))) as peer:
        hook = Webhook(peer.url, (network(peer.url),))
        with record_request(recorder) as calls:
            await WebhookClient(tracer=recorder.tracer).post(f"{peer.url}/secret-path?key=secret", {}, b"{}", hook)
    (span,) = calls
    assert (span.name, span.attributes["url.full"]) == ("POST", f"{peer.url}/REDACTED")
    assert f"\r\ntraceparent: {span.traceparent}-03\r\n".encode() in peer.requests[0][0].lower()


async def test_each_hop_to_an_artifact_is_recorded_without_its_path(recorder: SpanRecorder) -> None:
    async with (
        run_server(reply_with(file_response())) as server,
        run_server(reply_with(http_response(b"", 302, Location=f"{server.url}/secret-path"))) as here,
    ):
        client = make_fetcher(here.url, tracer=recorder.tracer)
        with record_request(recorder) as calls:
            assert (await client.fetch_all(f"{here.url}/files/secret-path.png?signature=secret"))[1]
    keys = "url.full", "http.response.status_code", "http.request.resend_count"
    assert [[call.attributes.get(key) for key in keys] for call in calls] == [
        [f"{here.url}/REDACTED", 302, None],
        [f"{server.url}/REDACTED", 200, 1],
    ]
    assert not [head for head, _ in (*here.requests, *server.requests) if b"\r\ntrace" in head.lower()]


async def test_redis_calls_are_recorded_without_keys_and_arguments(valkey: Valkey, recorder: SpanRecorder) -> None:
    async with (
        Redis.from_url(valkey.url) as client,
        Redis.from_url(f"redis://127.0.0.1:{reserve_port()}") as unreachable,
    ):
        scripts = RedisScripts(client, tracer=recorder.tracer)
        await scripts.call("reopen", ["clock", "secret-key"], account=77_777)  # loads the script
        with record_request(recorder) as calls:
            await scripts.call("reopen", ["clock", "secret-key"], account=77_777)
            await scripts.read(("GET", "other-secret"))
            await scripts.read(("GET", "other-secret"), ("TIME",))
            with suppress(LedgerUnavailable):
                await RedisScripts(unreachable, tracer=recorder.tracer).call("reopen", ["clock", "account"], account=1)
    assert [call.name for call in calls] == ["EVALSHA reopen", "GET", "PIPELINE", "EVALSHA reopen"]
    assert [call.attributes.get("error.type") for call in calls] == [None] * 3 + ["redis.exceptions.ConnectionError"]
    assert "77777" not in str(calls)


def test_any_url_can_be_recorded_and_credentials_in_it_are_not(recorder: SpanRecorder) -> None:
    for url in ("http://user:password@host:1/x?y#z", "http://[::1/x", "http://host:port/", "", "http://höst/\ud800"):
        with (
            tracing.start_request_span(recorder.tracer, make_http_scope()),
            tracing.start_client_span(recorder.tracer, "GET", url, hide_path=False),
        ):
            pass
    assert "password" not in str(recorder.spans)
    assert recorder.spans[0].attributes["url.full"] == "http://host:1/x"
