"""Requests to the gateway, and assertions on its responses."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from io import BytesIO
from typing import Any

from httpx2 import Response
from redis.asyncio import Redis

from service.container import TASK_ID_PURPOSE
from service.crypto import Keyring, TaskIdCodec
from service.domain.tasks import Kind, TaskReference
from service.storage.redis import Keys
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, RunningGateway
from tests.support.images import draw_image
from tests.support.valkey import Valkey

UNREACHABLE_POLICIES: dict[str, Any] = {
    "limits": [
        {"window": name, "tasks": 1_000, "money": 1_000} for name in ("minute", "hour", "day", "month", "total")
    ],
    "max_active": 1_000,
}
"""Limits that no test reaches, so that the quota reports every counter."""


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
    return document


async def assert_nothing_happened(gateway: RunningGateway, valkey: Valkey) -> None:
    """Assert that nothing is reserved, counted, stored or sent."""
    report = (await gateway.call("GET", "/v1/quota")).json()
    assert len(report["policies"]) == 11
    assert {(policy["used"], policy["reserved"]) for policy in report["policies"]} == {(0, 0)}
    assert (await gateway.call("GET", "/v1/tasks")).json() == {"items": [], "next_cursor": None}
    assert await gateway.upstream.count_submits() == 0
    assert await _submission_keys(valkey) == []


async def _submission_keys(valkey: Valkey) -> list[str]:
    """List the Redis keys that a submission writes."""
    names = Keys("gw")
    async with Redis.from_url(valkey.url) as client:
        stored = sorted([key.decode() async for key in client.scan_iter(count=1_000)])
    prefixes = names.reservation(""), names.task(""), f"{names.tenant_tasks(0)[:-1]}", names.leases, names.poll_due
    return [key for key in stored if key.startswith(prefixes)]


KEY = '"8e03978e-40d5-43dd-bc93-6894a57f9324"'
UNREACHABLE_LIMITS: dict[str, Any] = {"limits": [{"window": "total", "tasks": 100}], "max_active": 100}
"""Limits that no test reaches, so that the counters are reported."""


def make_jpeg(comment: bytes = b"a") -> bytes:
    """Make a valid JPEG; comments of one length change only their own bytes."""
    buffer = BytesIO()
    draw_image().save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


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
    assert response.status_code == 201, response.text
    assert "idempotent-replayed" not in response.headers
    task: dict[str, Any] = response.json()
    return task


def expect_replayed(response: Response, first: Mapping[str, Any]) -> dict[str, Any]:
    """Assert that a response is a replay of `first`; return its task."""
    assert response.status_code == 201, response.text
    assert response.headers["idempotent-replayed"] == "true"
    task: dict[str, Any] = response.json()
    assert task["id"] == first["id"]
    assert response.headers["location"] == f"/v1/tasks/{first['id']}"
    return task


def expect_refused(response: Response, status: int, code: str) -> dict[str, Any]:
    """Assert that a response is this problem and no replay; return the document."""
    assert "idempotent-replayed" not in response.headers
    return expect_problem(response, status, code)


def expect_unknown(response: Response, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Assert an unknown outcome, replayed if `first` is given; return the document."""
    document = expect_problem(response, 504, "submission-unknown")
    assert response.headers.get("idempotent-replayed") == ("true" if first else None)
    assert document["submission_id"] == (first or document)["submission_id"]
    return document


async def read_counts(gateway: RunningGateway) -> tuple[float, float, float]:
    """Return used, reserved and active tasks."""
    report = (await gateway.call("GET", "/v1/quota")).json()
    policies = {policy["policy"]: policy for policy in report["policies"]}
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]


NO_SUBMISSIONS: Mapping[str, int] = dict.fromkeys(
    ("running", "succeeded", "failed", "unknown", "refused", "not_sent"), 0
)


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


def expect_json(response: Response, status: int = 200) -> dict[str, Any]:
    assert response.status_code == status, response.text
    content: dict[str, Any] = response.json()
    return content


async def request_media_type(gateway: RunningGateway, path: str, accept: str) -> Response:
    """Request a media type from the port that serves the path."""
    port, token = (gateway.ops_url, ADMIN_TOKEN) if path.startswith("/admin/") else (gateway.url, gateway.token)
    return await gateway.http.get(port + path, headers={"Authorization": f"Bearer {token}", "Accept": accept})


async def read_csv_rows(gateway: RunningGateway, path: str) -> list[dict[str, str]]:
    """Read usage as CSV with the parser of the standard library."""
    response = await request_media_type(gateway, path, "text/csv")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/csv; header=present")
    text = response.content.decode()
    assert text.count("\n") == text.count("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def flatten_item(item: Mapping[str, Any]) -> dict[str, str]:
    """Flatten an item as its CSV row must be."""
    flat: dict[str, str] = {}
    for name, value in item.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{inner}": entry for inner, entry in flatten_item(value).items()}
        else:
            flat[name] = "" if value is None else str(value)
    return flat


async def read_windows(gateway: RunningGateway) -> dict[str, tuple[float, float]]:
    """Return tasks and yuan of `shop` by window; needs limits on all of them."""
    policies = expect_json(await gateway.call("GET", "/v1/quota"))["policies"]
    used = {policy["policy"]: policy["used"] for policy in policies}
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
    policies = expect_json(await gateway.call("GET", "/v1/quota"))["policies"]
    ends = {policy["policy"]: policy["resets_at"] for policy in policies}
    end, minute = (datetime.fromisoformat(ends[f"{name}-tasks"]) for name in (window, "minute"))
    await gateway.advance((end - minute + timedelta(hours=12)).total_seconds())
    return end.astimezone(UTC).date()


async def run_task(gateway: RunningGateway, kind: str = "face-enhance", *, token: str | None = None) -> dict[str, Any]:
    return await gateway.wait_for_task((await gateway.submit(kind, token=token)).json()["id"], token=token)


async def submit_and_lose_response(gateway: RunningGateway, kind: str = "face-enhance") -> str:
    await gateway.upstream.lose_next_response()
    return str(expect_problem(await gateway.submit(kind), 504, "submission-unknown")["submission_id"])


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
