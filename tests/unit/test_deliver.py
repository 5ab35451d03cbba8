"""Tenants are told of the ends of their tasks, until they have taken it or nobody wants it any more."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from service.domain import webhooks
from service.domain.errors import Conflict, NotFound
from service.domain.tenants import Registry, Signing, Webhook
from service.domain.webhooks import DeliveryState
from service.usecases.ports import Answered, Check, Reply
from tests.unit.over_deliver import URL, Teller


@pytest.fixture
def teller() -> Teller:
    return Teller()


async def test_told_once(teller: Teller) -> None:
    """The end of a task is told once, as the task is read, signed with the tenant's secret."""
    reservation = await teller.end_a_task()
    await teller.round()
    await teller.round()
    ((url, headers, body),) = teller.receivers.sent
    assert url == URL
    event = msgspec.json.decode(body)
    assert (event["type"], event["data"]["state"]) == ("task.succeeded", "succeeded")
    assert event["timestamp"] == event["data"]["finished_at"]
    assert headers["webhook-id"] == f"msg_{reservation}"
    assert headers == webhooks.headers(f"msg_{reservation}", teller.ledger.clock.now(), body, [b"s" * 32])
    assert teller.state(reservation) is DeliveryState.DELIVERED
    assert teller.metrics.registry.get_sample_value("gateway_webhook_attempts_total", {"state": "delivered"}) == 1


async def test_failure_is_told(teller: Teller) -> None:
    """A task that failed is told of as such."""
    await teller.end_a_task(Check(answered=Answered.FAILED))
    await teller.round()
    assert msgspec.json.decode(teller.receivers.sent[0][2])["type"] == "task.failed"


async def test_nobody_to_tell(teller: Teller) -> None:
    """Without a webhook nothing is told."""
    teller.put(Webhook())
    await teller.end_a_task()
    assert not teller.ledger.deliveries


async def test_again_until_it_is_taken(teller: Teller) -> None:
    """What failed is sent again after the waits of the schedule, the same under the same id, until it is taken."""
    await teller.end_a_task()
    teller.receivers.replies += [Reply(status=500), Reply(error="It took longer."), Reply(status=302)]
    for wait in (5_000, 30_000, 120_000):
        await teller.round()
        teller.ledger.clock.at += wait - 1
        before = len(teller.receivers.sent)
        await teller.round()
        assert len(teller.receivers.sent) == before
        teller.ledger.clock.at += 1
    await teller.round()
    assert len({(url, headers["webhook-id"], body) for url, headers, body in teller.receivers.sent}) == 1
    assert len({headers["webhook-timestamp"] for _, headers, _ in teller.receivers.sent}) == 4
    (delivery,) = teller.ledger.deliveries.values()
    assert (delivery.state, delivery.attempts, delivery.error) == (DeliveryState.DELIVERED, 4, None)


async def test_busy_receiver(teller: Teller) -> None:
    """A receiver that asks for time gets it."""
    await teller.end_a_task()
    teller.receivers.replies.append(Reply(status=503, retry_after=600))
    await teller.round()
    (delivery,) = teller.ledger.deliveries.values()
    assert delivery.due == teller.ledger.clock.at + 600_000


async def test_given_up_and_sent_again(teller: Teller) -> None:
    """After a day it is given up and listed; an operator has it sent again from the start."""
    reservation = await teller.end_a_task()
    teller.receivers.replies += [Reply(status=500, answer="full")] * 11
    began = teller.ledger.clock.at
    while teller.state(reservation) is DeliveryState.PENDING:
        await teller.round()
        teller.ledger.clock.at = teller.ledger.deliveries[reservation].due or teller.ledger.clock.at
    assert len(teller.receivers.sent) == 11
    assert 23 * 3_600_000 < teller.ledger.clock.at - began <= 24 * 3_600_000
    (failed,) = await teller.webhooks.failed(10)
    assert (failed.tenant, failed.delivery.error, failed.delivery.answer) == ("shop", "It answered 500.", "full")
    await teller.webhooks.redeliver(f"msg_{reservation}")
    await teller.round()
    assert teller.state(reservation) is DeliveryState.DELIVERED
    assert len({body for _, _, body in teller.receivers.sent}) == 1
    assert not await teller.webhooks.failed(10)


