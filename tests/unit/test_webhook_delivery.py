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
def webhook_gateway() -> WebhookGateway:
    return WebhookGateway()


async def test_webhook_is_sent_once_and_signed(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    await webhook_gateway.deliver_due()
    await webhook_gateway.deliver_due()
    ((url, headers, body),) = webhook_gateway.receivers.sent
    assert url == URL
    event = msgspec.json.decode(body)
    assert (event["type"], event["data"]["state"]) == ("task.succeeded", "succeeded")
    assert event["timestamp"] == event["data"]["finished_at"]
    assert headers["webhook-id"] == f"msg_{reservation}"
    assert headers == webhooks.sign_headers(f"msg_{reservation}", webhook_gateway.ledger.clock.now(), body, [b"s" * 32])
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED
    assert (
        webhook_gateway.metrics.registry.get_sample_value("gateway_webhook_attempts_total", {"state": "delivered"}) == 1
    )


async def test_failed_task_is_sent(webhook_gateway: WebhookGateway) -> None:
    await webhook_gateway.finish_task(CheckResult(outcome=CheckOutcome.FAILED))
    await webhook_gateway.deliver_due()
    assert msgspec.json.decode(webhook_gateway.receivers.sent[0][2])["type"] == "task.failed"


async def test_no_webhook_sends_nothing(webhook_gateway: WebhookGateway) -> None:
    webhook_gateway.set_webhook(Webhook())
    await webhook_gateway.finish_task()
    assert not webhook_gateway.ledger.deliveries


async def test_retries_until_delivered(webhook_gateway: WebhookGateway) -> None:
    await webhook_gateway.finish_task()
    webhook_gateway.receivers.replies += [
        WebhookResponse(status=500),
        WebhookResponse(error="It took longer."),
        WebhookResponse(status=302),
    ]
    for wait in (5_000, 30_000, 120_000):
        await webhook_gateway.deliver_due()
        webhook_gateway.ledger.clock.now_ms += wait - 1
        before = len(webhook_gateway.receivers.sent)
        await webhook_gateway.deliver_due()
        assert len(webhook_gateway.receivers.sent) == before
        webhook_gateway.ledger.clock.now_ms += 1
    await webhook_gateway.deliver_due()
    assert len({(url, headers["webhook-id"], body) for url, headers, body in webhook_gateway.receivers.sent}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in webhook_gateway.receivers.sent}) == 4
    (delivery,) = webhook_gateway.ledger.deliveries.values()
    assert (delivery.state, delivery.attempts, delivery.error) == (DeliveryState.DELIVERED, 4, None)


async def test_retry_after_of_the_receiver_is_obeyed(webhook_gateway: WebhookGateway) -> None:
    await webhook_gateway.finish_task()
    webhook_gateway.receivers.replies.append(WebhookResponse(status=503, retry_after_seconds=600))
    await webhook_gateway.deliver_due()
    (delivery,) = webhook_gateway.ledger.deliveries.values()
    assert delivery.next_attempt_at == webhook_gateway.ledger.clock.now_ms + 600_000


