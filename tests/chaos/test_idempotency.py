"""Copies of one submission with one key: over several processes, with a killed or frozen one, and during an outage."""

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
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.idempotent_requests import (
    KEY,
    UNREACHABLE_LIMITS,
    expect_created,
    expect_refused,
    expect_replayed,
    expect_unknown,
    make_jpeg,
    submit_with_key,
)
from tests.chaos.concurrent_requests import TIMEOUT_SECONDS, send_concurrently
from tests.chaos.process_cluster import ProcessCluster, TenantClient, run_cluster
from tests.chaos.test_redis_outage import read_counters, sandbox_control, wait_for_submits
from tests.process.gateway import GatewayProcess, wait_until
from tests.support.valkey import Valkey, run_valkey

pytestmark = pytest.mark.xdist_group("idempotency")  # its processes are started once

COPIES = 50
LEASE_SECONDS = 180


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    """Yield three gateways, for the tests that kill none."""
    with run_cluster(tmp_path_factory.mktemp("cluster"), 3) as running:
        yield running


def slow_tenant(cluster: ProcessCluster, *faults: dict[str, Any], seconds: float = 0.3) -> TenantClient:
    """Create a tenant with a slow upstream; the ledger's clock stands still, so that no task ends."""
    cluster.set_clock_to_noon()
    slow = {"on": "submit", "latency": seconds}
    cluster.upstream.set_faults(*(slow | item for item in (*faults, {})))
    return cluster.create_tenant(UNREACHABLE_LIMITS, {"count": 100, "money": 0}, {})


def build_submission(shop: TenantClient, gateway: GatewayProcess, image: bytes) -> httpx2.Request:
    """Build a submission with the idempotency key."""
    headers = {"Authorization": f"Bearer {shop.token}", "Idempotency-Key": KEY}
    files = {"image": ("a.jpg", image, "image/jpeg")}
    return httpx2.Request("POST", f"{gateway.url}/v1/tasks/face-enhance", headers=headers, files=files)


def build_copies(shop: TenantClient, *images: bytes) -> list[httpx2.Request]:
    """Build copies of one submission, or of several in turn, for the gateways in turn."""
    pairs = zip(cycle(shop.cluster.gateways), cycle(images), strict=False)
    return [build_submission(shop, *pair) for pair in islice(pairs, COPIES)]


