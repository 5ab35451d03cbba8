"""One key, many copies: over several processes, past a killed one, a frozen one, and a store that goes away."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2
import pytest
from redis import Redis

from service.domain.ledger import TenantState
from service.domain.tenants import Window
from tests.behaviour.house import House, real_house
from tests.behaviour.keyed import KEY, PLENTY, keyed, lost, made, photo, refused, replayed
from tests.chaos.fleet import Fleet, Shop, fleet
from tests.chaos.rush import SECONDS, rush
from tests.chaos.test_store_away import arrived, control, counters
from tests.process.gateway import Gateway, until
from tests.support.valkey import Valkey, running

pytestmark = pytest.mark.xdist_group("idempotency")  # its processes are started once

COPIES = 50
LEASE_SECONDS = 180


@pytest.fixture(scope="module")
def gateways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """Three gateways, for the tests of this module that kill none."""
    with fleet(tmp_path_factory.mktemp("fleet"), 3) as found:
        yield found


def slowly(gateways: Fleet, *faults: dict[str, Any], seconds: float = 0.3) -> Shop:
    """A tenant of an upstream that takes its time over submits; the ledger's clock stands, so no task goes on."""
    gateways.noon()
    slow = {"on": "submit", "latency": seconds}
    gateways.upstream.dial(*(slow | each for each in (*faults, {})))
    return gateways.shop(PLENTY, {"count": 100, "money": 0}, {})


def submission(shop: Shop, gateway: Gateway, image: bytes) -> httpx2.Request:
    """A submission under a key."""
    headers = {"Authorization": f"Bearer {shop.token}", "Idempotency-Key": KEY}
    files = {"image": ("a.jpg", image, "image/jpeg")}
    return httpx2.Request("POST", f"{gateway.url}/v1/tasks/face-enhance", headers=headers, files=files)


def copies(shop: Shop, *images: bytes) -> list[httpx2.Request]:
    """Many copies of one submission, or of several in turn, to one gateway after the other."""
    pairs = zip(cycle(shop.fleet.gateways), cycle(images), strict=False)
    return [submission(shop, *pair) for pair in islice(pairs, COPIES)]


