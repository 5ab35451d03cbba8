"""Something to count, and what a scrape shows of it."""

from __future__ import annotations

from enum import StrEnum

import msgspec
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families

from service.domain.ledger import AccountState
from service.domain.tasks import Backlog, Cost, Kind, State, Task
from service.domain.tenants import Account, AccountPolicy, Limit, Registry, Tenant, TenantPolicy, Window
from service.telemetry.gauges import AccountStanding, Levels, QuotaStanding, Seen, Standing
from service.telemetry.metrics import Metrics

_NONE = msgspec.Raw(b"{}")
_LIMITS = (Limit(Window.DAY, tasks=9), Limit(Window.MONTH, money=900))
KNOWN = Registry(
    version=1,
    tenants={
        "shop": Tenant(1, "shop", ("main",), TenantPolicy(_LIMITS, max_active=3), kinds=(Kind.UPSCALE, Kind.SEAMLESS))
    },
    accounts={"main": Account(2, "main", b"sealed")},
)
SEEN = Seen(
    tenants=1,
    quotas=[QuotaStanding("shop", "day-money", "yuan", 1.5, 0.5, 10)],
    active={("shop", "upscale"): 2},
    spent={("shop", "day"): 150},
    accounts=[AccountStanding("main", AccountPolicy(), AccountState(), 0)],
    watch=Backlog(1, 0),
    webhooks=Backlog(2, 1500),
    webhooks_failed=3,
    clock_offset=90_000,
)


def registry_of(*names: str, ids: tuple[int, ...]) -> Registry:
    """A registry with these tenants."""
    return Registry(tenants={name: Tenant(number, name, ()) for name, number in zip(names, ids, strict=True)})


def ended(cost: Cost) -> Task:
    """A task that took 7 seconds, and something of an account."""
    return Task(
        id="id",
        reservation="r",
        tenant=1,
        account=2,
        kind=Kind.SEAMLESS,
        state=State.FAILED,
        created=1_000,
        updated=8_000,
        finished=8_000,
        options=_NONE,
        metadata=_NONE,
        artifacts=(),
        error=None,
        cost=cost,
        version=3,
        checked=8_000,
    )


DESCRIBING = (MetricWrapperBase, Levels, Standing)
"""All collectors but those that tell of the process and its interpreter."""


class Outcome(StrEnum):
    """An outcome that some caller knows of."""

    GOOD = "good"


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    """A sample as a scrape shows it."""
    body, content_type = metrics.render()
    assert content_type.startswith("text/plain; version=0.0.4")
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            if sample.name == name and labels.items() <= sample.labels.items():
                return float(sample.value)
    return None
