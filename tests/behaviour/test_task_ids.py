"""Task ids are exact and per tenant."""

from __future__ import annotations

import string

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway

DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "-_"


def iter_alterations(task_id: str) -> list[str]:
    prefix, encrypted = task_id[:5], task_id[5:]
    altered = [
        prefix + encrypted[:place] + DIGITS[(DIGITS.index(digit) + 1) % 64] + encrypted[place + 1 :]
        for place, digit in enumerate(encrypted)
    ]
    altered += [prefix + encrypted[:end] for end in range(0, len(encrypted), 7)]
    altered += [prefix + encrypted + more for more in ("A", "AAAA", "=", "==", "%20", "%0A", "%00")]
    altered += [encrypted, prefix.upper() + encrypted, f"task-{encrypted}", prefix + task_id, prefix + encrypted[::-1]]
    altered += [prefix + encrypted.upper(), prefix + encrypted.lower(), prefix + encrypted[4:] + encrypted[:4]]
    # The last digit may stand for fewer bits than it could: other digits would decode to the same bytes.
    altered += [prefix + encrypted[:-1] + digit for digit in DIGITS if digit != encrypted[-1]]
    altered.append(prefix + encrypted.replace("-", "%2B"))
    return [*dict.fromkeys(item for item in altered if item != task_id)]


async def test_altered_id_is_not_found(gateway: RunningGateway) -> None:
    task_id = (await gateway.submit()).json()["id"]
    assert (await gateway.call("GET", f"/v1/tasks/{task_id}")).status_code == 200
    never = expect_problem(await gateway.call("GET", "/v1/tasks/task_never"), 404, "not-found")
    for altered in iter_alterations(task_id):
        problem = expect_problem(await gateway.call("GET", f"/v1/tasks/{altered}"), 404, "not-found")
        assert problem | {"instance": ""} == never | {"instance": ""}, altered
        expect_problem(await gateway.call_admin("GET", f"/tasks/{altered}"), 404, "not-found")
    assert await gateway.upstream.count_checks() == 0


async def test_other_tenants_task_is_not_found(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    foreign = await gateway.call("GET", f"/v1/tasks/{task['id']}", token=other)
    never = await gateway.call("GET", "/v1/tasks/task_never", token=other)
    assert expect_problem(foreign, 404, "not-found") | {"instance": ""} == expect_problem(never, 404, "not-found") | {
        "instance": ""
    }
    assert {*foreign.headers} == {*never.headers}
    tag = (await gateway.call("GET", task["links"]["self"])).headers["etag"]
    condition = {"If-None-Match": tag}
    expect_problem(await gateway.call("GET", task["links"]["self"], token=other, headers=condition), 404, "not-found")
    assert (await gateway.call("GET", "/v1/tasks", token=other)).json() == {"items": [], "next_cursor": None}
    assert await gateway.upstream.count_checks() == 0


async def test_cursor_of_another_list_is_refused(gateway: RunningGateway) -> None:
    tasks = [(await gateway.submit()).json()["id"] for _ in range(2)]
    first = (await gateway.call("GET", "/v1/tasks?limit=1")).json()
    following = (await gateway.call("GET", "/v1/tasks", params={"limit": 1, "cursor": first["next_cursor"]})).json()
    assert sorted(item["id"] for item in first["items"] + following["items"]) == sorted(tasks)

    await gateway.put_tenant("other")
    other = await gateway.new_token("other")
    assert (await gateway.submit(token=other)).status_code == 201
    response = await gateway.call("GET", "/v1/tasks", token=other, params={"cursor": first["next_cursor"]})
    expect_problem(response, 400, "malformed-request")


async def test_reused_tenant_name_gets_no_old_tasks(gateway: RunningGateway) -> None:
    task = (await gateway.submit()).json()
    assert (await gateway.call_admin("DELETE", "/tenants/shop?force=true")).status_code == 204
    expect_problem(await gateway.call("GET", task["links"]["self"]), 401, "unauthenticated")
    await gateway.put_tenant()
    token = await gateway.new_token()
    expect_problem(await gateway.call("GET", task["links"]["self"], token=token), 404, "not-found")
    assert (await gateway.call("GET", "/v1/tasks", token=token)).json()["items"] == []