def answers(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """What all who send at once are told in the end: they send again as long as there is no outcome."""
    found: dict[int, httpx2.Response] = {}

    def told() -> bool:
        waiting = [index for index in range(len(requests)) if index not in found]
        for index, answer in zip(waiting, asyncio.run(rush([requests[each] for each in waiting])), strict=True):
            if answer.status_code == 409:
                refused(answer, 409, "idempotency-in-flight")
                assert answer.headers["retry-after"]
            else:
                found[index] = answer
        return len(found) == len(requests)

    until(told, "an answer for each")
    return [found[index] for index in range(len(requests))]


def total(state: TenantState) -> tuple[int, int, int]:
    """Of all there ever was: used, held, and what is active."""
    counter = state.windows[Window.TOTAL]
    return counter.tasks, counter.tasks_reserved, state.active


def one_task(found: Sequence[httpx2.Response]) -> dict[str, Any]:
    """The task that all were told of: exactly one that it was new, all others that it was there before."""
    (first,) = [each for each in found if "idempotent-replayed" not in each.headers]
    task = made(first)
    for each in found:
        if each is not first:
            replayed(each, task)
    return task


def test_copies_at_once(gateways: Fleet) -> None:
    """Of 50 copies sent at once to three processes one is sent on, and all are told of the same task."""
    shop = slowly(gateways)
    one_task(answers(copies(shop, photo())))
    assert (shop.reached(), shop.balance()["count"]) == (1, 99)
    assert total(shop.counters()) == (1, 0, 1)


def test_two_contents_at_once(gateways: Fleet) -> None:
    """Of two different submissions under one key, 25 copies of each sent at once, one wins; the other is refused."""
    shop = slowly(gateways)
    found = answers(copies(shop, photo(b"a"), photo(b"b")))
    of_each = [found[::2], found[1::2]]
    (winners,) = [each for each in of_each if {answer.status_code for answer in each} == {201}]
    (losers,) = [each for each in of_each if each is not winners]
    one_task(winners)
    for answer in losers:
        refused(answer, 422, "idempotency-key-reused")
    assert (shop.reached(), total(shop.counters())) == (1, (1, 0, 1))


def test_copies_of_what_is_refused(gateways: Fleet) -> None:
    """Of copies of what the upstream rejects at first all are told of the one task that it took in the end."""
    shop = slowly(gateways, {"reject": "no", "times": 3})
    found = answers(copies(shop, photo()))
    rejected = [each for each in found if each.status_code == 502]
    for answer in rejected:
        refused(answer, 502, "upstream-rejected")
    one_task([each for each in found if each not in rejected])
    assert (len(rejected), shop.reached()) == (3, 4)
    assert total(shop.counters()) == (1, 0, 1)


@contextmanager
def sending(shop: Shop) -> Iterator[Future[httpx2.Response]]:
    """A submission that the first gateway has sent on."""
    with ThreadPoolExecutor() as threads:
        call = threads.submit(send, submission(shop, shop.fleet.gateways[0], photo()))
        until(lambda: shop.reached() == 1, "a submit")
        yield call


def send(request: httpx2.Request) -> httpx2.Response:
    """The answer to a request."""
    with httpx2.Client(timeout=SECONDS, trust_env=False) as http:
        return http.send(request)


def at_second(shop: Shop, image: bytes | None = None) -> httpx2.Response:
    """What the second gateway answers to the same submission, or to one with another image."""
    return send(submission(shop, shop.fleet.gateways[1], image or photo()))


def given_up(shop: Shop) -> dict[str, Any]:
    """What the second gateway tells of a submission once its lease has run out."""
    until(lambda: at_second(shop).status_code != 409, "the end of the lease")
    told = at_second(shop)
    return lost(told, told.json())


def test_killed_process(tmp_path: Path) -> None:
    """What a killed process was sending is in flight until its lease has run out, and an unknown submission then."""
    with fleet(tmp_path, 2) as two:
        shop = slowly(two, {"reply": "hang"})
        with sending(shop) as call:
            refused(at_second(shop), 409, "idempotency-in-flight")
            two.gateways[0].end(signal.SIGKILL)
            assert isinstance(call.exception(), httpx2.TransportError)
        two.pass_by(LEASE_SECONDS - 1)
        refused(at_second(shop), 409, "idempotency-in-flight")
        two.pass_by(1)
        first = given_up(shop)
        lost(at_second(shop), first)
        refused(at_second(shop, photo(b"b")), 422, "idempotency-key-reused")
        assert (shop.reached(), total(shop.counters())) == (1, (1, 0, 0))


def test_frozen_process(gateways: Fleet) -> None:
    """What a process accepted that slept through its lease is told as unknown, and as its task once it woke up."""
    shop, accepted = slowly(gateways, seconds=1), gateways.upstream.count("submit", "accepted")
    sleeper = gateways.gateways[0].process
    with sending(shop) as call:
        sleeper.send_signal(signal.SIGSTOP)
        try:
            until(lambda: gateways.upstream.count("submit", "accepted") > accepted, "the acceptance")
            gateways.pass_by(LEASE_SECONDS)
            given_up(shop)
        finally:
            sleeper.send_signal(signal.SIGCONT)
        task = made(call.result())
    replayed(at_second(shop), task)
    assert (shop.reached(), total(shop.counters())) == (1, (1, 0, 1))


@pytest.fixture
def store() -> Iterator[Valkey]:
    """A server of the test's own, which can be told to refuse."""
    with running() as server:
        yield server


@pytest.fixture
async def house(store: Valkey) -> AsyncIterator[House]:
    """A gateway on that server, which takes everything again at the end: the gateway would wait for it."""
    async with real_house(store) as found:
        try:
            yield found
        finally:
            heal(store)


def heal(store: Valkey) -> None:
    """Let the server take everything again."""
    with Redis(unix_socket_path=str(store.path)) as client:
        client.config_set("min-replicas-to-write", 0)
        client.execute_command("ACL", "SETUSER", "default", "allkeys")


async def test_away_when_settling(house: House, store: Valkey) -> None:
    """What was accepted while the store was away is in flight once it is back, until it is booked, and then replayed.

    Between the two the store takes all but what would begin to watch the task: so it reserves, but does not settle.
    """
    await control(house).answer_after(0.5)
    submitting = asyncio.create_task(keyed(house))
    await arrived(house, 1)
    with Redis(unix_socket_path=str(store.path)) as client:
        client.config_set("min-replicas-to-write", 1)
        task = made(await submitting)
        refused(await keyed(house), 503, "ledger-unavailable")
        client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~{gw}:[^w]*")
        client.config_set("min-replicas-to-write", 0)
        for _ in range(3):
            refused(await keyed(house), 409, "idempotency-in-flight")
    heal(store)
    async with asyncio.timeout(20):
        while (again := await keyed(house)).status_code != 201:
            refused(again, 409, "idempotency-in-flight")
            await asyncio.sleep(0.01)
    replayed(again, task)
    assert await house.upstream.submits() == 1
    assert total(await counters(house)) == (1, 0, 1)
