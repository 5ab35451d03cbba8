"""Clients that wait for a task: `Prefer: wait` on reads and submissions, and the event stream."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest
from structlog.testing import capture_logs

from service.api import tasks
from service.api.uploads import Upload
from service.usecases import task_status
from service.usecases.ports import CheckOutcome
from service.usecases.task_status import TenantSlots
from tests.behaviour.clients import Event, open_event_stream, poll_with_outcome, start_waiting_read, wait_until
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import KEY, expect_problem, expect_replayed

RUNNING, SUCCEEDED = CheckOutcome.RUNNING, CheckOutcome.SUCCEEDED
PREFER = {"Prefer": "wait=60"}


@pytest.fixture
async def task(gateway: RunningGateway) -> dict[str, Any]:
    task: dict[str, Any] = (await gateway.submit()).json()
    return task


async def wait_for_subscriptions(gateway: RunningGateway, number: int) -> None:
    await wait_until(lambda: gateway.services.task_cache.subscription_count == number)


@pytest.mark.smoke
async def test_end_wakes_the_waiting_read(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task["links"]["self"])
    await poll_with_outcome(gateway, RUNNING)
    assert not reading.done()
    assert "gateway_waiting_clients 1.0" in (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    await poll_with_outcome(gateway, SUCCEEDED)
    response = await reading
    assert (response.status_code, response.json()["state"]) == (200, "succeeded")
    assert response.headers["preference-applied"] == "wait=60"
    assert "retry-after" not in response.headers
    assert response.json() == (await gateway.call("GET", task["links"]["self"])).json()
    assert gateway.services.task_cache.subscription_count == 0
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for name in ("stream", "request"):  # a wait is no slow request
        labels = '{method="GET",port="tenants",route="/v1/tasks/{task_id}"}'
        assert f"gateway_http_{name}_duration_seconds_count{labels} 1.0" in metrics
    async with asyncio.timeout(20):
        at_once = await gateway.call("GET", task["links"]["self"], headers=PREFER)
    assert (at_once.json(), at_once.headers["preference-applied"]) == (response.json(), "wait=60")


async def test_timeout_returns_the_current_state(gateway: RunningGateway, task: dict[str, Any]) -> None:
    await poll_with_outcome(gateway, RUNNING)
    tag = (await gateway.call("GET", task["links"]["self"])).headers["etag"]
    readings = [
        await start_waiting_read(gateway, task["links"]["self"], 1),
        await start_waiting_read(gateway, task["links"]["self"], 1, if_none_match=tag),
    ]
    response, unchanged = await asyncio.gather(*readings)
    assert (response.status_code, response.json()["state"]) == (200, "running")
    assert int(response.headers["retry-after"]) > 0
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    for answer in (response, unchanged):
        assert (answer.headers["preference-applied"], answer.headers["etag"]) == ("wait=1", tag)


async def test_waiting_submission_and_replay_return_the_end(gateway: RunningGateway) -> None:
    key = {"Idempotency-Key": KEY}
    submitting = asyncio.create_task(gateway.submit(headers=key | PREFER))
    await wait_for_subscriptions(gateway, 1)
    repeating = asyncio.create_task(gateway.submit(headers=key | PREFER))
    await wait_for_subscriptions(gateway, 2)
    assert (await gateway.submit(headers=key)).json()["state"] == "queued"
    gc.collect()
    assert not [item for item in gc.get_objects() if type(item) is Upload]  # the image is not kept meanwhile
    await poll_with_outcome(gateway, SUCCEEDED)
    response = await submitting
    assert expect_replayed(await repeating, response.json()) == response.json()
    task = response.json()
    assert (response.status_code, task["state"]) == (201, "succeeded")
    assert response.headers["location"] == task["links"]["self"]
    assert response.headers["preference-applied"] == "wait=60"
    assert response.headers["etag"] == (await gateway.call("GET", task["links"]["self"])).headers["etag"]
    assert not {"retry-after", "age"} & response.headers.keys()


async def test_disconnect_releases_the_subscription(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task["links"]["self"])
    submitting = asyncio.create_task(gateway.submit(headers=PREFER))
    async with open_event_stream(gateway, task) as stream:
        await stream.next_event()
        await wait_for_subscriptions(gateway, 3)
    for call in (reading, submitting):
        call.cancel()
    await asyncio.gather(reading, submitting, return_exceptions=True)
    await wait_for_subscriptions(gateway, 0)


async def test_waits_beyond_the_limit(gateway: RunningGateway, task: dict[str, Any]) -> None:
    gateway.services.task_reader.waits = TenantSlots(1)
    reading = await start_waiting_read(gateway, task["links"]["self"])
    for path in (task["links"]["self"], task["links"]["events"]):
        refused = await gateway.call("GET", path, headers=PREFER)
        expect_problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
    accepted = await gateway.submit(headers=PREFER)
    assert (accepted.status_code, accepted.json()["state"]) == (201, "queued")
    assert "preference-applied" not in accepted.headers
    assert (await gateway.call("GET", task["links"]["self"])).status_code == 200
    await poll_with_outcome(gateway, SUCCEEDED)
    assert (await reading).json()["state"] == "succeeded"


@pytest.mark.parametrize(
    ("change", "body", "problem"),
    [
        ("DELETE /tenants/shop/tokens/{token}", None, (401, "unauthenticated")),
        ("DELETE /tenants/shop/tokens/{token}?grace=0.2", None, (401, "unauthenticated")),
        ("POST /tenants/shop/revoke-all", None, (401, "unauthenticated")),
        ("PATCH /tenants/shop", {"state": "disabled"}, (403, "tenant-disabled")),
        ("DELETE /tenants/shop?force=true", None, (401, "unauthenticated")),
    ],
)
async def test_lost_access_ends_all_waits(
    gateway: RunningGateway, task: dict[str, Any], change: str, body: Any, problem: tuple[int, str]
) -> None:
    """A submission, which may have been charged, is answered with its task; a stream ends without an event."""
    submitting = asyncio.create_task(gateway.submit(headers=PREFER))
    await wait_for_subscriptions(gateway, 1)
    reading = await start_waiting_read(gateway, task["links"]["self"])
    (token,) = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
    with capture_logs() as logs:
        async with open_event_stream(gateway, task) as stream, asyncio.timeout(20):
            await stream.next_event()
            await gateway.call_admin("PATCH", "/accounts/main", json={"note": "Another change."})
            assert not reading.done()
            await gateway.call_admin(*change.format(token=token["id"]).split(), json=body)
            assert await stream.read_remaining() == []
        expect_problem(await reading, *problem)
        accepted = await submitting
    assert (accepted.status_code, accepted.json()["state"]) == (201, "queued")
    outcomes = {log["status"]: log["outcome"] for log in logs if log.get("tenant") == "shop" and "status" in log}
    assert outcomes == {201: "answered", problem[0]: problem[1], 200: problem[1]}
    await wait_for_subscriptions(gateway, 0)


async def test_unauthorized_waits_are_refused_at_once(gateway: RunningGateway, task: dict[str, Any]) -> None:
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    for path in (task["links"]["self"], task["links"]["events"]):
        for token, status in ((other, 404), ("", 401)):
            response = await gateway.call("GET", path, token=token, headers=PREFER | {"Last-Event-ID": "3-succeeded"})
            assert response.status_code == status
    head = await gateway.call("HEAD", task["links"]["events"])
    assert (head.status_code, head.headers["content-type"], head.content) == (200, "text/event-stream", b"")
    await wait_for_subscriptions(gateway, 0)


async def test_stream_sends_each_change_until_the_end(gateway: RunningGateway, task: dict[str, Any]) -> None:
    assert task["links"]["events"] == f"/v1/tasks/{task['id']}/events"
    async with open_event_stream(gateway, task) as stream:
        headers = stream.response.headers
        assert (stream.response.status_code, headers["content-type"]) == (200, "text/event-stream")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
        assert "content-length" not in headers
        assert await stream.next_event() == Event("state", "1-queued", task)
        assert stream.retry_ms in range(1_000, 3_000)
        for outcome, event_id in ((RUNNING, "2-running"), (SUCCEEDED, "3-succeeded")):
            await poll_with_outcome(gateway, outcome)
            shown = (await gateway.call("GET", task["links"]["self"])).json()
            assert await stream.next_event() == Event("state", event_id, shown)
        assert await stream.read_remaining() == []
    assert gateway.services.task_cache.subscription_count == 0


async def test_last_event_id_resumes_the_stream(gateway: RunningGateway, task: dict[str, Any]) -> None:
    for unknown in ("", "1-queued-", "9" * 400 + "-succeeded"):
        async with open_event_stream(gateway, task, unknown) as stream:
            assert (await stream.next_event()).id == "1-queued"
    await poll_with_outcome(gateway, RUNNING)
    async with open_event_stream(gateway, task, "1-queued") as stream:
        assert (await stream.next_event()).id == "2-running"
    async with (
        open_event_stream(gateway, task, "2-running") as stream,
        open_event_stream(gateway, task, "7-running") as ahead,  # from before the store was restored
    ):
        await stream.wait_for_comment()
        await ahead.wait_for_comment()
        await poll_with_outcome(gateway, SUCCEEDED)
        (last,) = await stream.read_remaining()
        assert await ahead.read_remaining() == [last]
    assert last.task["state"] == "succeeded"
    async with open_event_stream(gateway, task, last.id) as stream:  # an EventSource stops reconnecting after 204
        assert (stream.response.status_code, stream.response.headers["cache-control"]) == (204, "no-store")
        assert await stream.read_remaining() == []


async def test_heartbeat_and_longest_duration(
    gateway: RunningGateway, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_status, "HEARTBEAT_SECONDS", 0.01)
    async with open_event_stream(gateway, task, "1-queued") as stream:
        for _ in range(3):
            await stream.wait_for_comment()
    monkeypatch.setattr(tasks, "MAX_STREAM_SECONDS", 0.05)
    async with open_event_stream(gateway, task) as stream:
        assert [event.id for event in await stream.read_remaining()] == ["1-queued"]
    await wait_for_subscriptions(gateway, 0)
