"""Submissions under an idempotency key and assertions on their responses."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from typing import Any

from httpx2 import Response

from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import RunningGateway
from tests.support.images import draw_image

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
