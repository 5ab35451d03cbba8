"""The composition root."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from service import container
from service.container import Container, Job, open_container
from service.settings import Settings
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor
from tests.behaviour.gateway_fixture import ENVIRONMENT
from tests.fakes import FakeDeliveryQueue, FakeLedger, FakeRegistry, FakeUpstream, FakeWebhookClient
from tests.fakes.artifacts import FakeArtifacts


def make_container(*jobs: Job, **settings: str) -> Container:
    ledger = FakeLedger()
    return Container(
        Settings.load(ENVIRONMENT | {"GATEWAY_REDIS_URL": "redis://localhost"} | settings),
        Metrics(CollectorRegistry()),
        TaskSupervisor(),
        ledger=ledger,
        tasks=ledger,
        deliveries=FakeDeliveryQueue(ledger),
        upstream=FakeUpstream(),
        registry=FakeRegistry(ledger),
        task_cache=ledger.cache,
        fetch_artifact=FakeArtifacts().fetch,
        post_webhook=FakeWebhookClient().post,
        now=ledger.clock.now,
        jobs=jobs,
    )


@pytest.mark.parametrize(("role", "works"), [("api", False), ("worker", True), ("all", True)])
async def test_jobs_by_role(role: str, works: bool) -> None:
    services = make_container(GATEWAY_ROLE=role)
    assert {job in services.jobs for job in (services.task_poller.run, services.webhook_dispatcher.run)} == {works}


async def test_failed_jobs_are_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "JOB_RESTART_SECONDS", 0)
    begun, third = [], asyncio.Event()

    async def job() -> None:
        begun.append(1)
        if len(begun) == 1:
            raise ValueError("a fault of ours")
        if len(begun) == 3:
            third.set()
            await asyncio.Event().wait()

    services = make_container(job, GATEWAY_ROLE="api", GATEWAY_LEASE_SECONDS="240")
    assert services.drain_seconds == 240
    async with services.run_jobs(), asyncio.timeout(10):
        await third.wait()
    assert len(begun) == 3


@pytest.mark.parametrize("missing", ["GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL", "GATEWAY_ADMIN_TOKEN"])
async def test_incomplete_settings_are_refused(missing: str) -> None:
    complete = ENVIRONMENT | {"GATEWAY_REDIS_URL": "redis://localhost", "GATEWAY_UPSTREAM_URL": "http://localhost"}
    complete.pop(missing)
    with pytest.raises(ValueError, match="not complete"):
        async with open_container(Settings.load(complete)):
            pass
