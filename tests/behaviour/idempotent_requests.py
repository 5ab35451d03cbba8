"""Submissions under an idempotency key: as clients write them, and what they have to be answered."""

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
"""Limits that nothing here reaches, so that the counters show."""


def make_jpeg(comment: bytes = b"a") -> bytes:
    """A valid image; with another comment of the same length, only those bytes of it differ."""
    buffer = BytesIO()
    draw_image().save(buffer, "JPEG", comment=comment)
    return buffer.getvalue()


async def submit_with_key(
    house: RunningGateway,
    kind: str = "seamless",
    fields: Mapping[str, str] | None = None,
    *,
    key: str = KEY,
    token: str | None = None,
    image: bytes | None = None,
) -> Response:
    """Submit under a key."""
    headers = {"Idempotency-Key": key}
    return await house.submit(kind, fields, token=token, image=image or make_jpeg(), headers=headers)


def expect_created(answer: Response) -> dict[str, Any]:
    """The task of a submission that was not made before."""
    assert answer.status_code == 201, answer.text
    assert "idempotent-replayed" not in answer.headers
    task: dict[str, Any] = answer.json()
    return task


def expect_replayed(answer: Response, first: Mapping[str, Any]) -> dict[str, Any]:
    """The task of a submission that was made before, and led to a certain task."""
    assert answer.status_code == 201, answer.text
    assert answer.headers["idempotent-replayed"] == "true"
    task: dict[str, Any] = answer.json()
    assert task["id"] == first["id"]
    assert answer.headers["location"] == f"/v1/tasks/{first['id']}"
    return task


def expect_refused(answer: Response, status: int, code: str) -> dict[str, Any]:
    """The problem of a submission that was refused, and is not said to be an earlier one."""
    assert "idempotent-replayed" not in answer.headers
    return expect_problem(answer, status, code)


def expect_unknown(answer: Response, first: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The problem of a submission whose answer was lost, now or, if it is given, when it was made before."""
    document = expect_problem(answer, 504, "submission-unknown")
    assert answer.headers.get("idempotent-replayed") == ("true" if first else None)
    assert document["submission_id"] == (first or document)["submission_id"]
    return document


async def read_counts(house: RunningGateway) -> tuple[float, float, float]:
    """Of a tenant that has plenty: used, held, and how many are active."""
    report = (await house.call("GET", "/v1/quota")).json()
    policies = {each["policy"]: each for each in report["policies"]}
    return policies["total-tasks"]["used"], policies["total-tasks"]["reserved"], policies["max-active"]["used"]
