"""Telling tenants of the ends of their tasks, over receivers, a store and processes that fail."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from service.api.webhook_views import task_event
from service.domain import webhook
from service.domain.errors import Conflict, NotFound
from service.domain.registry import Registry
from service.domain.webhook import DeliveryState, Signing, Webhook
from service.keyring import Keyring
from service.storage.agenda import LEASE
from service.telemetry.metrics import Metrics
from service.usecases.change import Change
from service.usecases.deliver import Deliver
from service.usecases.ports import Answered, Check, Claimed, Delivery, Outcome, Reply
from service.usecases.webhooks import Webhooks
from tests.fakes import FakeAgenda, FakeCallbacks
from tests.unit.over_fakes import Gateway, until

SEALER = Keyring([b"k" * 32]).purpose("webhook-secret")
URL = "https://hooks.test/ended"


def sealed(key: bytes) -> bytes:
    return SEALER.seal(key)


@dataclass
class Receivers(FakeCallbacks):
    """Those at a host of `dead` never answer."""

    dead: set[str] = field(default_factory=set)

    async def post(self, url: str, headers: Mapping[str, str], body: bytes, webhook: Webhook) -> Reply:
        if url in self.dead:
            await asyncio.Event().wait()
        return await super().post(url, headers, body, webhook)


class Teller:
    """A gateway whose tenant has a webhook, and processes that deliver."""

    def __init__(self) -> None:
        self.gateway, self.receivers = Gateway(), Receivers()
        self.ledger, self.registry = self.gateway.ledger, self.gateway.registry
        self.agenda = FakeAgenda(self.ledger)
        self.metrics = Metrics(CollectorRegistry())
        clock = self.ledger.clock
        change = Change(self.registry, self.registry)
        self.webhooks = Webhooks(change=change, registry=self.registry, agenda=self.agenda, secrets=SEALER, clock=clock)
        self.deliver = self.process()
        self.put(Webhook(URL, ("other.test",), Signing(sealed(b"s" * 32))))

    def process(self) -> Deliver:
        """One more process that delivers."""
        return Deliver(
            agenda=self.agenda,
            tasks=self.ledger,
            callbacks=self.receivers,
            registry=self.registry,
            secrets=SEALER,
            switch_off=self.webhooks.switch_off,
            render=task_event,
            clock=self.ledger.clock,
            metrics=self.metrics,
            at_once=8,
            chance=lambda: 0.0,
        )

    def put(self, hook: Webhook) -> None:
        """Give the tenant another webhook."""
        self.gateway.tenant = replace(self.gateway.tenant, webhook=hook)
        now = self.registry.current
        self.registry.current = Registry(
            now.version + 1, now.next_id, {"shop": self.gateway.tenant}, now.accounts, now.tokens
        )

    @property
    def hook(self) -> Webhook:
        return self.registry.current.tenants["shop"].webhook

    async def end_a_task(self, check: Check | None = None) -> str:
        """Submit an image and let its task end; the reservation."""
        task = (await self.gateway.submitted()).task
        if check:
            self.gateway.upstream.next_checks.append(check)
        self.ledger.clock.at += self.ledger.spans.check_after
        while await self.gateway.watch.tick():
            pass
        await self.gateway.watch.settled()
        return task.reservation

    async def round(self) -> None:
        """Deliver all that is due now."""
        while await self.deliver.tick():
            await self.deliver.settled()

    def state(self, reservation: str) -> DeliveryState:
        return self.ledger.deliveries[reservation].state


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
    assert headers == webhook.headers(f"msg_{reservation}", teller.ledger.clock.now(), body, [b"s" * 32])
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


async def test_killed_before_it_was_recorded(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process sent but did not record before it was killed is sent again once its lease is over, the same."""
    reservation = await teller.end_a_task()
    gone = asyncio.Event()

    async def never(_claimed: Claimed, _outcome: Outcome) -> bool:
        gone.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(teller.agenda, "record", never)
    running = asyncio.create_task(teller.deliver.run())
    await gone.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    monkeypatch.undo()
    teller.deliver = teller.process()
    teller.ledger.clock.at += LEASE - 1
    await teller.round()
    assert len(teller.receivers.sent) == 1
    teller.ledger.clock.at += 1
    await teller.round()
    first, second = teller.receivers.sent
    assert (first[1]["webhook-id"], first[2]) == (second[1]["webhook-id"], second[2])
    assert teller.state(reservation) is DeliveryState.DELIVERED


async def test_store_away_while_sending(teller: Teller) -> None:
    """An attempt whose outcome can't be written is made again."""
    reservation = await teller.end_a_task()
    await teller.deliver.tick()
    teller.ledger.away = True
    await teller.deliver.settled()
    teller.ledger.away = False
    teller.ledger.clock.at += LEASE
    await teller.round()
    assert teller.state(reservation) is DeliveryState.DELIVERED


