"""The store is away, killed, emptied or set back at every step of a submission, and its connections are reset."""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import pytest
import uvloop
from httpx2 import Response
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import capture_logs

from service import container
from service.domain.ledger import Reservation, ReservationState
from service.domain.tenants import Window
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.idempotent_requests import expect_created, expect_refused, expect_replayed, submit_with_key
from tests.support.resetting_proxy import ResettingProxy, run_resetting_proxy
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
        yield running


@contextmanager
def open_client(store: Valkey) -> Iterator[Any]:
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        yield client


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(120):
        while not await condition():
            await asyncio.sleep(0.01)


async def read_counters(gateway: RunningGateway) -> tuple[int, int, int]:
    """Return the used, held and active tasks of `shop` in total."""
    tenant = gateway.services.registry.current.tenants["shop"]
    state = (await gateway.services.quota.ledger.tenant_snapshot(tenant.id)).state
    total = state.windows.get(Window.TOTAL)
    return (total.tasks, total.tasks_reserved, state.active_tasks) if total else (0, 0, state.active_tasks)


async def wait_for_counters(gateway: RunningGateway, used: int, held: int) -> None:
    async def is_reached() -> bool:
        return (await read_counters(gateway))[:2] == (used, held)

    await wait_until(is_reached)


async def submit_in_background(gateway: RunningGateway, seconds: float) -> asyncio.Task[Response]:
    """Submit to an upstream that takes so long to answer; return once it has received the submit."""
    before = await gateway.upstream.count_submits()
    await gateway.upstream.delay_next_response(seconds)
    submitting = asyncio.create_task(submit_with_key(gateway))

    async def is_received() -> bool:
        return await gateway.upstream.count_submits() > before

    await wait_until(is_received)
    return submitting


async def test_outage_while_reserving(gateway: RunningGateway, store: Valkey) -> None:
    """Nothing is sent without the store, or one that rejects writes; a reservation after the timeout is cancelled."""
    store.suspend()
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
    assert refused.headers["retry-after"]
    store.resume()
    with open_client(store) as client:

        async def is_given_up() -> bool:
            packed = [client.get(key) for key in client.scan_iter(match="*:reservation:*")]
            states = [msgspec.msgpack.decode(item, type=Reservation).state for item in packed]
            return states == [ReservationState.NOT_SENT]

        await wait_until(is_given_up)
        assert await read_counters(gateway) == (0, 0, 0)
        client.config_set("min-replicas-to-write", 1)
        refused = await gateway.submit()
        assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
        client.config_set("min-replicas-to-write", 0)
    assert await gateway.upstream.count_submits() == 0
    assert (await gateway.submit()).status_code == 201


async def test_outage_while_settling(gateway: RunningGateway, store: Valkey) -> None:
    """An accepted submission gets its 201, and is settled exactly once after the outage."""
    submitting = await submit_in_background(gateway, 0.5)
    store.suspend()
    task = expect_created(await submitting)
    store.resume()
    await wait_for_counters(gateway, 1, 0)
    assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded"
    assert await read_counters(gateway) == (1, 0, 0)
    assert await gateway.upstream.count_submits() == 1


async def test_copies_during_an_outage_while_settling(gateway: RunningGateway, store: Valkey) -> None:
    """An acceptance during an outage is in flight afterwards until it is settled, then replayed."""
    submitting = await submit_in_background(gateway, 0.5)
    with open_client(store) as client:
        client.config_set("min-replicas-to-write", 1)
        task = expect_created(await submitting)
        expect_refused(await submit_with_key(gateway), 503, "ledger-unavailable")
        # Rejecting only keys of checks, it reserves but does not settle.
        client.execute_command("ACL", "SETUSER", "default", "resetkeys", "~{gw}:[^p]*")
        client.config_set("min-replicas-to-write", 0)
        for _ in range(3):
            expect_refused(await submit_with_key(gateway), 409, "idempotency-in-flight")
        client.execute_command("ACL", "SETUSER", "default", "allkeys")
    async with asyncio.timeout(120):
        while (again := await submit_with_key(gateway)).status_code != 201:
            expect_refused(again, 409, "idempotency-in-flight")
            await asyncio.sleep(0.01)
    expect_replayed(again, task)
    assert await gateway.upstream.count_submits() == 1
    assert await read_counters(gateway) == (1, 0, 1)


