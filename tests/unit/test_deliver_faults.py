"""No delivery is lost or held up, whatever happens to a receiver, to the store or to a process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.domain.errors import Overloaded
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import LEASE
from service.usecases.ports import Claimed, Outcome
from tests.unit.over_deliver import URL, Teller, delivery
from tests.unit.over_fakes import until


@pytest.fixture
def teller() -> Teller:
    return Teller()


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


async def test_no_descriptor(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that this machine could not make does not count, and is made once the claim is over."""
    reservation = await teller.end_a_task()

    async def post(*_: Any) -> Any:
        raise Overloaded("Too many open files", retry_after=1)

    with monkeypatch.context() as lacking:
        lacking.setattr(teller.receivers, "post", post)
        await teller.round()
    assert teller.ledger.deliveries[reservation].attempts == 0
    teller.ledger.clock.at += LEASE
    await teller.round()
    assert teller.state(reservation) is DeliveryState.DELIVERED
    assert teller.ledger.deliveries[reservation].attempts == 1


async def test_run_outlasts_the_store(teller: Teller, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job goes on through a store that is away and a fault of the gateway's own."""
    monkeypatch.setattr("service.usecases.background.AWAY_SECONDS", 0)
    monkeypatch.setattr("service.usecases.background.TICK_SECONDS", 0)
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
    dead = ("https://other.test/dead", "https://hooks.test/dead")
    teller.receivers.dead |= set(dead)
    template = teller.ledger.tasks[await teller.end_a_task()]
    await teller.round()
    for number in range(8):
        teller.agenda.enqueue(delivery(f"{number:032}", dead[number % 2]))
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
