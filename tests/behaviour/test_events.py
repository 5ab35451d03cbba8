"""The events of a task tell each of its changes once, and its stream ends with it, or when nobody reads it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import structlog

from service.api import tasks
from service.usecases import task_status
from service.usecases.ports import Answered, Check
from tests.behaviour.aftermath import problem
from tests.behaviour.following import checked, following, until
from tests.behaviour.house import House, house_of_fakes

RUNNING, SUCCEEDED, FAILED = Answered.RUNNING, Answered.SUCCEEDED, Answered.FAILED


@pytest.fixture
async def task(house: House) -> dict[str, Any]:
    """A task that runs."""
    task: dict[str, Any] = (await house.submit()).json()
    return task


async def read(house: House, task: dict[str, Any]) -> dict[str, Any]:
    """The task as it is read now."""
    found: dict[str, Any] = (await house.call("GET", task["links"]["self"])).json()
    return found


@pytest.mark.parametrize("ended", [SUCCEEDED, FAILED])
async def test_to_the_end(house: House, task: dict[str, Any], ended: Answered) -> None:
    """Each change is told as it is recorded, with the task as it is read then, and the stream ends with the task."""
    assert task["links"]["events"] == f"/v1/tasks/{task['id']}/events"
    async with following(house, task) as stream:
        first = await stream.next()
        assert first
        assert (first.name, first.id, first.task) == ("state", "1-queued", task)
        told = []
        for answered in (RUNNING, ended):
            await checked(house, answered)
            event = await stream.next()
            assert event
            assert event.task == await read(house, task)
            told.append((event.name, event.id))
        assert told == [("state", "2-running"), ("state", f"3-{ended}")]
        assert await stream.next() is None
    assert house.services.board.waiting == 0


async def test_headers(house: House, task: dict[str, Any]) -> None:
    """Nothing between the gateway and the client is to store the stream, or to hold it back."""
    async with following(house, task) as stream:
        headers = stream.answer.headers
        assert (stream.answer.status_code, headers["content-type"]) == (200, "text/event-stream")
        assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-store", "no")
        assert headers["x-request-id"]
        assert "content-length" not in headers
        await stream.next()
        assert stream.retry in range(1_000, 3_000)


async def test_only_what_is_not_known(house: House, task: dict[str, Any]) -> None:
    """Who comes again with the last event it got is told what came after it, and nothing twice."""
    async with following(house, task) as stream:
        first = await stream.next()
    assert first
    await checked(house, RUNNING)
    async with following(house, task, first.id) as stream:
        second = await stream.next()
        assert second
        assert second.id == "2-running"
    async with following(house, task, second.id) as stream:
        await stream.comment()
        await checked(house, SUCCEEDED)
        (last,) = await stream.rest()
    assert last.task["state"] == "succeeded"
    async with following(house, task, second.id) as stream:
        assert await stream.rest() == [last]


async def test_who_knows_the_end(house: House, task: dict[str, Any]) -> None:
    """Who has been told the end is answered with 204, which stops an EventSource; for others it is one event."""
    await checked(house, SUCCEEDED)
    async with following(house, task) as stream:
        (last,) = await stream.rest()
    async with following(house, task, last.id) as stream:
        assert stream.answer.status_code == 204
        assert stream.answer.headers["cache-control"] == "no-store"
        assert await stream.rest() == []


@pytest.mark.parametrize("last", ["", "x", "2", "1-queued-", "-1-queued", "1-ended", "9" * 400 + "-succeeded"])
async def test_ids_that_were_never_given(house: House, task: dict[str, Any], last: str) -> None:
    """An id that no event had is as good as none."""
    async with following(house, task, last) as stream:
        first = await stream.next()
    assert first
    assert first.id == "1-queued"


async def test_a_version_that_is_not_known_here(house: House, task: dict[str, Any]) -> None:
    """Who knows a later version than the ledger, which was restored, is told how the task ends all the same."""
    async with following(house, task, "7-running") as stream:
        await stream.comment()
        await checked(house, RUNNING, SUCCEEDED)
        assert [event.id for event in await stream.rest()][-1:] == ["3-succeeded"]


async def test_heartbeat(house: House, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing changes comments come, so that all between see that the stream lives."""
    monkeypatch.setattr(task_status, "HEARTBEAT_SECONDS", 0.01)
    async with following(house, task, "1-queued") as stream:
        for _ in range(5):
            await stream.comment()
        await checked(house, SUCCEEDED)
        assert len(await stream.rest()) == 1


