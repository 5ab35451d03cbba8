"""Requests to the gateway, and assertions on its responses."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

from httpx2 import Response
from redis.asyncio import Redis

from service.container import TASK_ID_PURPOSE
from service.crypto import Keyring, TaskIdCodec
from service.domain.tasks import Kind, TaskReference
from service.storage.redis import Keys
from tests.behaviour.gateway_fixture import SECRET_KEY, USER_KEY, RunningGateway
from tests.support.images import draw_image, encode_image
from tests.support.valkey import Valkey

KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
UNREACHABLE_LIMITS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 100}], "max_active": 100}
UNREACHABLE_POLICIES: dict[str, Any] = {
    "limits": [
        {"window": name, "tasks": 1_000, "money": 1_000} for name in ("minute", "hour", "day", "month", "total")
    ],
    "max_active": 1_000,
}
"""Limits that no test reaches, so that the quota reports every counter."""


def expect_json(response: Response, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.text
    content: dict[str, Any] = response.json()
    return content


def expect_problem(response: Response, status: int, code: str) -> dict[str, Any]:
    """Assert that a response is this problem, consistent with its headers; return the document."""
    assert response.headers["content-type"] == "application/problem+json", response.text
    document: dict[str, Any] = response.json()
    assert (response.status_code, document["code"]) == (status, code), document
    assert document["type"] == f"urn:imaging-gateway:problem:{code}"
    assert document["status"] == status
    assert document["instance"] == response.headers["x-request-id"]
    assert document["title"]
    assert document["detail"]
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["link"] == f'</docs/problems#{code}>; rel="help"'
    assert "idempotent-replayed" not in response.headers or code == "submission-unknown"
    return document


def assert_nothing_external(response: Response) -> None:
    """Assert that a page's policy allows no other host, no inline script and no `eval`."""
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = response.headers["content-security-policy"]
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} <= {*policy.split("; ")}
    sources = {source for directive in policy.split("; ") for source in directive.split()[1:]}
    assert sources <= {"'none'", "'self'", "'unsafe-inline'", "blob:", "data:"}
    assert response.headers["x-content-type-options"] == "nosniff"


def expect_invalid(response: Response, *fields: str) -> None:
    """Assert that a response names these invalid fields, in the gateway's own words."""
    problem = expect_problem(response, 422, "invalid-options")
    assert [error["field"] for error in problem["errors"]] == list(fields), problem
    assert not [error for error in problem["errors"] if error["detail"].startswith("Expected `")], problem


async def assert_nothing_happened(gateway: RunningGateway, valkey: Valkey) -> None:
    """Assert that nothing is reserved, counted, stored or sent; needs limits on all windows."""
    policies = await read_policies(gateway)
    assert len(policies) == 11
    assert {(policy["used"], policy["reserved"]) for policy in policies.values()} == {(0, 0)}
    assert (await gateway.call("GET", "/v1/tasks")).json() == {"items": [], "next_cursor": None}
    assert await gateway.upstream.count_submits() == 0
    names = Keys("gw")
    prefixes = names.reservation(""), names.task(""), f"{names.tenant_tasks(0)[:-1]}", names.leases, names.poll_due
    async with Redis.from_url(valkey.url, decode_responses=True) as client:
        assert [key async for key in client.scan_iter(count=1_000) if key.startswith(prefixes)] == []


async def read_policies(gateway: RunningGateway) -> dict[str, dict[str, Any]]:
    policies = expect_json(await gateway.call("GET", "/v1/quota"))["policies"]
    return {policy["policy"]: policy for policy in policies}


async def read_counts(gateway: RunningGateway) -> tuple[int, int, int]:
    """Return used, reserved and active tasks."""
    policies = await read_policies(gateway)
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


async def use_unreachable_account(gateway: RunningGateway) -> None:
    await gateway.call_admin("PUT", "/accounts/dead", json={"user_key": USER_KEY, "base_url": "http://127.0.0.1:9"})
    await gateway.put_tenant(accounts=["dead"])


def make_jpeg(comment: bytes = b"a") -> bytes:
    """Make a valid JPEG; comments of one length change only their own bytes."""
    return encode_image(draw_image(), "JPEG", comment=comment)


async def submit_with_key(
    gateway: RunningGateway,
    kind: str = "seamless",
    fields: Mapping[str, str] | None = None,
    *,
    key: str = KEY,
    token: str | None = None,
    image: bytes | None = None,
) -> Response:
    headers = {"Idempotency-Key": key}
    return await gateway.submit(kind, fields, token=token, image=image or make_jpeg(), headers=headers)


