"""The event stream of a task."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from service.api import tasks
from service.usecases import task_status
from service.usecases.ports import CheckOutcome, CheckResult
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.task_readers import open_event_stream, poll_with_outcomes, wait_until

RUNNING, SUCCEEDED, FAILED = CheckOutcome.RUNNING, CheckOutcome.SUCCEEDED, CheckOutcome.FAILED


@pytest.fixture
async def task(gateway: RunningGateway) -> dict[str, Any]:
    task: dict[str, Any] = (await gateway.submit()).json()
    return task


async def read_task(gateway: RunningGateway, task: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = (await gateway.call("GET", task["links"]["self"])).json()
    return content


@pytest.mark.parametrize("ended", [SUCCEEDED, FAILED])
async def test_stream_sends_each_change_until_the_end(
    gateway: RunningGateway, task: dict[str, Any], ended: CheckOutcome
) -> None:
    assert task["links"]["events"] == f"/v1/tasks/{task['id']}/events"
    async with open_event_stream(gateway, task) as stream:
        first = await stream.next_event()
        assert first
        assert (first.name, first.id, first.task) == ("state", "1-queued", task)
        events = []
        for answered in (RUNNING, ended):
            await poll_with_outcomes(gateway, answered)
            event = await stream.next_event()
            assert event
            assert event.task == await read_task(gateway, task)
            events.append((event.name, event.id))
        assert events == [("state", "2-running"), ("state", f"3-{ended}")]
        assert await stream.next_event() is None
    assert gateway.services.task_cache.subscription_count == 0


async def test_stream_headers_prevent_buffering(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task) as stream:
        headers = stream.response.headers
        assert (stream.response.status_code, headers["content-type"]) == (200, "text/event-stream")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
        assert headers["x-request-id"]
        assert "content-length" not in headers
        await stream.next_event()
        assert stream.retry_ms in range(1_000, 3_000)


async def test_last_event_id_resumes_the_stream(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task) as stream:
        first = await stream.next_event()
    assert first
    await poll_with_outcomes(gateway, RUNNING)
    async with open_event_stream(gateway, task, first.id) as stream:
        second = await stream.next_event()
        assert second
        assert second.id == "2-running"
    async with open_event_stream(gateway, task, second.id) as stream:
        await stream.wait_for_comment()
        await poll_with_outcomes(gateway, SUCCEEDED)
        (last,) = await stream.read_remaining()
    assert last.task["state"] == "succeeded"
    async with open_event_stream(gateway, task, second.id) as stream:
        assert await stream.read_remaining() == [last]


async def test_final_event_id_is_204(gateway: RunningGateway, task: dict[str, Any]) -> None:
    """An EventSource stops reconnecting after 204."""
    await poll_with_outcomes(gateway, SUCCEEDED)
    async with open_event_stream(gateway, task) as stream:
        (last,) = await stream.read_remaining()
    async with open_event_stream(gateway, task, last.id) as stream:
        assert stream.response.status_code == 204
        assert stream.response.headers["cache-control"] == "no-store"
        assert await stream.read_remaining() == []


@pytest.mark.parametrize("last", ["", "x", "2", "1-queued-", "-1-queued", "1-ended", "9" * 400 + "-succeeded"])
async def test_unknown_event_ids_are_ignored(gateway: RunningGateway, task: dict[str, Any], last: str) -> None:
    async with open_event_stream(gateway, task, last) as stream:
        first = await stream.next_event()
    assert first
    assert first.id == "1-queued"


async def test_event_id_later_than_a_restored_store(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task, "7-running") as stream:
        await stream.wait_for_comment()
        await poll_with_outcomes(gateway, RUNNING, SUCCEEDED)
        assert [event.id for event in await stream.read_remaining()][-1:] == ["3-succeeded"]


async def test_heartbeat(gateway: RunningGateway, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_status, "HEARTBEAT_SECONDS", 0.01)
    async with open_event_stream(gateway, task, "1-queued") as stream:
        for _ in range(5):
            await stream.wait_for_comment()
        await poll_with_outcomes(gateway, SUCCEEDED)
        assert len(await stream.read_remaining()) == 1


async def test_stream_ends_at_its_maximum_duration(
    gateway: RunningGateway, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "MAX_STREAM_SECONDS", 0.05)
    async with open_event_stream(gateway, task) as stream:
        assert [event.id for event in await stream.read_remaining()] == ["1-queued"]
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 0)


async def test_streams_end_at_shutdown(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task) as early, open_event_stream(gateway, task, "1-queued") as resumed:
        assert await early.next_event()
        await resumed.wait_for_comment()
        gateway.services.start_draining()
        assert await early.read_remaining() == await resumed.read_remaining() == []
    async with open_event_stream(gateway, task) as late:
        assert [event.id for event in await late.read_remaining()] == ["1-queued"]
    assert gateway.services.task_cache.subscription_count == 0


async def test_disconnect_releases_the_subscription(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task) as stream:
        await stream.next_event()
        assert gateway.services.task_cache.subscription_count == 1
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 0)
    assert gateway.services.task_cache.subscribed_ids() == []


async def test_revoked_token_ends_the_stream(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with open_event_stream(gateway, task) as stream:
        await stream.next_event()
        tokens = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
        for token in tokens:
            assert (await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{token['id']}")).status_code == 204
        await poll_with_outcomes(gateway, SUCCEEDED)
        assert await stream.read_remaining() == []


async def test_problems_precede_the_stream(gateway: RunningGateway, task: dict[str, Any]) -> None:
    path = task["links"]["events"]
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    expect_problem(await gateway.call("GET", path, token=""), 401, "unauthenticated")
    expect_problem(await gateway.call("GET", path, token=other), 404, "not-found")
    expect_problem(
        await gateway.call("GET", path, token=other, headers={"Last-Event-ID": "3-succeeded"}), 404, "not-found"
    )
    expect_problem(await gateway.call("GET", "/v1/tasks/task_x/events"), 404, "not-found")
    expect_problem(await gateway.call("POST", path), 405, "method-not-allowed")


async def test_streams_beyond_the_limit_are_refused(gateway: RunningGateway, task: dict[str, Any]) -> None:
    gateway.services.task_cache._max_subscriptions = 1
    async with open_event_stream(gateway, task) as stream:
        await stream.next_event()
        refused = await gateway.call("GET", task["links"]["events"])
        expect_problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0


async def test_head_opens_no_stream(gateway: RunningGateway, task: dict[str, Any]) -> None:
    async with asyncio.timeout(20):
        response = await gateway.call("HEAD", task["links"]["events"])
    assert (response.status_code, response.headers["content-type"], response.content) == (200, "text/event-stream", b"")
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 0)
    assert (await gateway.call("HEAD", task["links"]["events"], token="")).status_code == 401


async def test_stream_is_logged_once_at_its_end(gateway: RunningGateway, task: dict[str, Any]) -> None:
    with structlog.testing.capture_logs() as lines:
        async with open_event_stream(gateway, task) as stream:
            await stream.next_event()
            assert not [line for line in lines if line["event"] == "request.ended"]
            await poll_with_outcomes(gateway, SUCCEEDED)
            await stream.read_remaining()
        async with open_event_stream(gateway, {"links": {"events": task["links"]["events"]}}) as stream:
            await stream.read_remaining()
        await wait_until(lambda: len([line for line in lines if line["event"] == "request.ended"]) == 2)
    ended_requests = [line for line in lines if line["event"] == "request.ended"]
    route = "/v1/tasks/{task_id}/events"
    assert {(line["route"], line["status"], line["outcome"]) for line in ended_requests} == {(route, 200, "answered")}
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    labels = f'{{method="GET",port="tenants",route="{route}"}}'
    assert f"gateway_http_stream_duration_seconds_count{labels} 2.0" in metrics
    assert f"gateway_http_request_duration_seconds_count{labels}" not in metrics


async def test_stream_survives_an_outage_of_the_store() -> None:
    async with run_fake_gateway() as (gateway, ledger, upstream):
        task = (await gateway.submit()).json()
        async with open_event_stream(gateway, task) as stream:
            await stream.next_event()
            ledger.is_unavailable = True
            await gateway.advance(10)
            upstream.next_checks += [CheckResult(outcome=CheckOutcome.NO_RESPONSE)] * 2
            expect_problem(await gateway.call("GET", task["links"]["events"]), 503, "upstream-unavailable")
            ledger.is_unavailable = False
            await poll_with_outcomes(gateway, SUCCEEDED)
            assert [event.id for event in await stream.read_remaining()] == ["2-succeeded"]
