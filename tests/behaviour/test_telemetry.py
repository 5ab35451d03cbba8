"""Metrics of the ledger and of the process over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import pytest
from httpx2 import AsyncClient
from prometheus_client.parser import text_string_to_metric_families
from redis.asyncio import Redis

from service.usecases import ledger_snapshot
from service.usecases.ports import SubmitOutcome
from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway, run_real_gateway
from tests.fakes import FakeLedger
from tests.support.valkey import Valkey, run_valkey

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    def __init__(self, text: str) -> None:
        self._samples: Samples = {
            (sample.name, frozenset(sample.labels.items())): float(sample.value)
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __getitem__(self, name: str) -> float:
        (value,) = (value for (sample, _), value in self._samples.items() if sample == f"gateway_{name}")
        return value

    def get_sample(self, name: str, **labels: str) -> float | None:
        """Return the sum of the samples with these labels, or None without any."""
        values = [
            value
            for (sample, sample_labels), value in self._samples.items()
            if sample == f"gateway_{name}" and labels.items() <= dict(sample_labels).items()
        ]
        return sum(values) if values else None


async def scrape_metrics(gateway: RunningGateway, http: AsyncClient | None = None) -> Scrape:
    return Scrape((await (http or gateway.http).get(f"{gateway.ops_url}/metrics")).raise_for_status().text)


@pytest.fixture
async def fake_gateway() -> AsyncIterator[tuple[RunningGateway, FakeLedger]]:
    async with run_fake_gateway() as (gateway, ledger, _):
        yield gateway, ledger


async def test_idle_tenant_shows_its_limits(gateway: RunningGateway) -> None:
    await gateway.put_tenant("idle", limits=[{"window": "month", "tasks": 7, "money": 2.5}], max_active=4)
    scrape = await scrape_metrics(gateway)
    for policy, unit, limit in (("month-tasks", "tasks", 7), ("month-money", "yuan", 2.5), ("max-active", "active", 4)):
        of = {"tenant": "idle", "policy": policy, "unit": unit}
        values = [scrape.get_sample(f"quota_{name}", **of) for name in ("limit", "used", "reserved")]
        assert values == [limit, 0, 0]
    assert scrape.get_sample("tasks_active", tenant="idle", kind="upscale") == 0
    assert (scrape["redis_up"], scrape["tenants"]) == (1, 2)


async def test_task_moves_through_the_gauges(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 9, "money": 50}])
    of_day = {"tenant": "shop", "policy": "day-tasks"}
    task = (await gateway.submit()).json()["id"]
    running = await scrape_metrics(gateway)
    assert running.get_sample("tasks_active", tenant="shop", kind="face-enhance") == 1
    assert running.get_sample("tasks_active", tenant="shop", kind="upscale") == 0
    assert running.get_sample("quota_used", **of_day) == 1
    assert running.get_sample("tasks_submitted_total", tenant="shop", kind="face-enhance") == 1
    assert running.get_sample("account_open_submissions", account="main") == 1
    assert running["poll_tasks"] == 1
    await gateway.wait_for_task(task)
    ended = await scrape_metrics(gateway)
    assert ended.get_sample("tasks_active", tenant="shop") == 0
    assert ended.get_sample("tasks_finished_total", tenant="shop", kind="face-enhance", state="succeeded") == 1
    assert ended.get_sample("tenant_task_duration_seconds_count", tenant="shop", kind="face-enhance") == 1
    assert ended.get_sample("spent_uses_total", tenant="shop", kind="face-enhance") == 1
    assert ended.get_sample("account_spent_uses_total", account="main") == 1
    assert ended.get_sample("account_remaining_uses", account="main") == 9
    assert ended.get_sample("account_state", account="main", state="open") == 1
    assert ended["poll_tasks"] == 0
    assert (ended.get_sample("poll_batch_size_sum"), ended.get_sample("poll_lag_seconds_count")) == (1, 1)


async def test_spent_money_is_shown_in_yuan(gateway: RunningGateway) -> None:
    await gateway.upstream.set_balance(0, 300)
    await gateway.put_tenant(limits=[{"window": "day", "money": 50}])
    for _ in range(2):  # the cost of the first one is unknown: no balance was known before it
        await gateway.wait_for_task((await gateway.submit()).json()["id"])
    quota = (await gateway.call("GET", "/v1/quota")).json()
    (used,) = (policy["used"] for policy in quota["policies"] if policy["policy"] == "day-money")
    assert used > 0
    scrape = await scrape_metrics(gateway)
    assert scrape.get_sample("quota_used", tenant="shop", policy="day-money", unit="yuan") == used
    assert scrape.get_sample("tenant_spent_yuan", tenant="shop", window="day") == used
    assert scrape.get_sample("tenant_spent_yuan", tenant="shop", window="month") == used
    assert scrape.get_sample("spent_yuan_total", tenant="shop", kind="face-enhance") == used
    assert scrape.get_sample("account_spent_yuan_total", account="main") == used
    assert scrape.get_sample("account_remaining_yuan", account="main") == 300 - 2 * used


async def test_refusals_by_tenant_and_policy(gateway: RunningGateway) -> None:
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 1}])
    assert (await gateway.submit()).status_code == 201
    assert (await gateway.submit()).status_code == 429
    await gateway.put_tenant()
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    assert (await gateway.submit()).status_code == 402
    assert (await gateway.submit()).status_code == 402
    scrape = await scrape_metrics(gateway)
    assert scrape.get_sample("quota_denials_total", tenant="shop", policy="day-tasks") == 1
    assert scrape.get_sample("balance_denials_total", tenant="shop") == 2
    assert scrape.get_sample("account_state", account="main", state="exhausted") == 1


async def test_invalid_account_is_no_balance_denial(gateway: RunningGateway) -> None:
    await gateway.upstream.refuse_next(SubmitOutcome.INVALID_ACCOUNT)
    assert [(await gateway.submit()).status_code for _ in range(2)] == [503, 503]
    scrape = await scrape_metrics(gateway)
    assert scrape.get_sample("balance_denials_total", tenant="shop") == 0
    assert scrape.get_sample("account_state", account="main", state="invalid") == 1


async def test_reads_are_counted_by_source(gateway: RunningGateway) -> None:
    path = (await gateway.submit()).headers["location"]
    before = await scrape_metrics(gateway)
    await gateway.advance(1)
    for _ in range(3):
        assert (await gateway.call("GET", path)).status_code == 200
    after = await scrape_metrics(gateway)
    grown = {
        source: (after.get_sample("task_reads_total", source=source) or 0)
        - (before.get_sample("task_reads_total", source=source) or 0)
        for source in ("memory", "store", "upstream")
    }
    assert grown == {"memory": 2, "store": 1, "upstream": 0}


async def test_ledger_metrics_disappear_without_the_store(fake_gateway: tuple[RunningGateway, FakeLedger]) -> None:
    gateway, ledger = fake_gateway
    assert (await scrape_metrics(gateway)).get_sample("balance_denials_total", tenant="shop") == 0
    ledger.is_unavailable = True
    scrape = await scrape_metrics(gateway)
    assert scrape["redis_up"] == 0
    for name in ("tenants", "tasks_active", "account_state", "poll_tasks", "webhooks_failed"):
        assert scrape.get_sample(name) is None
    assert scrape.get_sample("tasks_submitted_total", tenant="shop") == 0
    ledger.is_unavailable = False
    assert (await scrape_metrics(gateway))["redis_up"] == 1


async def test_unresponsive_store_does_not_delay_scrapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_snapshot, "SNAPSHOT_TIMEOUT_SECONDS", 0.2)
    with run_valkey() as store:
        async with run_real_gateway(store) as gateway:
            store.suspend()
            scrape = await scrape_metrics(gateway)
            assert scrape["redis_up"] == 0
            assert scrape.get_sample("redis_calls_total", command="read", outcome="abandoned") == 1
            store.resume()
            assert (await scrape_metrics(gateway))["redis_up"] == 1


async def test_store_errors_are_counted(valkey: Valkey) -> None:
    async with run_real_gateway(valkey) as gateway, Redis(unix_socket_path=str(valkey.socket_path)) as store:
        await store.config_set("min-replicas-to-write", 1)
        try:
            assert (await gateway.submit()).status_code == 503
        finally:
            await store.config_set("min-replicas-to-write", 0)
        scrape = await scrape_metrics(gateway)
        assert scrape.get_sample("redis_calls_total", command="reserve", outcome="unavailable") == 1
        assert scrape.get_sample("redis_errors_total", error="response") == 1


async def test_store_calls_are_counted_by_script(valkey: Valkey) -> None:
    async with run_real_gateway(valkey) as gateway:
        before = await scrape_metrics(gateway)
        await gateway.submit()
        after = await scrape_metrics(gateway)
        for call in ("reserve", "settle"):
            grown = [
                (item.get_sample("redis_calls_total", command=call, outcome="ok") or 0) for item in (before, after)
            ]
            assert grown == [0, 1]
            assert after.get_sample("redis_call_duration_seconds_count", command=call) == 1
        assert after.get_sample("upstream_connections_limit", operation="submit") == 64
        assert after.get_sample("upstream_breaker_open") == 0
