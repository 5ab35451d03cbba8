"""Tenants do not see, use or influence each other's tasks, keys and figures."""

from __future__ import annotations

from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import KEY, expect_problem, submission_id_of

OWN_ROUTES = {"/v1/quota", "/v1/usage", "/v1/tasks"}
"""Routes without an id, which show what belongs to the caller."""


async def test_no_route_shows_the_task_of_another_tenant(gateway: RunningGateway) -> None:
    """With every id of a task, another tenant gets on every route what it gets for ids that never were."""
    created = await gateway.submit(headers={"Idempotency-Key": KEY})
    task = await gateway.wait_for_task(created.json()["id"])
    ids = {"task_id": task["id"], "submission_id": submission_id_of(gateway, task), "name": "image"}
    never = {"task_id": f"task_{'A' * 90}", "submission_id": "0" * 32, "name": "image"}
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    document = (await gateway.http.get(f"{gateway.url}/openapi.json")).json()
    routes = {path for path, item in document["paths"].items() if path.startswith("/v1/") and "get" in item}
    assert {path for path in routes if "{" not in path} == OWN_ROUTES
    for route in routes - OWN_ROUTES:
        own, unknown = route.format(**ids), route.format(**never)
        assert (await gateway.call("GET", own)).status_code == 200
        for headers in ({}, {"Prefer": "wait=1", "If-None-Match": created.headers["etag"]}):
            responses = [await gateway.call("GET", path, token=other, headers=headers) for path in (own, unknown)]
            theirs, absent = [expect_problem(item, 404, "not-found") | {"instance": ""} for item in responses]
            assert theirs == absent
    client = LegacyClient(gateway.http, gateway.url, other)
    assert await client.check(task["id"]) == await client.check(never["task_id"])


async def read_figures(gateway: RunningGateway, token: str) -> list[object]:
    return [(await gateway.call("GET", route, token=token)).json() for route in sorted(OWN_ROUTES)]


async def test_figures_and_idempotency_keys_of_a_tenant_are_its_own(gateway: RunningGateway) -> None:
    """The lists, limits, usage and idempotency keys of one tenant do not change with what another submits."""
    limits = [{"window": "day", "tasks": 5}]
    await gateway.put_tenant(limits=limits)
    await gateway.put_tenant("other", limits=limits)
    other = await gateway.new_token("other")
    before = await read_figures(gateway, other)
    mine = await gateway.submit(headers={"Idempotency-Key": KEY})
    await gateway.wait_for_task(mine.json()["id"])
    assert await read_figures(gateway, other) == before
    theirs = await gateway.submit("seamless", token=other, headers={"Idempotency-Key": KEY})
    assert (theirs.status_code, "idempotent-replayed" in theirs.headers) == (201, False)
    assert theirs.json()["id"] != mine.json()["id"]
