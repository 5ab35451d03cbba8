"""Concurrent submissions to several processes, and what a killed or frozen process leaves behind.

Each test has a tenant and an account of its own. Once set, the ledger's clock stands still until it is advanced: the
time to the end of a window is known exactly, and nothing is checked meanwhile.
"""

from __future__ import annotations

import asyncio
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.behaviour.requests import (
    KEY,
    UNREACHABLE_LIMITS,
    expect_created,
    expect_problem,
    expect_replayed,
    expect_unknown,
    make_jpeg,
)
from tests.process.gateway import HTTP, TIMEOUT_SECONDS, GatewayProcess, start_gateway, wait_until
from tests.process.sandbox import SandboxProcess, advance_clock, call_admin, read_clock, run_sandbox
from tests.support.images import make_png
from tests.support.valkey import Valkey, run_valkey

DAY_SECONDS = 86_400
COPIES = 50
LEASE_SECONDS = 180
MONEY_ONLY = {"count": 0, "money": 10_000}


async def send_concurrently(requests: Sequence[httpx2.Request]) -> list[httpx2.Response]:
    """Send all requests at once; return the responses in the same order."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx2.AsyncClient(timeout=TIMEOUT_SECONDS, trust_env=False, limits=limits) as client:
        return await asyncio.gather(*(client.send(request) for request in requests))


@dataclass(frozen=True)
class ProcessCluster:
    """Running gateways with their shared store and upstream."""

    gateways: Sequence[GatewayProcess]
    upstream: SandboxProcess
    store: Valkey
    prefix: str

    def create_tenant(
        self, policy: Mapping[str, Any], balance: Mapping[str, int], max_price: Mapping[str, int]
    ) -> TenantClient:
        """Create a tenant with a policy, alone on a new account with a balance, and wait until every gateway has it."""
        name, first = f"shop-{secrets.token_hex(4)}", self.gateways[0]
        HTTP.put(f"{self.upstream.url}/_control/accounts/{name}", json=balance).raise_for_status()
        call_admin(first, "PUT", f"/accounts/{name}", json={"user_key": name, "max_price": max_price})
        call_admin(first, "PUT", f"/tenants/{name}", json={"accounts": [name], **policy})
        shop = TenantClient(self, name, call_admin(first, "POST", f"/tenants/{name}/tokens")["token"])

        def is_known() -> bool:
            return all(shop.get(gateway, "/v1/quota").status_code == 200 for gateway in self.gateways)

        wait_until(is_known, "the news of a tenant")
        return shop

    def set_clock_to_noon(self) -> None:
        """Set the ledger's clock to noon of the next day."""
        seconds = read_clock(self.store, self.prefix)
        self.advance_clock((seconds // DAY_SECONDS + 1.5) * DAY_SECONDS - seconds)

    def advance_clock(self, seconds: float) -> None:
        advance_clock(self.store, self.prefix, seconds)


@dataclass(frozen=True)
class TenantClient:
    """A tenant on an account of the same name."""

    cluster: ProcessCluster
    name: str
    token: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"}

    def get(self, gateway: GatewayProcess, path: str) -> httpx2.Response:
        return HTTP.get(gateway.url + path, headers=self.headers)

    def submit(self, times: int) -> list[httpx2.Response]:
        """Submit a small image so many times at once, to the gateways in turn.

        A busy machine causes responses `ledger-unavailable`, after which nothing was sent: these submits are repeated.
        """
        responses: list[httpx2.Response] = []
        image = make_png()
        for _ in range(5):
            gateways = islice(cycle(self.cluster.gateways), times - len(responses))
            received = asyncio.run(send_concurrently([self.build_submission(gateway, image) for gateway in gateways]))
            responses += [item for item in received if item.status_code != httpx2.codes.SERVICE_UNAVAILABLE]
            if len(responses) == times:
                return responses
        raise AssertionError(f"of {times} submits only {len(responses)} got another response than 503")

    def build_submission(self, gateway: GatewayProcess, image: bytes, key: str = "") -> httpx2.Request:
        headers = self.headers | ({"Idempotency-Key": key} if key else {})
        files = {"image": ("a.png", image, "application/octet-stream")}
        return httpx2.Request("POST", f"{gateway.url}/v1/tasks/face-enhance", headers=headers, files=files)

    def count_submits(self) -> int:
        """Return how many of its submits have reached the upstream."""
        received = HTTP.get(f"{self.cluster.upstream.url}/_control/requests").json()
        return sum(item["operation"] == "submit" and item["user_key"] == self.name for item in received)

    def read_policies(self) -> dict[str, dict[str, Any]]:
        """Return the counters of its limits by the name of the policy."""
        answer = self.get(self.cluster.gateways[-1], "/v1/quota").json()
        return {item["policy"]: item for item in answer["policies"]}

    def finish_tasks(self) -> dict[str, dict[str, Any]]:
        """Advance the clock until all its tasks, whose number is limited, have ended; return the counters."""

        def have_ended() -> bool:
            self.cluster.advance_clock(0.1)
            return bool(self.read_policies()["max-active"]["used"] == 0)

        wait_until(have_ended, "the end of all tasks")
        return self.read_policies()


@contextmanager
def run_cluster(folder: Path, size: int) -> Iterator[ProcessCluster]:
    """Start several gateways at once."""
    with ExitStack() as opened:
        store, upstream = opened.enter_context(run_valkey()), opened.enter_context(run_sandbox())
        shared = upstream.gateway_settings(store)
        gateways = [opened.enter_context(start_gateway(folder / str(number), **shared)) for number in range(size)]
        for gateway in gateways:
            gateway.wait_ready()
        yield ProcessCluster(gateways, upstream, store, shared["GATEWAY_KEY_PREFIX"])


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), 3) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: ProcessCluster) -> ProcessCluster:
    """Return them at noon, with an upstream that answers at once."""
    shared_cluster.upstream.set_faults()
    shared_cluster.set_clock_to_noon()
    return shared_cluster


