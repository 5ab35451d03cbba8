"""Failures during the delivery of webhooks."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.domain.errors import Overloaded
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import LEASE_MS
from service.usecases.ports import ClaimedDelivery, DeliveryResult
from tests.unit.fake_gateway import wait_until
from tests.unit.webhook_gateway import URL, WebhookGateway, make_delivery


@pytest.fixture
def webhook_gateway() -> WebhookGateway:
    return WebhookGateway()


async def test_unrecorded_delivery_is_repeated_after_its_lease(
    webhook_gateway: WebhookGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = await webhook_gateway.finish_task()
    killed = asyncio.Event()

    async def never(_claimed: ClaimedDelivery, _outcome: DeliveryResult) -> bool:
        killed.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(webhook_gateway.deliveries, "record_attempt", never)
    running = asyncio.create_task(webhook_gateway.dispatcher.run())
    await killed.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    monkeypatch.undo()
    webhook_gateway.dispatcher = webhook_gateway.make_dispatcher()
    webhook_gateway.ledger.clock.now_ms += LEASE_MS - 1
    await webhook_gateway.deliver_due()
    assert len(webhook_gateway.receivers.sent) == 1
    webhook_gateway.ledger.clock.now_ms += 1
    await webhook_gateway.deliver_due()
    first, second = webhook_gateway.receivers.sent
    assert (first[1]["webhook-id"], first[2]) == (second[1]["webhook-id"], second[2])
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_unavailable_store_repeats_the_attempt(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    await webhook_gateway.dispatcher.start_due()
    webhook_gateway.ledger.is_unavailable = True
    await webhook_gateway.dispatcher.wait_idle()
    webhook_gateway.ledger.is_unavailable = False
    webhook_gateway.ledger.clock.now_ms += LEASE_MS
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_local_failure_is_no_attempt(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    webhook_gateway.receivers.errors.append(Overloaded("Too many open files", retry_after=1))
    await webhook_gateway.deliver_due()
    assert webhook_gateway.ledger.deliveries[reservation].attempts == 0
    webhook_gateway.ledger.clock.now_ms += LEASE_MS
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED
    assert webhook_gateway.ledger.deliveries[reservation].attempts == 1


async def test_job_survives_outages_and_errors(
    webhook_gateway: WebhookGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.usecases.background.UNAVAILABLE_SECONDS", 0)
    monkeypatch.setattr("service.usecases.background.IDLE_SECONDS", 0)
    claim, tries = webhook_gateway.deliveries.claim, 0

    async def claiming(most: int) -> Any:
        nonlocal tries
        tries += 1
        webhook_gateway.ledger.is_unavailable = tries == 1
        if tries == 2:
            raise ValueError("a fault of ours")
        return await claim(most)

    monkeypatch.setattr(webhook_gateway.deliveries, "claim", claiming)
    reservation = await webhook_gateway.finish_task()
    running = asyncio.create_task(webhook_gateway.dispatcher.run())
    await wait_until(lambda: webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_internal_error_loses_no_delivery(
    webhook_gateway: WebhookGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = await webhook_gateway.finish_task()
    monkeypatch.setattr(webhook_gateway.dispatcher, "encode_task_event", lambda _: 1 // 0)
    await webhook_gateway.deliver_due()
    monkeypatch.undo()
    webhook_gateway.dispatcher = webhook_gateway.make_dispatcher()
    webhook_gateway.ledger.clock.now_ms += LEASE_MS
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_nothing_is_claimed_before_the_registry_is_loaded(webhook_gateway: WebhookGateway) -> None:
    await webhook_gateway.finish_task()
    webhook_gateway.registry.is_ready = False
    assert await webhook_gateway.dispatcher.start_due() is False
    webhook_gateway.registry.is_ready = True
    assert await webhook_gateway.dispatcher.start_due() is True
    await webhook_gateway.dispatcher.wait_idle()


async def test_unresponsive_receiver_delays_no_other(webhook_gateway: WebhookGateway) -> None:
    dead = "https://other.test/dead"
    webhook_gateway.receivers.unresponsive_urls.add(dead)
    for number in range(1_000):
        webhook_gateway.deliveries.enqueue(make_delivery(f"{number:032}", dead))
    template = webhook_gateway.ledger.tasks[await webhook_gateway.finish_task()]
    webhook_gateway.ledger.tasks |= {f"{number:032}": template for number in range(1_000)}
    running = asyncio.create_task(webhook_gateway.dispatcher.run())
    await wait_until(lambda: len(webhook_gateway.receivers.sent) == 1)
    assert webhook_gateway.receivers.sent[0][0] == URL
    assert len(webhook_gateway.ledger.leased_deliveries) == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_failing_receiver_gets_one_delivery_at_a_time(webhook_gateway: WebhookGateway) -> None:
    for number in range(10):
        webhook_gateway.deliveries.enqueue(make_delivery(f"{number:032}", URL))
    (first, *others) = await webhook_gateway.deliveries.claim(100)
    assert len(others) == 3
    failure = DeliveryResult(state=DeliveryState.PENDING, retry_delay_ms=5_000)
    for item in (first, *others):
        await webhook_gateway.deliveries.record_attempt(item, failure)
    (alone,) = await webhook_gateway.deliveries.claim(100)
    await webhook_gateway.deliveries.record_attempt(alone, DeliveryResult(state=DeliveryState.DELIVERED))
    assert len(await webhook_gateway.deliveries.claim(100)) == 4


async def test_full_process_claims_nothing(webhook_gateway: WebhookGateway) -> None:
    dead = ("https://other.test/dead", "https://hooks.test/dead")
    webhook_gateway.receivers.unresponsive_urls |= set(dead)
    template = webhook_gateway.ledger.tasks[await webhook_gateway.finish_task()]
    await webhook_gateway.deliver_due()
    for number in range(8):
        webhook_gateway.deliveries.enqueue(make_delivery(f"{number:032}", dead[number % 2]))
    webhook_gateway.ledger.tasks |= {f"{number:032}": template for number in range(8)}
    await webhook_gateway.dispatcher.start_due()
    waiting = asyncio.create_task(webhook_gateway.dispatcher.start_due())
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    next(iter(webhook_gateway.dispatcher._attempts)).cancel()
    assert await waiting
    for attempt in webhook_gateway.dispatcher._attempts:
        attempt.cancel()
    await webhook_gateway.dispatcher.wait_idle()
