"""Requests for usage, windows and submissions, and their consistency."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

from httpx2 import Response

from service.container import TASK_ID_PURPOSE
from service.crypto import Keyring
from service.domain.tasks import Kind, TaskIdCodec, TaskReference
from tests.behaviour.audit import UNREACHABLE_POLICIES, expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, RunningGateway
from tests.behaviour.upstream_control import SandboxUpstreamControl

NO_SUBMISSIONS: Mapping[str, int] = dict.fromkeys(
    ("running", "succeeded", "failed", "unknown", "refused", "not_sent"), 0
)


async def read_usage(house: RunningGateway, query: str = "", *, token: str | None = None) -> dict[str, Any]:
    return expect_json(await house.call("GET", f"/v1/usage?{query}", token=token))


async def read_all_usage(house: RunningGateway, query: str = "") -> dict[str, Any]:
    return expect_json(await house.call_admin("GET", f"/usage?{query}"))


async def read_submission(house: RunningGateway, name: str) -> dict[str, Any]:
    return expect_json(await house.call("GET", f"/v1/submissions/{name}"))


async def post_refund(house: RunningGateway, **body: object) -> Response:
    return await house.call_admin("POST", "/refunds", json=body)


def submission_id_of(house: RunningGateway, task: Mapping[str, Any]) -> str:
    """Return the submission id that is encrypted in the task's id."""
    return house.services.submissions.submission_of_task(task["id"])


def expect_json(answer: Response, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    content: dict[str, Any] = answer.json()
    return content


async def request_media_type(house: RunningGateway, path: str, accept: str) -> Response:
    """Request a media type from the port that serves the path."""
    port, token = (house.ops_url, ADMIN_TOKEN) if path.startswith("/admin/") else (house.url, house.token)
    return await house.http.get(port + path, headers={"Authorization": f"Bearer {token}", "Accept": accept})


async def read_csv_rows(house: RunningGateway, path: str) -> list[dict[str, str]]:
    """Read usage as CSV with the parser of the standard library."""
    answer = await request_media_type(house, path, "text/csv")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/csv; header=present")
    text = answer.content.decode()
    assert text.count("\n") == text.count("\r\n")
    return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))


def flatten_item(item: Mapping[str, Any]) -> dict[str, str]:
    """Flatten an item as its CSV row must be."""
    flat: dict[str, str] = {}
    for name, value in item.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}_{inner}": each for inner, each in flatten_item(value).items()}
        else:
            flat[name] = "" if value is None else str(value)
    return flat


async def read_windows(house: RunningGateway) -> dict[str, tuple[float, float]]:
    """Return tasks and yuan of `shop` by window; needs limits on all of them."""
    policies = expect_json(await house.call("GET", "/v1/quota"))["policies"]
    used = {each["policy"]: each["used"] for each in policies}
    return {name: (used[f"{name}-tasks"], used[f"{name}-money"]) for name in ("day", "month", "total")}


async def read_charged_today(house: RunningGateway) -> tuple[float, float]:
    """Return tasks and yuan charged today; assert that usage and windows agree."""
    today = (await read_usage(house))["to"]
    charged = [
        (await read_usage(house, query))["total"]["charged"]
        for query in (f"from={today}", f"from={today}&interval=total&group_by=none", "interval=month")
    ]
    found = [(each["tasks"], each["money"]) for each in charged]
    in_windows = await read_windows(house)
    assert found == [in_windows["day"], in_windows["day"], in_windows["month"]]
    return found[0]


async def advance_to_next_window(house: RunningGateway, window: str = "day") -> date:
    """Advance to noon of the first day of the next window; return that day."""
    await house.put_tenant(**UNREACHABLE_POLICIES)
    policies = expect_json(await house.call("GET", "/v1/quota"))["policies"]
    ends = {each["policy"]: each["resets_at"] for each in policies}
    end, minute = (datetime.fromisoformat(ends[f"{name}-tasks"]) for name in (window, "minute"))
    await house.advance((end - minute + timedelta(hours=12)).total_seconds())
    return end.astimezone(UTC).date()


async def run_task(house: RunningGateway, kind: str = "face-enhance", *, token: str | None = None) -> dict[str, Any]:
    return await house.wait_for_task((await house.submit(kind, token=token)).json()["id"], token=token)


async def submit_and_lose_response(house: RunningGateway, kind: str = "face-enhance") -> str:
    await house.upstream.lose_next_response()
    return str(expect_problem(await house.submit(kind), 504, "submission-unknown")["submission_id"])


async def recover_task(house: RunningGateway, name: str) -> str:
    """Read a task whose submit response was lost by its id; return the id."""
    known = house.services.registry.current
    tenant, account = known.tenants["shop"], known.accounts["main"]
    told = await read_submission(house, name)
    created = int(datetime.fromisoformat(told["created_at"]).timestamp() * 1000)
    upstream_id = "up"
    if isinstance(house.upstream, SandboxUpstreamControl):
        upstream_id = [each.task_id for each in await house.upstream.control.list_requests() if each.task_id][-1]
    reference = TaskReference(tenant.id, account.id, Kind(told["kind"]), created, name, upstream_id)
    task_id = TaskIdCodec(Keyring([SECRET_KEY]).derive(TASK_ID_PURPOSE)).encode(reference)
    await house.upstream.wait_until_idle()
    expect_json(await house.call("GET", f"/v1/tasks/{task_id}"))
    return task_id
