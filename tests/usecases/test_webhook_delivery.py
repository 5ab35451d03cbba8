"""Deliveries of webhooks when the store, the gateway or a receiver fails."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from service.domain.errors import Overloaded
from service.domain.tasks import Task
from service.domain.tenants import WebhookSecrets
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import LEASE_MS, MAX_CONCURRENT
from service.usecases.ports import Delivery, WebhookResponse
from tests.usecases.gateway_fixture import INTERNAL_ERROR, UNAVAILABLE, URL, UseCases, run_job, wait_until


@pytest.fixture(autouse=True)
async def webhook(gateway: UseCases) -> None:
    await gateway.set_webhook(url=URL, allow=("other.test", "third.test"))


async def finish_task(gateway: UseCases) -> Task:
    task = await gateway.submit_task()
    await gateway.poll()
    return task


async def read_delivery(gateway: UseCases, task: Task) -> Delivery:
    packed = await gateway.client.get(gateway.keys.delivery(task.reservation))
    return msgspec.convert(msgspec.msgpack.decode(packed) | {"id": task.reservation}, Delivery)


async def add_deliveries(gateway: UseCases, task: Task, number: int, *urls: str) -> None:
    """Make more deliveries of an ended task, in turn to these URLs."""
    template = await gateway.client.get(gateway.keys.task(task.reservation))
    packed = msgspec.msgpack.decode(await gateway.client.get(gateway.keys.delivery(task.reservation)))
    for index in range(number):
        name, delivery = f"{index:032}", packed | {"url": urls[index % len(urls)]}
        await gateway.client.set(gateway.keys.task(name), template, px=LEASE_MS)
        await gateway.client.set(gateway.keys.delivery(name), msgspec.msgpack.encode(delivery), px=LEASE_MS)
        assert await gateway.queue.redeliver(name)


async def test_retries_until_delivered(gateway: UseCases) -> None:
    task = await finish_task(gateway)
    gateway.receivers.responses += [
        WebhookResponse(status=500),
        WebhookResponse(error="It took longer."),
        WebhookResponse(status=302),
        WebhookResponse(status=503, retry_after_seconds=600),
        WebhookResponse(status=200),
    ]
    await gateway.deliver()
    for sent, wait_ms in enumerate((5_000, 30_000, 120_000, 600_000), start=1):
        await gateway.deliver(wait_ms - 1)
        assert len(gateway.receivers.sent) == sent
        await gateway.deliver(1)
    assert len({(url, headers["webhook-id"], body) for url, headers, body in gateway.receivers.sent}) == 1
    delivery = await read_delivery(gateway, task)
    assert (delivery.state, delivery.attempts, delivery.error) == (DeliveryState.DELIVERED, 5, None)


async def test_fails_after_a_day(gateway: UseCases) -> None:
    task, began_at = await finish_task(gateway), gateway.now_ms
    gateway.receivers.responses += [WebhookResponse(status=500, excerpt="full")] * 11
    while (delivery := await read_delivery(gateway, task)).next_attempt_at:
        await gateway.deliver(delivery.next_attempt_at - gateway.now_ms)
    assert (delivery.state, delivery.attempts, delivery.response_excerpt) == (DeliveryState.FAILED, 11, "full")
    assert 23 * 3_600_000 < gateway.now_ms - began_at <= 24 * 3_600_000
    assert [item.id for item in await gateway.queue.list_failed(10)] == [task.reservation]


@pytest.mark.parametrize("cause", ["tenant deleted", "no webhook", "other host", "task expired"])
async def test_delivery_without_a_receiver_or_task_fails(gateway: UseCases, cause: str) -> None:
    task = await finish_task(gateway)
    if cause == "tenant deleted":
        await gateway.change_registry(drop_tenants=(gateway.tenant,))
    elif cause == "task expired":
        await gateway.client.delete(gateway.keys.task(task.reservation))
    else:
        await gateway.set_webhook(url=None if cause == "no webhook" else "https://elsewhere.test/")
    await gateway.deliver()
    assert gateway.receivers.sent == []
    delivery = await read_delivery(gateway, task)
    assert (delivery.state, delivery.attempts) == (DeliveryState.FAILED, 0)


async def test_disabling_a_url_of_a_deleted_tenant(gateway: UseCases) -> None:
    before = gateway.registry.current.tenants
    await gateway.dispatcher.disable_url(99, URL)
    assert gateway.registry.current.tenants == before


async def test_missing_key_defers_the_delivery(gateway: UseCases) -> None:
    task = await finish_task(gateway)
    secrets = gateway.tenant.webhook.secrets
    await gateway.set_webhook(secrets=WebhookSecrets(b"encrypted with a removed key"))
    await gateway.deliver()
    assert gateway.receivers.sent == []
    assert (await read_delivery(gateway, task)).state is DeliveryState.PENDING
    await gateway.set_webhook(secrets=secrets)
    await gateway.deliver(5_000)
    assert len(gateway.receivers.sent) == 1


@pytest.mark.parametrize("fault", ["store", "local", "internal"])
async def test_failed_attempt_is_repeated_after_its_lease(
    gateway: UseCases, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = await finish_task(gateway)
    with monkeypatch.context() as patched:
        if fault == "store":
            gateway.faults.before["record_attempt"] = [UNAVAILABLE]
        elif fault == "local":
            gateway.receivers.responses.append(Overloaded("Too many open files", retry_after=1))
        else:
            patched.setattr(gateway.dispatcher, "encode_task_event", lambda _: 1 // 0)
        await gateway.deliver()
    assert (await read_delivery(gateway, task)).attempts == 0
    sent = len(gateway.receivers.sent)
    await gateway.deliver(LEASE_MS - 1)
    assert len(gateway.receivers.sent) == sent
    await gateway.deliver(1)
    delivery = await read_delivery(gateway, task)
    assert (delivery.state, delivery.attempts) == (DeliveryState.DELIVERED, 1)
    assert len({body for _, _, body in gateway.receivers.sent}) == 1


async def test_job_waits_for_the_registry_and_survives_outages_and_errors(gateway: UseCases) -> None:
    await finish_task(gateway)
    gateway.registry.is_ready = False
    await gateway.deliver()
    assert gateway.receivers.sent == []
    gateway.registry.is_ready = True
    gateway.faults.before["claim"] = [UNAVAILABLE, INTERNAL_ERROR]
    async with run_job(gateway.dispatcher.run()):
        await wait_until(lambda: len(gateway.receivers.sent) == 1)


async def test_silent_receivers_delay_no_other_and_are_limited(gateway: UseCases) -> None:
    silent = ("https://other.test/silent", "https://third.test/silent")
    gateway.receivers.silent_urls |= set(silent)
    await add_deliveries(gateway, await finish_task(gateway), 40, *silent)
    limit = gateway.dispatcher.max_concurrent
    async with run_job(gateway.dispatcher.run()):
        await wait_until(lambda: bool(gateway.receivers.sent) and len(gateway.dispatcher._attempts) >= limit)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(gateway.dispatcher._attempts) == limit
    assert [url for url, _, _ in gateway.receivers.sent] == [URL]
    for host in ("other.test", "third.test"):
        assert await gateway.client.zcard(gateway.keys.deliveries_claimed(f"1:{host}")) == MAX_CONCURRENT
