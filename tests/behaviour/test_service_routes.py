"""Service routes and common headers of both ports."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_fake_gateway
from tests.fakes import FakeRegistry
from tests.unit.asgi_client import open_raw_connection, read_response


async def test_health(gateway: RunningGateway) -> None:
    for url in (gateway.url, gateway.ops_url):
        for path in ("/healthz", "/readyz"):
            response = await gateway.http.get(url + path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})


async def test_draining_process_is_not_ready(gateway: RunningGateway) -> None:
    gateway.services.start_draining()
    for url in (gateway.url, gateway.ops_url):
        assert (await gateway.http.get(f"{url}/healthz")).status_code == 200
        response = await gateway.http.get(f"{url}/readyz")
        assert (response.status_code, response.json()) == (503, {"status": "draining"})
    assert (await gateway.submit()).status_code == 201


async def test_starting_process_is_not_ready() -> None:
    async with run_fake_gateway() as (gateway, _, _):
        registry = gateway.services.registry
        assert isinstance(registry, FakeRegistry)
        registry.is_ready = False
        for url in (gateway.url, gateway.ops_url):
            assert (await gateway.http.get(f"{url}/healthz")).status_code == 200
            response = await gateway.http.get(f"{url}/readyz")
            assert (response.status_code, response.json()) == (503, {"status": "starting"})


async def test_unavailable_store_keeps_the_process_ready() -> None:
    async with run_fake_gateway() as (gateway, ledger, _):
        task = (await gateway.submit()).json()
        ledger.is_unavailable = True
        assert (await gateway.http.get(f"{gateway.url}/readyz")).status_code == 200
        assert (await gateway.call("GET", task["links"]["self"])).status_code == 200
        response = await gateway.submit()
        expect_problem(response, 503, "ledger-unavailable")
        assert int(response.headers["retry-after"]) > 0


async def test_admin_routes_are_on_their_own_port(gateway: RunningGateway) -> None:
    metrics = await gateway.http.get(f"{gateway.ops_url}/metrics")
    assert metrics.status_code == 200
    assert metrics.headers["content-type"].startswith("text/plain")
    assert re.search(r"^\w+_requests_total\{.*route=\"/admin/v1/tenants/\{name\}\"", metrics.text, re.MULTILINE)

    as_operator = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for path in ("/metrics", "/admin/v1/tenants", "/admin/v1/accounts/main", "/admin"):
        expect_problem(await gateway.call("GET", path, token="", headers=as_operator), 404, "not-found")
    for path in ("/v1/quota", "/v1/tasks", "/api/check_task_status", "/"):
        response = await gateway.http.get(gateway.ops_url + path, headers=as_operator)
        expect_problem(response, 404, "not-found")


async def test_admin_routes_need_the_admin_token(gateway: RunningGateway) -> None:
    for headers in ({}, {"Authorization": f"Bearer {gateway.token}"}, {"Authorization": f"Bearer {ADMIN_TOKEN}x"}):
        for method, path in (("GET", "/tenants"), ("PUT", "/tenants/x"), ("POST", "/tenants/shop/tokens")):
            response = await gateway.http.request(method, f"{gateway.ops_url}/admin/v1{path}", headers=headers)
            expect_problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer ")


async def test_request_id_header(gateway: RunningGateway) -> None:
    calls = [
        ("GET", "/healthz"),
        ("GET", "/v1/quota"),
        ("GET", "/nowhere"),
        ("PUT", "/v1/quota"),
        ("POST", "/v1/tasks/upscale"),
    ]
    for method, path in calls:
        for value in ("a", "Req-1_2.3", "x" * 128):
            response = await gateway.call(method, path, headers={"X-Request-Id": value})
            assert response.headers.get_list("x-request-id") == [value]
        made = set()
        for refused in ("", "x" * 129, "a b", "a/b", "é".encode(), "a\tb"):
            response = await gateway.call(method, path, headers={"X-Request-Id": refused})
            assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
            made.add(response.headers["x-request-id"])
        assert len(made) == 6


async def test_tenant_data_is_private(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    path = created.headers["location"]
    for response in (
        created,
        await gateway.call("GET", path),
        await gateway.call("GET", path, headers={"If-None-Match": created.headers["etag"]}),
        await gateway.call("HEAD", path),
        await gateway.call("GET", "/v1/tasks"),
        await gateway.call("GET", "/v1/quota"),
    ):
        assert response.headers["cache-control"] == "private, no-cache"


async def test_location_header(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    assert created.headers["location"] == created.json()["links"]["self"] == f"/v1/tasks/{created.json()['id']}"
    assert (await gateway.call("GET", created.headers["location"])).json() == created.json()


async def test_retry_after_header(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    assert created.headers["retry-after"] == "3"
    path = created.headers["location"]
    assert (await gateway.call("GET", path)).headers["retry-after"] == "3"
    await gateway.wait_for_task(created.json()["id"])
    assert "retry-after" not in (await gateway.call("GET", path)).headers


async def test_age_header(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    path = (await gateway.submit()).headers["location"]
    assert (await gateway.call("GET", path)).headers["age"] == "0"
    await gateway.poll_due_tasks()
    await gateway.advance(100)
    assert 100 <= int((await gateway.call("GET", path)).headers["age"]) <= 103
    await gateway.poll_due_tasks()
    assert int((await gateway.call("GET", path)).headers["age"]) <= 3


async def test_conditional_read(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    path, tag = created.headers["location"], created.headers["etag"]
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', tag)
    for condition in (tag, f"W/{tag}", f'"other", {tag}', f'{tag},"other"', "*", f'W/"a" ,  W/{tag}'):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.content) == (304, b""), condition
        assert response.headers["etag"] == tag
        assert response.headers["retry-after"] == "3"
        assert "content-type" not in response.headers
    for condition in ('"other"', "", tag.strip('"'), f'{tag[:-1]}x"', '"*"', "w/x"):
        response = await gateway.call("GET", path, headers={"If-None-Match": condition})
        assert (response.status_code, response.json()["state"]) == (200, "queued"), condition
    await gateway.wait_for_task(created.json()["id"])
    response = await gateway.call("GET", path, headers={"If-None-Match": tag})
    assert (response.status_code, response.json()["state"]) == (200, "succeeded")
    assert response.headers["etag"] != tag
    again = await gateway.call("GET", path, headers={"If-None-Match": response.headers["etag"]})
    assert again.status_code == 304


async def test_conditional_read_without_a_store() -> None:
    async with run_fake_gateway() as (gateway, ledger, upstream):
        await gateway.upstream.keep_running()
        path = (await gateway.submit()).headers["location"]
        ledger.is_unavailable = True
        running = await gateway.call("GET", path)
        assert running.json()["state"] == "running"
        condition = {"If-None-Match": running.headers["etag"]}
        assert (await gateway.call("GET", path, headers=condition)).status_code == 304
        upstream.next_checks.clear()
        gateway.services.task_reader._queries.clear()  # as after a poll interval
        ended = await gateway.call("GET", path, headers=condition)
        assert (ended.status_code, ended.json()["state"]) == (200, "succeeded")


async def test_rate_limit_headers(gateway: RunningGateway) -> None:
    unlimited = await gateway.submit()
    assert not {"ratelimit", "ratelimit-policy"} & {*unlimited.headers}
    await gateway.put_tenant(
        limits=[{"window": "hour", "tasks": 3}, {"window": "total", "tasks": 9, "money": 5}], max_active=9
    )
    response = await gateway.submit()
    assert response.headers["ratelimit-policy"] == '"hour-tasks";q=3;w=3600, "total-tasks";q=9'
    assert re.fullmatch(r'"hour-tasks";r=1;t=\d{1,4}, "total-tasks";r=7', response.headers["ratelimit"])


async def test_violated_money_limit_is_in_yuan(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 300)
    await gateway.put_tenant(limits=[{"window": "day", "money": 0.5}])
    await gateway.submit()
    problem = expect_problem(await gateway.submit(), 429, "quota-exceeded")
    assert [
        (violated_policy["policy"], violated_policy["limit"]) for violated_policy in problem["violated_policies"]
    ] == [("day-money", 0.5)]


async def test_head_matches_get(gateway: RunningGateway) -> None:
    created = await gateway.submit()
    for url, path in (
        (gateway.url, created.headers["location"]),
        (gateway.url, "/v1/quota"),
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
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    assert re.search(r'method="HEAD".*route="/v1/quota"', metrics)
    assert await gateway.upstream.count_submits() == 1


async def test_no_framework_pages(gateway: RunningGateway) -> None:
    for url in (gateway.url, gateway.ops_url):
        for path in ("", "/", "/openapi.json", "/openapi.yaml", "/swagger", "/redoc", "/elements", "/anything"):
            response = await gateway.http.get(f"{url}/schema{path}")
            assert (response.status_code, response.json()["code"]) == (404, "not-found"), path
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    assert 'route="/schema' not in metrics
    assert re.search(
        r'gateway_http_requests_total\{method="GET",port="tenants",route="unmatched",status="404"\} 8.0', metrics
    )


async def test_route_metrics_start_at_zero(gateway: RunningGateway) -> None:
    path = (await gateway.submit()).headers["location"]
    assert (await gateway.call("GET", path)).status_code == 200
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    routes = set(
        re.findall(r'gateway_http_requests_total\{method="GET",port="tenants",route="([^"]+)",status="200"', metrics)
    )
    assert routes
    for route in routes:
        for status in (500, 502, 503, 504):
            zero = f'gateway_http_requests_total{{method="GET",port="tenants",route="{route}",status="{status}"}} 0.0'
            assert zero in metrics


async def test_unparsable_request_is_a_problem(gateway: RunningGateway) -> None:
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
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for port in ("tenants", "operators"):
        counted = f'gateway_http_requests_total{{method="other",port="{port}",route="unmatched",status="431"}} 1.0'
        assert counted in metrics
