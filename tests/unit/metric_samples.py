"""Sample data for metrics, and samples of a scrape."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from service.domain.ledger import AccountState
from service.domain.tasks import Backlog, Cost, Kind, State, Task
from service.domain.tenants import Account, AccountPolicy, Limit, Registry, Tenant, TenantPolicy, Window
from service.telemetry.gauges import AccountSample, GaugeCollector, LedgerCollector, MetricsSnapshot, QuotaSample
from service.telemetry.metrics import Metrics

_NONE = msgspec.Raw(b"{}")
_LIMITS = (Limit(Window.DAY, tasks=9), Limit(Window.MONTH, money_fen=900))
REGISTRY = Registry(
    version=1,
    tenants={
        "shop": Tenant(1, "shop", ("main",), TenantPolicy(_LIMITS, max_active=3), kinds=(Kind.UPSCALE, Kind.SEAMLESS))
    },
    accounts={"main": Account(2, "main", b"encrypted")},
)
SNAPSHOT = MetricsSnapshot(
    tenant_count=1,
    quotas=[QuotaSample("shop", "day-money", "yuan", 1.5, 0.5, 10)],
    active_tasks={("shop", "upscale"): 2},
    spent_fen={("shop", "day"): 150},
    accounts=[AccountSample("main", AccountPolicy(), AccountState(), 0)],
    poll_queue=Backlog(1, 0),
    webhook_queue=Backlog(2, 1500),
    failed_webhooks=3,
    clock_offset_ms=90_000,
)


def make_registry(*names: str, ids: tuple[int, ...]) -> Registry:
    return Registry(tenants={name: Tenant(number, name, ()) for name, number in zip(names, ids, strict=True)})


def make_finished_task(cost: Cost) -> Task:
    return Task(
        id="id",
        reservation="r",
        tenant=1,
        account=2,
        kind=Kind.SEAMLESS,
        state=State.FAILED,
        created_at=1_000,
        updated_at=8_000,
        finished_at=8_000,
        options=_NONE,
        metadata=_NONE,
        artifacts=(),
        error=None,
        cost=cost,
        version=3,
        last_checked_at=8_000,
    )


GATEWAY_COLLECTORS = (MetricWrapperBase, GaugeCollector, LedgerCollector)
"""All collectors but those of the process and the interpreter."""


class SampleOutcome(StrEnum):
    GOOD = "good"


def read_sample(metrics: Metrics, name: str, **labels: str) -> float | None:
    """Return a sample of a scrape, or None."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None
