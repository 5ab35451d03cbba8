"""Tasks of all tenants, as operators read them."""

from __future__ import annotations

from typing import Any

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.usage_requests import expect_json, run_task, submission_id_of, submit_and_lose_response


async def list_page(gateway: RunningGateway, **params: str) -> dict[str, Any]:
    return expect_json(await gateway.call_admin("GET", "/tasks", params=params))


async def list_ids(gateway: RunningGateway, **params: str) -> list[str]:
    return [task["id"] for task in (await list_page(gateway, **params))["items"]]


async def test_either_id_reads_any_task(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    for tenant, token in (("shop", gateway.token), ("other", await gateway.new_token("other"))):
        task = await run_task(gateway, token=token)
        submission = submission_id_of(gateway, task)
        expected = task | {"submission": submission, "tenant": tenant, "account": "main"}
        for task_or_submission in (task["id"], submission):
            assert expect_json(await gateway.call_admin("GET", f"/tasks/{task_or_submission}")) == expected
        assert (await list_page(gateway, tenant=tenant))["items"] == [expected]


async def test_submission_without_a_task(gateway: RunningGateway) -> None:
    submission = await submit_and_lose_response(gateway)
    expect_problem(await gateway.call_admin("GET", f"/tasks/{submission}"), 404, "not-found")
    assert await list_ids(gateway, tenant="shop") == []


async def test_pages_and_filters(gateway: RunningGateway) -> None:
    made = [(await run_task(gateway, kind))["id"] for kind in ("seamless", "vectorize", "seamless")][::-1]
    await gateway.put_tenant("other")
    foreign = (await gateway.submit(token=await gateway.new_token("other"))).json()["id"]
    first = await list_page(gateway, tenant="shop", limit="2")
    second = await list_page(gateway, tenant="shop", limit="2", cursor=first["next_cursor"])
    assert [task["id"] for task in first["items"] + second["items"]] == made
    assert second["next_cursor"] is None
    assert await list_ids(gateway, tenant="shop", kind="vectorize", state="succeeded") == [made[1]]
    assert await list_ids(gateway, tenant="shop", state="queued") == []
    assert await list_ids(gateway, tenant="other", state="queued") == [foreign]
    cursor_of_shop = {"tenant": "other", "cursor": first["next_cursor"]}
    expect_problem(await gateway.call_admin("GET", "/tasks", params=cursor_of_shop), 400, "malformed-request")


async def test_invalid_lists(gateway: RunningGateway) -> None:
    expect_problem(await gateway.call_admin("GET", "/tasks?tenant=missing"), 404, "not-found")
    for query, field in (("", "tenant"), ("tenant=shop&limit=0", "limit"), ("tenant=shop&status=x", "status")):
        problem = expect_problem(await gateway.call_admin("GET", f"/tasks?{query}"), 422, "invalid-options")
        assert [error["field"] for error in problem["errors"]] == [field]


async def test_reading_schedules_no_check(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = (await gateway.submit()).json()
    await gateway.advance(300)  # so that it is checked less often unless a tenant reads it
    await gateway.poll_due_tasks()
    checks = await gateway.upstream.count_checks()
    assert expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}"))["state"] == "running"
    assert await list_ids(gateway, tenant="shop") == [task["id"]]
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() == checks


async def test_deleted_tenant_and_account(gateway: RunningGateway) -> None:
    task = await run_task(gateway)
    for path in ("/tenants/shop", "/accounts/main"):
        assert (await gateway.call_admin("DELETE", path)).status_code == 204
    read = expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}"))
    assert (read["tenant"], read["account"], read["artifacts"]) == ("shop", None, task["artifacts"])
    assert (await list_page(gateway, tenant="shop"))["items"] == [read]
    await gateway.create_demo_tenant()
    assert await list_ids(gateway, tenant="shop") == []
    assert expect_json(await gateway.call_admin("GET", f"/tasks/{task['id']}")) == read
