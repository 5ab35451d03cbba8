"""Spans of outgoing calls, and the trace context that these send."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.trace import Tracer
from redis.asyncio import Redis

from service.clients.artifacts import ArtifactClient
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import WebhookClient
from service.domain.errors import GatewayError, LedgerUnavailable
from service.domain.tasks import DEFAULT_CATALOGUE, Artifact, ArtifactName, FaceEnhanceOptions
from service.domain.tenants import Webhook
from service.storage.redis import RedisScripts
from service.telemetry import tracing
from service.usecases.ports import RangeRequest, WebhookResponse
from tests.contract.artifact_server import file_response, response_head, send_pieces
from tests.contract.client import ACCOUNT, CIPHER, IMAGE, USER_KEY
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Handler,
    ScriptedServer,
    http_response,
    never_reply,
    reply_with,
    reset_after_request,
    run_server,
)
from tests.support.traces import RecordedSpan, SpanRecorder
from tests.support.valkey import Valkey, reserve_port
from tests.unit.asgi_client import make_http_scope

RECEIVER_QUERY = "key=of-the-tenant"


def _ignore(*_: object) -> None:
    pass


async def submit(url: str, tracer: Tracer, *, seconds: float = 10) -> None:
    async with UpstreamClient(url, CIPHER, DEFAULT_CATALOGUE, on_call=_ignore, tracer=tracer) as client:
        await client.submit(ACCOUNT, FaceEnhanceOptions(), IMAGE, timeout_seconds=seconds)


async def send_webhook(url: str, tracer: Tracer) -> WebhookResponse:
    hook = Webhook(url, ("127.0.0.0/8",))
    return await WebhookClient(tracer=tracer, timeout_seconds=5).post(
        f"{url}/secret-path?{RECEIVER_QUERY}", {}, b"{}", hook
    )


async def fetch(url: str, tracer: Tracer) -> None:
    client = ArtifactClient(url, max_bytes=1_000_000, on_call=_ignore, tracer=tracer)
    artifact = Artifact(ArtifactName.IMAGE, f"{url}/files/secret-path.png?signature=of-the-file")
    async with client.fetch(ACCOUNT, artifact, RangeRequest()) as fetched:
        assert [chunk async for chunk in fetched.chunks]


def request_headers(peer: ScriptedServer) -> list[dict[str, str]]:
    """Return the headers of the requests that a server received."""
    return [
        {name.lower(): value for name, _, value in (line.partition(": ") for line in sent.decode().split("\r\n")[1:])}
        for sent, _ in peer.requests
    ]


def child_spans(recorder: SpanRecorder) -> list[RecordedSpan]:
    """Return all spans but the request's own, and require them to be its children."""
    *children, request = recorder.spans
    assert {item.parent_id for item in children} <= {request.span_id}
    assert {item.trace_id for item in children} <= {request.trace_id}
    assert {item.kind for item in children} <= {"client"}
    return children


async def test_submit() -> None:
    """A submit is recorded as a request to the upstream, without trace headers."""
    recorder = SpanRecorder()
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer:
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            await submit(peer.url, recorder.tracer)
    (span,) = child_spans(recorder)
    port = int(peer.url.rpartition(":")[2])
    assert (span.name, span.is_error) == ("POST /api/submit_face_enhance_task", False)
    assert span.attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": port,
        "url.full": f"{peer.url}/api/submit_face_enhance_task",
    }
    assert not {"traceparent", "tracestate"} & request_headers(peer)[0].keys()
    assert USER_KEY not in str(recorder.spans)


@pytest.mark.parametrize(
    ("serve", "seconds", "attributes"),
    [
        (reply_with(http_response(b"", 404)), 10, {"http.response.status_code": 404, "error.type": "404"}),
        (reply_with(http_response(b"", 502)), 10, {"http.response.status_code": 502, "error.type": "502"}),
        (reset_after_request, 10, {"error.type": "httpx2.ReadError"}),
        (never_reply, 0.2, {"error.type": "TimeoutError"}),
    ],
)
async def test_failures(serve: Handler, seconds: float, attributes: Mapping[str, Any]) -> None:
    """A failed call records a status or an error type, without its message."""
    recorder = SpanRecorder()
    async with run_server(serve) as peer:
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            await submit(peer.url, recorder.tracer, seconds=seconds)
    (span,) = child_spans(recorder)
    assert (span.is_error, span.status_message, span.event_count) == (True, "", 0)
    assert {name: span.attributes.get(name) for name in attributes} == attributes


async def test_connection_refused() -> None:
    recorder = SpanRecorder()
    with tracing.start_request_span(recorder.tracer, make_http_scope()):
        await submit(f"http://127.0.0.1:{reserve_port()}", recorder.tracer)
    (span,) = child_spans(recorder)
    assert span.attributes["error.type"] == "httpx2.ConnectError"


async def test_webhook_trace_headers() -> None:
    """A webhook carries the trace context; only the host of its URL is recorded."""
    recorder = SpanRecorder()
    async with run_server(reply_with(http_response(b"", 204))) as peer:
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            assert (await send_webhook(peer.url, recorder.tracer)).status == 204
    (span,) = child_spans(recorder)
    assert (span.name, span.attributes["url.full"]) == ("POST", f"{peer.url}/REDACTED")
    assert span.attributes["http.response.status_code"] == 204
    assert request_headers(peer)[0]["traceparent"] == f"{span.traceparent}-03"
    assert "secret-path" not in str(recorder.spans)
    assert RECEIVER_QUERY not in str(recorder.spans)


async def test_no_trace_headers_when_not_recorded() -> None:
    recorder = SpanRecorder()
    async with run_server(reply_with(http_response(b"", 204))) as peer:
        await send_webhook(peer.url, recorder.tracer)
    assert "traceparent" not in request_headers(peer)[0]
    assert recorder.spans == []


