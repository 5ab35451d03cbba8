"""The life of a task: submit, poll, result."""

from __future__ import annotations

import json
from datetime import datetime
from itertools import cycle
from typing import Any, NoReturn

import pytest

from service.api import legacy, schemas, tasks
from service.api.uploads import MultipartForm
from service.domain.tasks import Kind
from service.usecases.caches import TaskCache
from service.usecases.reports import QuotaReports
from service.usecases.task_status import TaskReader
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import RunningGateway

"""Form fields, the options shown for them, and the defaults, by kind."""


OPTIONS: dict[str, dict[str, Any]] = {
    "upscale": {"model": "general", "scale": 1.5, "steps": 20, "high_fidelity": True, "prompt": "红色的圆"},
    "vectorize": {"colors": 3},
    "face-enhance": {},
    "seamless": {"fit": 0.3},
}


@pytest.mark.smoke
@pytest.mark.parametrize("kind", list(Kind))
async def test_every_kind_succeeds(gateway: RunningGateway, kind: Kind) -> None:
    fields = {name: json.dumps(value, ensure_ascii=False).strip('"') for name, value in OPTIONS[kind].items()}
    response = await gateway.submit(kind, fields | {"metadata": '{"order": "17"}'})
    assert response.status_code == 201, response.text
    task = response.json()
    assert (task["kind"], task["state"], task["finished_at"], task["error"]) == (kind, "queued", None, None)
    assert task["options"] == task["options"] | OPTIONS[kind]
    assert (task["metadata"], task["artifacts"]) == ({"order": "17"}, [])
    assert response.headers["location"] == f"/v1/tasks/{task['id']}" == task["links"]["self"]
    assert response.headers["retry-after"] == "3"
    ended = await gateway.wait_for_task(task["id"])
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert ended["artifacts"]
    for artifact in ended["artifacts"]:
        assert artifact["url"].startswith("http")
        assert (await gateway.call("GET", artifact["href"])).status_code == 200
    assert ended.keys() == task.keys()
    assert datetime.fromisoformat(ended["finished_at"]) > datetime.fromisoformat(ended["created_at"])
    assert ended["created_at"] == task["created_at"]
    assert await gateway.upstream.count_submits() == 1
    checks = await gateway.upstream.count_checks()
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == checks


async def test_one_upstream_check_per_interval(gateway: RunningGateway) -> None:
    async def read_states() -> list[str]:
        responses = [await gateway.call("GET", task["links"]["self"]) for _ in range(3)]
        assert {response.headers["retry-after"] for response in responses} == {"3"}
        return [response.json()["state"] for response in responses]

    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    assert await read_states() == ["queued"] * 3
    assert await gateway.upstream.count_checks() == 0
    await gateway.poll_due_tasks()
    assert await read_states() == ["running"] * 3
    await gateway.advance(2.4)
    assert await gateway.services.task_poller.start_due() is False
    await gateway.services.task_poller.wait_idle()
    assert await gateway.upstream.count_checks() == 1
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == 2


async def test_etag_and_age(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    tag = (await gateway.call("GET", task["links"]["self"])).headers["etag"]
    await gateway.advance(17)
    again = await gateway.call("GET", task["links"]["self"], headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert again.headers["age"] == "17"
    await gateway.wait_for_task(task["id"])
    changed = await gateway.call("GET", task["links"]["self"], headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag
    assert "retry-after" not in changed.headers


async def test_tasks_are_listed_newest_first(gateway: RunningGateway) -> None:
    async def list_ids(**params: str) -> tuple[list[str], str | None]:
        page = (await gateway.call("GET", "/v1/tasks", params=params)).json()
        return [task["id"] for task in page["items"]], page["next_cursor"]

    done = (await gateway.submit("seamless")).json()["id"]
    await gateway.wait_for_task(done)
    await gateway.upstream.keep_running()
    made = [done]
    for kind in Kind:
        await gateway.advance(0.001)
        made.append((await gateway.submit(kind)).json()["id"])
    listed_ids, cursor = await list_ids(limit="2")
    while cursor is not None:
        await gateway.advance(0.001)
        await gateway.submit()
        more, cursor = await list_ids(limit="2", cursor=cursor)
        listed_ids += more
    assert listed_ids == made[::-1]
    by_kind = dict(zip(Kind, made[1:], strict=True))
    assert await list_ids(state="succeeded") == ([done], None)
    assert await list_ids(kind="vectorize") == ([by_kind[Kind.VECTORIZE]], None)
    assert await list_ids(kind="vectorize", state="succeeded") == ([], None)
    assert await list_ids(kind="seamless") == ([by_kind[Kind.SEAMLESS], done], None)


async def test_tenants_are_isolated(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    other_token = await gateway.new_token("other")
    task = (await gateway.submit()).json()
    response = await gateway.call("GET", task["links"]["self"], token=other_token)
    never = await gateway.call("GET", "/v1/tasks/task_nonsense", token=other_token)
    assert response.status_code == never.status_code == 404
    assert {**response.json(), "instance": ""} == {**never.json(), "instance": ""}
    assert (await gateway.call("GET", "/v1/tasks", token=other_token)).json() == {"items": [], "next_cursor": None}


async def test_errors_after_the_acceptance_still_return_201(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[tuple[Any, str]] = [
        (schemas, "task_headers"),
        (schemas, "render_task"),
        (tasks, "rate_limit_headers"),
        (tasks, "parse_wait_seconds"),
        (MultipartForm, "discard"),
        (TaskReader, "read"),
        (TaskCache, "get_fresh"),
    ]
    gateway.services.task_cache.close()  # so that no wait lasts
    ids = set()
    for (place, name), error in zip(places, cycle((KeyError, OSError))):

        def failing(*_: Any, error: type[Exception] = error, **__: Any) -> NoReturn:
            raise error("a fault of the gateway")

        with monkeypatch.context() as patched:
            patched.setattr(place, name, failing)
            response = await gateway.submit(headers={"Prefer": "wait=1"})
        assert response.status_code == 201, name
        location = response.headers["location"]
        assert location == response.json()["links"]["self"]
        assert (await gateway.call("GET", location)).json()["id"] == response.json()["id"]
        ids.add(location)
    assert len(ids) == await gateway.upstream.count_submits() == len(places)


@pytest.mark.parametrize("error", [KeyError, OSError])
async def test_errors_after_the_acceptance_of_a_legacy_submit(
    gateway: RunningGateway, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> NoReturn:
        raise error("a fault of the gateway")

    def failing_at_once(*_: Any) -> NoReturn:
        raise error("a fault of the gateway")

    monkeypatch.setattr(QuotaReports, "remaining", failing)
    monkeypatch.setattr(MultipartForm, "discard", failing_at_once)
    response = await LegacyClient(gateway.http, gateway.url, gateway.token).submit("submit_vector_task", {})
    assert response["err_code"] == 0
    assert set(response) == {"err_code", "task_id"}
    assert legacy.NOTHING_LEFT not in str(response)