def slow_tenant(cluster: ProcessCluster, *faults: dict[str, Any], seconds: float = 0.3) -> TenantClient:
    """Create a tenant with a slow upstream; the ledger's clock stands still, so that no task ends."""
    slow = {"on": "submit", "latency": seconds}
    cluster.upstream.set_faults(*(slow | item for item in (*faults, {})))
    return cluster.create_tenant(UNREACHABLE_LIMITS, {"count": 100, "money": 0}, {})


def send_copies(shop: TenantClient, *images: bytes) -> list[httpx2.Response]:
    """Send copies of one submission, or of several in turn, to the gateways in turn; repeat those in flight."""
    pairs = list(islice(zip(cycle(shop.cluster.gateways), cycle(images), strict=False), COPIES))
    responses: dict[int, httpx2.Response] = {}

    def are_final() -> bool:
        waiting = [index for index in range(COPIES) if index not in responses]
        answers = asyncio.run(send_concurrently([shop.build_submission(*pairs[index], KEY) for index in waiting]))
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
    return HTTP.send(shop.build_submission(shop.cluster.gateways[number], image or make_jpeg(), KEY))


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


def expect_accepted(shop: TenantClient, times: int, accepted: int, policy: str = "") -> set[str | None]:
    """Require that so many of the submits are accepted, and all others violate one policy; return their Retry-After."""
    before, answers = shop.count_submits(), shop.submit(times)
    refused = [answer for answer in answers if answer.status_code == 429]
    assert [answer.status_code for answer in answers if answer not in refused] == [201] * accepted
    violated = [item["policy"] for answer in refused for item in answer.json()["violated_policies"]]
    assert violated == [policy] * (times - accepted)
    assert shop.count_submits() == before + accepted
    return {answer.headers.get("retry-after") for answer in refused}


def test_tasks_per_day_are_exact(cluster: ProcessCluster) -> None:
    limits = [{"window": "day", "tasks": 20}, {"window": "total", "tasks": 1000}]
    shop = cluster.create_tenant({"limits": limits, "max_active": 1000}, MONEY_ONLY, {})
    assert expect_accepted(shop, 200, 20, "day-tasks") == {str(DAY_SECONDS // 2)}
    cluster.advance_clock(DAY_SECONDS // 2 - 1)
    assert expect_accepted(shop, 20, 0, "day-tasks") == {"1"}
    cluster.advance_clock(1)
    assert expect_accepted(shop, 200, 20, "day-tasks") == {str(DAY_SECONDS)}
    policies = shop.finish_tasks()
    counters = [(policies[name]["used"], policies[name]["reserved"]) for name in ("day-tasks", "total-tasks")]
    assert counters == [(20, 0), (40, 0)]


def wait_for_checks(cluster: ProcessCluster, times: int) -> None:
    wait_until(lambda: cluster.upstream.count_requests("check") >= times, "a check of every task")


def test_active_tasks_are_exact(cluster: ProcessCluster) -> None:
    shop = cluster.create_tenant({"max_active": 8}, MONEY_ONLY, {})
    for _ in range(2):
        cluster.upstream.set_faults({"on": "check", "reply": "page", "status": 503})
        checks = cluster.upstream.count_requests("check")
        assert expect_accepted(shop, 200, 8, "max-active") == {None}
        cluster.advance_clock(60)
        wait_for_checks(cluster, checks + 8)
        expect_accepted(shop, 20, 0, "max-active")
        cluster.upstream.set_faults()
        shop.finish_tasks()


def test_money_per_day_is_exact(cluster: ProcessCluster) -> None:
    limits = [{"window": "day", "money": 10}]
    shop = cluster.create_tenant({"limits": limits, "max_active": 1000}, MONEY_ONLY, {"face-enhance": 3})
    for _ in range(2):
        expect_accepted(shop, 100, 3, "day-money")
        day = shop.finish_tasks()["day-money"]
        assert (day["used"], day["reserved"], day["overrun"]) == (9, 0, 0)
        expect_accepted(shop, 20, 0, "day-money")
        cluster.set_clock_to_noon()
