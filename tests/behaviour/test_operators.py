"""Named operators: the actor of each change, and the role that can make none."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from httpx2 import Response
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from service.domain.tenants import hash_token
from service.domain.webhooks import event_id
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_real_gateway
from tests.behaviour.requests import expect_problem, run_task, submission_id_of
from tests.support.valkey import Valkey

TOKENS = {"alice": "the-token-of-alice", "bob": "the-token-of-bob", "carol": ADMIN_TOKEN}
OPERATORS = ",".join(
    f"{name}:{role}:{hash_token(TOKENS[name]).hex()}"
    for name, role in {"alice": "admin", "bob": "read-only", "carol": "admin"}.items()
)
WEBHOOK = {"url": "https://hooks.example/"}
CHANGES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "PUT /accounts/{extra}": ("account.updated", {"user_key": "key-of-extra"}),
    "PATCH /accounts/{extra}": ("account.updated", {"note": "Unused."}),
    "POST /accounts/{extra}/reopen": ("account.reopened", None),
    "DELETE /accounts/{extra}": ("account.deleted", None),
    "PUT /tenants/{press}": ("tenant.updated", {"accounts": ["main"], "webhook": WEBHOOK}),
    "PATCH /tenants/{press}": ("tenant.updated", {"max_active": 1}),
    "POST /tenants/{press}/webhook-secret": ("webhook.secret_rotated", None),
    "POST /tenants/{press}/tokens": ("token.created", None),
    "DELETE /tenants/{shop}/tokens/{TOKEN_ID}": ("token.revoked", None),
    "POST /tenants/{press}/revoke-all": ("token.all_revoked", None),
    "DELETE /tenants/{press}": ("tenant.deleted", None),
    "PUT /registry": ("registry.applied", {"tenants": {"lab": {"accounts": ["main"]}}}),
    "POST /registry/rotate-keys": ("request.ended", None),  # nothing to encrypt again
    "POST /webhooks/{DELIVERY_ID}/redeliver": ("webhook.redelivered", None),
    "POST /refunds": ("submission.refunded", {"task": "{TASK_ID}", "reason": "It was of no use."}),
    "POST /clock/reset": ("clock.reset", None),
}
"""All changes in an order in which each succeeds, with their event and body."""


async def call_as(gateway: RunningGateway, name: str, label: str, body: Any = None) -> Response:
    """Send a request such as `GET /accounts` with the token of an operator."""
    headers = {"Authorization": f"Bearer {TOKENS[name]}"}
    return await gateway.call_admin(*label.split(), headers=headers, json=body)


def mask_names(label: str) -> str:
    return re.sub(r"\{\w+\}", "{}", label)


def fill_in(text: str, ids: Mapping[str, str]) -> str:
    """Replace `{NAME}` by the id of this name, else by the name."""
    return re.sub(r"\{(\w+)\}", lambda found: ids.get(found[1], found[1]), text)


async def list_operations(gateway: RunningGateway) -> list[tuple[str, str]]:
    """Return method and path of all operations behind the operators' tokens."""
    paths = (await gateway.http.get(f"{gateway.ops_url}/openapi.json")).json()["paths"]
    items = {path.removeprefix("/admin/v1"): item for path, item in paths.items() if path.startswith("/admin/v1")}
    return [(method.upper(), path) for path, item in items.items() for method in item]


async def test_every_change_has_an_actor_and_needs_the_role(valkey: Valkey) -> None:
    """A read-only operator is refused before anything changes; an admin's name is on the event of each change."""
    async with run_real_gateway(valkey, GATEWAY_OPERATORS=OPERATORS) as gateway:
        await gateway.put_tenant(webhook=WEBHOOK)
        task = await run_task(gateway)
        (token,) = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
        ids = {"TOKEN_ID": token["id"], "TASK_ID": task["id"]}
        ids["DELIVERY_ID"] = event_id(submission_id_of(gateway, task))
        expected = [f"{method} {path}" for method, path in await list_operations(gateway) if method != "GET"]
        assert sorted(map(mask_names, CHANGES)) == sorted(map(mask_names, expected))
        for label, (event, body) in CHANGES.items():
            version = gateway.services.registry.current.version
            request = json.loads(fill_in(json.dumps([label, body]), ids))
            with capture_logs(processors=[merge_contextvars]) as refused:
                expect_problem(await call_as(gateway, "bob", *request), 403, "forbidden")
            assert [(item["event"], item["operator"]) for item in refused] == [("request.ended", "bob")], label
            assert gateway.services.registry.current.version == version, label
            with capture_logs(processors=[merge_contextvars]) as changed:
                response = await call_as(gateway, "alice", *request)
            assert response.is_success, (label, response.text)
            assert event in {item["event"] for item in changed}, label
            assert {item["operator"] for item in changed} == {"alice"}, label


async def test_read_only_operator_reads_everything(valkey: Valkey) -> None:
    async with run_real_gateway(valkey, GATEWAY_OPERATORS=OPERATORS) as gateway:
        for method in ("GET", "HEAD"):
            for path in [path for of, path in await list_operations(gateway) if of == "GET"]:
                theirs, own = [await call_as(gateway, name, f"{method} {path}") for name in ("alice", "bob")]
                assert own.status_code == theirs.status_code != 403, path
        assert (await call_as(gateway, "bob", "GET /tenants/shop")).is_success


async def test_name_of_each_request(valkey: Valkey) -> None:
    """A name is logged with the requests of its token only, also if they are pipelined; it replaces `admin`."""
    requests = (
        f"GET /admin/v1/accounts HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {ADMIN_TOKEN}\r\n\r\n"
        "GET /healthz HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n"
    )
    for operators, actor in (("", "admin"), (OPERATORS, "carol")):
        async with run_real_gateway(valkey, GATEWAY_OPERATORS=operators) as gateway:
            with capture_logs(processors=[merge_contextvars]) as ended:
                reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(gateway.ops_url).port)
                writer.write(requests.encode())
                await reader.read()
                writer.close()
                await gateway.call_admin("GET", "/accounts", headers={"Authorization": "Bearer another-token"})
                await gateway.call("GET", "/v1/quota")
        assert [item.get("operator") for item in ended] == [actor, None, None, None]
        assert [item["status"] for item in ended] == [200, 200, 401, 200]
