"""Checks of problem documents, and of what a refused request leaves behind."""

from __future__ import annotations

from typing import Any

from httpx2 import Response
from redis.asyncio import Redis

from service.storage.redis import Keys
from tests.behaviour.gateway_fixture import RunningGateway
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
