"""Spans of outgoing calls, and the trace context that these send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from redis.asyncio import Redis

from service.clients.upstream import UpstreamClient
from service.clients.webhooks import WebhookClient
from service.domain.errors import LedgerUnavailable
from service.domain.tasks import DEFAULT_CATALOGUE, FaceEnhanceOptions
from service.domain.tenants import Webhook
from service.storage.redis import RedisScripts
from service.telemetry import tracing
from tests.contract.client import ACCOUNT, CIPHER, IMAGE, USER_KEY, make_fetcher
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Handler,
    file_response,
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
        (reset_after_request, {"error.type": "httpx2.ReadError"}),
        (never_reply, {"error.type": "TimeoutError"}),
    ],
)
async def test_submit(serve: Handler, attributes: Mapping[str, Any], recorder: SpanRecorder) -> None:
    async with (
        run_server(serve) as peer,
        UpstreamClient(peer.url, CIPHER, DEFAULT_CATALOGUE, on_call=lambda *_: None, tracer=recorder.tracer) as client,
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
        hook = Webhook(peer.url, ("127.0.0.0/8",))
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
