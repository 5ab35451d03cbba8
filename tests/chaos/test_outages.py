"""The store is away, killed, emptied or set back at every step of a submission, and its connections are reset."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest
import uvloop
from httpx2 import Response
from redis import Redis
from structlog.testing import capture_logs

from service import container
from service.domain.ledger import Reservation, ReservationState
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.requests import UNREACHABLE_LIMITS, expect_created, read_counts
from tests.support.proxy import Proxy, run_thread_proxy
from tests.support.valkey import Valkey, run_cluster, run_single, run_valkey

CONCURRENT_REQUESTS = 80
RESET_SHARE = 0.15


@pytest.fixture
def store() -> Iterator[Valkey]:
    """Yield a server of the test's own, which can be frozen."""
    with run_valkey() as server:
        yield server
        server.resume()


@pytest.fixture
async def gateway(store: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningGateway]:
    """Yield a gateway on that server with a short Redis timeout."""
    monkeypatch.setattr(container, "REDIS_TIMEOUT_SECONDS", 0.3)
    async with run_real_gateway(store) as running:
        await running.put_tenant(**UNREACHABLE_LIMITS)
        yield running


@contextmanager
def open_client(store: Valkey) -> Iterator[Any]:
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        yield client


async def wait_for_counts(gateway: RunningGateway, *expected: int) -> None:
    """Wait until the store can be read and has these used, held and active tasks of `shop`."""
    async with asyncio.timeout(120):
        while not (await gateway.call("GET", "/v1/quota")).is_success or await read_counts(gateway) != expected:
            await asyncio.sleep(0.01)


async def submit_in_background(gateway: RunningGateway, seconds: float) -> asyncio.Task[Response]:
    """Submit to an upstream that takes so long to answer; return once it has received the submit."""
    before = len(await gateway.upstream.control.list_requests())
    await gateway.upstream.set_fault(on="submit", times=1, latency=seconds)
    submitting = asyncio.create_task(gateway.submit())
    await gateway.upstream.control.wait_for_requests(lambda requests: len(requests) > before)
    return submitting


async def test_nothing_is_sent_while_the_store_cannot_reserve(gateway: RunningGateway, store: Valkey) -> None:
    store.suspend()
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
    assert refused.headers["retry-after"]
    store.resume()
    with open_client(store) as client:

        def is_given_up() -> bool:
            packed = [client.get(key) for key in client.scan_iter(match="*:reservation:*")]
            states = [msgspec.msgpack.decode(item, type=Reservation).state for item in packed]
            return states == [ReservationState.NOT_SENT]

        await wait_until(is_given_up)
        assert await read_counts(gateway) == (0, 0, 0)
        client.config_set("min-replicas-to-write", 1)
        refused = await gateway.submit()
        assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
        client.config_set("min-replicas-to-write", 0)
    assert await gateway.upstream.count_submits() == 0
    assert (await gateway.submit()).status_code == 201


async def test_accepted_submission_is_settled_once_after_an_outage(gateway: RunningGateway, store: Valkey) -> None:
    submitting = await submit_in_background(gateway, 0.5)
    store.suspend()
    task = expect_created(await submitting)
    store.resume()
    await wait_for_counts(gateway, 1, 0, 1)
    assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded"
    assert await read_counts(gateway) == (1, 0, 0)
    assert await gateway.upstream.count_submits() == 1


async def test_task_and_registry_survive_the_loss_of_all_data(gateway: RunningGateway, store: Valkey) -> None:
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}], max_active=9)
    task = (await gateway.submit("seamless", {"fit": "0.4"})).json()
    with open_client(store) as client:
        client.flushall()
    result = await gateway.call("GET", task["links"]["self"])
    assert (result.status_code, result.json()["kind"]) == (200, "seamless")
    assert await read_counts(gateway) == (1, 0, int(result.json()["state"] != "succeeded"))
    assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded"
    assert await read_counts(gateway) == (1, 0, 0)
    await gateway.services.registry.refresh()
    assert (await gateway.submit()).json()["code"] == "quota-exceeded"
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["limits"][0]["tasks"] == 1
    await gateway.put_tenant("another")
    assert await gateway.upstream.count_submits() == 1