async def test_no_longer_than_allowed(house: House, task: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream ends by itself after its time, in good order, and its client comes again."""
    monkeypatch.setattr(tasks, "LONGEST_SECONDS", 0.05)
    async with following(house, task) as stream:
        assert [event.id for event in await stream.rest()] == ["1-queued"]
    await until(lambda: house.services.board.waiting == 0)


async def test_the_process_ends(house: House, task: dict[str, Any]) -> None:
    """When the process ends so do all streams, in good order; who comes then is told how things are, no more."""
    async with following(house, task) as early, following(house, task, "1-queued") as known:
        assert await early.next()
        await known.comment()
        house.services.lifecycle.drain()
        assert await early.rest() == await known.rest() == []
    async with following(house, task) as late:
        assert [event.id for event in await late.rest()] == ["1-queued"]
    assert house.services.board.waiting == 0


async def test_who_leaves_is_forgotten(house: House, task: dict[str, Any]) -> None:
    """A client that leaves holds nothing any more."""
    async with following(house, task) as stream:
        await stream.next()
        assert house.services.board.waiting == 1
    await until(lambda: house.services.board.waiting == 0)
    assert house.services.board.watched() == []


async def test_token_revoked_meanwhile(house: House, task: dict[str, Any]) -> None:
    """Whose token is revoked is told no more: neither the next change nor how the task ends."""
    async with following(house, task) as stream:
        await stream.next()
        tokens = (await house.admin("GET", "/tenants/shop")).json()["tokens"]
        for token in tokens:
            assert (await house.admin("DELETE", f"/tenants/shop/tokens/{token['id']}")).status_code == 204
        await checked(house, SUCCEEDED)
        assert await stream.rest() == []


async def test_problems(house: House, task: dict[str, Any]) -> None:
    """What can't be followed is told by a problem as everywhere else, even to who claims to know the end."""
    path = task["links"]["events"]
    await house.put_tenant("other")
    other = await house.new_token("other")
    problem(await house.call("GET", path, token=""), 401, "unauthenticated")
    problem(await house.call("GET", path, token=other), 404, "not-found")
    problem(await house.call("GET", path, token=other, headers={"Last-Event-ID": "3-succeeded"}), 404, "not-found")
    problem(await house.call("GET", "/v1/tasks/task_x/events"), 404, "not-found")
    problem(await house.call("POST", path), 405, "method-not-allowed")


async def test_no_more_than_so_many(house: House, task: dict[str, Any]) -> None:
    """Beyond so many a stream is refused for now, by a problem with the time to come again."""
    house.services.board._most_watchers = 1
    async with following(house, task) as stream:
        await stream.next()
        refused = await house.call("GET", task["links"]["events"])
        problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0


async def test_head(house: House, task: dict[str, Any]) -> None:
    """HEAD is answered like GET, without the stream, and leaves nothing open."""
    async with asyncio.timeout(20):
        answer = await house.call("HEAD", task["links"]["events"])
    assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, "text/event-stream", b"")
    await until(lambda: house.services.board.waiting == 0)
    assert (await house.call("HEAD", task["links"]["events"], token="")).status_code == 401


async def test_one_line_at_its_end(house: House, task: dict[str, Any]) -> None:
    """A stream is logged once, at its end, with how it ended; its time is not mixed with that of other requests."""
    with structlog.testing.capture_logs() as lines:
        async with following(house, task) as stream:
            await stream.next()
            assert not [line for line in lines if line["event"] == "request.ended"]
            await checked(house, SUCCEEDED)
            await stream.rest()
        async with following(house, {"links": {"events": task["links"]["events"]}}) as stream:
            await stream.rest()
        await until(lambda: len([line for line in lines if line["event"] == "request.ended"]) == 2)
    told = [line for line in lines if line["event"] == "request.ended"]
    route = "/v1/tasks/{task_id}/events"
    assert {(line["route"], line["status"], line["outcome"]) for line in told} == {(route, 200, "answered")}
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    labels = f'{{method="GET",port="tenants",route="{route}"}}'
    assert f"gateway_http_held_duration_seconds_count{labels} 2.0" in metrics
    assert f"gateway_http_request_duration_seconds_count{labels}" not in metrics


async def test_the_store_is_away() -> None:
    """A stream outlives a store that goes away; where nobody can tell of a task none begins."""
    async with house_of_fakes() as (house, ledger, upstream):
        task = (await house.submit()).json()
        async with following(house, task) as stream:
            await stream.next()
            ledger.away = True
            await house.advance(10)
            upstream.next_checks += [Check(answered=Answered.NOTHING)] * 2
            problem(await house.call("GET", task["links"]["events"]), 503, "upstream-unavailable")
            ledger.away = False
            await checked(house, SUCCEEDED)
            assert [event.id for event in await stream.rest()] == ["2-succeeded"]