@pytest.mark.parametrize("event", ["msg_" + "0" * 32, "nonsense"])
async def test_unknown_delivery(teller: Teller, event: str) -> None:
    """What is not known can't be sent again."""
    with pytest.raises(NotFound):
        await teller.webhooks.redeliver(event)


async def test_gone_receiver(teller: Teller) -> None:
    """An address that answers 410 is switched off and not called any more; what it did not get can be sent later."""
    teller.receivers.replies.append(Reply(status=410))
    first = await teller.end_a_task()
    await teller.round()
    assert teller.hook.is_off(URL)
    second = await teller.end_a_task()
    await teller.round()
    assert len(teller.receivers.sent) == 1
    assert teller.state(first) is teller.state(second) is DeliveryState.OFF
    assert len(await teller.webhooks.failed(10)) == 2
    teller.put(replace(teller.hook, off=()))
    await teller.webhooks.redeliver(f"msg_{second}")
    await teller.round()
    assert teller.state(second) is DeliveryState.DELIVERED


async def test_tenant_deleted_meanwhile(teller: Teller) -> None:
    """Nobody is told of the tasks of a tenant that was deleted, and its delivery is listed under its former name."""
    reservation = await teller.end_a_task()
    now = teller.registry.current
    teller.registry.current = Registry(now.version + 1, now.next_id, former={1: "shop"})
    await teller.round()
    assert not teller.receivers.sent
    (failed,) = await teller.webhooks.failed(10)
    assert (failed.delivery.reservation, failed.tenant) == (reservation, "shop")
    assert failed.delivery.error == "The tenant was deleted."


async def test_switching_off_a_deleted_tenant(teller: Teller) -> None:
    """An address of a tenant that is deleted while it says that it is gone does no harm."""
    before = teller.registry.current.tenants
    await teller.webhooks.switch_off(99, URL)
    assert teller.registry.current.tenants == before


@pytest.mark.parametrize("hook", [Webhook(), Webhook("https://elsewhere.test/")])
async def test_address_not_allowed_any_more(teller: Teller, hook: Webhook) -> None:
    """Nothing goes to an address that was taken off the tenant's list after its task had begun."""
    reservation = await teller.end_a_task()
    teller.put(replace(hook, signing=teller.hook.signing))
    await teller.round()
    assert not teller.receivers.sent
    assert teller.state(reservation) is DeliveryState.FAILED


async def test_task_forgotten(teller: Teller) -> None:
    """A task that is not known any more can't be told of."""
    reservation = await teller.end_a_task()
    teller.ledger.tasks.clear()
    await teller.round()
    assert teller.state(reservation) is DeliveryState.FAILED


async def test_keys_taken_away(teller: Teller) -> None:
    """Nothing is sent without a signature: it waits for the key that can open the secret."""
    reservation = await teller.end_a_task()
    teller.put(replace(teller.hook, signing=Signing(b"sealed by a key that is gone")))
    await teller.round()
    assert not teller.receivers.sent
    assert teller.state(reservation) is DeliveryState.PENDING


async def test_rotation(teller: Teller) -> None:
    """During the grace each webhook carries the signatures of both secrets, then that of the new one alone."""
    made = await teller.webhooks.rotate("shop", 60)
    new = webhooks.parse_secret(made.text)
    for keys in ([new, b"s" * 32], [new]):
        reservation = await teller.end_a_task()
        await teller.round()
        _, headers, body = teller.receivers.sent[-1]
        at = float(headers["webhook-timestamp"])
        assert headers == webhooks.headers(f"msg_{reservation}", at, body, keys)
        teller.ledger.clock.at += 60_000
    teller.put(Webhook())
    with pytest.raises(Conflict):
        await teller.webhooks.rotate("shop", 0)
    with pytest.raises(NotFound):
        await teller.webhooks.rotate("nobody", 0)
