"""Outages of the store at every step of a submission, with and without loss of data."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import msgspec
import pytest
from httpx2 import Response
from redis import Redis

from service import container
from service.domain.ledger import Reservation, ReservationState, TenantState
from service.domain.tenants import Window
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.upstream_control import SandboxUpstreamControl
from tests.support.valkey import Valkey, run_valkey


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


async def wait_until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(20):
        while not await condition():
            await asyncio.sleep(0.01)


async def read_counters(gateway: RunningGateway) -> TenantState:
    """Return the counters of the tenant `shop`."""
    tenant = gateway.services.registry.current.tenants["shop"]
    return (await gateway.services.quota.ledger.tenant_snapshot(tenant.id)).state


def reservation_states(store: Valkey) -> list[ReservationState]:
    """Return the state of every reservation."""
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        packed = [client.get(key) for key in client.scan_iter(match="*:reservation:*")]
    return [msgspec.msgpack.decode(item, type=Reservation).state for item in packed if isinstance(item, bytes)]


async def wait_for_submits(gateway: RunningGateway, submits: int) -> None:
    async def enough() -> bool:
        return await gateway.upstream.count_submits() >= submits

    await wait_until(enough)


def sandbox_control(gateway: RunningGateway) -> SandboxUpstreamControl:
    assert isinstance(gateway.upstream, SandboxUpstreamControl)
    return gateway.upstream


async def test_outage_while_reserving(gateway: RunningGateway, store: Valkey) -> None:
    """Without the store nothing is sent, and a reservation made after the timeout is cancelled."""
    store.suspend()
    refused = await gateway.submit()
    assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
    assert refused.headers["retry-after"]
    store.resume()

    async def given_up() -> bool:
        return reservation_states(store) == [ReservationState.NOT_SENT]

    await wait_until(given_up)
    state = await read_counters(gateway)
    assert (state.active_tasks, sum(window.tasks_reserved for window in state.windows.values())) == (0, 0)
    assert await gateway.upstream.count_submits() == 0
    assert (await gateway.submit()).status_code == 201


async def test_outage_while_settling(gateway: RunningGateway, store: Valkey) -> None:
    """An accepted submission gets its 201, and is settled exactly once after the outage."""
    await sandbox_control(gateway).delay_next_response(0.5)
    submitting = asyncio.create_task(gateway.submit())
    await wait_for_submits(gateway, 1)
    store.suspend()
    accepted: Response = await submitting
    assert accepted.status_code == 201
    store.resume()

    async def booked() -> bool:
        total = (await read_counters(gateway)).windows[Window.TOTAL]
        return (total.tasks, total.tasks_reserved) == (1, 0)

    await wait_until(booked)
    ended = await gateway.wait_for_task(accepted.json()["id"])
    assert ended["state"] == "succeeded"
    assert (await read_counters(gateway)).active_tasks == 0
    assert await gateway.upstream.count_submits() == 1


async def test_reading_during_an_outage(gateway: RunningGateway, store: Valkey) -> None:
    """A task is read from the upstream by its id alone, once per interval for all readers."""
    task = (await gateway.submit()).json()
    await gateway.upstream.wait_until_idle()
    store.suspend()
    answers = await asyncio.gather(*(gateway.call("GET", task["links"]["self"]) for _ in range(5)))
    assert [answer.status_code for answer in answers] == [200] * 5
    assert {answer.json()["state"] for answer in answers} == {"succeeded"}
    assert all(answer.json()["artifacts"] for answer in answers)
    assert await gateway.upstream.count_checks() == 1
    assert (await gateway.call("GET", "/v1/tasks")).status_code == 503
    assert (await gateway.call("GET", "/readyz", token="")).status_code == 200
    store.resume()


async def test_all_data_lost(gateway: RunningGateway, store: Valkey) -> None:
    """A task of which only the id is left is read, settled again and checked to its end."""
    task = (await gateway.submit("seamless", {"fit": "0.4"})).json()
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.flushall()
    result = await gateway.call("GET", task["links"]["self"])
    assert (result.status_code, result.json()["kind"]) == (200, "seamless")
    state = await read_counters(gateway)
    runs = result.json()["state"] != "succeeded"
    assert (state.windows[Window.TOTAL].tasks, state.active_tasks) == (1, int(runs))
    assert (await gateway.wait_for_task(task["id"]))["state"] == "succeeded"
    state = await read_counters(gateway)
    assert (state.windows[Window.TOTAL].tasks, state.active_tasks) == (1, 0)
    assert await gateway.upstream.count_submits() == 1


async def test_registry_lost(gateway: RunningGateway, store: Valkey) -> None:
    """A lost registry is restored from a process that still has it, limits included."""
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 1}])
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.flushall()
    await gateway.services.registry.refresh()
    assert [(await gateway.submit()).status_code for _ in range(2)] == [201, 429]
    assert (await gateway.call_admin("GET", "/tenants/shop")).json()["limits"][0]["tasks"] == 1
    await gateway.put_tenant("another")


async def test_client_disconnects(gateway: RunningGateway) -> None:
    """A submission whose client disconnects is sent, settled and listed."""
    await sandbox_control(gateway).delay_next_response(0.3)
    submitting = asyncio.create_task(gateway.submit())
    await wait_for_submits(gateway, 1)
    submitting.cancel()
    await asyncio.gather(submitting, return_exceptions=True)

    async def listed() -> bool:
        return len((await gateway.call("GET", "/v1/tasks")).json()["items"]) == 1

    await wait_until(listed)
    state = await read_counters(gateway)
    assert (state.windows[Window.TOTAL].tasks, state.windows[Window.TOTAL].tasks_reserved, state.active_tasks) == (
        1,
        0,
        1,
    )
    assert await gateway.upstream.count_submits() == 1


async def test_rolled_back_registry(gateway: RunningGateway, store: Valkey) -> None:
    """A failover to older data does not bring back revoked tokens or deleted tenants."""
    await gateway.put_tenant("gone")
    revoked = await gateway.new_token()
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        before = client.dump("{gw}:registry")
        tokens = (await gateway.call_admin("GET", "/tenants/shop")).json()["tokens"]
        assert (await gateway.call_admin("DELETE", f"/tenants/shop/tokens/{tokens[-1]['id']}")).status_code == 204
        assert (await gateway.call_admin("DELETE", "/tenants/gone")).status_code == 204
        client.restore("{gw}:registry", 0, before, replace=True)
    await gateway.services.registry.refresh()
    assert (await gateway.call("GET", "/v1/quota", token=revoked)).status_code == 401
    assert (await gateway.call("GET", "/v1/quota")).status_code == 200
    assert (await gateway.call_admin("GET", "/tenants/gone")).status_code == 404


async def test_store_that_rejects_writes(gateway: RunningGateway, store: Valkey) -> None:
    """A store without enough replicas counts as unavailable: nothing is sent, and the response is 503."""
    with Redis(unix_socket_path=str(store.socket_path)) as client:
        client.config_set("min-replicas-to-write", 1)
        refused = await gateway.submit()
        assert (refused.status_code, refused.json()["code"]) == (503, "ledger-unavailable")
        client.config_set("min-replicas-to-write", 0)
    assert await gateway.upstream.count_submits() == 0
