"""Delivery of webhooks."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from service.domain import webhooks
from service.domain.errors import Conflict, NotFound
from service.domain.tenants import Registry, Webhook, WebhookSecrets
from service.domain.webhooks import DeliveryState
from service.usecases.ports import CheckOutcome, CheckResult, WebhookResponse
from tests.unit.webhook_gateway import URL, WebhookGateway


@pytest.fixture
def teller() -> WebhookGateway:
    return WebhookGateway()


async def test_webhook_is_sent_once_and_signed(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    await teller.deliver_due()
    await teller.deliver_due()
    ((url, headers, body),) = teller.receivers.sent
    assert url == URL
    event = msgspec.json.decode(body)
    assert (event["type"], event["data"]["state"]) == ("task.succeeded", "succeeded")
    assert event["timestamp"] == event["data"]["finished_at"]
    assert headers["webhook-id"] == f"msg_{reservation}"
    assert headers == webhooks.sign_headers(f"msg_{reservation}", teller.ledger.clock.now(), body, [b"s" * 32])
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED
    assert teller.metrics.registry.get_sample_value("gateway_webhook_attempts_total", {"state": "delivered"}) == 1


async def test_failed_task_is_sent(teller: WebhookGateway) -> None:
    await teller.finish_task(CheckResult(outcome=CheckOutcome.FAILED))
    await teller.deliver_due()
    assert msgspec.json.decode(teller.receivers.sent[0][2])["type"] == "task.failed"


async def test_no_webhook_sends_nothing(teller: WebhookGateway) -> None:
    teller.set_webhook(Webhook())
    await teller.finish_task()
    assert not teller.ledger.deliveries


async def test_retries_until_delivered(teller: WebhookGateway) -> None:
    await teller.finish_task()
    teller.receivers.replies += [
        WebhookResponse(status=500),
        WebhookResponse(error="It took longer."),
        WebhookResponse(status=302),
    ]
    for wait in (5_000, 30_000, 120_000):
        await teller.deliver_due()
        teller.ledger.clock.now_ms += wait - 1
        before = len(teller.receivers.sent)
        await teller.deliver_due()
        assert len(teller.receivers.sent) == before
        teller.ledger.clock.now_ms += 1
    await teller.deliver_due()
    assert len({(url, headers["webhook-id"], body) for url, headers, body in teller.receivers.sent}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in teller.receivers.sent}) == 4
    (delivery,) = teller.ledger.deliveries.values()
    assert (delivery.state, delivery.attempts, delivery.error) == (DeliveryState.DELIVERED, 4, None)


async def test_retry_after_of_the_receiver_is_obeyed(teller: WebhookGateway) -> None:
    await teller.finish_task()
    teller.receivers.replies.append(WebhookResponse(status=503, retry_after_seconds=600))
    await teller.deliver_due()
    (delivery,) = teller.ledger.deliveries.values()
    assert delivery.next_attempt_at == teller.ledger.clock.now_ms + 600_000


async def test_fails_after_a_day_and_can_be_redelivered(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    teller.receivers.replies += [WebhookResponse(status=500, excerpt="full")] * 11
    began = teller.ledger.clock.now_ms
    while teller.delivery_state(reservation) is DeliveryState.PENDING:
        await teller.deliver_due()
        teller.ledger.clock.now_ms = teller.ledger.deliveries[reservation].next_attempt_at or teller.ledger.clock.now_ms
    assert len(teller.receivers.sent) == 11
    assert 23 * 3_600_000 < teller.ledger.clock.now_ms - began <= 24 * 3_600_000
    (failed,) = await teller.webhooks.list_failed(10)
    assert (failed.tenant, failed.delivery.error, failed.delivery.response_excerpt) == (
        "shop",
        "It answered 500.",
        "full",
    )
    await teller.webhooks.redeliver(f"msg_{reservation}")
    await teller.deliver_due()
    assert teller.delivery_state(reservation) is DeliveryState.DELIVERED
    assert len({body for _, _, body in teller.receivers.sent}) == 1
    assert not await teller.webhooks.list_failed(10)


@pytest.mark.parametrize("event", ["msg_" + "0" * 32, "nonsense"])
async def test_unknown_delivery(teller: WebhookGateway, event: str) -> None:
    with pytest.raises(NotFound):
        await teller.webhooks.redeliver(event)


async def test_gone_url_is_disabled(teller: WebhookGateway) -> None:
    teller.receivers.replies.append(WebhookResponse(status=410))
    first = await teller.finish_task()
    await teller.deliver_due()
    assert teller.webhook.is_disabled(URL)
    second = await teller.finish_task()
    await teller.deliver_due()
    assert len(teller.receivers.sent) == 1
    assert teller.delivery_state(first) is teller.delivery_state(second) is DeliveryState.DISABLED
    assert len(await teller.webhooks.list_failed(10)) == 2
    teller.set_webhook(replace(teller.webhook, disabled_urls=()))
    await teller.webhooks.redeliver(f"msg_{second}")
    await teller.deliver_due()
    assert teller.delivery_state(second) is DeliveryState.DELIVERED


async def test_deleted_tenant_gets_no_webhook(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    now = teller.registry.current
    teller.registry.current = Registry(now.version + 1, now.next_id, deleted_tenant_names={1: "shop"})
    await teller.deliver_due()
    assert not teller.receivers.sent
    (failed,) = await teller.webhooks.list_failed(10)
    assert (failed.delivery.reservation, failed.tenant) == (reservation, "shop")
    assert failed.delivery.error == "The tenant was deleted."


async def test_disabling_a_url_of_a_deleted_tenant(teller: WebhookGateway) -> None:
    before = teller.registry.current.tenants
    await teller.webhooks.disable_url(99, URL)
    assert teller.registry.current.tenants == before


@pytest.mark.parametrize("hook", [Webhook(), Webhook("https://elsewhere.test/")])
async def test_removed_url_is_not_called(teller: WebhookGateway, hook: Webhook) -> None:
    reservation = await teller.finish_task()
    teller.set_webhook(replace(hook, secrets=teller.webhook.secrets))
    await teller.deliver_due()
    assert not teller.receivers.sent
    assert teller.delivery_state(reservation) is DeliveryState.FAILED


async def test_lost_task_is_not_sent(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    teller.ledger.tasks.clear()
    await teller.deliver_due()
    assert teller.delivery_state(reservation) is DeliveryState.FAILED


async def test_missing_key_defers_the_delivery(teller: WebhookGateway) -> None:
    reservation = await teller.finish_task()
    teller.set_webhook(replace(teller.webhook, secrets=WebhookSecrets(b"sealed by a key that is gone")))
    await teller.deliver_due()
    assert not teller.receivers.sent
    assert teller.delivery_state(reservation) is DeliveryState.PENDING


async def test_rotated_secrets_both_sign_during_the_grace(teller: WebhookGateway) -> None:
    made = await teller.webhooks.rotate_secret("shop", 60)
    new = webhooks.parse_secret(made.text)
    for keys in ([new, b"s" * 32], [new]):
        reservation = await teller.finish_task()
        await teller.deliver_due()
        _, headers, body = teller.receivers.sent[-1]
        at = float(headers["webhook-timestamp"])
        assert headers == webhooks.sign_headers(f"msg_{reservation}", at, body, keys)
        teller.ledger.clock.now_ms += 60_000
    teller.set_webhook(Webhook())
    with pytest.raises(Conflict):
        await teller.webhooks.rotate_secret("shop", 0)
    with pytest.raises(NotFound):
        await teller.webhooks.rotate_secret("nobody", 0)
