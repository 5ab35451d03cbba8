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
async def task(house: RunningGateway) -> dict[str, Any]:
    task: dict[str, Any] = (await house.submit()).json()
    return task


def task_path(task: dict[str, Any]) -> str:
    found: str = task["links"]["self"]
    return found


async def test_end_wakes_the_waiting_read(house: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(house, task_path(task))
    await poll_with_outcomes(house, RUNNING)
    assert not reading.done()
    await poll_with_outcomes(house, SUCCEEDED)
    answer = await reading
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["preference-applied"] == "wait=60"
    assert "retry-after" not in answer.headers
    assert answer.json() == (await house.call("GET", task_path(task))).json()
    assert house.services.task_cache.subscription_count == 0


async def test_finished_task_is_returned_at_once(house: RunningGateway, task: dict[str, Any]) -> None:
    await poll_with_outcomes(house, SUCCEEDED)
    async with asyncio.timeout(20):
        answer = await house.call("GET", task_path(task), headers=PREFERS)
    assert answer.json()["state"] == "succeeded"
    assert answer.headers["preference-applied"] == "wait=60"


async def test_timeout_returns_the_current_state(house: RunningGateway, task: dict[str, Any]) -> None:
    await poll_with_outcomes(house, RUNNING)
    tag = (await house.call("GET", task_path(task))).headers["etag"]
    reading = await start_waiting_read(house, task_path(task), 1)
    answer = await reading
    assert (answer.status_code, answer.json()["state"]) == (200, "running")
    assert answer.headers["preference-applied"] == "wait=1"
    assert answer.headers["etag"] == tag
    assert int(answer.headers["retry-after"]) > 0


@pytest.mark.parametrize("prefer", ["wait=0", "wait=soon", "respond-async"])
async def test_other_preferences_are_ignored(house: RunningGateway, task: dict[str, Any], prefer: str) -> None:
    answer = await house.call("GET", task_path(task), headers={"Prefer": prefer})
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    assert "preference-applied" not in answer.headers


async def test_unchanged_task_after_a_wait_is_304(house: RunningGateway, task: dict[str, Any]) -> None:
    tag = (await house.call("GET", task_path(task))).headers["etag"]
    readings = [await start_waiting_read(house, task_path(task), 1, if_none_match=tag) for _ in range(2)]
    for reading in readings:
        answer = await reading
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["preference-applied"] == "wait=1"
    reading = await start_waiting_read(house, task_path(task), if_none_match=tag)
    await poll_with_outcomes(house, SUCCEEDED)
    assert (await reading).status_code == 200


async def test_waiting_submission_returns_the_end(house: RunningGateway) -> None:
    submitting = asyncio.create_task(house.submit(headers=PREFERS))
    await wait_until(lambda: house.services.task_cache.subscription_count == 1)
    await poll_with_outcomes(house, SUCCEEDED)
    answer = await submitting
    task = answer.json()
    assert (answer.status_code, task["state"]) == (201, "succeeded")
    assert answer.headers["location"] == task_path(task)
    assert answer.headers["preference-applied"] == "wait=60"
    assert answer.headers["etag"] == (await house.call("GET", task_path(task))).headers["etag"]
    assert not {"retry-after", "age"} & answer.headers.keys()


async def test_replay_waits_by_its_own_preference(house: RunningGateway) -> None:
    key = {"Idempotency-Key": KEY}
    first = await house.submit(headers=key)
    assert first.json()["state"] == "queued"
    repeating = asyncio.create_task(house.submit(headers=key | PREFERS))
    await wait_until(lambda: house.services.task_cache.subscription_count == 1)
    assert (await house.submit(headers=key)).json()["state"] == "queued"
    await poll_with_outcomes(house, SUCCEEDED)
    answer = await repeating
    assert (answer.status_code, answer.json()["state"]) == (201, "succeeded")
    assert answer.headers["idempotent-replayed"] == "true"
    assert answer.headers["preference-applied"] == "wait=60"


async def test_shutdown_answers_all_waiters(house: RunningGateway, task: dict[str, Any]) -> None:
    readings = [await start_waiting_read(house, task_path(task)) for _ in range(3)]
    house.services.lifecycle.start_draining()
    async with asyncio.timeout(20):
        answers = [*await asyncio.gather(*readings), await house.call("GET", task_path(task), headers=PREFERS)]
    for answer in answers:
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")
        assert answer.headers["preference-applied"] == "wait=60"
        assert answer.headers["retry-after"] == "3"


async def test_disconnect_releases_the_waiter(house: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(house, task_path(task))
    submitting = asyncio.create_task(house.submit(headers=PREFERS))
    await wait_until(lambda: house.services.task_cache.subscription_count == 2)
    for call in (reading, submitting):
        call.cancel()
    await asyncio.gather(reading, submitting, return_exceptions=True)
    await wait_until(lambda: house.services.task_cache.subscription_count == 0)
    assert house.services.task_cache.subscribed_ids() == []


async def test_waits_beyond_the_limit(house: RunningGateway, task: dict[str, Any]) -> None:
    house.services.task_cache._max_subscriptions = 1
    reading = await start_waiting_read(house, task_path(task))
    refused = await house.call("GET", task_path(task), headers=PREFERS)
    expect_problem(refused, 503, "overloaded")
    assert int(refused.headers["retry-after"]) > 0
    accepted = await house.submit(headers=PREFERS)
    assert (accepted.status_code, accepted.json()["state"]) == (201, "queued")
    assert "preference-applied" not in accepted.headers
    assert (await house.call("GET", task_path(task))).status_code == 200
    await poll_with_outcomes(house, SUCCEEDED)
    assert (await reading).json()["state"] == "succeeded"


async def test_tenant_removed_during_a_wait(house: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(house, task_path(task))
    assert (await house.call_admin("DELETE", "/tenants/shop?force=true")).status_code == 204
    await poll_with_outcomes(house, SUCCEEDED)
    assert (await reading).status_code == 200


@pytest.mark.parametrize("head", [False, True])
async def test_unauthorized_wait_is_refused_at_once(house: RunningGateway, task: dict[str, Any], head: bool) -> None:
    await house.put_tenant("other")
    method = "HEAD" if head else "GET"
    async with asyncio.timeout(20):
        other = await house.call(method, task_path(task), token=await house.new_token("other"), headers=PREFERS)
        nobody = await house.call(method, task_path(task), token="", headers=PREFERS)
    assert (other.status_code, nobody.status_code) == (404, 401)


async def test_waits_are_counted_separately(house: RunningGateway, task: dict[str, Any]) -> None:
    reading = await start_waiting_read(house, task_path(task))
    assert "gateway_waiting_clients 1.0" in (await house.http.get(f"{house.ops_url}/metrics")).text
    await poll_with_outcomes(house, SUCCEEDED)
    await reading
    await house.call("GET", task_path(task))
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    labels = '{method="GET",port="tenants",route="/v1/tasks/{task_id}"}'
    for name in ("gateway_http_stream_duration_seconds", "gateway_http_request_duration_seconds"):
        assert f"{name}_count{labels} 1.0" in metrics
    assert "gateway_waiting_clients 0.0" in metrics


async def test_waiting_submission_releases_the_image() -> None:
    async with run_fake_gateway() as (house, _, upstream):
        submitting = asyncio.create_task(house.submit(image=make_png(), headers=PREFERS))
        await wait_until(lambda: house.services.task_cache.subscription_count == 1)
        upstream.submits.clear()
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Upload]
        await poll_with_outcomes(house, SUCCEEDED)
        assert (await submitting).status_code == 201


async def test_wait_survives_an_outage_of_the_store() -> None:
    async with run_fake_gateway() as (house, ledger, _):
        task = (await house.submit()).json()
        reading = await start_waiting_read(house, task_path(task))
        in_vain = await start_waiting_read(house, task_path(task), 1)
        ledger.is_unavailable = True
        answer = await in_vain
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")
        assert answer.headers["preference-applied"] == "wait=1"
        assert not reading.done()
        ledger.is_unavailable = False
        await poll_with_outcomes(house, SUCCEEDED)
        assert (await reading).json()["state"] == "succeeded"


async def test_lost_task_ends_the_wait() -> None:
    async with run_fake_gateway() as (house, ledger, _):
        task = (await house.submit()).json()
        reading = await start_waiting_read(house, task_path(task), 1)
        board = house.services.task_cache
        await wait_until(lambda: all(map(board.latest, board.subscribed_ids())))  # it has seen what is about to vanish
        for kept in (ledger.tasks, ledger.reservations, ledger.due_checks, ledger.tenants):
            kept.clear()
        answer = await reading
        assert (answer.status_code, answer.json()["state"]) == (200, "queued")
