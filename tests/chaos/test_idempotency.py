"""Copies of one submission with one key over several processes, and what a killed or frozen process leaves behind."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2

from tests.behaviour.requests import (
    KEY,
    UNREACHABLE_LIMITS,
    expect_created,
    expect_problem,
    expect_replayed,
    expect_unknown,
    make_jpeg,
)
from tests.chaos.process_cluster import ProcessCluster, TenantClient, call_admin, run_cluster, send_concurrently
from tests.process.gateway import HTTP, GatewayProcess, wait_until

COPIES = 50
LEASE_SECONDS = 180


def slow_tenant(cluster: ProcessCluster, *faults: dict[str, Any], seconds: float = 0.3) -> TenantClient:
    """Create a tenant with a slow upstream; the ledger's clock stands still, so that no task ends."""
    slow = {"on": "submit", "latency": seconds}
    cluster.upstream.set_faults(*(slow | item for item in (*faults, {})))
    return cluster.create_tenant(UNREACHABLE_LIMITS, {"count": 100, "money": 0}, {})


def build_submission(shop: TenantClient, gateway: GatewayProcess, image: bytes) -> httpx2.Request:
    return shop.build_submission(gateway, image, **{"Idempotency-Key": KEY})


def send_copies(shop: TenantClient, *images: bytes) -> list[httpx2.Response]:
    """Send copies of one submission, or of several in turn, to the gateways in turn; repeat those in flight."""
    pairs = list(islice(zip(cycle(shop.cluster.gateways), cycle(images), strict=False), COPIES))
    responses: dict[int, httpx2.Response] = {}

    def are_final() -> bool:
        waiting = [index for index in range(COPIES) if index not in responses]
        answers = asyncio.run(send_concurrently([build_submission(shop, *pairs[index]) for index in waiting]))
        for index, answer in zip(waiting, answers, strict=True):
            if answer.status_code == 409:
                expect_problem(answer, 409, "idempotency-in-flight")
                assert answer.headers["retry-after"]
            else:
                responses[index] = answer
        return len(responses) == COPIES

    wait_until(are_final, "an answer for each")
    return [responses[index] for index in range(COPIES)]


def total_counters(shop: TenantClient) -> tuple[int, int, int]:
    """Return the used, held and active tasks."""
    policies = shop.read_policies()
    total = policies["total-tasks"]
    return total["used"], total["reserved"], policies["max-active"]["used"]


def expect_one_task(responses: Sequence[httpx2.Response]) -> None:
    """Require that one response is new and all others replay it."""
    (first,) = [entry for entry in responses if "idempotent-replayed" not in entry.headers]
    task = expect_created(first)
    for item in responses:
        if item is not first:
            expect_replayed(item, task)


def test_copies_of_two_contents_with_one_key_are_sent_once(cluster: ProcessCluster) -> None:
    shop = slow_tenant(cluster)
    responses = send_copies(shop, make_jpeg(b"a"), make_jpeg(b"b"))
    copies = [responses[::2], responses[1::2]]
    (winners,) = [item for item in copies if {answer.status_code for answer in item} == {201}]
    (losers,) = [item for item in copies if item is not winners]
    expect_one_task(winners)
    for answer in losers:
        expect_problem(answer, 422, "idempotency-key-reused")
    assert (shop.count_submits(), total_counters(shop)) == (1, (1, 0, 1))


def test_copies_are_sent_until_one_is_accepted(cluster: ProcessCluster) -> None:
    shop = slow_tenant(cluster, {"reject": "no", "times": 3})
    responses = send_copies(shop, make_jpeg())
    rejected = [item for item in responses if item.status_code == 502]
    for answer in rejected:
        expect_problem(answer, 502, "upstream-rejected")
    expect_one_task([item for item in responses if item not in rejected])
    assert (len(rejected), shop.count_submits(), total_counters(shop)) == (3, 4, (1, 0, 1))
    assert HTTP.get(f"{cluster.upstream.url}/_control/accounts").json()[shop.name]["count"] == 99


def send_to(shop: TenantClient, number: int, image: bytes | None = None) -> httpx2.Response:
    """Send the submission, or another image with its key, to a gateway."""
    return HTTP.send(build_submission(shop, shop.cluster.gateways[number], image or make_jpeg()))


@contextmanager
def submit_in_background(shop: TenantClient) -> Iterator[Future[httpx2.Response]]:
    """Submit to the first gateway in a thread, and wait until the upstream has it."""
    before = shop.count_submits()
    with ThreadPoolExecutor() as threads:
        call = threads.submit(send_to, shop, 0)
        wait_until(lambda: shop.count_submits() == before + 1, "a submit")
        yield call


def expect_abandoned(shop: TenantClient) -> dict[str, Any]:
    """Require that the submission is unknown once its lease has expired."""
    wait_until(lambda: send_to(shop, 1).status_code != 409, "the end of the lease")
    response = send_to(shop, 1)
    return expect_unknown(response, response.json())


def test_submission_of_a_killed_process_is_unknown_once_its_lease_expires(tmp_path: Path) -> None:
    with run_cluster(tmp_path, 2) as two:
        two.set_clock_to_noon()
        shop, (victim, other) = slow_tenant(two), two.gateways
        two.upstream.set_faults({"on": "check", "reply": "hang"})
        (watched,) = shop.submit(1)
        other.process.send_signal(signal.SIGSTOP)  # so that the victim has the check
        two.advance_clock(60)
        wait_until(lambda: two.upstream.count_requests("check") == 1, "a check")
        other.process.send_signal(signal.SIGCONT)
        two.upstream.set_faults({"on": "submit", "reply": "hang"})
        with submit_in_background(shop) as call:
            expect_problem(send_to(shop, 1), 409, "idempotency-in-flight")
            victim.stop(signal.SIGKILL)
            assert isinstance(call.exception(), httpx2.TransportError)
        two.upstream.set_faults()
        two.advance_clock(LEASE_SECONDS - 1)
        expect_problem(send_to(shop, 1), 409, "idempotency-in-flight")
        two.advance_clock(1)
        first = expect_abandoned(shop)
        expect_unknown(send_to(shop, 1), first)
        expect_problem(send_to(shop, 1, make_jpeg(b"b")), 422, "idempotency-key-reused")
        wait_until(lambda: total_counters(shop) == (2, 0, 0), "the end of the task")
        assert shop.get(other, watched.json()["links"]["self"]).json()["state"] == "succeeded"
        account = call_admin(other, "GET", f"/accounts/{shop.name}")
        assert (account["unknown"], account["in_flight"], shop.count_submits()) == (1, 0, 2)


def test_submission_of_a_frozen_process_is_unknown_until_it_continues(cluster: ProcessCluster) -> None:
    shop, accepted = slow_tenant(cluster, seconds=1), cluster.upstream.count_requests("submit", "accepted")
    frozen = cluster.gateways[0].process
    with submit_in_background(shop) as call:
        frozen.send_signal(signal.SIGSTOP)
        try:
            wait_until(lambda: cluster.upstream.count_requests("submit", "accepted") > accepted, "the acceptance")
            cluster.advance_clock(LEASE_SECONDS)
            expect_abandoned(shop)
        finally:
            frozen.send_signal(signal.SIGCONT)
        task = expect_created(call.result())
    expect_replayed(send_to(shop, 1), task)
    assert (shop.count_submits(), total_counters(shop)) == (1, (1, 0, 1))
