"""Connections to Redis are reset under load, and a whole Cluster is unavailable."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import ExitStack

import uvloop
from structlog.testing import capture_logs

from service.domain.tenants import Window
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.chaos.test_redis_killed import is_ready, restart_store
from tests.chaos.test_redis_outage import read_counters, wait_until
from tests.support.network import reserve_port
from tests.support.resetting_proxy import ResettingProxy, run_resetting_proxy
from tests.support.valkey import run_cluster, run_valkey

CONCURRENT_REQUESTS = 80
ROUNDS = 3
RESET_SHARE = 0.15


async def _submit_under_resets(gateway: RunningGateway, proxy: ResettingProxy) -> None:
    """Submit concurrently while connections are reset; every accepted task is returned and settled."""
    await gateway.upstream.set_balance(10_000, 0)
    statuses: Counter[int] = Counter()
    accepted: set[str] = set()
    proxy.reset_probability = RESET_SHARE
    for _ in range(ROUNDS):
        for answer in await asyncio.gather(*(gateway.submit() for _ in range(CONCURRENT_REQUESTS))):
            statuses[answer.status_code] += 1
            if answer.status_code == 201:
                accepted.add(answer.json()["id"])
            else:
                assert (answer.status_code, answer.json()["code"]) == (503, "ledger-unavailable")
    proxy.reset_probability = 0
    assert proxy.resets > ROUNDS
    assert statuses[503] > 0
    assert statuses[201] == len(accepted) == await gateway.upstream.count_submits() > 0

    async def booked() -> bool:
        total = (await read_counters(gateway)).windows[Window.TOTAL]
        return (total.tasks, total.tasks_reserved) == (len(accepted), 0)

    await wait_until(booked)
    listed: set[str] = set()
    page = "/v1/tasks?limit=100"
    while page:
        body = (await gateway.call("GET", page)).json()
        assert listed.isdisjoint(item["id"] for item in body["items"])
        listed |= {item["id"] for item in body["items"]}
        page = body["next_cursor"] and f"/v1/tasks?limit=100&cursor={body['next_cursor']}"
    assert listed == accepted


def test_resets_while_submitting() -> None:
    """On uvloop no response is a 500, and everything that the upstream accepted gets a 201."""

    async def run(proxy: ResettingProxy) -> None:
        async with run_real_gateway(server, GATEWAY_REDIS_URL=f"redis://127.0.0.1:{proxy.port}") as gateway:
            await _submit_under_resets(gateway, proxy)

    with (
        run_valkey(port=reserve_port()) as server,
        run_resetting_proxy(server.port, seed=80) as proxy,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run(proxy))


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
                    assert {(item.status_code, item.json()["code"]) for item in refused} == {
                        (503, "ledger-unavailable")
                    }
                    gateway.services.task_cache._tasks.clear()
                    read = await asyncio.gather(
                        *(gateway.call("GET", task["links"]["self"]) for _ in range(CONCURRENT_REQUESTS))
                    )
                    assert {(item.status_code, item.json()["state"]) for item in read} == {(200, "succeeded")}
                    again.enter_context(restart_store(store.server))
                    await wait_until(lambda: is_ready(store.server))

                    async def logged() -> bool:
                        return any(log["event"] == "redis.available" for log in logs)

                    await wait_until(logged)
                    assert (await gateway.submit()).status_code == 201
            result = [log["event"] for log in logs if log["event"].startswith("redis.")]
            assert result == ["redis.unavailable", "redis.available"]
            assert [log for log in logs if log["log_level"] in {"error", "critical"}] == []
            assert await gateway.upstream.count_submits() == 2

    with (
        run_cluster("--appendonly", "yes", "--appendfsync", "always") as store,
        ExitStack() as again,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run())
