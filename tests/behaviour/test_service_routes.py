"""Service routes and common headers of both ports."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_fake_gateway
from tests.fakes import FakeRegistry
from tests.unit.asgi_client import open_raw_connection, read_response


async def test_health(house: RunningGateway) -> None:
    for url in (house.url, house.ops_url):
        for path in ("/healthz", "/readyz"):
            answer = await house.http.get(url + path)
            assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_draining_process_is_not_ready(house: RunningGateway) -> None:
    house.services.lifecycle.start_draining()
    for url in (house.url, house.ops_url):
        assert (await house.http.get(f"{url}/healthz")).status_code == 200
        answer = await house.http.get(f"{url}/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "draining"})
    assert (await house.submit()).status_code == 201


async def test_starting_process_is_not_ready() -> None:
    async with run_fake_gateway() as (house, _, _):
        registry = house.services.registry
        assert isinstance(registry, FakeRegistry)
        registry.is_ready = False
        for url in (house.url, house.ops_url):
            assert (await house.http.get(f"{url}/healthz")).status_code == 200
            answer = await house.http.get(f"{url}/readyz")
            assert (answer.status_code, answer.json()) == (503, {"status": "starting"})


async def test_unavailable_store_keeps_the_process_ready() -> None:
    async with run_fake_gateway() as (house, ledger, _):
        task = (await house.submit()).json()
        ledger.is_unavailable = True
        assert (await house.http.get(f"{house.url}/readyz")).status_code == 200
        assert (await house.call("GET", task["links"]["self"])).status_code == 200
        answer = await house.submit()
        expect_problem(answer, 503, "ledger-unavailable")
        assert int(answer.headers["retry-after"]) > 0


async def test_admin_routes_are_on_their_own_port(house: RunningGateway) -> None:
    metrics = await house.http.get(f"{house.ops_url}/metrics")
    assert metrics.status_code == 200
    assert metrics.headers["content-type"].startswith("text/plain")
    assert re.search(r"^\w+_requests_total\{.*route=\"/admin/v1/tenants/\{name\}\"", metrics.text, re.MULTILINE)

    as_operator = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    for path in ("/metrics", "/admin/v1/tenants", "/admin/v1/accounts/main", "/admin"):
        expect_problem(await house.call("GET", path, token="", headers=as_operator), 404, "not-found")
    for path in ("/v1/quota", "/v1/tasks", "/docs", "/openapi.json", "/api/check_task_status", "/"):
        answer = await house.http.get(house.ops_url + path, headers=as_operator)
        expect_problem(answer, 404, "not-found")


async def test_admin_routes_need_the_admin_token(house: RunningGateway) -> None:
    for headers in ({}, {"Authorization": f"Bearer {house.token}"}, {"Authorization": f"Bearer {ADMIN_TOKEN}x"}):
        for method, path in (("GET", "/tenants"), ("PUT", "/tenants/x"), ("POST", "/tenants/shop/tokens")):
            answer = await house.http.request(method, f"{house.ops_url}/admin/v1{path}", headers=headers)
            expect_problem(answer, 401, "unauthenticated")
            assert answer.headers["www-authenticate"].startswith("Bearer ")


async def test_request_id_header(house: RunningGateway) -> None:
    calls = [
        ("GET", "/healthz"),
        ("GET", "/v1/quota"),
        ("GET", "/nowhere"),
        ("PUT", "/v1/quota"),
        ("POST", "/v1/tasks/upscale"),
    ]
    for method, path in calls:
        for given in ("a", "Req-1_2.3", "x" * 128):
            answer = await house.call(method, path, headers={"X-Request-Id": given})
            assert answer.headers.get_list("x-request-id") == [given]
        made = set()
        for refused in ("", "x" * 129, "a b", "a/b", "é".encode(), "a\tb"):
            answer = await house.call(method, path, headers={"X-Request-Id": refused})
            assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-request-id"])
            made.add(answer.headers["x-request-id"])
        assert len(made) == 6


async def test_tenant_data_is_private(house: RunningGateway) -> None:
    created = await house.submit()
    path = created.headers["location"]
    for answer in (
        created,
        await house.call("GET", path),
        await house.call("GET", path, headers={"If-None-Match": created.headers["etag"]}),
        await house.call("HEAD", path),
        await house.call("GET", "/v1/tasks"),
        await house.call("GET", "/v1/quota"),
    ):
        assert answer.headers["cache-control"] == "private, no-cache"


async def test_location_header(house: RunningGateway) -> None:
    created = await house.submit()
    assert created.headers["location"] == created.json()["links"]["self"] == f"/v1/tasks/{created.json()['id']}"
    assert (await house.call("GET", created.headers["location"])).json() == created.json()


async def test_retry_after_header(house: RunningGateway) -> None:
    created = await house.submit()
    assert created.headers["retry-after"] == "3"
    path = created.headers["location"]
    assert (await house.call("GET", path)).headers["retry-after"] == "3"
    await house.wait_for_task(created.json()["id"])
    assert "retry-after" not in (await house.call("GET", path)).headers


async def test_age_header(house: RunningGateway) -> None:
    await house.upstream.keep_running()
    path = (await house.submit()).headers["location"]
    assert (await house.call("GET", path)).headers["age"] == "0"
    await house.poll_due_tasks()
    await house.advance(100)
    assert 100 <= int((await house.call("GET", path)).headers["age"]) <= 103
    await house.poll_due_tasks()
    assert int((await house.call("GET", path)).headers["age"]) <= 3


async def test_conditional_read(house: RunningGateway) -> None:
    created = await house.submit()
    path, tag = created.headers["location"], created.headers["etag"]
    assert re.fullmatch(r'"[\x21\x23-\x7e]+"', tag)
    for condition in (tag, f"W/{tag}", f'"other", {tag}', f'{tag},"other"', "*", f'W/"a" ,  W/{tag}'):
        answer = await house.call("GET", path, headers={"If-None-Match": condition})
        assert (answer.status_code, answer.content) == (304, b""), condition
        assert answer.headers["etag"] == tag
        assert answer.headers["retry-after"] == "3"
        assert "content-type" not in answer.headers
    for condition in ('"other"', "", tag.strip('"'), f'{tag[:-1]}x"', '"*"', "w/x"):
        answer = await house.call("GET", path, headers={"If-None-Match": condition})
        assert (answer.status_code, answer.json()["state"]) == (200, "queued"), condition
    await house.wait_for_task(created.json()["id"])
    answer = await house.call("GET", path, headers={"If-None-Match": tag})
    assert (answer.status_code, answer.json()["state"]) == (200, "succeeded")
    assert answer.headers["etag"] != tag
    again = await house.call("GET", path, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


async def test_conditional_read_without_a_store() -> None:
    async with run_fake_gateway() as (house, ledger, upstream):
        await house.upstream.keep_running()
        path = (await house.submit()).headers["location"]
        ledger.is_unavailable = True
        running = await house.call("GET", path)
        assert running.json()["state"] == "running"
        condition = {"If-None-Match": running.headers["etag"]}
        assert (await house.call("GET", path, headers=condition)).status_code == 304
        upstream.next_checks.clear()
        house.services.task_reader._queries.clear()  # as after a poll interval
        ended = await house.call("GET", path, headers=condition)
        assert (ended.status_code, ended.json()["state"]) == (200, "succeeded")


async def test_rate_limit_headers(house: RunningGateway) -> None:
    unlimited = await house.submit()
    assert not {"ratelimit", "ratelimit-policy"} & {*unlimited.headers}
    await house.put_tenant(
        limits=[{"window": "hour", "tasks": 3}, {"window": "total", "tasks": 9, "money": 5}], max_active=9
    )
    answer = await house.submit()
    assert answer.headers["ratelimit-policy"] == '"hour-tasks";q=3;w=3600, "total-tasks";q=9'
    assert re.fullmatch(r'"hour-tasks";r=1;t=\d{1,4}, "total-tasks";r=7', answer.headers["ratelimit"])


async def test_violated_money_limit_is_in_yuan(house: RunningGateway) -> None:
    await house.upstream.set_balance(0, 300)
    await house.put_tenant(limits=[{"window": "day", "money": 0.5}])
    await house.submit()
    found = expect_problem(await house.submit(), 429, "quota-exceeded")
    assert [(each["policy"], each["limit"]) for each in found["violated_policies"]] == [("day-money", 0.5)]


async def test_head_matches_get(house: RunningGateway) -> None:
    created = await house.submit()
    for url, path in (
        (house.url, created.headers["location"]),
        (house.url, "/v1/quota"),
        (house.url, "/openapi.json"),
        (house.url, "/nowhere"),
        (house.ops_url, "/healthz"),
    ):
        headers = {"Authorization": f"Bearer {house.token}", "X-Request-Id": "same"}
        whole = await house.http.get(url + path, headers=headers)
        bare = await house.http.head(url + path, headers=headers)
        assert (bare.status_code, bare.content) == (whole.status_code, b"")
        assert {**bare.headers, "date": ""} == {**whole.headers, "date": ""}
    request = "{} /v1/quota HTTP/1.1\r\nHost: gateway\r\n\r\n"
    async with open_raw_connection(urlsplit(house.url).port or 0) as (reader, writer):
        writer.write((request.format("HEAD") + request.format("GET")).encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
        assert (await read_response(reader)).json()["code"] == "unauthenticated"
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    assert re.search(r'method="HEAD".*route="/v1/quota"', metrics)
    assert await house.upstream.count_submits() == 1


async def test_no_framework_pages(house: RunningGateway) -> None:
    for url in (house.url, house.ops_url):
        for path in ("", "/", "/openapi.json", "/openapi.yaml", "/swagger", "/redoc", "/elements", "/anything"):
            answer = await house.http.get(f"{url}/schema{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), path
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    assert 'route="/schema' not in metrics
    assert re.search(
        r'gateway_http_requests_total\{method="GET",port="tenants",route="unmatched",status="404"\} 8.0', metrics
    )


async def test_route_metrics_start_at_zero(house: RunningGateway) -> None:
    path = (await house.submit()).headers["location"]
    assert (await house.call("GET", path)).status_code == 200
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    routes = set(
        re.findall(r'gateway_http_requests_total\{method="GET",port="tenants",route="([^"]+)",status="200"', metrics)
    )
    assert routes
    for route in routes:
        for status in (500, 502, 503, 504):
            zero = f'gateway_http_requests_total{{method="GET",port="tenants",route="{route}",status="{status}"}} 0.0'
            assert zero in metrics


async def test_unparsable_request_is_a_problem(house: RunningGateway) -> None:
    faults = {
        b"GET / HTTP/1.1\r\n\r\n": (400, "malformed-request"),
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 100 + b"\r\n": (431, "headers-too-large"),
    }
    for url in (house.url, house.ops_url):
        for fault, (status, code) in faults.items():
            async with open_raw_connection(urlsplit(url).port or 0) as (reader, writer):
                writer.write(fault)
                answer = await read_response(reader)
                assert (answer.status, answer.json()["code"], answer.json()["status"]) == (status, code, status)
                assert answer.headers["content-type"] == "application/problem+json"
                assert answer.json()["instance"] == answer.headers["x-request-id"]
                assert await reader.read() == b""
    metrics = (await house.http.get(f"{house.ops_url}/metrics")).text
    for port in ("tenants", "operators"):
        counted = f'gateway_http_requests_total{{method="other",port="{port}",route="unmatched",status="431"}} 1.0'
        assert counted in metrics
