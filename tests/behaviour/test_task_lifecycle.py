"""The life of a task: submit, poll, result."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NoReturn

import pytest

from service.api import legacy, tasks
from service.api.uploads import MultipartForm
from service.domain.tasks import Kind
from service.usecases.reports import QuotaReports
from service.usecases.task_cache import TaskCache
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
async def test_every_kind_succeeds(house: RunningGateway, kind: Kind) -> None:
    answer = await house.submit(kind, OPTIONS[kind] | {"metadata": '{"order": "17"}'})
    assert answer.status_code == 201, answer.text
    task = answer.json()
    assert (task["kind"], task["state"], task["finished_at"], task["error"]) == (kind, "queued", None, None)
    assert task["options"] == SHOWN_OPTIONS[kind]
    assert task["metadata"] == {"order": "17"}
    assert task["artifacts"] == []
    assert answer.headers["location"] == f"/v1/tasks/{task['id']}" == task["links"]["self"]
    assert answer.headers["retry-after"] == "3"

    ended = await house.wait_for_task(task["id"])
    assert (ended["state"], ended["error"]) == ("succeeded", None)
    assert ended["artifacts"]
    assert all(each["url"].startswith("http") for each in ended["artifacts"])
    assert {**ended, "state": "queued", "artifacts": []}.keys() == task.keys()
    assert datetime.fromisoformat(ended["finished_at"]) > datetime.fromisoformat(ended["created_at"])
    assert ended["created_at"] == task["created_at"]
    assert await house.upstream.count_submits() == 1


@pytest.mark.parametrize("kind", list(Kind))
async def test_default_options(house: RunningGateway, kind: Kind) -> None:
    assert (await house.submit(kind)).json()["options"] == DEFAULTS[kind]


async def test_failed_task(house: RunningGateway) -> None:
    await house.upstream.fail_next_task()
    task = (await house.submit()).json()
    ended = await house.wait_for_task(task["id"])
    assert (ended["state"], ended["artifacts"]) == ("failed", [])
    assert ended["error"]["code"] == "task-failed"


async def test_states_while_running(house: RunningGateway) -> None:
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    for _ in range(3):
        assert (await house.call("GET", task["links"]["self"])).json()["state"] == "queued"
    assert await house.upstream.count_checks() == 0
    await house.poll_due_tasks()
    for _ in range(3):
        answer = await house.call("GET", task["links"]["self"])
        assert answer.json()["state"] == "running"
        assert answer.headers["retry-after"] == "3"
    assert await house.upstream.count_checks() == 1


async def test_one_upstream_check_per_interval(house: RunningGateway) -> None:
    await house.upstream.keep_running()
    await house.submit()
    await house.poll_due_tasks()
    assert await house.upstream.count_checks() == 1
    await house.advance(2.4)
    assert await house.services.task_poller.start_due() is False
    await house.services.task_poller.wait_idle()
    assert await house.upstream.count_checks() == 1
    await house.poll_due_tasks()
    assert await house.upstream.count_checks() == 2


async def test_finished_task_is_not_checked_again(house: RunningGateway) -> None:
    task = (await house.submit()).json()
    await house.wait_for_task(task["id"])
    checks = await house.upstream.count_checks()
    for _ in range(3):
        await house.poll_due_tasks()
    assert await house.upstream.count_checks() == checks


async def test_etag_changes_with_the_task(house: RunningGateway) -> None:
    task = (await house.submit()).json()
    first = await house.call("GET", task["links"]["self"])
    tag = first.headers["etag"]
    again = await house.call("GET", task["links"]["self"], headers={"If-None-Match": f'"other", W/{tag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    await house.wait_for_task(task["id"])
    changed = await house.call("GET", task["links"]["self"], headers={"If-None-Match": tag})
    assert changed.status_code == 200
    assert changed.headers["etag"] != tag
    assert "retry-after" not in changed.headers


async def test_age_header(house: RunningGateway) -> None:
    await house.upstream.keep_running()
    task = (await house.submit()).json()
    await house.poll_due_tasks()
    assert (await house.call("GET", task["links"]["self"])).headers["age"] == "0"
    await house.advance(17)
    assert (await house.call("GET", task["links"]["self"])).headers["age"] == "17"


async def test_tasks_are_listed_newest_first(house: RunningGateway) -> None:
    made = []
    for kind in [*Kind, *Kind]:
        made.append((await house.submit(kind)).json()["id"])
        await house.advance(0.001)
    seen: list[str] = []
    cursor: str | None = None
    while True:
        params = {"limit": "3"} | ({"cursor": cursor} if cursor else {})
        page = (await house.call("GET", "/v1/tasks", params=params)).json()
        seen += [task["id"] for task in page["items"]]
        cursor = page["next_cursor"]
        if cursor is None:
            break
        await house.advance(0.001)
        await house.submit()
    assert seen == made[::-1]


async def test_list_filters(house: RunningGateway) -> None:
    done = (await house.submit("seamless")).json()["id"]
    await house.wait_for_task(done)
    await house.upstream.keep_running()
    waiting = (await house.submit("vectorize")).json()["id"]

    async def ids(**params: str) -> list[str]:
        answer = await house.call("GET", "/v1/tasks", params=params)
        return [task["id"] for task in answer.json()["items"]]

    assert await ids(state="succeeded") == [done]
    assert await ids(state="queued") == [waiting]
    assert await ids(kind="vectorize") == [waiting]
    assert await ids(kind="vectorize", state="succeeded") == []
    assert set(await ids()) == {done, waiting}


async def test_tenants_are_isolated(house: RunningGateway) -> None:
    await house.put_tenant("other")
    stranger = await house.new_token("other")
    task = (await house.submit()).json()
    found = await house.call("GET", task["links"]["self"], token=stranger)
    never = await house.call("GET", "/v1/tasks/task_nonsense", token=stranger)
    assert found.status_code == never.status_code == 404
    assert {**found.json(), "instance": ""} == {**never.json(), "instance": ""}
    assert (await house.call("GET", "/v1/tasks", token=stranger)).json() == {"items": [], "next_cursor": None}


async def test_form_parts_in_any_order(house: RunningGateway) -> None:
    parts = [("image", ("a.png", make_png(), "image/png")), ("fit", (None, "0.4"))]
    for order in (parts, parts[::-1]):
        answer = await house.call("POST", "/v1/tasks/seamless", files=order)
        assert (answer.status_code, answer.json()["options"]) == (201, {"fit": 0.4})


@pytest.mark.parametrize("error", [KeyError, OSError])
@pytest.mark.parametrize(
    ("where", "name"),
    [
        (tasks, "task_headers"),
        (tasks, "rate_limit_headers"),
        (tasks, "wait_seconds"),
        (MultipartForm, "drop"),
        (TaskReader, "read"),
        (TaskCache, "fresh"),
    ],
)
async def test_errors_after_the_acceptance_still_return_201(
    house: RunningGateway, where: Any, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> NoReturn:
        raise error("a fault of the gateway")

    with monkeypatch.context() as patched:
        patched.setattr(where, name, failing)
        answer = await house.submit(headers={"Prefer": "wait=1"})
    assert answer.status_code == 201
    assert answer.headers["location"] == answer.json()["links"]["self"]
    assert (await house.call("GET", answer.headers["location"])).json()["id"] == answer.json()["id"]
    assert await house.upstream.count_submits() == 1


async def test_unrenderable_task_still_returns_its_id(house: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> NoReturn:
        raise KeyError("a fault of the gateway")

    with monkeypatch.context() as patched:
        patched.setattr(tasks, "render_task", failing)
        answer = await house.submit()
    assert answer.status_code == 201
    assert answer.headers["location"] == answer.json()["links"]["self"]
    assert (await house.call("GET", answer.headers["location"])).json()["id"] == answer.json()["id"]


@pytest.mark.parametrize("error", [KeyError, OSError])
async def test_errors_after_the_acceptance_of_a_legacy_submit(
    house: RunningGateway, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def failing(*_: Any, **__: Any) -> NoReturn:
        raise error("a fault of the gateway")

    def failing_at_once(*_: Any) -> NoReturn:
        raise error("a fault of the gateway")

    monkeypatch.setattr(QuotaReports, "remaining", failing)
    monkeypatch.setattr(MultipartForm, "discard", failing_at_once)
    answer = await LegacyClient(house.http, house.url, house.token).submit("submit_vector_task", {})
    assert answer["err_code"] == 0
    assert set(answer) == {"err_code", "task_id"}
    assert legacy.NOTHING_LEFT not in str(answer)
