"""`Prefer: wait` on reads and submissions."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from service.api.uploads import Upload
from service.usecases.ports import CheckOutcome
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.behaviour.idempotent_requests import KEY
from tests.behaviour.task_readers import poll_with_outcomes, start_waiting_read, wait_until
from tests.support.images import make_png

RUNNING, SUCCEEDED = CheckOutcome.RUNNING, CheckOutcome.SUCCEEDED
PREFERS = {"Prefer": "wait=60"}


@pytest.fixture
async def task(gateway: RunningGateway) -> dict[str, Any]:
    task: dict[str, Any] = (await gateway.submit()).json()
    return task


def task_path(task: dict[str, Any]) -> str:
    path: str = task["links"]["self"]
    return path


async def test_end_wakes_the_waiting_read(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task_path(task))
    await poll_with_outcomes(gateway, RUNNING)
    assert not reading.done()
    await poll_with_outcomes(gateway, SUCCEEDED)
    response = await reading
    assert (response.status_code, response.json()["state"]) == (200, "succeeded")
    assert response.headers["preference-applied"] == "wait=60"
    assert "retry-after" not in response.headers
    assert response.json() == (await gateway.call("GET", task_path(task))).json()
    assert gateway.services.task_cache.subscription_count == 0


async def test_finished_task_is_returned_at_once(gateway: RunningGateway, task: dict[str, Any]) -> None:
    await poll_with_outcomes(gateway, SUCCEEDED)
    async with asyncio.timeout(20):
        response = await gateway.call("GET", task_path(task), headers=PREFERS)
    assert response.json()["state"] == "succeeded"
    assert response.headers["preference-applied"] == "wait=60"


async def test_timeout_returns_the_current_state(gateway: RunningGateway, task: dict[str, Any]) -> None:
    await poll_with_outcomes(gateway, RUNNING)
    tag = (await gateway.call("GET", task_path(task))).headers["etag"]
    reading = await start_waiting_read(gateway, task_path(task), 1)
    response = await reading
    assert (response.status_code, response.json()["state"]) == (200, "running")
    assert response.headers["preference-applied"] == "wait=1"
    assert response.headers["etag"] == tag
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("prefer", ["wait=0", "wait=soon", "respond-async"])
async def test_other_preferences_are_ignored(gateway: RunningGateway, task: dict[str, Any], prefer: str) -> None:
    response = await gateway.call("GET", task_path(task), headers={"Prefer": prefer})
    assert (response.status_code, response.json()["state"]) == (200, "queued")
    assert "preference-applied" not in response.headers


async def test_unchanged_task_after_a_wait_is_304(gateway: RunningGateway, task: dict[str, Any]) -> None:
    tag = (await gateway.call("GET", task_path(task))).headers["etag"]
    readings = [await start_waiting_read(gateway, task_path(task), 1, if_none_match=tag) for _ in range(2)]
    for reading in readings:
        response = await reading
        assert (response.status_code, response.content) == (304, b"")
        assert response.headers["preference-applied"] == "wait=1"
    reading = await start_waiting_read(gateway, task_path(task), if_none_match=tag)
    await poll_with_outcomes(gateway, SUCCEEDED)
    assert (await reading).status_code == 200


async def test_waiting_submission_returns_the_end(gateway: RunningGateway) -> None:
    submitting = asyncio.create_task(gateway.submit(headers=PREFERS))
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 1)
    await poll_with_outcomes(gateway, SUCCEEDED)
    response = await submitting
    task = response.json()
    assert (response.status_code, task["state"]) == (201, "succeeded")
    assert response.headers["location"] == task_path(task)
    assert response.headers["preference-applied"] == "wait=60"
    assert response.headers["etag"] == (await gateway.call("GET", task_path(task))).headers["etag"]
    assert not {"retry-after", "age"} & response.headers.keys()


async def test_replay_waits_by_its_own_preference(gateway: RunningGateway) -> None:
    key = {"Idempotency-Key": KEY}
    first = await gateway.submit(headers=key)
    assert first.json()["state"] == "queued"
    repeating = asyncio.create_task(gateway.submit(headers=key | PREFERS))
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 1)
    assert (await gateway.submit(headers=key)).json()["state"] == "queued"
    await poll_with_outcomes(gateway, SUCCEEDED)
    response = await repeating
    assert (response.status_code, response.json()["state"]) == (201, "succeeded")
    assert response.headers["idempotent-replayed"] == "true"
    assert response.headers["preference-applied"] == "wait=60"


async def test_shutdown_answers_all_waiters(gateway: RunningGateway, task: dict[str, Any]) -> None:
    readings = [await start_waiting_read(gateway, task_path(task)) for _ in range(3)]
    gateway.services.start_draining()
    async with asyncio.timeout(20):
        responses = [*await asyncio.gather(*readings), await gateway.call("GET", task_path(task), headers=PREFERS)]
    for response in responses:
        assert (response.status_code, response.json()["state"]) == (200, "queued")
        assert response.headers["preference-applied"] == "wait=60"
        assert response.headers["retry-after"] == "3"


async def test_disconnect_releases_the_waiter(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task_path(task))
    submitting = asyncio.create_task(gateway.submit(headers=PREFERS))
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 2)
    for call in (reading, submitting):
        call.cancel()
    await asyncio.gather(reading, submitting, return_exceptions=True)
    await wait_until(lambda: gateway.services.task_cache.subscription_count == 0)
    assert gateway.services.task_cache.subscribed_ids() == []


async def test_waits_beyond_the_limit(gateway: RunningGateway, task: dict[str, Any]) -> None:
    gateway.services.task_cache._max_subscriptions = 1
    reading = await start_waiting_read(gateway, task_path(task))
    refused = await gateway.call("GET", task_path(task), headers=PREFERS)
    expect_problem(refused, 503, "overloaded")
    assert int(refused.headers["retry-after"]) > 0
    accepted = await gateway.submit(headers=PREFERS)
    assert (accepted.status_code, accepted.json()["state"]) == (201, "queued")
    assert "preference-applied" not in accepted.headers
    assert (await gateway.call("GET", task_path(task))).status_code == 200
    await poll_with_outcomes(gateway, SUCCEEDED)
    assert (await reading).json()["state"] == "succeeded"


async def test_tenant_removed_during_a_wait(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task_path(task))
    assert (await gateway.call_admin("DELETE", "/tenants/shop?force=true")).status_code == 204
    await poll_with_outcomes(gateway, SUCCEEDED)
    assert (await reading).status_code == 200


@pytest.mark.parametrize("head", [False, True])
async def test_unauthorized_wait_is_refused_at_once(gateway: RunningGateway, task: dict[str, Any], head: bool) -> None:
    await gateway.put_tenant("other")
    method = "HEAD" if head else "GET"
    async with asyncio.timeout(20):
        other = await gateway.call(method, task_path(task), token=await gateway.new_token("other"), headers=PREFERS)
        anonymous = await gateway.call(method, task_path(task), token="", headers=PREFERS)
    assert (other.status_code, anonymous.status_code) == (404, 401)


async def test_waits_are_counted_separately(gateway: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(gateway, task_path(task))
    assert "gateway_waiting_clients 1.0" in (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    await poll_with_outcomes(gateway, SUCCEEDED)
    await reading
    await gateway.call("GET", task_path(task))
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    labels = '{method="GET",port="tenants",route="/v1/tasks/{task_id}"}'
    for name in ("gateway_http_stream_duration_seconds", "gateway_http_request_duration_seconds"):
        assert f"{name}_count{labels} 1.0" in metrics
    assert "gateway_waiting_clients 0.0" in metrics


async def test_waiting_submission_releases_the_image() -> None:
    async with run_fake_gateway() as (gateway, _, upstream):
        submitting = asyncio.create_task(gateway.submit(image=make_png(), headers=PREFERS))
        await wait_until(lambda: gateway.services.task_cache.subscription_count == 1)
        upstream.submits.clear()
        gc.collect()
        assert not [item for item in gc.get_objects() if type(item) is Upload]
        await poll_with_outcomes(gateway, SUCCEEDED)
        assert (await submitting).status_code == 201


async def test_wait_survives_an_outage_of_the_store() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        task = (await gateway.submit()).json()
        reading = await start_waiting_read(gateway, task_path(task))
        in_vain = await start_waiting_read(gateway, task_path(task), 1)
        ledger.is_unavailable = True
        response = await in_vain
        assert (response.status_code, response.json()["state"]) == (200, "queued")
        assert response.headers["preference-applied"] == "wait=1"
        assert not reading.done()
        ledger.is_unavailable = False
        await poll_with_outcomes(gateway, SUCCEEDED)
        assert (await reading).json()["state"] == "succeeded"


async def test_lost_task_ends_the_wait() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        task = (await gateway.submit()).json()
        reading = await start_waiting_read(gateway, task_path(task), 1)
        cache = gateway.services.task_cache
        await wait_until(lambda: all(map(cache.latest, cache.subscribed_ids())))  # it has seen what is about to vanish
        for kept in (ledger.tasks, ledger.reservations, ledger.due_checks, ledger.tenants):
            kept.clear()
        response = await reading
        assert (response.status_code, response.json()["state"]) == (200, "queued")
