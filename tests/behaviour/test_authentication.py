"""Callers in the access log, wrong tokens on both ports, and tokens that end during an upload."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from httpx2 import Request, Response
from structlog.testing import capture_logs

from service.api import auth
from service.api.auth import FAILURE_SECONDS, FREE_FAILURES
from service.domain.tenants import Registry
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.requests import expect_problem
from tests.support.images import make_png
from tests.support.valkey import Valkey
from tests.unit.asgi_client import open_raw_connection

PROXIES: Any = {"GATEWAY_TRUSTED_PROXIES": "127.0.0.0/8, 10.0.0.0/8"}


@pytest.fixture
async def proxied(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway that trusts its clients to forward the addresses of theirs."""
    async with run_real_gateway(valkey, **PROXIES) as gateway:
        yield gateway


async def call_from(gateway: RunningGateway, address: str, token: str | None = "wrong") -> Response:
    return await gateway.call("GET", "/v1/quota", token=token, headers={"X-Forwarded-For": address})


async def fail_often(gateway: RunningGateway, address: str) -> None:
    """Use up the failures of an address that are not delayed."""
    for _ in range(FREE_FAILURES):
        expect_problem(await call_from(gateway, address), 401, "unauthenticated")


def count_failures(gateway: RunningGateway, port: str = "tenants") -> float:
    name = "gateway_authentication_failures_total"
    return gateway.services.metrics.registry.get_sample_value(name, {"port": port}) or 0


@contextmanager
def access_log(*names: str) -> Iterator[list[tuple[Any, ...]]]:
    """Yield a list that has these fields of each request after the block."""
    fields: list[tuple[Any, ...]] = []
    with capture_logs() as logs:
        yield fields
    fields += [tuple(log[name] for name in names) for log in logs if log["event"] == "request.ended"]


async def test_access_log_names_client_and_token(valkey: Valkey) -> None:
    async def call_all(gateway: RunningGateway) -> str:
        forwarded = {"X-Forwarded-For": "192.0.2.1, 203.0.113.9, 10.1.2.3"}
        (token,) = (await gateway.call_admin("GET", "/tenants/shop", headers=forwarded)).json()["tokens"]
        for value in (None, "wrong"):
            await gateway.call("GET", "/v1/quota", token=value, headers=forwarded)
        return str(token["id"])

    none: Any = {}
    for environment, client in ((PROXIES, "203.0.113.9"), (none, "127.0.0.1")):
        async with run_real_gateway(valkey, **environment) as running:
            with access_log("client", "token_id") as logged:
                token_id = await call_all(running)
        assert logged == [(client, None), (client, token_id), (client, None)]


async def test_wrong_keys_of_old_clients_are_unauthenticated(gateway: RunningGateway) -> None:
    """So are missing ones; other errors are logged under their codes too."""
    client = LegacyClient(gateway.http, gateway.url, gateway.token)
    wrong = LegacyClient(gateway.http, gateway.url, gateway.token[:-1])
    with access_log("status", "outcome") as logged:
        for call in ("submit_task", "submit_face_enhance_task"):
            assert (await wrong.submit(call))["err_code"] == 1
        await wrong.check("task_x")
        await client.post("check_task_status", data={"task_id": "task_x"})
        await client.check("task_x")
        await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "disabled"})
        await client.check("task_x")
    codes = [*["unauthenticated"] * 4, "not-found", "answered", "tenant-disabled"]
    assert logged == [(200, code) for code in codes]
    assert (count_failures(gateway), count_failures(gateway, "operators")) == (4, 0)


async def test_valid_tokens_before_the_registry_is_loaded(gateway: RunningGateway) -> None:
    """They are not refused as invalid, which would count as a failure; an impossible token is."""
    registry = gateway.services.registry
    loaded, registry.current, registry.is_ready = registry.current, Registry(), False
    response = await gateway.call("GET", "/v1/quota")
    expect_problem(response, 503, "ledger-unavailable")
    assert (int(response.headers["retry-after"]) > 0, count_failures(gateway)) == (True, 0)
    expect_problem(await gateway.call("GET", "/v1/quota", token="wrong"), 401, "unauthenticated")
    registry.current, registry.is_ready = loaded, True
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200


async def test_failures_of_an_address_are_delayed(proxied: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """If too many are, the rest is refused at once; other addresses and valid tokens are neither."""
    monkeypatch.setattr(auth, "DELAY_SECONDS", 0.2)
    await fail_often(proxied, "203.0.113.9")
    with access_log("seconds") as logged:
        expect_problem(await call_from(proxied, "203.0.113.9"), 401, "unauthenticated")
    assert logged >= [(0.2,)]
    monkeypatch.setattr(auth, "_MAX_DELAYED", 0)
    refused = await call_from(proxied, "203.0.113.9")
    expect_problem(refused, 429, "rate-limited")
    assert 0 < int(refused.headers["retry-after"]) <= FAILURE_SECONDS
    form = {"user_key": (None, "wrong"), "task_id": (None, "task_x")}
    headers = {"X-Forwarded-For": "203.0.113.9", "Authorization": "Bearer wrong"}
    with access_log("outcome") as logged:
        old = await proxied.http.post(f"{proxied.url}/api/check_task_status", files=form, headers=headers)
    assert (old.status_code, old.json()["err_code"], logged) == (200, 1, [("rate-limited",)])
    assert (await call_from(proxied, "203.0.113.9", proxied.token)).status_code == 200
    expect_problem(await call_from(proxied, "203.0.113.8"), 401, "unauthenticated")
    for status in [401] * FREE_FAILURES + [429]:  # each port counts its own
        assert (await proxied.call_admin("GET", "/accounts", headers=headers)).status_code == status
    monkeypatch.setattr(auth, "FAILURE_SECONDS", 0)  # they are over
    expect_problem(await call_from(proxied, "203.0.113.9"), 401, "unauthenticated")


async def test_sources_of_failures_are_bounded(proxied: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Addresses of one IPv6 network are one source, others are not; the oldest are forgotten."""
    monkeypatch.setattr(auth, "_MAX_DELAYED", 0)
    monkeypatch.setattr(auth, "_MAX_SOURCES", 2)
    await fail_often(proxied, "2001:db8::1")
    expect_problem(await call_from(proxied, "2001:db8::ffff:1"), 429, "rate-limited")
    for address in ("2001:db8:0:1::1", "::ffff:203.0.113.9", "2001:db8::1"):
        expect_problem(await call_from(proxied, address), 401, "unauthenticated")


async def send_half(request: Request, token: str, revoke: Any) -> bytes:
    """Send the head of a submission, call `revoke`, send the body; return the status line."""
    request.headers |= {"Authorization": f"Bearer {token}", "Expect": "100-continue"}
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    async with open_raw_connection(request.url.port or 0) as (reader, writer):
        writer.write(f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n".encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100 ")
        await revoke()
        writer.write(request.read())
        return await reader.readline()


async def test_token_revoked_during_the_upload(gateway: RunningGateway) -> None:
    """The submission is refused: nothing is sent to the upstream."""

    async def revoke() -> None:
        await gateway.call_admin("POST", "/tenants/shop/revoke-all")

    async def stop() -> None:
        await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "read-only"})

    files = {"image": ("a.png", make_png(), "image/png")}
    request = gateway.http.build_request("POST", f"{gateway.url}/v1/tasks/face-enhance", files=files)
    for change, status in ((stop, b"403"), (revoke, b"401")):
        assert (await send_half(request, gateway.token, change)).split()[1] == status
        await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "active"})
    assert await gateway.upstream.count_submits() == 0
    assert count_failures(gateway) == 0