def expect_created(response: Response) -> dict[str, Any]:
    """Assert that a response is a new task; return it."""
    assert "idempotent-replayed" not in response.headers
    return expect_json(response, 201)


def expect_replayed(response: Response, first: Mapping[str, Any]) -> dict[str, Any]:
    """Assert that a response is a replay of `first`; return its task."""
    task = expect_json(response, 201)
    assert response.headers["idempotent-replayed"] == "true"
    assert task["id"] == first["id"]
    assert response.headers["location"] == f"/v1/tasks/{first['id']}"
    return task


def expect_unknown(response: Response, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Assert an unknown outcome, replayed if `first` is given; return the document."""
    document = expect_problem(response, 504, "submission-unknown")
    assert response.headers.get("idempotent-replayed") == ("true" if first else None)
    assert document["submission_id"] == (first or document)["submission_id"]
    return document


async def read_usage(gateway: RunningGateway, query: str = "", *, token: str | None = None) -> dict[str, Any]:
    return expect_json(await gateway.call("GET", f"/v1/usage?{query}", token=token))


async def read_all_usage(gateway: RunningGateway, query: str = "") -> dict[str, Any]:
    return expect_json(await gateway.call_admin("GET", f"/usage?{query}"))


async def read_submission(gateway: RunningGateway, name: str) -> dict[str, Any]:
    return expect_json(await gateway.call("GET", f"/v1/submissions/{name}"))


async def post_refund(gateway: RunningGateway, **body: object) -> Response:
    return await gateway.call_admin("POST", "/refunds", json=body)


def submission_id_of(gateway: RunningGateway, task: Mapping[str, Any]) -> str:
    """Return the submission id that is encrypted in the task's id."""
    return gateway.services.submissions.resolve_submission_id(task["id"])


async def read_windows(gateway: RunningGateway) -> dict[str, tuple[float, float]]:
    """Return tasks and yuan of `shop` by window; needs limits on all of them."""
    used = {name: policy["used"] for name, policy in (await read_policies(gateway)).items()}
    return {name: (used[f"{name}-tasks"], used[f"{name}-money"]) for name in ("day", "month", "total")}


async def read_charged_today(gateway: RunningGateway) -> tuple[float, float]:
    """Return tasks and yuan charged today; assert that usage and windows agree."""
    today = (await read_usage(gateway))["to"]
    charged = [
        (await read_usage(gateway, query))["total"]["charged"]
        for query in (f"from={today}", f"from={today}&interval=total&group_by=none", "interval=month")
    ]
    totals = [(item["tasks"], item["money"]) for item in charged]
    in_windows = await read_windows(gateway)
    assert totals == [in_windows["day"], in_windows["day"], in_windows["month"]]
    return totals[0]


async def advance_to_next_window(gateway: RunningGateway, window: str = "day") -> date:
    """Advance to noon of the first day of the next window; return that day."""
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    policies = await read_policies(gateway)
    end, minute = (datetime.fromisoformat(policies[f"{name}-tasks"]["resets_at"]) for name in (window, "minute"))
    await gateway.advance((end - minute + timedelta(hours=12)).total_seconds())
    return end.astimezone(UTC).date()


async def run_task(gateway: RunningGateway, kind: str = "face-enhance", *, token: str | None = None) -> dict[str, Any]:
    return await gateway.wait_for_task((await gateway.submit(kind, token=token)).json()["id"], token=token)


async def submit_and_lose_response(gateway: RunningGateway, kind: str = "face-enhance") -> str:
    await gateway.upstream.lose_next_response()
    return str(expect_unknown(await gateway.submit(kind))["submission_id"])


async def recover_task(gateway: RunningGateway, name: str) -> str:
    """Read a task whose submit response was lost by its id; return the id."""
    registry = gateway.services.registry.current
    tenant, account = registry.tenants["shop"], registry.accounts["main"]
    submission = await read_submission(gateway, name)
    created = int(datetime.fromisoformat(submission["created_at"]).timestamp() * 1000)
    upstream_ids = [request.task_id for request in await gateway.upstream.control.list_requests() if request.task_id]
    reference = TaskReference(tenant.id, account.id, Kind(submission["kind"]), created, name, upstream_ids[-1])
    task_id = TaskIdCodec(Keyring([SECRET_KEY]).derive(TASK_ID_PURPOSE)).encode(reference)
    await gateway.upstream.wait_until_idle()
    expect_json(await gateway.call("GET", f"/v1/tasks/{task_id}"))
    return task_id
