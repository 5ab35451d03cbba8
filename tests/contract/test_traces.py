"""Spans of outgoing calls, and the trace context that these send."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from opentelemetry.trace import Tracer
from redis.asyncio import Redis

from service.clients.artifacts import ArtifactClient
from service.clients.upstream import UpstreamClient
from service.clients.webhooks import WebhookClient
from service.domain.errors import LedgerUnavailable
from service.domain.tasks import DEFAULT_CATALOGUE, Artifact, ArtifactName, FaceEnhanceOptions
from service.domain.tenants import Webhook
from service.storage.redis import RedisScripts
from service.telemetry import tracing
from service.usecases.ports import RangeRequest
from tests.contract.artifact_server import file_response, response_head, send_pieces
from tests.contract.client import ACCOUNT, CIPHER, IMAGE, USER_KEY
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Handler,
    http_response,
    never_reply,
    reply_with,
    reset_after_request,
    run_server,
)
from tests.support.network import reserve_port
from tests.support.traces import RecordedSpan, SpanRecorder
from tests.support.valkey import Valkey
from tests.unit.asgi_client import make_http_scope


def _ignore(*_: object) -> None:
    pass


async def submit(url: str, tracer: Tracer, *, seconds: float = 10) -> None:
    async with UpstreamClient(url, CIPHER, DEFAULT_CATALOGUE, on_call=_ignore, tracer=tracer) as client:
        await client.submit(ACCOUNT, FaceEnhanceOptions(), IMAGE, timeout_seconds=seconds)


async def send_webhook(url: str, tracer: Tracer) -> None:
    hook = Webhook(url, ("127.0.0.0/8",))
    client = WebhookClient(tracer=tracer, timeout_seconds=5)
    assert (await client.post(f"{url}/secret-path?key=secret", {}, b"{}", hook)).status == 204


async def fetch(url: str, tracer: Tracer) -> None:
    client = ArtifactClient(url, max_bytes=1_000_000, on_call=_ignore, tracer=tracer)
    artifact = Artifact(ArtifactName.IMAGE, f"{url}/files/secret-path.png?signature=secret")
    async with client.fetch(ACCOUNT, artifact, RangeRequest()) as fetched:
        assert [chunk async for chunk in fetched.chunks]


@contextmanager
def record_request(recorder: SpanRecorder) -> Iterator[list[RecordedSpan]]:
    """Record a request; the list has the spans of its calls after the block."""
    calls: list[RecordedSpan] = []
    with tracing.start_request_span(recorder.tracer, make_http_scope()):
        yield calls
    *calls[:], request = recorder.spans
    assert {(call.parent_id, call.trace_id, call.kind) for call in calls} == {
        (request.span_id, request.trace_id, "client")
    }
    assert "secret" not in str(recorder.spans)
    assert USER_KEY not in str(recorder.spans)


async def test_submit() -> None:
    """A submit is recorded as a request to the upstream, without trace headers."""
    recorder = SpanRecorder()
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer:
        with record_request(recorder) as calls:
            await submit(peer.url, recorder.tracer)
    assert [(call.name, call.is_error) for call in calls] == [("POST /api/submit_face_enhance_task", False)]
    assert calls[0].attributes == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "127.0.0.1",
        "server.port": int(peer.url.rpartition(":")[2]),
        "url.full": f"{peer.url}/api/submit_face_enhance_task",
    }
    assert b"\r\ntrace" not in peer.requests[0][0].lower()


@pytest.mark.parametrize(
    ("serve", "attributes"),
    [
        (reply_with(http_response(b"", 404)), {"http.response.status_code": 404, "error.type": "404"}),
        (reset_after_request, {"error.type": "httpx2.ReadError"}),
        (never_reply, {"error.type": "TimeoutError"}),
        (None, {"error.type": "httpx2.ConnectError"}),
    ],
)
async def test_failures(serve: Handler | None, attributes: Mapping[str, Any]) -> None:
    """A failed call records a status or an error type, without its message."""
    recorder = SpanRecorder()
    async with run_server(serve or never_reply) as peer:
        with record_request(recorder) as calls:
            url = peer.url if serve else f"http://127.0.0.1:{reserve_port()}"
            await submit(url, recorder.tracer, seconds=0.2 if serve is never_reply else 10)
    (span,) = calls
    assert (span.is_error, span.status_message, span.event_count) == (True, "", 0)
    assert {name: span.attributes.get(name) for name in attributes} == attributes


async def test_webhook() -> None:
    """A webhook carries the trace context, if recorded; only the host of its URL is recorded."""
    recorder = SpanRecorder()
    async with run_server(reply_with(http_response(b"", 204))) as peer:
        await send_webhook(peer.url, recorder.tracer)
        assert recorder.spans == []
        with record_request(recorder) as calls:
            await send_webhook(peer.url, recorder.tracer)
    (span,) = calls
    assert (span.name, span.attributes["url.full"]) == ("POST", f"{peer.url}/REDACTED")
    first, second = [head.lower() for head, _ in peer.requests]
    assert b"traceparent" not in first
    assert f"\r\ntraceparent: {span.traceparent}-03\r\n".encode() in second


async def test_artifacts() -> None:
    """Each hop to an artifact is recorded by its host, without trace headers."""
    recorder = SpanRecorder()
    async with run_server(send_pieces(file_response())) as server:
        moved = send_pieces(response_head(302, Location=f"{server.url}/secret-path", Content_Length="0"))
        async with run_server(moved) as here:
            with record_request(recorder) as calls:
                await fetch(here.url, recorder.tracer)
    keys = "url.full", "http.response.status_code", "http.request.resend_count"
    assert [[call.attributes.get(key) for key in keys] for call in calls] == [
        [f"{here.url}/REDACTED", 302, None],
        [f"{server.url}/REDACTED", 200, 1],
    ]
    assert not [head for head, _ in (*here.requests, *server.requests) if b"\r\ntrace" in head.lower()]


async def test_work_after_the_request() -> None:
    """Work that continues after its request has ended is recorded as part of it."""
    recorder, go = SpanRecorder(), asyncio.Event()

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


async def test_follow_up() -> None:
    """Later work has a trace of its own with a link to its cause, whatever the sampling ratio."""
    recorder, none = SpanRecorder(), SpanRecorder(share=0.0)
    with tracing.start_request_span(recorder.tracer, make_http_scope()):
        cause = tracing.trace_headers().get("traceparent")
    request = recorder.span
    for context in (cause, None, "00-nothing"):
        with tracing.start_linked_span(none.tracer, "check task", context, "r1"):
            pass
    work = none.span
    assert (work.name, work.kind, work.parent_id) == ("check task", "internal", "")
    assert work.links == [(request.trace_id, request.span_id)]
    assert work.attributes == {"gateway.reservation": "r1"}
    assert work.trace_id != request.trace_id


async def test_redis(valkey: Valkey) -> None:
    """Scripts and plain commands are recorded by their names or number, without keys and arguments."""
    recorder = SpanRecorder()
    async with Redis.from_url(valkey.url) as client:
        scripts = RedisScripts(client, tracer=recorder.tracer)
        await scripts.call("reopen", ["clock", "secret-key"], account=77_777)
        with record_request(recorder) as calls:
            await scripts.call("reopen", ["clock", "secret-key"], account=77_777)
            await scripts.read(("GET", "other-secret"))
            await scripts.read(("GET", "other-secret"), ("TIME",))
    script, one, two = calls
    assert (script.name, script.is_error) == ("EVALSHA reopen", False)
    assert script.attributes == {
        "db.system.name": "redis",
        "db.operation.name": "EVALSHA",
        "db.stored_procedure.name": "reopen",
    }
    assert (one.name, one.attributes) == ("GET", {"db.system.name": "redis", "db.operation.name": "GET"})
    assert (two.name, two.attributes["db.operation.batch.size"]) == ("PIPELINE", 2)


async def test_redis_unavailable() -> None:
    """The error recorded is the client's own, not the one that callers get."""
    recorder = SpanRecorder()
    async with Redis.from_url(f"redis://127.0.0.1:{reserve_port()}") as client:
        with record_request(recorder) as calls, suppress(LedgerUnavailable):
            await RedisScripts(client, tracer=recorder.tracer).call("reopen", ["clock", "account"], account=1)
    (span,) = calls
    assert (span.is_error, span.attributes["error.type"]) == (True, "redis.exceptions.ConnectionError")


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