async def test_fails_after_a_day_and_can_be_redelivered(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    webhook_gateway.receivers.replies += [WebhookResponse(status=500, excerpt="full")] * 11
    began = webhook_gateway.ledger.clock.now_ms
    while webhook_gateway.delivery_state(reservation) is DeliveryState.PENDING:
        await webhook_gateway.deliver_due()
        webhook_gateway.ledger.clock.now_ms = (
            webhook_gateway.ledger.deliveries[reservation].next_attempt_at or webhook_gateway.ledger.clock.now_ms
        )
    assert len(webhook_gateway.receivers.sent) == 11
    assert 23 * 3_600_000 < webhook_gateway.ledger.clock.now_ms - began <= 24 * 3_600_000
    (failed,) = await webhook_gateway.webhooks.list_failed(10)
    assert (failed.tenant, failed.delivery.error, failed.delivery.response_excerpt) == (
        "shop",
        "It answered 500.",
        "full",
    )
    await webhook_gateway.webhooks.redeliver(f"msg_{reservation}")
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.DELIVERED
    assert len({body for _, _, body in webhook_gateway.receivers.sent}) == 1
    assert not await webhook_gateway.webhooks.list_failed(10)


@pytest.mark.parametrize("event", ["msg_" + "0" * 32, "nonsense"])
async def test_unknown_delivery(webhook_gateway: WebhookGateway, event: str) -> None:
    with pytest.raises(NotFound):
        await webhook_gateway.webhooks.redeliver(event)


async def test_gone_url_is_disabled(webhook_gateway: WebhookGateway) -> None:
    webhook_gateway.receivers.replies.append(WebhookResponse(status=410))
    first = await webhook_gateway.finish_task()
    await webhook_gateway.deliver_due()
    assert webhook_gateway.webhook.is_disabled(URL)
    second = await webhook_gateway.finish_task()
    await webhook_gateway.deliver_due()
    assert len(webhook_gateway.receivers.sent) == 1
    assert webhook_gateway.delivery_state(first) is webhook_gateway.delivery_state(second) is DeliveryState.DISABLED
    assert len(await webhook_gateway.webhooks.list_failed(10)) == 2
    webhook_gateway.set_webhook(replace(webhook_gateway.webhook, disabled_urls=()))
    await webhook_gateway.webhooks.redeliver(f"msg_{second}")
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(second) is DeliveryState.DELIVERED


async def test_deleted_tenant_gets_no_webhook(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    now = webhook_gateway.registry.current
    webhook_gateway.registry.current = Registry(now.version + 1, now.next_id, deleted_tenant_names={1: "shop"})
    await webhook_gateway.deliver_due()
    assert not webhook_gateway.receivers.sent
    (failed,) = await webhook_gateway.webhooks.list_failed(10)
    assert (failed.delivery.reservation, failed.tenant) == (reservation, "shop")
    assert failed.delivery.error == "The tenant was deleted."


async def test_disabling_a_url_of_a_deleted_tenant(webhook_gateway: WebhookGateway) -> None:
    before = webhook_gateway.registry.current.tenants
    await webhook_gateway.dispatcher.disable_url(99, URL)
    assert webhook_gateway.registry.current.tenants == before


@pytest.mark.parametrize("hook", [Webhook(), Webhook("https://elsewhere.test/")])
async def test_removed_url_is_not_called(webhook_gateway: WebhookGateway, hook: Webhook) -> None:
    reservation = await webhook_gateway.finish_task()
    webhook_gateway.set_webhook(replace(hook, secrets=webhook_gateway.webhook.secrets))
    await webhook_gateway.deliver_due()
    assert not webhook_gateway.receivers.sent
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.FAILED


async def test_lost_task_is_not_sent(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    webhook_gateway.ledger.tasks.clear()
    await webhook_gateway.deliver_due()
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.FAILED


async def test_missing_key_defers_the_delivery(webhook_gateway: WebhookGateway) -> None:
    reservation = await webhook_gateway.finish_task()
    webhook_gateway.set_webhook(
        replace(webhook_gateway.webhook, secrets=WebhookSecrets(b"encrypted with a removed key"))
    )
    await webhook_gateway.deliver_due()
    assert not webhook_gateway.receivers.sent
    assert webhook_gateway.delivery_state(reservation) is DeliveryState.PENDING


async def test_rotated_secrets_both_sign_during_the_grace(webhook_gateway: WebhookGateway) -> None:
    made = await webhook_gateway.webhooks.rotate_secret("shop", 60)
    new = webhooks.parse_secret(made.text)
    for keys in ([new, b"s" * 32], [new]):
        reservation = await webhook_gateway.finish_task()
        await webhook_gateway.deliver_due()
        _, headers, body = webhook_gateway.receivers.sent[-1]
        at = float(headers["webhook-timestamp"])
        assert headers == webhooks.sign_headers(f"msg_{reservation}", at, body, keys)
        webhook_gateway.ledger.clock.now_ms += 60_000
    webhook_gateway.set_webhook(Webhook())
    with pytest.raises(Conflict):
        await webhook_gateway.webhooks.rotate_secret("shop", 0)
    with pytest.raises(NotFound):
        await webhook_gateway.webhooks.rotate_secret("unknown", 0)
