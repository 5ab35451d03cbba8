"""Webhooks sent at the end of a task."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import datetime

import msgspec
import pytest
from msgspec.structs import replace

from service.client import InvalidWebhook, verify_webhook
from service.domain.tenants import Webhook, WebhookSecrets
from service.usecases.admin import require
from service.usecases.registry_plan import DesiredTenant
from tests.behaviour.gateway_fixture import RunningGateway
from tests.behaviour.requests import expect_invalid, expect_json, expect_problem
from tests.behaviour.webhook_receiver import WebhookReceiver, make_secret, run_receiver

SECRET = make_secret()


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with run_receiver() as webhook_receiver:
        yield webhook_receiver


async def set_webhook(gateway: RunningGateway, receiver: WebhookReceiver, *allow: str) -> None:
    hook = {"url": f"{receiver.url}?key=hidden", "secret": SECRET, "allow": [receiver.network, *allow]}
    await gateway.put_tenant(webhook=hook)


async def finish_task(gateway: RunningGateway, **fields: str) -> str:
    """Run a task to its end and deliver its webhook; return its id."""
    task = await gateway.wait_for_task(expect_json(await gateway.submit(fields=fields), 201)["id"])
    await gateway.deliver_due_webhooks()
    return str(task["id"])


@pytest.mark.smoke
async def test_webhook_is_sent_once_and_signed(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    receiver.statuses = [500]
    task_id = await finish_task(gateway)
    await gateway.advance(5)
    for _ in range(2):
        await gateway.deliver_due_webhooks()
    failed, webhook = receiver.requests
    assert (failed.body, failed.headers["webhook-id"]) == (webhook.body, webhook.headers["webhook-id"])
    assert (webhook.path, webhook.headers["content-type"]) == ("/ended?key=hidden", "application/json")
    assert webhook.event["type"] == "task.succeeded"
    assert webhook.event["data"] == (await gateway.call("GET", f"/v1/tasks/{task_id}")).json()
    assert webhook.is_signed_with(SECRET)
    assert not webhook.is_signed_with(make_secret(b"x"))
    await gateway.upstream.fail_next_task()
    await finish_task(gateway)
    assert receiver.requests[2].event["type"] == "task.failed"
    assert receiver.requests[2].event["data"]["error"]["code"] == "task-failed"


async def test_webhook_url_per_task(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    refused = await gateway.submit(fields={"webhook_url": "https://hooks.test/"})
    expect_problem(refused, 422, "invalid-options")  # the tenant has no webhook
    await set_webhook(gateway, receiver)
    for url in ("http://169.254.169.254/latest", "https://hooks.elsewhere.test/", "ftp://127.0.0.1/", "/ended"):
        expect_invalid(await gateway.submit(fields={"webhook_url": url}), "webhook_url")
    assert await gateway.upstream.count_submits() == 0
    await finish_task(gateway, webhook_url="", metadata="")  # both are optional, and not given
    assert receiver.requests[0].event["data"]["metadata"] == {}
    async with run_receiver() as other:
        own_url = {"webhook_url": f"{other.url}/4711"}
        expect_invalid(await gateway.submit(fields=own_url), "webhook_url")  # its port is not listed
        await set_webhook(gateway, receiver, other.network)
        await finish_task(gateway, **own_url)
        assert [request.path for request in other.requests] == ["/ended/4711"]
        assert other.requests[0].is_signed_with(SECRET)
    assert len(receiver.requests) == 1
    contents: tuple[dict[str, str], ...] = ({}, {}, own_url)  # another URL is other content under the same key
    responses = [await gateway.submit(fields=fields, headers={"Idempotency-Key": "k"}) for fields in contents]
    assert [response.status_code for response in responses] == [201, 201, 422]


async def test_private_addresses_and_ports_are_listed(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    for allow in ([], ["127.0.0.0/8"], ["10.0.0.0/8", "127.0.0.1:1"]):
        body = {"accounts": ["main"], "webhook": {"url": receiver.url, "allow": allow}}
        expect_invalid(await gateway.call_admin("PUT", "/tenants/shop", json=body), "webhook.url")
    for url in ("http://169.254.169.254/", "http://0xA9FEA9FE/", "http://[fd00:ec2::254]/"):
        body = {"accounts": ["main"], "webhook": {"url": url, "allow": ["0.0.0.0/0", "::/0"]}}
        expect_invalid(await gateway.call_admin("PUT", "/tenants/shop", json=body), "webhook.url")
    by_name = receiver.url.replace("127.0.0.1", "localhost")
    for allow, is_delivered in (([], False), (["127.0.0.0/8", "localhost"], False), ([receiver.network], True)):
        await gateway.put_tenant(webhook={"url": by_name, "allow": allow})
        await finish_task(gateway)
        assert bool(receiver.requests) == is_delivered


async def test_a_webhook_of_former_rules_does_not_hinder_other_changes(gateway: RunningGateway) -> None:
    admin = gateway.services.registry_admin
    hook = Webhook("http://10.0.0.1:8080/", secrets=WebhookSecrets(b"encrypted"))
    await admin.save_tenant("shop", lambda before: DesiredTenant(replace(require(before, "", ""), webhook=hook)))
    response = await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "disabled"})
    assert expect_json(response)["webhook"]["url"] == hook.url
    expect_invalid(await gateway.call_admin("PATCH", "/tenants/shop", json={"webhook": {}}), "webhook.url")


async def test_secret_is_shown_once_and_rotated(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    body = {"accounts": ["main"], "webhook": {"url": receiver.url, "allow": [receiver.network]}}
    old = (await gateway.call_admin("PUT", "/tenants/shop", json=body)).json()["webhook"]["secret"]
    assert old.startswith("whsec_")
    shown = {"url": receiver.url, "allow": [receiver.network], "disabled_urls": []}
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["webhook"] == shown
    assert (await gateway.call_admin("PUT", "/tenants/shop", json={"accounts": ["main"]})).json()["webhook"] is None
    assert (await gateway.call_admin("PUT", "/tenants/shop", json=body)).json()["webhook"] == shown
    response = await gateway.call_admin("POST", "/tenants/shop/webhook-secret?grace=3600")
    assert response.status_code == 201
    new = response.json()["secret"]
    await finish_task(gateway)
    assert receiver.requests[0].is_signed_with(old)
    assert receiver.requests[0].is_signed_with(new)
    gateway.services.webhook_dispatcher.now = lambda: time.time() + 3_600
    await finish_task(gateway)
    assert receiver.requests[1].is_signed_with(new)
    assert not receiver.requests[1].is_signed_with(old)
    newer = (await gateway.call_admin("POST", "/tenants/shop/webhook-secret")).json()["secret"]
    await finish_task(gateway)
    assert receiver.requests[2].is_signed_with(newer)
    assert not receiver.requests[2].is_signed_with(new)
    assert (await gateway.call_admin("POST", "/tenants/unknown/webhook-secret")).status_code == 404
    await gateway.put_tenant("without")
    assert (await gateway.call_admin("POST", "/tenants/without/webhook-secret")).status_code == 409


async def test_threshold_of_a_limit_is_signed_sent_once_and_shown(
    gateway: RunningGateway, receiver: WebhookReceiver
) -> None:
    hook = {"url": receiver.url, "secret": SECRET, "allow": [receiver.network]}
    limit = {"window": "day", "tasks": 4, "money": 100, "warn_at": [75, 50]}
    await gateway.put_tenant(webhook=hook, limits=[limit])
    for _ in range(2):
        await gateway.submit()
        await gateway.services.threshold_reporter.report_reached()
    receiver.statuses = [500]
    await gateway.deliver_due_webhooks()
    await gateway.advance(5)
    await gateway.deliver_due_webhooks()
    failed, webhook = receiver.requests
    assert (failed.body, failed.headers["webhook-id"]) == (webhook.body, webhook.headers["webhook-id"])
    assert webhook.is_signed_with(SECRET)
    event = verify_webhook(webhook.body, webhook.headers, SECRET)
    threshold, (policy, *_) = event.threshold, expect_json(await gateway.call("GET", "/v1/quota"))["policies"]
    assert (event.type, threshold.tenant, threshold.threshold) == ("quota.threshold", "shop", 50)
    shown = msgspec.to_builtins(threshold, builtin_types=(datetime,))
    assert {name: policy[name] for name in ("policy", "unit", "window", "limit", "used", "reserved", "remaining")} == {
        name: value for name, value in shown.items() if name in policy and name != "resets_at"
    }
    with pytest.raises(InvalidWebhook):
        _ = event.task
    scrape = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for policy_name, percent, is_reached in (("tasks", 50, 1), ("tasks", 75, 0), ("money", 50, 0), ("money", 75, 0)):
        labels = f'policy="day-{policy_name}",tenant="shop",threshold="{percent}"'
        assert f"gateway_quota_threshold_reached{{{labels}}} {is_reached}.0\n" in scrape
    receiver.statuses = [410]
    await gateway.submit()
    await gateway.services.threshold_reporter.report_reached()
    await gateway.deliver_due_webhooks()
    (item,) = expect_json(await gateway.call_admin("GET", "/webhooks/failed"))["items"]
    assert (item["state"], item["task"], item["threshold"]) == ("off", None, "day-tasks 75%")
    await gateway.call_admin("PATCH", "/tenants/shop", json={"webhook": {"url": receiver.url}})
    assert (await gateway.call_admin("POST", f"/webhooks/{item['id']}/redeliver")).status_code == 200
    await gateway.deliver_due_webhooks()
    assert [request.event["data"]["threshold"] for request in receiver.requests] == [50, 50, 75, 75]


async def test_gone_url_is_disabled_until_redelivery(gateway: RunningGateway, receiver: WebhookReceiver) -> None:
    await set_webhook(gateway, receiver)
    receiver.statuses = [410]
    task_id = await finish_task(gateway)
    await finish_task(gateway)
    assert len(receiver.requests) == 1
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["webhook"]["disabled_urls"] == [receiver.url]
    items = expect_json(await gateway.call_admin("GET", "/webhooks/failed"))["items"]
    assert [item["state"] for item in items] == ["off", "off"]
    oldest = items[-1]
    assert (oldest["tenant"], oldest["task"], oldest["url"]) == ("shop", task_id, receiver.url)
    assert (oldest["attempts"], oldest["status"], oldest["answer"]) == (1, 410, "no")
    assert len(expect_json(await gateway.call_admin("GET", "/webhooks/failed?limit=1"))["items"]) == 1
    await set_webhook(gateway, receiver)
    again = await gateway.call_admin("POST", f"/webhooks/{oldest['id']}/redeliver")
    assert (again.status_code, again.json()["state"], again.json()["attempts"]) == (200, "pending", 0)
    await gateway.deliver_due_webhooks()
    first, second = receiver.requests
    assert (first.body, first.headers["webhook-id"]) == (second.body, oldest["id"])
    assert len(expect_json(await gateway.call_admin("GET", "/webhooks/failed"))["items"]) == 1
    for event in ("msg_" + "0" * 32, "nonsense"):
        assert (await gateway.call_admin("POST", f"/webhooks/{event}/redeliver")).status_code == 404