async def test_client_disconnects(gateway: RunningGateway) -> None:
    """A submission whose client disconnects is sent, settled and listed."""
    submitting = await submit_in_background(gateway, 0.3)
    submitting.cancel()
    await asyncio.gather(submitting, return_exceptions=True)
    await wait_for_counters(gateway, 1, 0)
    assert len((await gateway.call("GET", "/v1/tasks")).json()["items"]) == 1
    assert await read_counters(gateway) == (1, 0, 1)
    assert await gateway.upstream.count_submits() == 1


async def test_reading_during_an_outage(gateway: RunningGateway, store: Valkey) -> None:
    """A task is read from the upstream by its id alone, once per interval for all readers."""
    task = (await gateway.submit()).json()
    await gateway.upstream.wait_until_idle()
    store.suspend()
    answers = await asyncio.gather(*(gateway.call("GET", task["links"]["self"]) for _ in range(5)))
    assert {(answer.status_code, answer.json()["state"]) for answer in answers} == {(200, "succeeded")}
    assert all(answer.json()["artifacts"] for answer in answers)
    assert await gateway.upstream.count_checks() == 1
    assert (await gateway.call("GET", "/v1/tasks")).status_code == 503
    assert (await gateway.call("GET", "/readyz", token="")).status_code == 200
    store.resume()


async def test_all_data_lost(gateway: RunningGateway, store: Valkey) -> None:
    """A task of which only the id is left is settled again and checked; the registry is restored, limits included."""
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])
    task = (await gateway.submit("seamless", {"fit": "0.4"})).json()
    with open_client(store) as client:
        client.flushall()
    result = await gateway.call("GET", task["links"]["self"])
    assert (result.status_code, result.json()["kind"]) == (200, "seamless")
    assert await read_counters(gateway) == (1, 0, int(result.json()["state"] != "succeeded"))
    assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded"
    assert await read_counters(gateway) == (1, 0, 0)
    await gateway.services.registry.refresh()
    assert (await gateway.submit()).json()["code"] == "quota-exceeded"
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["limits"][0]["tasks"] == 1
    await gateway.put_tenant("another")
    assert await gateway.upstream.count_submits() == 1


