"""A submission can be followed in traces to its end: over the store, the upstream and the tenant's own server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.telemetry.redaction import Redactor
from tests.behaviour.house import ADMIN_TOKEN, SECRET_KEY, real_house
from tests.behaviour.receiver import a_secret, receiving
from tests.behaviour.test_secrets import KEYS, a_busy_day, spellings
from tests.behaviour.upstreams import USER_KEY
from tests.support.traces import Collector, collecting
from tests.support.valkey import Valkey
from tests.unit.test_tracing import SPAN, TRACE

CALLERS = {"traceparent": f"00-{TRACE}-{SPAN}-01", "tracestate": "tool=of-the-caller"}


@pytest.fixture
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


async def test_from_submission_to_delivery(valkey: Valkey, collector: Collector) -> None:
    """A submission is a part of its caller's trace, and its checks and its delivery point back to it."""
    async with (
        receiving() as receiver,
        real_house(valkey, GATEWAY_TRACES_URL=collector.url, GATEWAY_TRACES_SHARE="0") as house,
    ):
        await house.put_tenant(webhook={"url": receiver.url, "secret": a_secret(), "allow": ["127.0.0.0/8"]})
        submitted = await house.submit(headers=CALLERS)
        assert submitted.status_code == 201
        task = await house.finished(submitted.json()["id"])
        while await house.services.deliver.tick():
            await house.services.deliver.settled()
        result = await house.call("GET", task["artifacts"][0]["href"], headers=CALLERS)
        assert result.status_code == 200
    request = collector.one("POST /v1/tasks/face-enhance")
    assert (request.trace, request.parent, request.state) == (TRACE, SPAN, "tool=of-the-caller")
    assert request.attributes["gateway.tenant"] == "shop"
    parts = [span for span in collector.spans if span.parent == request.id]
    assert [span.name for span in parts] == ["EVALSHA reserve", "POST /api/submit_face_enhance_task", "EVALSHA settle"]
    assert {span.trace for span in parts} == {TRACE}
    checks = collector.all("check task")
    assert checks
    for check in checks:
        assert check.links == [(TRACE, request.id)]
        inner = [span.name for span in collector.spans if span.trace == check.trace and span != check]
        assert inner == ["POST /api/check_task_status", "EVALSHA record"]
    delivery = collector.one("deliver webhook")
    assert delivery.links == [(TRACE, request.id)]
    (call,) = [span for span in collector.spans if span.parent == delivery.id]
    (told,) = receiver.told
    assert told.headers["traceparent"].startswith(call.context)
    fetched = collector.one("GET /v1/tasks/{task_id}/artifacts/{name}")
    assert "GET" in [span.name for span in collector.spans if span.parent == fetched.id]
    assert [span for span in collector.spans if span.failed] == []


async def test_what_is_not_traced(valkey: Valkey, collector: Collector) -> None:
    """What follows from a submission that is not recorded is not recorded either, nor what nobody asked for."""
    async with (
        receiving() as receiver,
        real_house(valkey, GATEWAY_TRACES_URL=collector.url, GATEWAY_TRACES_SHARE="0") as house,
    ):
        await house.put_tenant(webhook={"url": receiver.url, "secret": a_secret(), "allow": ["127.0.0.0/8"]})
        await house.finished((await house.submit()).json()["id"])
        while await house.services.deliver.tick():
            await house.services.deliver.settled()
        assert "traceparent" not in receiver.told[0].headers
    assert collector.spans == []


async def test_idle(valkey: Valkey, collector: Collector) -> None:
    """A gateway of which nobody wants anything sends nothing, though it looks for work all the time."""
    async with real_house(valkey, GATEWAY_TRACES_URL=collector.url) as house:
        for _ in range(3):
            await house.services.watch.tick()
            await house.services.deliver.tick()
            await house.services.looks.tick()
    assert [span.name for span in collector.spans if not span.parent] == [
        "PUT /admin/v1/accounts/{name}",
        "PUT /admin/v1/tenants/{name}",
        "POST /admin/v1/tenants/{name}/tokens",
    ]


async def test_nothing_secret(valkey: Valkey, collector: Collector) -> None:
    """No key, token, prompt or label of anybody is sent to the collector, whatever is done and whatever fails."""
    private = ["a prompt", "order-of-a-customer"]
    redactor = Redactor([ADMIN_TOKEN])
    async with real_house(valkey, redactor.learn, redactor.text, GATEWAY_TRACES_URL=collector.url) as house:
        await house.submit("upscale", {"prompt": "a prompt", "metadata": '{"order": "order-of-a-customer"}'})
        await house.call("GET", f"/v1/tasks/{house.token}")
        await house.call("GET", f"/v1/tasks?token={house.token}", headers={"User-Agent": f"curl {house.token}"})
        await house.http.get(f"{house.ops_url}/admin/v1/{ADMIN_TOKEN}")
        answers = [answer async for answer in a_busy_day(house)]
        assert answers
        token = house.token
    sent = b"".join(collector.bodies)
    assert len(collector.spans) > 40
    for secret in (*KEYS, USER_KEY, token, ADMIN_TOKEN, SECRET_KEY.decode(), *private):
        assert [spelling for spelling in spellings(secret) if spelling in sent] == []
