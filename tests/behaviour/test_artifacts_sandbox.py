"""Artifact downloads from the sandbox: ranges, conditions and faults."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from httpx2 import Response

from service.sandbox.faults import Fault
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.openapi_reader import resolve_reference
from tests.behaviour.upstream_control import SandboxUpstreamControl
from tests.support.images import make_png
from tests.support.valkey import Valkey


@pytest.fixture
async def gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    async with run_real_gateway(valkey) as running_gateway:
        yield running_gateway


@pytest.fixture
async def href(gateway: RunningGateway) -> str:
    task = await gateway.wait_for_task((await gateway.submit(image=make_png(200, 200))).json()["id"])
    path: str = task["artifacts"][0]["href"]
    return path


async def fetch_artifact(gateway: RunningGateway, href: str, **headers: str) -> Response:
    return await gateway.call("GET", href, headers={name.replace("_", "-"): text for name, text in headers.items()})


async def test_ranges_add_up_to_the_whole(gateway: RunningGateway, href: str) -> None:
    whole = await fetch_artifact(gateway, href)
    size = len(whole.content)
    assert whole.headers["accept-ranges"] == "bytes"
    for value, first, last in (
        ("0-9", 0, 9),
        ("10-", 10, size - 1),
        ("-5", size - 5, size - 1),
        ("0-99999999", 0, size - 1),
    ):
        part = await fetch_artifact(gateway, href, Range=f"bytes={value}")
        assert (part.status_code, part.headers["content-range"]) == (206, f"bytes {first}-{last}/{size}")
        assert part.content == whole.content[first : last + 1]
        assert part.headers["content-length"] == str(last + 1 - first)
        same = {"content-type", "content-disposition", "etag", "x-content-type-options"}
        assert {name: part.headers[name] for name in same} == {name: whole.headers[name] for name in same}


async def test_document_lists_headers_and_types(gateway: RunningGateway, href: str) -> None:
    document = (await gateway.call("GET", "/openapi.json")).json()
    operation = document["paths"]["/v1/tasks/{task_id}/artifacts/{name}"]["get"]
    for status, headers in (
        (200, {}),
        (206, {"Range": "bytes=1-"}),
        (416, {"Range": "bytes=999999-"}),
    ):
        response = await fetch_artifact(gateway, href, **headers)
        documented = resolve_reference(document, operation["responses"][str(status)])
        assert response.status_code == status
        assert response.headers["content-type"] in documented["content"]
        # The sandbox sends no Last-Modified; other servers may.
        assert {name.lower() for name in documented["headers"]} - {"last-modified"} <= {*response.headers}
    assert operation["responses"]["304"]["headers"].keys() >= {"ETag", "Cache-Control"}


async def test_unsatisfiable_range_reports_the_size(gateway: RunningGateway, href: str) -> None:
    size = len((await fetch_artifact(gateway, href)).content)
    response = await fetch_artifact(gateway, href, Range=f"bytes={size}-")
    expect_problem(response, 416, "range-not-satisfiable")
    assert response.headers["content-range"] == f"bytes */{size}"


async def test_multiple_ranges_return_the_whole(gateway: RunningGateway, href: str) -> None:
    whole = await fetch_artifact(gateway, href)
    for value in ("bytes=0-1,4-5", "lines=0-1", "bytes=-", "bytes=x-"):
        response = await fetch_artifact(gateway, href, Range=value)
        assert (response.status_code, response.content) == (200, whole.content)
    head = await gateway.call("HEAD", href, headers={"Range": "bytes=0-1"})
    assert (head.status_code, head.headers["content-length"]) == (200, str(len(whole.content)))


async def test_if_range(gateway: RunningGateway, href: str) -> None:
    whole = await fetch_artifact(gateway, href)
    same = await fetch_artifact(gateway, href, Range="bytes=10-", If_Range=whole.headers["etag"])
    assert (same.status_code, same.content) == (206, whole.content[10:])
    other = await fetch_artifact(gateway, href, Range="bytes=10-", If_Range='"other"')
    assert (other.status_code, other.content) == (200, whole.content)


async def test_failure_before_the_first_byte_is_a_problem(gateway: RunningGateway, href: str) -> None:
    for fault, status, code in (
        (Fault(on="file", times=1, reply="reset"), 502, "upstream-invalid-response"),
        (Fault(on="file", times=1, reply="page", status=410), 502, "upstream-invalid-response"),
        (Fault(on="file", times=1, reply="page", status=404), 503, "upstream-unavailable"),
        (Fault(on="file", times=1, reply="page"), 502, "upstream-invalid-response"),
        (Fault(on="file", times=1, reply="page", status=503), 503, "upstream-unavailable"),
    ):
        await sandbox_control(gateway)._set_fault(fault)
        response = await fetch_artifact(gateway, href)
        expect_problem(response, status, code)
        assert "127.0.0.1" not in response.text
        assert ("retry-after" in response.headers) == (status == 503)
    assert (await fetch_artifact(gateway, href)).status_code == 200


async def test_missing_artifact_is_retryable_at_first_and_gone_later(gateway: RunningGateway, href: str) -> None:
    for passed, status in ((0, 503), (299, 503), (2, 502)):
        await gateway.advance(passed)
        gateway.services.task_cache.clear()
        await sandbox_control(gateway)._set_fault(Fault(on="file", times=1, reply="page", status=404))
        response = await fetch_artifact(gateway, href)
        assert (response.status_code, "retry-after" in response.headers) == (status, status == 503)


async def test_slow_server_is_awaited(gateway: RunningGateway, href: str) -> None:
    await sandbox_control(gateway)._set_fault(Fault(on="file", times=1, latency=0.2))
    assert (await fetch_artifact(gateway, href)).status_code == 200


async def test_truncated_download_can_be_resumed(gateway: RunningGateway, href: str) -> None:
    whole = await fetch_artifact(gateway, href)
    await sandbox_control(gateway)._set_fault(Fault(on="file", times=1, reply="cut"))
    with pytest.raises(httpx2.RemoteProtocolError):
        await fetch_artifact(gateway, href)
    rest = await fetch_artifact(gateway, href, Range="bytes=10-", If_Range=whole.headers["etag"])
    assert rest.content == whole.content[10:]


async def test_artifact_of_a_task_lost_by_redis(gateway: RunningGateway, href: str, valkey: Valkey) -> None:
    task_id = href.split("/")[3]
    reservation = gateway.services.task_reader.task_ids.decode(task_id).reservation
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    await client.delete(Keys("gw").task(reservation))
    await connections.aclose()
    gateway.services.task_cache.clear()
    assert (await fetch_artifact(gateway, href)).status_code == 200


async def test_deleted_account_reaches_no_private_address(gateway: RunningGateway, href: str) -> None:
    assert (await gateway.call_admin("DELETE", "/accounts/main?force=true")).status_code == 204
    expect_problem(await fetch_artifact(gateway, href), 502, "upstream-invalid-response")


def sandbox_control(gateway: RunningGateway) -> SandboxUpstreamControl:
    assert isinstance(gateway.upstream, SandboxUpstreamControl)
    return gateway.upstream
