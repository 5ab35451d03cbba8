"""Tasks from submit to result, and what both ports share: documentation, health, headers, unknown paths."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from datetime import datetime
from itertools import cycle
from typing import Any
from unittest.mock import Mock
from urllib.parse import urljoin, urlsplit

import pytest

from service.api import schemas, tasks
from service.api.errors import PROBLEMS
from service.api.form_parser import MultipartForm
from service.domain.tasks import Kind
from service.usecases.caches import TaskCache
from service.usecases.reports import QuotaReports
from service.usecases.task_status import TaskReader
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway
from tests.behaviour.requests import assert_nothing_external, expect_problem
from tests.unit.asgi_client import open_raw_connection, read_response

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


async def test_one_upstream_check_per_interval(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    path = (await gateway.submit()).headers["location"]
    for checks, state in ((0, "queued"), (1, "running")):
        responses = [await gateway.call("GET", path) for _ in range(3)]
        assert {(response.json()["state"], response.headers["retry-after"]) for response in responses} == {(state, "3")}
        assert await gateway.upstream.count_checks() == checks
        await gateway.poll_due_tasks()
    await gateway.advance(2.4)
    assert await gateway.services.task_poller.start_due() is False
    await gateway.services.task_poller.wait_idle()
    assert await gateway.upstream.count_checks() == 2
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == 3


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
        with monkeypatch.context() as patched:
            patched.setattr(place, name, Mock(side_effect=error("a fault of the gateway")))
            response = await gateway.submit(headers={"Prefer": "wait=1"})
        assert response.status_code == 201, name
        location = response.headers["location"]
        assert location == response.json()["links"]["self"]
        assert (await gateway.call("GET", location)).json()["id"] == response.json()["id"]
        ids.add(location)
    assert len(ids) == await gateway.upstream.count_submits() == len(places)
    for place, name in ((QuotaReports, "remaining"), (MultipartForm, "discard")):
        monkeypatch.setattr(place, name, Mock(side_effect=OSError("a fault of the gateway")))
    accepted = await LegacyClient(gateway.http, gateway.url, gateway.token).submit("submit_vector_task", {})
    assert accepted == {"err_code": 0, "task_id": accepted["task_id"]}


async def test_headers_of_a_task(gateway: RunningGateway) -> None:
    await gateway.advance(0)  # the clock stands still from here
    created = await gateway.submit()
    path, tag = created.headers["location"], created.headers["etag"]
    assert path == created.json()["links"]["self"] == f"/v1/tasks/{created.json()['id']}"
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', tag)
    read = await gateway.call("GET", path)
    assert read.json() == created.json()
    await gateway.advance(17)
    for condition in (tag, f'"other", {tag}', "*", f'W/"a" ,  W/{tag}'):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.content) == (304, b""), condition
        assert (response.headers["etag"], response.headers["retry-after"], response.headers["age"]) == (tag, "3", "17")
        assert "content-type" not in response.headers
    for condition in ("", tag.strip('"'), f'{tag[:-1]}x"', '"*"'):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.json()["state"]) == (200, "queued"), condition
    bare = await gateway.call("HEAD", path)
    assert (bare.status_code, bare.content) == (200, b"")
    assert bare.headers["content-length"] == read.headers["content-length"]
    for response in (created, read, bare, await gateway.call("GET", "/v1/quota")):
        assert response.headers["cache-control"] == "private, no-cache"
    assert created.headers["retry-after"] == read.headers["retry-after"] == "3"
    await gateway.wait_for_task(created.json()["id"])
    ended = await gateway.call("GET", path, headers={"If-None-Match": tag})
    assert (ended.status_code, ended.json()["state"]) == (200, "succeeded")
    assert "retry-after" not in ended.headers
    again = await gateway.call("GET", path, headers={"If-None-Match": ended.headers["etag"]})
    assert again.status_code == 304


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_read_is_the_same_with_and_without_a_preference(gateway: RunningGateway, method: str) -> None:
    created = await gateway.submit()
    for path, condition in (
        (created.headers["location"], "x"),
        (created.headers["location"], "*"),
        ("/v1/tasks/x", "x"),
    ):
        plain, preferring = [
            await gateway.call(method, path, headers={"If-None-Match": condition, "X-Request-Id": "r1"} | more)
            for more in ({}, {"Prefer": "respond-async"})
        ]
        for name in ("date", "age"):  # not the same moment
            assert plain.headers.pop(name, "") >= ""
            preferring.headers.pop(name, "")
        assert (plain.status_code, plain.content) == (preferring.status_code, preferring.content)
        assert sorted(plain.headers.multi_items()) == sorted(preferring.headers.multi_items())


async def test_altered_and_foreign_ids_and_cursors(gateway: RunningGateway) -> None:
    tasks = [(await gateway.submit()).json()["id"] for _ in range(2)]
    etag = (await gateway.call("GET", f"/v1/tasks/{tasks[0]}")).headers["etag"]
    cursor = (await gateway.call("GET", "/v1/tasks?limit=1")).json()["next_cursor"]
    checks = await gateway.upstream.count_checks()
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    never = expect_problem(await gateway.call("GET", "/v1/tasks/task_never"), 404, "not-found")
    task = tasks[0]
    altered = [task[:-1], task + "A", task + "%20", task.upper(), task[:5] + task[6:] + task[5]]
    refused = [await gateway.call("GET", f"/v1/tasks/{task_id}") for task_id in altered]
    refused.append(await gateway.call("GET", f"/v1/tasks/{task}", token=other, headers={"If-None-Match": etag}))
    for response in refused:
        assert expect_problem(response, 404, "not-found") | {"instance": ""} == never | {"instance": ""}
    expect_problem(await gateway.call_admin("GET", f"/tasks/{altered[0]}"), 404, "not-found")
    response = await gateway.call("GET", "/v1/tasks", token=other, params={"cursor": cursor})
    expect_problem(response, 400, "malformed-request")
    assert (await gateway.call("GET", "/v1/tasks", token=other)).json() == {"items": [], "next_cursor": None}
    assert await gateway.upstream.count_checks() == checks


@pytest.mark.smoke
async def test_docs_show_the_document_of_their_port(gateway: RunningGateway) -> None:
    root = await gateway.http.get(f"{gateway.url}/")
    assert (root.status_code, root.headers["location"]) == (302, "/docs")
    for url, path in ((gateway.url, "/v1/tasks/upscale"), (gateway.ops_url, "/admin/v1/tenants/{name}")):
        response = await gateway.http.get(f"{url}/docs")
        assert_nothing_external(response)
        (setup, _), (viewer, integrity) = re.findall(r'<script src="(\S+)"(?: integrity="(\S+)")?>', response.text)
        addresses = [urljoin(f"{url}/docs", address) for address in (setup, viewer, "openapi.json")]
        assert all(address.startswith(url) for address in addresses)
        setup_script, program, document = [await gateway.http.get(address) for address in addresses]
        assert 'url: "openapi.json"' in setup_script.text
        assert path in document.json()["paths"]
        assert program.headers["content-type"] == "text/javascript; charset=utf-8"
        digest = base64.b64encode(hashlib.sha256(program.content).digest()).decode()
        assert integrity == f"sha256-{digest}"
        for slashes in ("/", "//"):  # the addresses on the page are relative to its own
            redirect = await gateway.http.get(f"{url}/docs{slashes}")
            assert redirect.status_code == 302
            assert urljoin(f"{url}/docs{slashes}", redirect.headers["location"]) == f"{url}/docs"
        problem = await gateway.http.get(f"{url}/nowhere")
        expect_problem(problem, 404, "not-found")
        help_path, _, fragment = problem.links["help"]["url"].partition("#")
        help_page = await gateway.http.get(url + help_path)
        assert_nothing_external(help_page)
        assert {*re.findall(r'id="([^"]+)"', help_page.text)} >= {fragment, *(problem.code for problem in PROBLEMS)}


@pytest.mark.smoke
async def test_health_and_readiness(gateway: RunningGateway) -> None:
    async def read_readiness() -> set[tuple[int, str]]:
        ready = []
        for url in (gateway.url, gateway.ops_url):
            assert (await gateway.http.get(f"{url}/healthz")).json() == {"status": "ok"}
            ready.append(await gateway.http.get(f"{url}/readyz"))
        return {(response.status_code, response.json()["status"]) for response in ready}

    assert await read_readiness() == {(200, "ok")}
    gateway.services.registry.is_ready = False
    assert await read_readiness() == {(503, "starting")}
    gateway.services.registry.is_ready = True
    gateway.services.start_draining()
    assert await read_readiness() == {(503, "draining")}
    assert (await gateway.submit()).status_code == 201


async def test_request_id_header(gateway: RunningGateway) -> None:
    for path in ("/healthz", "/nowhere", "/v1/quota"):
        response = await gateway.call("GET", path, headers={"X-Request-Id": "x" * 128})
        assert response.headers.get_list("x-request-id") == ["x" * 128]
        for refused in ("", "x" * 129, "a b", "é".encode()):
            response = await gateway.call("GET", path, headers={"X-Request-Id": refused})
            assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


async def test_no_response_is_taken_for_another_type(gateway: RunningGateway) -> None:
    """Every response of both ports is `nosniff`, once: JSON, problems, CSV, pages, and responses without a body."""
    for path in ("/v1/quota", "/v1/usage", "/v1/nowhere", "/openapi.json", "/docs", "/healthz"):
        response = await gateway.call("GET", path, headers={"Accept": "text/csv, */*"})
        assert response.headers.get_list("x-content-type-options") == ["nosniff"], path
    for path in ("/admin/v1/accounts", "/metrics", "/docs/problems", "/nowhere"):
        for headers in ({}, {"Authorization": f"Bearer {ADMIN_TOKEN}"}):
            response = await gateway.http.get(gateway.ops_url + path, headers=headers)
            assert response.headers.get_list("x-content-type-options") == ["nosniff"], path


async def test_unparsable_requests_and_unmatched_paths(gateway: RunningGateway) -> None:
    faults = {
        b"GET / HTTP/1.1\r\n\r\n": (400, "malformed-request"),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100 + b"\r\n": (431, "headers-too-large"),
    }
    for url in (gateway.url, gateway.ops_url):
        for fault, (status, code) in faults.items():
            async with open_raw_connection(urlsplit(url).port or 0) as (reader, writer):
                writer.write(fault)
                response = await read_response(reader)
                assert (response.status, response.json()["code"]) == (status, code)
                assert response.headers["content-type"] == "application/problem+json"
                assert response.json()["instance"] == response.headers["x-request-id"]
                assert response.headers["x-content-type-options"] == "nosniff"
                assert await reader.read() == b""
        for path in ("", "/openapi.json", "/swagger"):  # where the framework would serve its own pages
            expect_problem(await gateway.http.get(f"{url}/schema{path}"), 404, "not-found")
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for port in ("tenants", "operators"):
        for method, status, count in (("other", 431, 1), ("GET", 404, 3)):
            labels = f'method="{method}",port="{port}",route="unmatched",status="{status}"'
            assert f"gateway_http_requests_total{{{labels}}} {count}.0" in metrics
