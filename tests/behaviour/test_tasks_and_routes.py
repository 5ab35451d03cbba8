"""Health, documentation and headers that both ports share, and the headers of tasks."""

from __future__ import annotations

import base64
import hashlib
import re
from urllib.parse import urljoin, urlsplit

import pytest
from httpx2 import Response

from service.api.errors import PROBLEMS
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import expect_problem
from tests.unit.asgi_client import open_raw_connection, read_response


def assert_nothing_external(response: Response) -> None:
    """Assert that a page's policy allows no other host, no inline script and no `eval`."""
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = {
        name: sources for name, *sources in map(str.split, response.headers["content-security-policy"].split(";"))
    }
    assert policy["default-src"] == ["'none'"]
    assert policy["script-src"] == policy["connect-src"] == ["'self'"]
    sources = {source for sources in policy.values() for source in sources}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "blob:", "data:"}
    assert response.headers["x-content-type-options"] == "nosniff"


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
    for method, path in (("GET", "/healthz"), ("GET", "/nowhere"), ("PUT", "/v1/quota"), ("POST", "/v1/tasks/upscale")):
        for value in ("Req-1_2.3", "x" * 128):
            response = await gateway.call(method, path, headers={"X-Request-Id": value})
            assert response.headers.get_list("x-request-id") == [value]
        made = set()
        for refused in ("", "x" * 129, "a b", "a/b", "é".encode()):
            response = await gateway.call(method, path, headers={"X-Request-Id": refused})
            assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
            made.add(response.headers["x-request-id"])
        assert len(made) == 5


async def test_headers_of_a_task(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    path, tag = created.headers["location"], created.headers["etag"]
    assert path == created.json()["links"]["self"] == f"/v1/tasks/{created.json()['id']}"
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', tag)
    read = await gateway.call("GET", path)
    assert read.json() == created.json()
    for condition in (tag, f"W/{tag}", f'"other", {tag}', f'{tag},"other"', "*", f'W/"a" ,  W/{tag}'):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.content) == (304, b""), condition
        assert (response.headers["etag"], response.headers["retry-after"]) == (tag, "3")
        assert "content-type" not in response.headers
    for condition in ('"other"', "", tag.strip('"'), f'{tag[:-1]}x"', '"*"', "w/x"):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.json()["state"]) == (200, "queued"), condition
    for response in (created, read, await gateway.call("HEAD", path), await gateway.call("GET", "/v1/quota")):
        assert response.headers["cache-control"] == "private, no-cache"
    assert created.headers["retry-after"] == read.headers["retry-after"] == "3"
    await gateway.wait_for_task(created.json()["id"])
    ended = await gateway.call("GET", path, headers={"If-None-Match": tag})
    assert (ended.status_code, ended.json()["state"]) == (200, "succeeded")
    assert "retry-after" not in ended.headers
    again = await gateway.call("GET", path, headers={"If-None-Match": ended.headers["etag"]})
    assert again.status_code == 304


async def test_altered_and_foreign_ids_and_cursors(gateway: RunningGateway) -> None:
    """Every altered character is covered by unit/test_crypto."""
    tasks = [(await gateway.submit()).json()["id"] for _ in range(2)]
    etag = (await gateway.call("GET", f"/v1/tasks/{tasks[0]}")).headers["etag"]
    cursor = (await gateway.call("GET", "/v1/tasks?limit=1")).json()["next_cursor"]
    checks = await gateway.upstream.count_checks()
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    never = expect_problem(await gateway.call("GET", "/v1/tasks/task_never"), 404, "not-found")
    task = tasks[0]
    altered = [task[:-1], task + "A", task + "%20", task.replace("_", "-"), task.upper(), task[:5] + task[6:] + task[5]]
    refused = [await gateway.call("GET", f"/v1/tasks/{task_id}") for task_id in altered]
    refused.append(await gateway.call("GET", f"/v1/tasks/{task}", token=other, headers={"If-None-Match": etag}))
    for response in refused:
        assert expect_problem(response, 404, "not-found") | {"instance": ""} == never | {"instance": ""}
    expect_problem(await gateway.call_admin("GET", f"/tasks/{altered[0]}"), 404, "not-found")
    response = await gateway.call("GET", "/v1/tasks", token=other, params={"cursor": cursor})
    expect_problem(response, 400, "malformed-request")
    assert (await gateway.call("GET", "/v1/tasks", token=other)).json() == {"items": [], "next_cursor": None}
    assert await gateway.upstream.count_checks() == checks


async def test_rate_limit_headers(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 300)
    unlimited = await gateway.submit()
    assert not {"ratelimit", "ratelimit-policy"} & {*unlimited.headers}
    limits = [{"window": "hour", "tasks": 3}, {"window": "total", "tasks": 9, "money": 5}]
    await gateway.put_tenant(limits=limits, max_active=9)
    response = await gateway.submit()
    assert response.headers["ratelimit-policy"] == '"hour-tasks";q=3;w=3600, "total-tasks";q=9'
    assert re.fullmatch(r'"hour-tasks";r=1;t=\d{1,4}, "total-tasks";r=7', response.headers["ratelimit"])
    await gateway.put_tenant(limits=[{"window": "day", "money": 0.5}])
    problem = expect_problem(await gateway.submit(), 429, "quota-exceeded")
    assert [(item["policy"], item["limit"]) for item in problem["violated_policies"]] == [("day-money", 0.5)]


async def test_head_matches_get(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    for url, path in (
        (gateway.url, created.headers["location"]),
        (gateway.url, "/openapi.json"),
        (gateway.url, "/nowhere"),
        (gateway.ops_url, "/healthz"),
    ):
        headers = {"Authorization": f"Bearer {gateway.token}", "X-Request-Id": "same"}
        whole = await gateway.http.get(url + path, headers=headers)
        bare = await gateway.http.head(url + path, headers=headers)
        assert (bare.status_code, bare.content) == (whole.status_code, b"")
        assert {**bare.headers, "date": ""} == {**whole.headers, "date": ""}
    request = "{} /v1/quota HTTP/1.1\r\nHost: gateway\r\n\r\n"
    async with open_raw_connection(urlsplit(gateway.url).port or 0) as (reader, writer):
        writer.write((request.format("HEAD") + request.format("GET")).encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
        assert (await read_response(reader)).json()["code"] == "unauthenticated"
    assert await gateway.upstream.count_submits() == 1


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
                assert (response.status, response.json()["code"], response.json()["status"]) == (status, code, status)
                assert response.headers["content-type"] == "application/problem+json"
                assert response.json()["instance"] == response.headers["x-request-id"]
                assert await reader.read() == b""
        for path in ("", "/openapi.json", "/swagger", "/anything"):  # where the framework would serve its own pages
            expect_problem(await gateway.http.get(f"{url}/schema{path}"), 404, "not-found")
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for port in ("tenants", "operators"):
        for method, status, count in (("other", 431, 1), ("GET", 404, 4)):
            labels = f'method="{method}",port="{port}",route="unmatched",status="{status}"'
            assert f"gateway_http_requests_total{{{labels}}} {count}.0" in metrics
