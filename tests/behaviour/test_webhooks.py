"""Webhooks sent at the end of a task."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import structlog
from redis.asyncio import Redis

from service.container import Container, open_container
from service.settings import Settings
from service.storage.deliveries import LEASE_MS
from service.storage.redis import Keys
from tests.behaviour.clients import LegacyClient
from tests.behaviour.gateway_fixture import ENVIRONMENT, POLL_SECONDS, RunningGateway, run_real_gateway
from tests.behaviour.openapi_reader import assert_matches_schema, resolve_reference
from tests.behaviour.requests import expect_problem
from tests.behaviour.webhook_receiver import WebhookReceiver, make_secret, run_receiver
from tests.support.valkey import Valkey

SECRET = make_secret()


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with run_receiver() as webhook_receiver:
        yield webhook_receiver


async def set_webhook(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    hook = {"url": f"{receiver.url}?key=hidden", "secret": SECRET, "allow": ["127.0.0.0/8"]}
    await gateway.put_tenant(webhook=hook)


async def deliver_due(services: Container) -> None:
    while await services.webhook_dispatcher.start_due():
        await services.webhook_dispatcher.wait_idle()


async def finish_task(gateway: RunningGateway, **fields: str) -> str:
    """Run a task to its end and deliver its webhook; return its id."""
    response = await gateway.submit(fields=fields)
    assert response.status_code == 201, response.text
    task = await gateway.wait_for_task(response.json()["id"])
    await deliver_due(gateway.services)
    return str(task["id"])


async def list_failed(gateway: RunningGateway, query: str = "") -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = (await gateway.call_admin("GET", f"/webhooks/failed{query}")).json()["items"]
    return items


@pytest.mark.smoke
async def test_webhook_is_sent_once_and_signed(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    task_id = await finish_task(gateway)
    await deliver_due(gateway.services)
    (webhook,) = receiver.requests
    assert webhook.path == "/ended?key=hidden"
    assert webhook.event["type"] == "task.succeeded"
    assert webhook.event["data"] == (await gateway.call("GET", f"/v1/tasks/{task_id}")).json()
    assert webhook.is_signed_with(SECRET)
    assert not webhook.is_signed_with(make_secret(b"x"))
    document = (await gateway.call("GET", "/openapi.json", token="")).json()
    operation = resolve_reference(document, document["webhooks"]["task-ended"])["post"]
    assert_matches_schema(document, webhook.event, operation["requestBody"]["content"]["application/json"]["schema"])
    assert {parameter["name"] for parameter in operation["parameters"]} <= webhook.headers.keys()
    await gateway.upstream.fail_next_task()
    await finish_task(gateway)
    assert receiver.requests[1].event["type"] == "task.failed"
    assert receiver.requests[1].event["data"]["error"]["code"] == "task-failed"


async def test_webhook_url_per_task(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    refused = await gateway.submit(fields={"webhook_url": "https://hooks.test/"})
    expect_problem(refused, 422, "invalid-options")  # the tenant has no webhook
    await set_webhook(gateway, receiver)
    for url in ("http://169.254.169.254/latest", "https://hooks.elsewhere.test/", "ftp://127.0.0.1/", " ", "/ended"):
        document = expect_problem(await gateway.submit(fields={"webhook_url": url}), 422, "invalid-options")
        assert [error["field"] for error in document["errors"]] == ["webhook_url"]
    assert await gateway.upstream.count_submits() == 0
    await finish_task(gateway, webhook_url="", metadata="")  # both are optional, and not given
    assert receiver.requests[0].event["data"]["metadata"] == {}
    async with run_receiver() as other:
        await finish_task(gateway, webhook_url=f"{other.url}/4711")
        assert [request.path for request in other.requests] == ["/ended/4711"]
        assert other.requests[0].is_signed_with(SECRET)
    assert len(receiver.requests) == 1


async def test_failed_delivery_is_retried_unchanged(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    receiver.statuses = [500]
    await finish_task(gateway)
    await deliver_due(gateway.services)
    assert len(receiver.requests) == 1
    await gateway.advance(5)
    await deliver_due(gateway.services)
    first, second = receiver.requests
    assert (first.body, first.headers["webhook-id"]) == (second.body, second.headers["webhook-id"])


async def test_secret_is_shown_once_and_rotated(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    body = {"accounts": ["main"], "webhook": {"url": receiver.url, "allow": ["127.0.0.0/8"]}}
    old = (await gateway.call_admin("PUT", "/tenants/shop", json=body)).json()["webhook"]["secret"]
    assert old.startswith("whsec_")
    shown = {"url": receiver.url, "allow": ["127.0.0.0/8"], "disabled_urls": []}
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["webhook"] == shown
    assert (await gateway.call_admin("PUT", "/tenants/shop", json={"accounts": ["main"]})).json()["webhook"] is None
    assert (await gateway.call_admin("PUT", "/tenants/shop", json=body)).json()["webhook"] == shown
    response = await gateway.call_admin("POST", "/tenants/shop/webhook-secret?grace=3600")
    assert response.status_code == 201
    new = response.json()["secret"]
    await finish_task(gateway)
    assert receiver.requests[0].is_signed_with(old)
    assert receiver.requests[0].is_signed_with(new)
    newer = (await gateway.call_admin("POST", "/tenants/shop/webhook-secret")).json()["secret"]
    await finish_task(gateway)
    assert receiver.requests[1].is_signed_with(newer)
    assert not receiver.requests[1].is_signed_with(new)
    assert (await gateway.call_admin("POST", "/tenants/unknown/webhook-secret")).status_code == 404
    await gateway.put_tenant("without")
    assert (await gateway.call_admin("POST", "/tenants/without/webhook-secret")).status_code == 409


async def test_gone_url_is_disabled_until_redelivery(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    receiver.statuses = [410]
    task_id = await finish_task(gateway)
    await finish_task(gateway)
    assert len(receiver.requests) == 1
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["webhook"]["disabled_urls"] == [receiver.url]
    items = await list_failed(gateway)
    assert [item["state"] for item in items] == ["off", "off"]
    oldest = items[-1]
    assert (oldest["tenant"], oldest["task"], oldest["url"]) == ("shop", task_id, receiver.url)
    assert (oldest["attempts"], oldest["status"], oldest["answer"]) == (1, 410, "no")
    assert len(await list_failed(gateway, "?limit=1")) == 1
    await set_webhook(gateway, receiver)
    again = await gateway.call_admin("POST", f"/webhooks/{oldest['id']}/redeliver")
    assert (again.status_code, again.json()["state"], again.json()["attempts"]) == (200, "pending", 0)
    await deliver_due(gateway.services)
    first, second = receiver.requests
    assert (first.body, first.headers["webhook-id"]) == (second.body, oldest["id"])
    assert len(await list_failed(gateway)) == 1
    for event in ("msg_" + "0" * 32, "nonsense"):
        assert (await gateway.call_admin("POST", f"/webhooks/{event}/redeliver")).status_code == 404


async def test_delivery_of_a_killed_process_is_repeated(
    gateway: RunningGateway, valkey: Valkey, receiver: WebhookReceiver
) -> None:
    environment = ENVIRONMENT | {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": "http://localhost:1"}
    async with open_container(Settings.load(environment)) as other:
        await set_webhook(gateway, receiver)
        await other.registry.refresh()
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
        receiver.is_silent = True
        job = asyncio.create_task(gateway.services.webhook_dispatcher.run())
        await receiver.request_received.wait()
        job.cancel()
        await asyncio.wait([job])
        receiver.is_silent = False
        await deliver_due(other)
        assert len(receiver.requests) == 1
        await gateway.advance(LEASE_MS / 1000)
        await deliver_due(other)
    first, second = receiver.requests
    assert (first.headers["webhook-id"], first.body) == (second.headers["webhook-id"], second.body)


async def test_lost_and_legacy_tasks_use_the_tenants_url(
    gateway: RunningGateway, valkey: Valkey, receiver: WebhookReceiver
) -> None:
    await set_webhook(gateway, receiver)
    client = LegacyClient(gateway.http, gateway.url, gateway.token)
    legacy_id = (await client.submit("submit_face_enhance_task"))["task_id"]
    await client.wait_for_end(legacy_id, gateway.poll_due_tasks)
    await deliver_due(gateway.services)
    task_id = (await gateway.submit()).json()["id"]
    async with Redis.from_url(valkey.url) as store:
        lost_keys = [key async for key in store.scan_iter() if b":task" in key or b":reservation" in key]
        await store.delete(*lost_keys, Keys("gw").poll_due)
    await gateway.advance(0)
    await gateway.call("GET", f"/v1/tasks/{task_id}")
    await gateway.wait_for_task(task_id)
    await deliver_due(gateway.services)
    assert [request.event["data"]["id"] for request in receiver.requests] == [legacy_id, task_id]


async def test_tasks_with_webhooks_are_polled_often(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    await gateway.upstream.keep_running()
    assert (await gateway.submit()).status_code == 201
    await gateway.advance(600)
    await gateway.poll_due_tasks()
    before = await gateway.upstream.count_checks()
    await gateway.advance(POLL_SECONDS)
    await gateway.poll_due_tasks()
    assert await gateway.upstream.count_checks() > before


async def test_secrets_are_neither_stored_nor_logged(valkey: Valkey, receiver: WebhookReceiver) -> None:
    with structlog.testing.capture_logs() as logged:
        async with run_real_gateway(valkey) as gateway:
            await set_webhook(gateway, receiver)
            made = (await gateway.call_admin("POST", "/tenants/shop/webhook-secret?grace=60")).json()["secret"]
            receiver.statuses = [500]
            await finish_task(gateway)
            async with Redis.from_url(valkey.url) as client:
                stored = b"".join([key + (await client.dump(key) or b"") async for key in client.scan_iter()])
    assert b"shop" in stored
    assert any(item["event"] == "webhook.attempted" for item in logged)
    for secret in (SECRET, made):
        assert secret.removeprefix("whsec_") not in str(logged)
        assert secret.removeprefix("whsec_").encode() not in stored
    assert b"s" * 32 not in stored
    assert "hidden" not in str(logged)
