"""Requests for the registry as one document."""

from __future__ import annotations

import base64
from typing import Any

from httpx2 import Response

from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway

ACCOUNT_KEY = "a-key-of-the-registry-0123"
HOOK_SECRET = "whsec_" + base64.b64encode(b"s" * 32).decode()
FULL_REGISTRY: dict[str, Any] = {
    "accounts": {
        "main": {
            "user_key": {"env": "MAIN_KEY", "value": ACCOUNT_KEY},
            "base_url": "http://127.0.0.1:9",
            "floor_count": 2,
            "floor_money": 0.5,
            "max_price": {"upscale": 1.25},
        },
        "spare": {"user_key": {"file": "spare.key", "value": ACCOUNT_KEY + "-2"}},
    },
    "tenants": {
        "shop": {
            "accounts": ["spare", "main"],
            "limits": [{"window": "day", "tasks": 5, "money": None}],
            "max_active": 4,
            "spending_mode": "count_only",
            "kinds": ["upscale"],
            "state": "read-only",
            "webhook": {
                "url": "https://hooks.example/a",
                "allow": ["10.0.0.0/8"],
                "secret": {"env": "HOOK", "value": HOOK_SECRET},
            },
            "tokens": {"0123456789ab": {"sha256": "ab" * 32, "label": "a label", "expires_at": "2100-01-01T00:00:00Z"}},
        },
    },
}


async def get_registry(gateway: RunningGateway) -> Response:
    response = await gateway.call_admin("GET", "/registry")
    assert response.status_code == 200, response.text
    return response


async def put_registry(gateway: RunningGateway, document: Any, tag: str) -> Response:
    """Send the registry with `If-Match`."""
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}", "If-Match": tag}
    return await gateway.http.put(f"{gateway.ops_url}/admin/v1/registry", json=document, headers=headers)


async def apply_registry(gateway: RunningGateway, document: Any, query: str = "") -> dict[str, Any]:
    """Send the registry; return the differences applied."""
    response = await gateway.call_admin("PUT", f"/registry{query}", json=document)
    assert response.status_code == 200, response.text
    applied: dict[str, Any] = response.json()
    return applied