async def test_rolled_back_registry(gateway: RunningGateway, store: Valkey) -> None:
    """A failover to older data does not bring back revoked tokens or deleted tenants."""
    await gateway.put_tenant("gone")
    revoked = await gateway.new_token()
    with open_client(store) as client:
        before = client.dump("{gw}:registry")
        tokens = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
        assert (await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{tokens[-1]['id']}")).status_code == 204
        assert (await gateway.call_admin("DELETE", "/tenants/gone")).status_code == 204
        client.restore("{gw}:registry", 0, before, replace=True)
    await gateway.services.registry.refresh()
    assert (await gateway.call("GET", "/v1/quota", token=revoked)).status_code == 401
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200
    assert (await gateway.call_admin("GET", "/tenants/gone")).status_code == 404


@contextmanager
def restart_store(store: Valkey) -> Iterator[None]:
    """Restart the server on the same data."""
    with subprocess.Popen(store.process.args, stdout=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.kill()


async def is_ready(store: Valkey) -> bool:
    """Return whether the server has loaded its data."""
    with open_client(store) as client:
        try:
            return bool(client.ping())
        except RedisConnectionError:
            return False


async def test_killed_while_settling() -> None:
    """An acceptance that could not be settled before the store was killed is settled once after its restart."""
    with run_valkey("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as restarted:
        async with run_real_gateway(store) as gateway:
            await gateway.put_tenant(limits=[{"window": "total", "tasks": 2}], max_active=2)
            assert (await gateway.submit()).status_code == 201
            submitting = await submit_in_background(gateway, 0.3)
            store.kill()
            expect_created(await submitting)
            assert (await gateway.submit()).json()["code"] == "ledger-unavailable"
            restarted.enter_context(restart_store(store))
            await wait_until(lambda: is_ready(store))
            await wait_for_counters(gateway, 2, 0)
            assert (await gateway.submit()).json()["code"] == "quota-exceeded"
            assert await read_counters(gateway) == (2, 0, 2)
            assert await gateway.upstream.count_submits() == 2


async def submit_under_resets(gateway: RunningGateway, proxy: ResettingProxy) -> None:
    await gateway.upstream.set_balance(10_000, 0)
    statuses: Counter[int] = Counter()
    accepted: set[str] = set()
    proxy.reset_probability = RESET_SHARE
    for _ in range(3):
        for answer in await asyncio.gather(*(gateway.submit() for _ in range(CONCURRENT_REQUESTS))):
            statuses[answer.status_code] += 1
            if answer.status_code == 201:
                accepted.add(answer.json()["id"])
            else:
                assert (answer.status_code, answer.json()["code"]) == (503, "ledger-unavailable")
    proxy.reset_probability = 0
    assert proxy.resets > 3
    assert statuses[503] > 0
    assert statuses[201] == len(accepted) == await gateway.upstream.count_submits() > 0
    await wait_for_counters(gateway, len(accepted), 0)
    listed: list[str] = []
    page = "/v1/tasks?limit=100"
    while page:
        body = (await gateway.call("GET", page)).json()
        listed += [item["id"] for item in body["items"]]
        page = body["next_cursor"] and f"/v1/tasks?limit=100&cursor={body['next_cursor']}"
    assert sorted(listed) == sorted(accepted)


def test_resets_while_submitting() -> None:
    """On uvloop no response is a 500, and everything that the upstream accepted gets a 201, once."""

    async def run(proxy: ResettingProxy, store: Valkey) -> None:
        async with run_real_gateway(store, GATEWAY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}") as gateway:
            await submit_under_resets(gateway, proxy)

    with run_single() as single, run_resetting_proxy(single.server.port, seed=80) as proxy:
        uvloop.run(run(proxy, single.server))


def test_cluster_unavailable() -> None:
    """Without its Cluster a gateway rejects submissions, still reads tasks, and logs two lines in all."""

    async def run() -> None:
        async with run_real_gateway(store.server, GATEWAY_REDIS_URL=store.url) as gateway:
            task = (await gateway.submit()).json()
            await gateway.upstream.wait_until_idle()
            with capture_logs() as logs:
                async with gateway.services.run_jobs():
                    store.server.kill()
                    refused = await asyncio.gather(*(gateway.submit() for _ in range(CONCURRENT_REQUESTS)))
                    problems = {(item.status_code, item.json()["code"]) for item in refused}
                    assert problems == {(503, "ledger-unavailable")}
                    gateway.services.task_cache.clear()
                    reads = (gateway.call("GET", task["links"]["self"]) for _ in range(CONCURRENT_REQUESTS))
                    read = {(item.status_code, item.json()["state"]) for item in await asyncio.gather(*reads)}
                    assert read == {(200, "succeeded")}
                    restarted.enter_context(restart_store(store.server))
                    await wait_until(lambda: is_ready(store.server))

                    async def is_logged() -> bool:
                        return any(log["event"] == "redis.available" for log in logs)

                    await wait_until(is_logged)
                    assert (await gateway.submit()).status_code == 201
            events = [log["event"] for log in logs if log["event"].startswith("redis.")]
            assert events == ["redis.unavailable", "redis.available"]
            assert [log for log in logs if log["log_level"] in {"error", "critical"}] == []
            assert await gateway.upstream.count_submits() == 2

    with run_cluster("--appendonly", "yes", "--appendfsync", "always") as store, ExitStack() as restarted:
        uvloop.run(run())