async def test_run_outlasts_the_store(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on through a store that is away and a fault of the gateway's own."""
    monkeypatch.setattr("service.usecases.rounds.AWAY_SECONDS", 0)
    monkeypatch.setattr("service.usecases.rounds.TICK_SECONDS", 0)
    claim, tries = teller.agenda.claim, 0

    async def claiming(most: int) -> Any:
        nonlocal tries
        tries += 1
        teller.ledger.away = tries == 1
        if tries == 2:
            raise ValueError("a fault of ours")
        return await claim(most)

    monkeypatch.setattr(teller.agenda, "claim", claiming)
    reservation = await teller.end_a_task()
    running = asyncio.create_task(teller.deliver.run())
    await until(lambda: teller.state(reservation) is DeliveryState.DELIVERED)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_own_fault(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the gateway's own loses no delivery."""
    reservation = await teller.end_a_task()
    monkeypatch.setattr(teller.deliver, "_render", lambda _: 1 // 0)
    await teller.round()
    monkeypatch.undo()
    teller.deliver = teller.process()
    teller.ledger.clock.at += LEASE
    await teller.round()
    assert teller.state(reservation) is DeliveryState.DELIVERED


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
    new = webhook.parse_secret(made.text)
    for keys in ([new, b"s" * 32], [new]):
        reservation = await teller.end_a_task()
        await teller.round()
        _, headers, body = teller.receivers.sent[-1]
        at = float(headers["webhook-timestamp"])
        assert headers == webhook.headers(f"msg_{reservation}", at, body, keys)
        teller.ledger.clock.at += 60_000
    teller.put(Webhook())
    with pytest.raises(Conflict):
        await teller.webhooks.rotate("shop", 0)
    with pytest.raises(NotFound):
        await teller.webhooks.rotate("nobody", 0)


async def test_registry_not_there_yet(teller: Teller) -> None:
    """Nothing is claimed before the tenants are known, which would look deleted."""
    await teller.end_a_task()
    teller.registry.ready = False
    assert await teller.deliver.tick() is False
    teller.registry.ready = True
    assert await teller.deliver.tick() is True
    await teller.deliver.settled()


async def test_dead_receiver(teller: Teller) -> None:
    """A thousand deliveries to a receiver that never answers hold up nobody else's, in whichever order they came."""
    dead = "https://other.test/dead"
    teller.receivers.dead.add(dead)
    for number in range(1_000):
        teller.agenda.enqueue(delivery(f"{number:032}", dead))
    template = teller.ledger.tasks[await teller.end_a_task()]
    teller.ledger.tasks |= {f"{number:032}": template for number in range(1_000)}
    running = asyncio.create_task(teller.deliver.run())
    await until(lambda: len(teller.receivers.sent) == 1)
    assert teller.receivers.sent[0][0] == URL
    assert len(teller.ledger.leased) == 4
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_failing_receiver(teller: Teller) -> None:
    """A receiver that has failed is tried by one delivery at a time until it takes one."""
    for number in range(10):
        teller.agenda.enqueue(delivery(f"{number:032}", URL))
    (first, *others) = await teller.agenda.claim(100)
    assert len(others) == 3
    failure = Outcome(state=DeliveryState.PENDING, wait=5_000)
    for each in (first, *others):
        await teller.agenda.record(each, failure)
    (alone,) = await teller.agenda.claim(100)
    await teller.agenda.record(alone, Outcome(state=DeliveryState.DELIVERED))
    assert len(await teller.agenda.claim(100)) == 4


async def test_no_more_than_there_is_room_for(teller: Teller) -> None:
    """A process that sends as much as it may waits for one of them to end."""
    teller.receivers.dead |= {f"https://other.test:{port}/" for port in range(1, 5)}
    template = teller.ledger.tasks[await teller.end_a_task()]
    await teller.round()
    for number in range(8):
        teller.agenda.enqueue(delivery(f"{number:032}", f"https://other.test:{number % 4 + 1}/"))
    teller.ledger.tasks |= {f"{number:032}": template for number in range(8)}
    await teller.deliver.tick()
    waiting = asyncio.create_task(teller.deliver.tick())
    await asyncio.wait([waiting], timeout=0.05)
    assert not waiting.done()
    next(iter(teller.deliver._sending)).cancel()
    assert await waiting
    for each in teller.deliver._sending:
        each.cancel()
    await teller.deliver.settled()


def delivery(reservation: str, url: str) -> Delivery:
    """A delivery as it begins."""
    state = DeliveryState.PENDING
    return Delivery(reservation=reservation, task="task_x", tenant=1, url=url, state=state, created=0, updated=0)
