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
def teller() -> WebhookGateway:
    return WebhookGateway()


async def test_unrecorded_delivery_is_repeated_after_its_lease(
    teller: WebhookGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    reservation = await teller.finish_task()
    gone = asyncio.Event()

    async def never(_claimed: ClaimedDelivery, _outcome: DeliveryResult) -> bool:
        gone.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(teller.deliveries, "record_attempt", never)
    running = asyncio.create_task(teller.dispatcher.run())
    await gone.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    monkeypatch.undo()
    teller.dispatcher = teller.make_dispatcher()
    teller.ledger.clock.now_ms += LEASE_MS - 1
    await teller.deliver_due()
    assert len(teller.receivers.sent) == 1
    teller.ledger.clock.now_ms += 1
    await teller.deliver_due()
    first, second = teller.receivers.sent
    assert (first[1]["webhook-id"], first[2]) == (second[1]["webhook-id"], second[2])
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_unavailable_store_repeats_the_attempt(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    await teller.dispatcher.start_due()
    teller.ledger.is_unavailable = True
    await teller.dispatcher.wait_idle()
    teller.ledger.is_unavailable = False
    teller.ledger.clock.now_ms += LEASE_MS
    await teller.deliver_due()
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_local_failure_is_no_attempt(teller: WebhookGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    reservation = await teller.finish_task()

    async def post(*_: Any) -> Any:
        raise Overloaded("Too many open files", retry_after=1)

    with monkeypatch.context() as lacking:
        lacking.setattr(teller.receivers, "post", post)
        await teller.deliver_due()
    assert teller.ledger.deliveries[reservation].attempts == 0
    teller.ledger.clock.now_ms += LEASE_MS
    await teller.deliver_due()
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED
    assert teller.ledger.deliveries[reservation].attempts == 1


async def test_job_survives_outages_and_errors(teller: WebhookGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.usecases.background.UNAVAILABLE_SECONDS", 0)
    monkeypatch.setattr("service.usecases.background.IDLE_SECONDS", 0)
    claim, tries = teller.deliveries.claim, 0

    async def claiming(most: int) -> Any:
        nonlocal tries
        tries += 1
        teller.ledger.is_unavailable = tries == 1
        if tries == 2:
            raise ValueError("a fault of ours")
        return await claim(most)

    monkeypatch.setattr(teller.deliveries, "claim", claiming)
    reservation = await teller.finish_task()
    running = asyncio.create_task(teller.dispatcher.run())
    await wait_until(lambda: teller.delivery_state(reservation) is DeliveryState.DELIVERED)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_internal_error_loses_no_delivery(teller: WebhookGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    reservation = await teller.finish_task()
    monkeypatch.setattr(teller.dispatcher, "_render", lambda _: 1 // 0)
    await teller.deliver_due()
    monkeypatch.undo()
    teller.dispatcher = teller.make_dispatcher()
    teller.ledger.clock.now_ms += LEASE_MS
    await teller.deliver_due()
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED


async def test_nothing_is_claimed_before_the_registry_is_loaded(teller: WebhookGateway) -> None:
    await teller.finish_task()
    teller.registry.is_ready = False
    assert await teller.dispatcher.start_due() is False
    teller.registry.is_ready = True
    assert await teller.dispatcher.start_due() is True
    await teller.dispatcher.wait_idle()


async def test_unresponsive_receiver_delays_no_other(teller: WebhookGateway) -> None:
    dead = "https://other.test/dead"
    teller.receivers.unresponsive_urls.add(dead)
    for number in range(1_000):
        teller.deliveries.enqueue(make_delivery(f"{number:032}", dead))
    template = teller.ledger.tasks[await teller.finish_task()]
    teller.ledger.tasks |= {f"{number:032}": template for number in range(1_000)}
    running = asyncio.create_task(teller.dispatcher.run())
    await wait_until(lambda: len(teller.receivers.sent) == 1)
    assert teller.receivers.sent[0][0] == URL
    assert len(teller.ledger.leased_deliveries) == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_failing_receiver_gets_one_delivery_at_a_time(teller: WebhookGateway) -> None:
    for number in range(10):
        teller.deliveries.enqueue(make_delivery(f"{number:032}", URL))
    (first, *others) = await teller.deliveries.claim(100)
    assert len(others) == 3
    failure = DeliveryResult(state=DeliveryState.PENDING, retry_delay_ms=5_000)
    for each in (first, *others):
        await teller.deliveries.record_attempt(each, failure)
    (alone,) = await teller.deliveries.claim(100)
    await teller.deliveries.record_attempt(alone, DeliveryResult(state=DeliveryState.DELIVERED))
    assert len(await teller.deliveries.claim(100)) == 4


async def test_full_process_claims_nothing(teller: WebhookGateway) -> None:
    dead = ("https://other.test/dead", "https://hooks.test/dead")
    teller.receivers.unresponsive_urls |= set(dead)
    template = teller.ledger.tasks[await teller.finish_task()]
    await teller.deliver_due()
    for number in range(8):
        teller.deliveries.enqueue(make_delivery(f"{number:032}", dead[number % 2]))
    teller.ledger.tasks |= {f"{number:032}": template for number in range(8)}
    await teller.dispatcher.start_due()
    waiting = asyncio.create_task(teller.dispatcher.start_due())
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    next(iter(teller.dispatcher._attempts)).cancel()
    assert await waiting
    for each in teller.dispatcher._attempts:
        each.cancel()
    await teller.dispatcher.wait_idle()
