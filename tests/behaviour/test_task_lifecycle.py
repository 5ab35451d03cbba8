"""The life of a task: submit, poll, result."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NoReturn

import pytest

from service.api import legacy, schemas, tasks
from service.api.uploads import MultipartForm
from service.domain.tasks import Kind
from service.usecases.caches import TaskCache
from service.usecases.reports import QuotaReports
from service.usecases.task_status import TaskReader
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.legacy_client import LegacyClient
from tests.support.images import make_png

OPTIONS = {
    "upscale": {
        "model": "通用模型",
        "style": "general",
        "scale": "1.5",
        "noise": "1.01",
        "steps": "20",
        "high_fidelity": "true",
        "strong_inpaint": "false",
        "inpaint_strength": "0.25",
        "prompt": "红色的圆",
        "negative_prompt": "",
        "vector": "false",
        "colors": "4",
    },
    "vectorize": {"colors": "3"},
    "face-enhance": {},
    "seamless": {"fit": "0.3"},
}
SHOWN_OPTIONS = {
    "upscale": {
        "model": "general",
        "style": "general",
        "scale": 1.5,
        "noise": 1.01,
        "steps": 20,
        "high_fidelity": True,
        "strong_inpaint": False,
        "inpaint_strength": 0.25,
        "prompt": "红色的圆",
        "negative_prompt": "",
        "vector": False,
        "colors": 4,
    },
    "vectorize": {"colors": 3},
    "face-enhance": {},
    "seamless": {"fit": 0.3},
}
DEFAULTS = {
    "upscale": {
        "model": "general",
        "style": "general",
        "scale": 2.0,
        "noise": 1.003,
        "steps": 30,
        "high_fidelity": False,
        "strong_inpaint": False,
        "inpaint_strength": 0.5,
        "prompt": "",
        "negative_prompt": "",
        "vector": False,
        "colors": 5,
    },
    "vectorize": {"colors": 5},
    "face-enhance": {},
    "seamless": {"fit": 0.5},
}


@pytest.mark.parametrize("kind", list(Kind))
async def test_every_kind_succeeds(gateway: RunningGateway, kind: Kind) -> None:
    response = await gateway.submit(kind, OPTIONS[kind] | {"metadata": '{"order": "17"}'})
    assert response.status_code == 201, response.text
    task = response.json()
    assert (task["kind"], task["state"], task["finished_at"], task["error"]) == (kind, "queued", None, None)
    assert task["options"] == SHOWN_OPTIONS[kind]
    assert task["metadata"] == {"order": "17"}
    assert task["artifacts"] == []
    assert response.headers["location"] == f"/v1/tasks/{task['id']}" == task["links"]["self"]
    assert response.headers["retry-after"] == "3"

    ended = await gateway.wait_for_task(task["id"])
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert ended["artifacts"]
    assert all(artifact["url"].startswith("http") for artifact in ended["artifacts"])
    assert {**ended, "state": "queued", "artifacts": []}.keys() == task.keys()
    assert datetime.fromisoformat(ended["finished_at"]) > datetime.fromisoformat(ended["created_at"])
    assert ended["created_at"] == task["created_at"]
    assert await gateway.upstream.count_submits() == 1


@pytest.mark.parametrize("kind", list(Kind))
async def test_default_options(gateway: RunningGateway, kind: Kind) -> None:
    assert (await gateway.submit(kind)).json()["options"] == DEFAULTS[kind]


async def test_failed_task(gateway: RunningGateway) -> None:
    await gateway.upstream.fail_next_task()
    task = (await gateway.submit()).json()
    ended = await gateway.wait_for_task(task["id"])
    assert (ended["state"], ended["artifacts"]) == ("failed", [])
    assert ended["error"]["code"] == "task-failed"


async def test_states_while_running(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    for _ in range(3):
        assert (await gateway.call("GET", task["links"]["self"])).json()["state"] == "queued"
    assert await gateway.upstream.count_checks() == 0
    await gateway.poll_due_tasks()
    for _ in range(3):
        response = await gateway.call("GET", task["links"]["self"])
        assert response.json()["state"] == "running"
        assert response.headers["retry-after"] == "3"
    assert await gateway.upstream.count_checks() == 1


async def test_one_upstream_check_per_interval(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    await gateway.submit()
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == 1
    await gateway.advance(2.4)
    assert await gateway.services.task_poller.start_due() is False
    await gateway.services.task_poller.wait_idle()
    assert await gateway.upstream.count_checks() == 1
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == 2


async def test_finished_task_is_not_checked_again(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    await gateway.wait_for_task(task["id"])
    checks = await gateway.upstream.count_checks()
    for _ in range(3):
        await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == checks


async def test_etag_changes_with_the_task(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    first = await gateway.call("GET", task["links"]["self"])
    tag = first.headers["etag"]
    again = await gateway.call("GET", task["links"]["self"], headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    await gateway.wait_for_task(task["id"])
    changed = await gateway.call("GET", task["links"]["self"], headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag
    assert "retry-after" not in changed.headers


async def test_age_header(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    await gateway.poll_due_tasks()
    assert (await gateway.call("GET", task["links"]["self"])).headers["age"] == "0"
    await gateway.advance(17)
    assert (await gateway.call("GET", task["links"]["self"])).headers["age"] == "17"


async def test_tasks_are_listed_newest_first(gateway: RunningGateway) -> None:
    made = []
    for kind in [*Kind, *Kind]:
        made.append((await gateway.submit(kind)).json()["id"])
        await gateway.advance(0.001)
    listed_ids: list[str] = []
    cursor: str | None = None
    while True:
        params = {"limit": "3"} | ({"cursor": cursor} if cursor else {})
        page = (await gateway.call("GET", "/v1/tasks", params=params)).json()
        listed_ids += [task["id"] for task in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        await gateway.advance(0.001)
        await gateway.submit()
    assert listed_ids == made[::-1]


async def test_list_filters(gateway: RunningGateway) -> None:
    done = (await gateway.submit("seamless")).json()["id"]
    await gateway.wait_for_task(done)
    await gateway.upstream.keep_running()
    waiting = (await gateway.submit("vectorize")).json()["id"]

    async def ids(**params: str) -> list[str]:
        response = await gateway.call("GET", "/v1/tasks", params=params)
        return [task["id"] for task in response.json()["items"]]

    assert await ids(state="succeeded") == [done]
    assert await ids(state="queued") == [waiting]
    assert await ids(kind="vectorize") == [waiting]
    assert await ids(kind="vectorize", state="succeeded") == []
    assert set(await ids()) == {done, waiting}


async def test_tenants_are_isolated(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    other_token = await gateway.new_token("other")
    task = (await gateway.submit()).json()
    response = await gateway.call("GET", task["links"]["self"], token=other_token)
    never = await gateway.call("GET", "/v1/tasks/task_nonsense", token=other_token)
    assert response.status_code == never.status_code == 404
    assert {**response.json(), "instance": ""} == {**never.json(), "instance": ""}
    assert (await gateway.call("GET", "/v1/tasks", token=other_token)).json() == {"items": [], "next_cursor": None}


async def test_form_parts_in_any_order(gateway: RunningGateway) -> None:
    parts = [("image", ("a.png", make_png(), "image/png")), ("fit", (None, "0.4"))]
    for order in (parts, parts[::-1]):
        response = await gateway.call("POST", "/v1/tasks/seamless", files=order)
        assert (response.status_code, response.json()["options"]) == (201, {"fit": 0.4})


@pytest.mark.parametrize("error", [KeyError, OSError])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (schemas, "task_headers"),
        (tasks, "rate_limit_headers"),
        (tasks, "parse_wait_seconds"),
        (MultipartForm, "discard"),
        (TaskReader, "read"),
        (TaskCache, "get_fresh"),
    ],
)
async def test_errors_after_the_acceptance_still_return_201(
    gateway: RunningGateway, where: Any, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> NoReturn:
        raise error("a fault of the gateway")

    with monkeypatch.context() as patched:
        patched.setattr(where, name, failing)
        response = await gateway.submit(headers={"Prefer": "wait=1"})
    assert response.status_code == 201
    assert response.headers["location"] == response.json()["links"]["self"]
    assert (await gateway.call("GET", response.headers["location"])).json()["id"] == response.json()["id"]
    assert await gateway.upstream.count_submits() == 1


async def test_unrenderable_task_still_returns_its_id(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> NoReturn:
        raise KeyError("a fault of the gateway")

    with monkeypatch.context() as patched:
        patched.setattr(schemas, "render_task", failing)
        response = await gateway.submit()
    assert response.status_code == 201
    assert response.headers["location"] == response.json()["links"]["self"]
    assert (await gateway.call("GET", response.headers["location"])).json()["id"] == response.json()["id"]


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