async def test_artifacts() -> None:
    """Each hop to an artifact is recorded by its host, without trace headers."""
    recorder = SpanRecorder()
    async with run_server(send_pieces(file_response())) as server:
        moved = send_pieces(response_head(302, Location=f"{server.url}/secret-path", Content_Length="0"))
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            async with run_server(moved) as here:
                await fetch(here.url, recorder.tracer)
    first, second = child_spans(recorder)
    assert [item.attributes["url.full"] for item in (first, second)] == [
        f"{here.url}/REDACTED",
        f"{server.url}/REDACTED",
    ]
    assert [item.attributes["http.response.status_code"] for item in (first, second)] == [302, 200]
    assert [item.attributes.get("http.request.resend_count") for item in (first, second)] == [None, 1]
    assert not {"traceparent", "tracestate"} & {name for peer in (here, server) for name in request_headers(peer)[0]}
    assert "secret-path" not in str(recorder.spans)
    assert "signature" not in str(recorder.spans)


async def test_missing_artifact() -> None:
    recorder = SpanRecorder()
    async with run_server(send_pieces(response_head(404, Content_Length="0"))) as peer:
        with tracing.start_request_span(recorder.tracer, make_http_scope()), pytest.raises(GatewayError):
            await fetch(peer.url, recorder.tracer)
    (span,) = child_spans(recorder)
    assert span.attributes["error.type"] == "404"


async def test_work_after_the_request() -> None:
    """Work that continues after its request has ended is recorded as part of it."""
    recorder = SpanRecorder()
    go = asyncio.Event()

    async def work(url: str) -> str | None:
        await go.wait()
        await submit(url, recorder.tracer)
        return tracing.trace_headers().get("traceparent")

    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer:
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            working = asyncio.create_task(work(peer.url))
            await asyncio.sleep(0)
        go.set()
        context = await working
    request, call = recorder.spans
    assert (call.parent_id, call.trace_id) == (request.span_id, request.trace_id)
    assert context == f"{request.traceparent}-03"


async def test_scripts(valkey: Valkey) -> None:
    """A script is recorded by its name, without its arguments."""
    recorder = SpanRecorder()
    async with Redis.from_url(valkey.url) as client:
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            await RedisScripts(client, tracer=recorder.tracer).call("reopen", ["clock", "account-key"], account=77_777)
        await RedisScripts(client, tracer=recorder.tracer).call("reopen", ["clock", "account-key"], account=77_777)
    (span,) = child_spans(recorder)
    assert (span.name, span.is_error) == ("EVALSHA reopen", False)
    assert span.attributes == {
        "db.system.name": "redis",
        "db.operation.name": "EVALSHA",
        "db.stored_procedure.name": "reopen",
    }


async def test_reads(valkey: Valkey) -> None:
    """Plain commands are recorded by the name of the only one, or their number, without keys."""
    recorder = SpanRecorder()
    async with Redis.from_url(valkey.url) as client:
        scripts = RedisScripts(client, tracer=recorder.tracer)
        with tracing.start_request_span(recorder.tracer, make_http_scope()):
            await scripts.read(("GET", "a-key"))
            await scripts.read(("GET", "a-key"), ("TIME",))
    one, two = child_spans(recorder)
    assert (one.name, one.attributes) == ("GET", {"db.system.name": "redis", "db.operation.name": "GET"})
    assert (two.name, two.attributes["db.operation.batch.size"]) == ("PIPELINE", 2)
    assert "a-key" not in str(recorder.spans)


async def test_store_unavailable() -> None:
    """The error recorded is the client's own, not the one that callers get."""
    recorder = SpanRecorder()
    async with Redis.from_url(f"redis://127.0.0.1:{reserve_port()}") as client:
        with tracing.start_request_span(recorder.tracer, make_http_scope()), pytest.raises(LedgerUnavailable):
            await RedisScripts(client, tracer=recorder.tracer).call("reopen", ["clock", "account"], account=1)
    (span,) = child_spans(recorder)
    assert span.is_error
    assert span.attributes["error.type"] == "redis.exceptions.ConnectionError"


async def test_follow_up() -> None:
    """Later work has a trace of its own with a link to its cause, whatever the sampling ratio."""
    recorder, none = SpanRecorder(), SpanRecorder(share=0.0)
    with tracing.start_request_span(recorder.tracer, make_http_scope()):
        cause = tracing.trace_headers().get("traceparent")
    request = recorder.span
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer:
        for context in (cause, None, "00-nothing"):
            with tracing.start_linked_span(none.tracer, "check task", context, "r1"):
                await submit(peer.url, none.tracer)
    call, work = none.spans
    assert (work.name, work.kind, work.parent_id, work.links) == (
        "check task",
        "internal",
        "",
        [(request.trace_id, request.span_id)],
    )
    assert work.attributes == {"gateway.reservation": "r1"}
    assert (call.trace_id, call.parent_id) == (work.trace_id, work.span_id)
    assert work.trace_id != request.trace_id


async def test_unusual_urls() -> None:
    """Any URL can be recorded, and credentials in it are left out."""
    recorder = SpanRecorder()
    for url in ("http://user:password@host:1/x?y#z", "http://[::1/x", "http://host:port/", "", "http://höst/\ud800"):
        with (
            tracing.start_request_span(recorder.tracer, make_http_scope()),
            tracing.start_client_span(recorder.tracer, "GET", url, hide_path=False),
        ):
            pass
    assert "password" not in str(recorder.spans)
    assert recorder.spans[0].attributes["url.full"] == "http://host:1/x"
