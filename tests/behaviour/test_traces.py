"""Traces of a submission from the request to the webhook."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.telemetry.redaction import Redactor
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, run_real_gateway
from tests.behaviour.test_secrets import KEYS, call_every_operation, encode_secret
from tests.behaviour.upstream_control import USER_KEY
from tests.behaviour.webhook_receiver import make_secret, run_receiver
from tests.support.traces import SPAN, TRACE, TraceCollector, run_collector
from tests.support.valkey import Valkey

CALLER_TRACEPARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "tool=of-the-caller"}


@pytest.fixture
def collector() -> Iterator[TraceCollector]:
    with run_collector() as trace_collector:
        yield trace_collector


async def test_trace_from_submission_to_webhook(valkey: Valkey, collector: TraceCollector) -> None:
    async with (
        run_receiver() as receiver,
        run_real_gateway(valkey, GATEWAY_TRACES_URL=collector.url, GATEWAY_TRACES_SHARE="0") as gateway,
    ):
        await gateway.put_tenant(webhook={"url": receiver.url, "secret": make_secret(), "allow": ["127.0.0.0/8"]})
        submitted = await gateway.submit(headers=CALLER_TRACEPARENT)
        assert submitted.status_code == 201
        task = await gateway.wait_for_task(submitted.json()["id"])
        while await gateway.services.webhook_dispatcher.start_due():
            await gateway.services.webhook_dispatcher.wait_idle()
        result = await gateway.call("GET", task["artifacts"][0]["href"], headers=CALLER_TRACEPARENT)
        assert result.status_code == 200
    request = collector.get_span("POST /v1/tasks/face-enhance")
    assert (request.trace_id, request.parent_id, request.trace_state) == (TRACE, SPAN, "tool=of-the-caller")
    assert request.attributes["gateway.tenant"] == "shop"
    parts = [span for span in collector.spans if span.parent_id == request.span_id]
    assert [span.name for span in parts] == ["EVALSHA reserve", "POST /api/submit_face_enhance_task", "EVALSHA settle"]
    assert {span.trace_id for span in parts} == {TRACE}
    checks = collector.find_spans("check task")
    assert checks
    for check in checks:
        assert check.links == [(TRACE, request.span_id)]
        inner = [span.name for span in collector.spans if span.trace_id == check.trace_id and span != check]
        assert inner == ["POST /api/check_task_status", "EVALSHA record_check"]
    delivery = collector.get_span("deliver webhook")
    assert delivery.links == [(TRACE, request.span_id)]
    (call,) = [span for span in collector.spans if span.parent_id == delivery.span_id]
    (webhook,) = receiver.requests
    assert webhook.headers["traceparent"].startswith(call.traceparent)
    fetched = collector.get_span("GET /v1/tasks/{task_id}/artifacts/{name}")
    assert "GET" in [span.name for span in collector.spans if span.parent_id == fetched.span_id]
    assert [span for span in collector.spans if span.is_error] == []


async def test_unsampled_work_is_not_recorded(valkey: Valkey, collector: TraceCollector) -> None:
    async with (
        run_receiver() as receiver,
        run_real_gateway(valkey, GATEWAY_TRACES_URL=collector.url, GATEWAY_TRACES_SHARE="0") as gateway,
    ):
        await gateway.put_tenant(webhook={"url": receiver.url, "secret": make_secret(), "allow": ["127.0.0.0/8"]})
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
        while await gateway.services.webhook_dispatcher.start_due():
            await gateway.services.webhook_dispatcher.wait_idle()
        assert "traceparent" not in receiver.requests[0].headers
    assert collector.spans == []


async def test_idle_gateway_sends_no_spans(valkey: Valkey, collector: TraceCollector) -> None:
    async with run_real_gateway(valkey, GATEWAY_TRACES_URL=collector.url) as gateway:
        for _ in range(3):
            await gateway.services.task_poller.start_due()
            await gateway.services.webhook_dispatcher.start_due()
            await gateway.services.balance_refresher.refresh_due()
    assert [span.name for span in collector.spans if not span.parent_id] == [
        "PUT /admin/v1/accounts/{name}",
        "PUT /admin/v1/tenants/{name}",
        "POST /admin/v1/tenants/{name}/tokens",
    ]


async def test_no_secret_is_exported(valkey: Valkey, collector: TraceCollector) -> None:
    private = ["a prompt", "order-of-a-customer"]
    redactor = Redactor([ADMIN_TOKEN])
    async with run_real_gateway(valkey, redactor, GATEWAY_TRACES_URL=collector.url) as gateway:
        await gateway.submit("upscale", {"prompt": "a prompt", "metadata": '{"order": "order-of-a-customer"}'})
        await gateway.call("GET", f"/v1/tasks/{gateway.token}")
        await gateway.call("GET", f"/v1/tasks?token={gateway.token}", headers={"User-Agent": f"curl {gateway.token}"})
        await gateway.http.get(f"{gateway.ops_url}/admin/v1/{ADMIN_TOKEN}")
        responses = [item async for item in call_every_operation(gateway)]
        assert responses
        token = gateway.token
    sent = b"".join(collector.bodies)
    assert len(collector.spans) > 40
    for secret in (*KEYS, USER_KEY, token, ADMIN_TOKEN, SECRET_KEY.decode(), *private):
        assert [spelling for spelling in encode_secret(secret) if spelling in sent] == []
