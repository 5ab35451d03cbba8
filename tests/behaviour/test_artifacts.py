"""Artifact downloads by tenants."""

from __future__ import annotations

import re
from typing import Any

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway
from tests.fakes.artifacts import FakeArtifacts


async def run_task(gateway: RunningGateway) -> dict[str, Any]:
    return await gateway.wait_for_task((await gateway.submit()).json()["id"])


async def test_artifact_is_served_at_its_href(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    (artifact,) = task["artifacts"]
    assert artifact["href"] == f"/v1/tasks/{task['id']}/artifacts/image"
    response = await gateway.call("GET", artifact["href"])
    assert response.status_code == 200
    assert response.content.startswith(b"\x89PNG")
    assert response.headers["content-type"] == "image/png"
    assert response.headers["content-length"] == str(len(response.content))
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["content-security-policy"] == "default-src 'none'; sandbox"
    assert response.headers["cache-control"] == "private, no-cache"
    assert response.headers["etag"]
    name = re.fullmatch(
        r'attachment; filename="face-enhance-[0-9a-f]{12}-image\.png"', response.headers["content-disposition"]
    )
    assert name, response.headers["content-disposition"]


async def test_head_matches_get_and_keeps_the_connection(gateway: RunningGateway) -> None:
    href = (await run_task(gateway))["artifacts"][0]["href"]
    whole = await gateway.call("GET", href)
    for _ in range(2):
        head = await gateway.call("HEAD", href)
        assert (head.status_code, head.content) == (200, b"")
        same = {"content-type", "content-length", "content-disposition", "etag", "cache-control"}
        assert {name: head.headers[name] for name in same} == {name: whole.headers[name] for name in same}


async def test_unfinished_and_failed_tasks_have_no_artifacts(gateway: RunningGateway) -> None:
    await gateway.upstream.fail_next_task()
    task_id = (await gateway.submit()).json()["id"]
    href = f"/v1/tasks/{task_id}/artifacts/image"
    assert "not ended" in expect_problem(await gateway.call("GET", href), 404, "not-found")["detail"]
    assert (await gateway.wait_for_task(task_id))["state"] == "failed"
    assert "failed" in expect_problem(await gateway.call("GET", href), 404, "not-found")["detail"]


async def test_unknown_artifact_name_lists_the_available_ones(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    for name in ("grid", "IMAGE", "x", "..%2fimage"):
        response = await gateway.call("GET", f"/v1/tasks/{task['id']}/artifacts/{name}")
        expect_problem(response, 404, "not-found")
    response = await gateway.call("GET", f"/v1/tasks/{task['id']}/artifacts/vector")
    assert expect_problem(response, 404, "not-found")["detail"].endswith("it has image.")


async def test_other_tenants_artifacts_are_not_found(gateway: RunningGateway) -> None:
    href = (await run_task(gateway))["artifacts"][0]["href"]
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    unrelated = expect_problem(await gateway.call("GET", href, token=other), 404, "not-found")
    altered = expect_problem(await gateway.call("GET", href.replace("task_", "task_A")), 404, "not-found")
    assert unrelated["detail"] == altered["detail"]
    expect_problem(await gateway.call("GET", href, token=""), 401, "unauthenticated")
    expect_problem(await gateway.call("POST", href), 405, "method-not-allowed")


async def test_artifact_is_fetched_with_the_paying_account() -> None:
    fake = FakeArtifacts()
    async with run_fake_gateway(fake.fetch) as (gateway, _, _):
        task = await run_task(gateway)
        await gateway.call("GET", task["artifacts"][0]["href"])
        assert fake.requests == [("main", task["artifacts"][0]["url"])]


async def test_malformed_conditions_are_ignored(gateway: RunningGateway) -> None:
    href = (await run_task(gateway))["artifacts"][0]["href"]
    values: list[str | bytes] = ["null", "\u00e4".encode("latin-1"), "x" * 1_000, "bytes=0-1,4-5", 'bytes=1-"']
    for value in values:
        headers = dict.fromkeys(("Range", "If-Range", "If-None-Match", "If-Modified-Since"), value)
        assert (await gateway.call("GET", href, headers=headers)).status_code == 200
