"""The metrics of both processes are well-formed, bounded, used and consistent."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.api.docs import docs_routes
from service.clients import artifacts, upstream
from service.domain.ledger import AccountStatus
from service.domain.tasks import CostBasis, Kind
from service.domain.tenants import Window
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import FINAL_STATES, POLICIES, Port, ReadSource, RedisErrorKind, RedisOutcome
from service.usecases.ports import CheckOutcome, SubmitOutcome
from tests.deploy.queries import ledger_series
from tests.monitoring.conftest import MonitoredSystem
from tests.process.gateway import wait_until

OPENAPI = Path(__file__).parents[2] / "openapi"
MAX_SERIES = 4_000
"""For twenty tenants, eight accounts and every event."""

UNBOUNDED_LABELS = {"le", "version", "python", "command"}
UNBOUNDED_LABELS |= {"generation", "implementation", "major", "minor", "patchlevel"}
"""Labels with values from the code: buckets, versions and script names."""
_VALUES = {
    "port": frozenset(Port),
    "method": frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"}),
    "kind": frozenset(Kind),
    "policy": frozenset(POLICIES),
    "unit": frozenset({"tasks", "yuan", "active"}),
    "window": frozenset(Window),
    "basis": frozenset(CostBasis),
    "source": frozenset(ReadSource),
    "error": frozenset(RedisErrorKind),
    "operation": frozenset[str]({*upstream.UpstreamOperation, *artifacts.ArtifactOperation}),
    "outcome": frozenset[str]({*SubmitOutcome, *CheckOutcome, *artifacts.FetchOutcome, *RedisOutcome}),
    "state": frozenset[str]({*FINAL_STATES, *AccountStatus, *DeliveryState, "busy", "idle"}),
}
UNREACHED_VALUES: Mapping[tuple[str, str, str], str] = {
    ("gateway_redis_calls", "outcome", "fault"): "it would be a fault of a script",
    ("gateway_redis_calls", "outcome", "abandoned"): "it takes a caller that leaves within a millisecond",
    ("gateway_redis_errors", "error", "cluster"): "the store is no cluster",
    ("gateway_redis_errors", "error", "readonly"): "the store has no replica to be made one of",
    ("gateway_redis_errors", "error", "timeout"): "it takes a store that is silent for seconds",
    ("gateway_redis_errors", "error", "other"): "nothing is known that would be",
    ("gateway_submissions", "outcome", "misconfigured"): "it takes a key that was lost",
    ("gateway_upstream_requests", "outcome", "misconfigured"): "it takes a key that was lost",
    ("gateway_upstream_requests", "outcome", "stopped"): "it takes a result that no buffer can hold",
}
"""Label values that the workload does not reach: family, label, value, and the reason."""


@pytest.fixture(scope="module")
def scrapes(monitored: MonitoredSystem) -> Sequence[str]:
    """Return the final metrics of both processes."""
    return monitored.gateway.scrape_all()


def parse_samples(scrapes: Sequence[str]) -> Iterator[tuple[str, Sample]]:
    """Yield all samples with the names of their families."""
    for scrape in scrapes:
        for family in text_string_to_metric_families(scrape):
            for sample in family.samples:
                yield family.name, sample


def test_format(scrapes: Sequence[str]) -> None:
    """Promtool accepts the metrics; series are unique and bounded."""
    for scrape in scrapes:
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(command, input=scrape, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        names = [line.rpartition(" ")[0] for line in scrape.splitlines() if not line.startswith("#")]
        assert len(names) == len(set(names))
        assert len(names) < MAX_SERIES


def test_label_values(monitored: MonitoredSystem, scrapes: Sequence[str]) -> None:
    """Labels have only known values, or values that operators have created."""
    known = _VALUES | {
        "status": frozenset(map(str, range(200, 600))),
        "route": _routes(),
        "upstream": frozenset({monitored.gateway.upstream.url, monitored.gateway.unreachable_url}),
        "tenant": frozenset({*monitored.gateway.tokens, "demo"}),
        "account": frozenset(item["name"] for item in monitored.gateway.call_admin("GET", "/accounts")["items"]),
    }
    strange = {
        (family, label, value)
        for family, sample in parse_samples(scrapes)
        for label, value in sample.labels.items()
        if label not in UNBOUNDED_LABELS and value not in known[label]
    }
    assert strange == set()


def _routes() -> frozenset[str]:
    """Return the documented routes, those of the documentation and metrics, and the one for all others."""
    documents = [yaml.safe_load(file.read_text("utf-8")) for file in OPENAPI.glob("*.yaml")]
    undocumented = {"/", "/metrics", "unmatched", *(path for route in docs_routes() for path in route.paths)}
    return frozenset({path for document in documents for path in document["paths"]} | undocumented)


def test_every_label_value_occurs(scrapes: Sequence[str]) -> None:
    """Every known label value occurs at least once, so that counting it is tested."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for family, sample in parse_samples(scrapes):
        if sample.name == f"{family}_total" and family.startswith("gateway_"):
            counted[family, "", ""] += int(sample.value > 0)
            for label in sample.labels.keys() & (_VALUES.keys() - {"method"}):
                counted[family, label, sample.labels[label]] += int(sample.value > 0)
    assert {item for item, times in counted.items() if not times} <= UNREACHED_VALUES.keys()


def test_ledger_metrics_agree(monitored: MonitoredSystem) -> None:
    """Both processes export the same values from the ledger."""

    def read(scrape: str) -> Mapping[tuple[str, str], float]:
        return {
            (sample.name, str(sample.labels)): sample.value
            for _, sample in parse_samples([scrape])
            if sample.name in ledger_series()
        }

    def agree() -> bool:
        one, other = map(read, monitored.gateway.scrape_all())
        return one == other and len({name for name, _ in one}) == len(ledger_series())

    wait_until(agree, "agreement of both processes")


def test_task_counts_add_up(monitored: MonitoredSystem) -> None:
    """The tasks counted by both processes add up to all tasks."""

    def add_up() -> bool:
        tasks = monitored.gateway.call("steady", "GET", "/v1/tasks?limit=100").json()
        assert tasks["next_cursor"] is None
        states = Counter(item["state"] for item in tasks["items"])
        counted = {
            state: monitored.gateway.sum_samples("gateway_tasks_finished_total", tenant="steady", state=state)
            for state in FINAL_STATES
        }
        submitted = monitored.gateway.sum_samples("gateway_tasks_submitted_total", tenant="steady")
        return submitted == states.total() and counted == {state: states[state] for state in FINAL_STATES}

    wait_until(add_up, "agreement of what is counted with what there is")
    total = monitored.prometheus.query_value('sum(gateway_tasks_submitted_total{tenant="steady"})')
    assert total == monitored.gateway.sum_samples("gateway_tasks_submitted_total", tenant="steady")