@contextmanager
def restart_store(store: Valkey) -> Iterator[None]:
    """Restart the server on the same data."""
    with subprocess.Popen(store.process.args, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def test_accepted_submission_is_settled_once_after_a_restart() -> None:
    with run_valkey("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as restarted:
        async with run_real_gateway(store) as gateway:
            await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}], max_active=2)
            assert (await gateway.submit()).status_code == 201
            submitting = await submit_in_background(gateway, 0.3)
            store.kill()
            expect_created(await submitting)
            assert (await gateway.submit()).json()["code"] == "ledger-unavailable"
            restarted.enter_context(restart_store(store))
            await wait_for_counts(gateway, 2, 0, 2)
            assert (await gateway.submit()).json()["code"] == "quota-exceeded"
            assert await gateway.upstream.count_submits() == 2


async def submit_under_resets(gateway: RunningGateway, proxy: Proxy) -> None:
    await gateway.upstream.set_balance(10_000, 0)
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1_000}], max_active=1_000)
    proxy.reset_probability = RESET_SHARE
    answers = [answer for _ in range(3) for answer in await submit_concurrently(gateway)]
    proxy.reset_probability = 0
    assert proxy.resets > 3
    accepted = {answer.json()["id"] for answer in answers if answer.status_code == 201}
    refused = [answer for answer in answers if answer.status_code != 201]
    assert {(answer.status_code, answer.json()["code"]) for answer in refused} == {(503, "ledger-unavailable")}
    assert len(answers) - len(refused) == len(accepted) == await gateway.upstream.count_submits() > 0
    await wait_for_counts(gateway, len(accepted), 0, len(accepted))
    listed: list[str] = []
    page = "/v1/tasks?limit=100"
    while page:
        body = (await gateway.call("GET", page)).json()
        listed += [item["id"] for item in body["items"]]
        page = body["next_cursor"] and f"/v1/tasks?limit=100&cursor={body['next_cursor']}"
    assert sorted(listed) == sorted(accepted)


async def submit_concurrently(gateway: RunningGateway) -> list[Response]:
    return await asyncio.gather(*(gateway.submit() for _ in range(CONCURRENT_REQUESTS)))


def test_no_submission_is_lost_or_sent_twice_by_resets() -> None:

    async def run() -> None:  # on uvloop, as in production
        async with run_real_gateway(single.server, GATEWAY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}") as gateway:
            await submit_under_resets(gateway, proxy)

    with run_single() as single, run_thread_proxy(single.server.port, seed=80) as proxy:
        uvloop.run(run())


def test_lost_cluster_rejects_submissions_and_still_reads_tasks() -> None:

    async def run() -> None:
        async with run_real_gateway(store.server, GATEWAY_REDIS_URL=store.url) as gateway:
            task = (await gateway.submit()).json()
            await gateway.upstream.wait_until_idle()
            with capture_logs() as logs:
                async with gateway.services.run_jobs():
                    store.server.kill()
                    refused = await submit_concurrently(gateway)
                    problems = {(item.status_code, item.json()["code"]) for item in refused}
                    assert problems == {(503, "ledger-unavailable")}
                    gateway.services.task_cache.clear()
                    reads = (gateway.call("GET", task["links"]["self"]) for _ in range(CONCURRENT_REQUESTS))
                    read = {(item.status_code, item.json()["state"]) for item in await asyncio.gather(*reads)}
                    assert read == {(200, "succeeded")}
                    restarted.enter_context(restart_store(store.server))
                    await wait_until(lambda: "redis.available" in [log["event"] for log in logs])
                    assert (await gateway.submit()).status_code == 201
            assert [log["event"] for log in logs if log["event"].startswith("redis.")] == [
                "redis.unavailable",
                "redis.available",
            ]
            assert [log for log in logs if log["log_level"] in {"error", "critical"}] == []
            assert await gateway.upstream.count_submits() == 2

    with run_cluster("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as restarted:
        uvloop.run(run())