def send_until_final(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """Send all requests at once, and repeat those in flight until each has a final response."""
    responses: dict[int, httpx2.Response] = {}

    def are_final() -> bool:
        waiting = [index for index in range(len(requests)) if index not in responses]
        for index, answer in zip(
            waiting, asyncio.run(send_concurrently([requests[item] for item in waiting])), strict=True
        ):
            if answer.status_code == 409:
                expect_refused(answer, 409, "idempotency-in-flight")
                assert answer.headers["retry-after"]
            else:
                responses[index] = answer
        return len(responses) == len(requests)

    wait_until(are_final, "an answer for each")
    return [responses[index] for index in range(len(requests))]


def total_counters(state: TenantState) -> tuple[int, int, int]:
    """Return the used, held and active tasks in total."""
    counter = state.windows[Window.TOTAL]
    return counter.tasks, counter.tasks_reserved, state.active_tasks


def expect_one_task(responses: Sequence[httpx2.Response]) -> dict[str, Any]:
    """Require that one response is new and all others replay it; returns the task."""
    (first,) = [entry for entry in responses if "idempotent-replayed" not in entry.headers]
    task = expect_created(first)
    for item in responses:
        if item is not first:
            expect_replayed(item, task)
    return task


def test_concurrent_copies(cluster: ProcessCluster) -> None:
    """Of 50 concurrent copies to three processes one is sent, and all responses have the same task."""
    shop = slow_tenant(cluster)
    expect_one_task(send_until_final(build_copies(shop, make_jpeg())))
    assert (shop.count_submits(), shop.read_balance()["count"]) == (1, 99)
    assert total_counters(shop.read_counters()) == (1, 0, 1)


def test_two_contents(cluster: ProcessCluster) -> None:
    """Of two submissions with one key, 25 copies each, one wins and the other is rejected."""
    shop = slow_tenant(cluster)
    result = send_until_final(build_copies(shop, make_jpeg(b"a"), make_jpeg(b"b")))
    of_each = [result[::2], result[1::2]]
    (winners,) = [item for item in of_each if {answer.status_code for answer in item} == {201}]
    (losers,) = [item for item in of_each if item is not winners]
    expect_one_task(winners)
    for answer in losers:
        expect_refused(answer, 422, "idempotency-key-reused")
    assert (shop.count_submits(), total_counters(shop.read_counters())) == (1, (1, 0, 1))


def test_copies_of_a_rejected_submission(cluster: ProcessCluster) -> None:
    """Copies are sent until the upstream accepts one; all others replay it."""
    shop = slow_tenant(cluster, {"reject": "no", "times": 3})
    result = send_until_final(build_copies(shop, make_jpeg()))
    rejected = [item for item in result if item.status_code == 502]
    for answer in rejected:
        expect_refused(answer, 502, "upstream-rejected")
    expect_one_task([item for item in result if item not in rejected])
    assert (len(rejected), shop.count_submits()) == (3, 4)
    assert total_counters(shop.read_counters()) == (1, 0, 1)


@contextmanager
def submit_in_background(shop: TenantClient) -> Iterator[Future[httpx2.Response]]:
    """Submit to the first gateway in a thread, and wait until the upstream has it."""
    with ThreadPoolExecutor() as threads:
        call = threads.submit(send_request, build_submission(shop, shop.cluster.gateways[0], make_jpeg()))
        wait_until(lambda: shop.count_submits() == 1, "a submit")
        yield call


def send_request(request: httpx2.Request) -> httpx2.Response:
    with httpx2.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as http:
        return http.send(request)


def send_to_second(shop: TenantClient, image: bytes | None = None) -> httpx2.Response:
    """Send the same submission, or another image, to the second gateway."""
    return send_request(build_submission(shop, shop.cluster.gateways[1], image or make_jpeg()))


def expect_abandoned(shop: TenantClient) -> dict[str, Any]:
    """Require that the submission is unknown once its lease has expired."""
    wait_until(lambda: send_to_second(shop).status_code != 409, "the end of the lease")
    result = send_to_second(shop)
    return expect_unknown(result, result.json())


def test_killed_process(tmp_path: Path) -> None:
    """A killed process's submission is in flight until its lease expires, then unknown."""
    with run_cluster(tmp_path, 2) as two:
        shop = slow_tenant(two, {"reply": "hang"})
        with submit_in_background(shop) as call:
            expect_refused(send_to_second(shop), 409, "idempotency-in-flight")
            two.gateways[0].stop(signal.SIGKILL)
            assert isinstance(call.exception(), httpx2.TransportError)
        two.advance_clock(LEASE_SECONDS - 1)
        expect_refused(send_to_second(shop), 409, "idempotency-in-flight")
        two.advance_clock(1)
        first = expect_abandoned(shop)
        expect_unknown(send_to_second(shop), first)
        expect_refused(send_to_second(shop, make_jpeg(b"b")), 422, "idempotency-key-reused")
        assert (shop.count_submits(), total_counters(shop.read_counters())) == (1, (1, 0, 0))


def test_frozen_process(cluster: ProcessCluster) -> None:
    """A submission accepted by a process stopped beyond its lease is unknown until the process continues."""
    shop, accepted = slow_tenant(cluster, seconds=1), cluster.upstream.count_requests("submit", "accepted")
    sleeper = cluster.gateways[0].process
    with submit_in_background(shop) as call:
        sleeper.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: cluster.upstream.count_requests("submit", "accepted") > accepted, "the acceptance")
            cluster.advance_clock(LEASE_SECONDS)
            expect_abandoned(shop)
        finally:
            sleeper.send_signal(signal.SIGCONT)
        task = expect_created(call.result())
    expect_replayed(send_to_second(shop), task)
    assert (shop.count_submits(), total_counters(shop.read_counters())) == (1, (1, 0, 1))


@pytest.fixture
def store() -> Iterator[Valkey]:
    """Yield a server of the test's own, which can be made to reject commands."""
    with run_valkey() as server:
        yield server


@pytest.fixture
async def gateway(store: Valkey) -> AsyncIterator[RunningGateway]:
    """Yield a gateway on that server; restore the server at the end, or the shutdown would wait."""
    async with run_real_gateway(store) as running:
        try:
            yield running
        finally:
            restore_store(store)


def restore_store(store: Valkey) -> None:
    """Make the server accept all commands again."""
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.config_set("min-replicas-to-write", 0)
        client.execute_command("ACL", "SETUSER", "default", "allkeys")


async def test_away_when_settling(gateway: RunningGateway, store: Valkey) -> None:
    """An acceptance during an outage is in flight afterwards until it is settled, then replayed.

    In between the store rejects only keys of checks, so that it reserves but does not settle.
    """
    await sandbox_control(gateway).delay_next_response(0.5)
    submitting = asyncio.create_task(submit_with_key(gateway))
    await wait_for_submits(gateway, 1)
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.config_set("min-replicas-to-write", 1)
        task = expect_created(await submitting)
        expect_refused(await submit_with_key(gateway), 503, "ledger-unavailable")
        client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~{gw}:[^p]*")
        client.config_set("min-replicas-to-write", 0)
        for _ in range(3):
            expect_refused(await submit_with_key(gateway), 409, "idempotency-in-flight")
    restore_store(store)
    async with asyncio.timeout(20):
        while (again := await submit_with_key(gateway)).status_code != 201:
            expect_refused(again, 409, "idempotency-in-flight")
            await asyncio.sleep(0.01)
    expect_replayed(again, task)
    assert await gateway.upstream.count_submits() == 1
    assert total_counters(await read_counters(gateway)) == (1, 0, 1)
