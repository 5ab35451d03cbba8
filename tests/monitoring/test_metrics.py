"""What both processes export is well-formed, bounded, used, and fits together."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.clients import artifacts, upstream
from service.domain.ledger import Status
from service.domain.tasks import Basis, Kind
from service.domain.tenants import Window
from service.domain.webhooks import DeliveryState
from service.telemetry.metrics import ENDS, POLICIES, LedgerOutcome, Port, Source, StoreError
from service.usecases.ports import Answered, SubmitOutcome
from tests.deploy.promql import names
from tests.deploy.series import shared
from tests.monitoring.conftest import SERIES, Seen
from tests.monitoring.queries import texts
from tests.monitoring.tools import promtool
from tests.process.gateway import until

OPENAPI = Path(__file__).parents[2] / "openapi"
MOST_SERIES = 4_000
"""For a score of tenants, eight accounts, and all that can happen."""

FREE = {"le", "version", "python", "call", "generation", "implementation", "major", "minor", "patchlevel"}
"""Labels whose values are those of the code itself: buckets, versions and the names of scripts."""
_OUTCOMES = {
    "gateway_submissions": frozenset(SubmitOutcome),
    "gateway_upstream_requests": frozenset[str]({*SubmitOutcome, *Answered, *artifacts.Outcome}),
    "gateway_upstream_request_duration_seconds": frozenset[str]({*SubmitOutcome, *Answered, *artifacts.Outcome}),
    "gateway_ledger_calls": frozenset(LedgerOutcome),
}
_STATES = {
    "gateway_tasks_finished": frozenset(ENDS),
    "gateway_task_duration_seconds": frozenset(ENDS),
    "gateway_account_state": frozenset(Status),
    "gateway_webhook_attempts": frozenset(DeliveryState),
    "gateway_webhook_age_seconds": frozenset(DeliveryState) - {DeliveryState.PENDING},
    "gateway_upstream_connections": frozenset({"busy", "idle"}),
}
_VALUES = {
    "port": frozenset(Port),
    "method": frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other"}),
    "kind": frozenset(Kind),
    "policy": frozenset(POLICIES),
    "unit": frozenset({"tasks", "yuan", "active"}),
    "window": frozenset(Window),
    "basis": frozenset(Basis),
    "answer": frozenset(Answered),
    "source": frozenset(Source),
    "error": frozenset(StoreError),
    "operation": frozenset[str]({*upstream.Operation, *artifacts.Operation}),
}
NEVER: Mapping[tuple[str, str, str], str] = {
    ("gateway_ledger_calls", "outcome", "fault"): "it would be a fault of a script",
    ("gateway_ledger_calls", "outcome", "given-up"): "it takes a caller that leaves within a millisecond",
    ("gateway_redis_errors", "error", "cluster"): "the store is no cluster",
    ("gateway_redis_errors", "error", "readonly"): "the store has no replica to be made one of",
    ("gateway_redis_errors", "error", "timeout"): "it takes a store that is silent for seconds",
    ("gateway_redis_errors", "error", "other"): "nothing is known that would be",
    ("gateway_submissions", "outcome", "misconfigured"): "it takes a key that was lost",
    ("gateway_upstream_requests", "outcome", "misconfigured"): "it takes a key that was lost",
    ("gateway_upstream_requests", "outcome", "stopped"): "it takes a result that no buffer can hold",
}
"""What the traffic does not bring about: a family, a label, its value, and why."""
UNUSED: Mapping[str, str] = {}
"""Families that no panel and no rule asks for, and why they are exported."""


@pytest.fixture(scope="session")
def scrapes(seen: Seen, pytestconfig: pytest.Config) -> Sequence[str]:
    """What both export in the end."""
    found = seen.plant.scrapes()
    pytestconfig.stash[SERIES] = [len(list(samples(each))) for each in found]
    return found


def samples(scrape: str) -> Iterator[tuple[str, Sample]]:
    """All samples of a scrape, each with the name of its family."""
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            yield family.name, sample


def test_promtool_has_nothing_to_criticise(scrapes: Sequence[str]) -> None:
    """The names, types and texts of help are as Prometheus wants them."""
    for scrape in scrapes:
        done = subprocess.run(
            [promtool(), "check", "metrics"], input=scrape, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_each_series_once(scrapes: Sequence[str]) -> None:
    """No series is told twice in a scrape, and there are not too many."""
    for scrape in scrapes:
        told = Counter((sample.name, tuple(sorted(sample.labels.items()))) for _, sample in samples(scrape))
        assert max(told.values()) == 1
        assert len(told) < MOST_SERIES


def test_values_of_labels(seen: Seen, scrapes: Sequence[str]) -> None:
    """Labels have only values that are known beforehand, or that operators have made."""
    known = _VALUES | {
        "status": frozenset(map(str, range(200, 600))),
        "route": _routes(),
        "upstream": frozenset({seen.plant.upstream.url, seen.plant.nowhere}),
        "tenant": frozenset({*seen.plant.tokens, "demo"}),
        "account": frozenset(each["name"] for each in seen.plant.admin("GET", "/accounts")["items"]),
    }
    by_family = {"outcome": _OUTCOMES, "state": _STATES}
    strange = {
        (family, label, value)
        for scrape in scrapes
        for family, sample in samples(scrape)
        for label, value in sample.labels.items()
        if label not in FREE and value not in (by_family[label][family] if label in by_family else known[label])
    }
    assert strange == set()


def _routes() -> frozenset[str]:
    """The documented ones, those that document them, that of the metrics, and that of all others."""
    documents = [yaml.safe_load(file.read_text("utf-8")) for file in OPENAPI.glob("*.yaml")]
    undocumented = {"/metrics", "/docs", "/openapi.json", "unmatched"}
    return frozenset({path for each in documents for path in each["paths"]} | undocumented)


def test_everything_happened(scrapes: Sequence[str]) -> None:
    """Each way that things can go was gone at least once, so that it is known to be counted."""
    counted: Counter[tuple[str, str, str]] = Counter()
    for family, sample in (each for scrape in scrapes for each in samples(scrape)):
        if sample.name == f"{family}_total" and family.startswith("gateway_"):
            counted[family, "", ""] += int(sample.value > 0)
            for label in sample.labels.keys() & (_VALUES.keys() | {"outcome", "state"}) - {"method"}:
                counted[family, label, sample.labels[label]] += int(sample.value > 0)
    assert {each for each, times in counted.items() if not times} == NEVER.keys()


def test_none_is_dead(scrapes: Sequence[str]) -> None:
    """Each family is on a panel or in a rule."""
    asked = {name for text in texts() for name in names(text)}
    asked |= {re.sub("_(total|bucket|sum|count)$", "", name) for name in asked}
    there = {family for scrape in scrapes for family, _ in samples(scrape) if family.startswith("gateway_")}
    assert there - asked == UNUSED.keys()


def test_what_is_read_from_the_ledger_is_the_same(seen: Seen) -> None:
    """Both processes tell the same of the ledger, whichever of them did the work."""

    def read(scrape: str) -> Mapping[tuple[str, str], float]:
        return {(each.name, str(each.labels)): each.value for _, each in samples(scrape) if each.name in shared()}

    def agree() -> bool:
        one, other = map(read, seen.plant.scrapes())
        return one == other and len({name for name, _ in one}) == len(shared())

    until(agree, "agreement of both processes")


def test_what_each_counts_adds_up(seen: Seen) -> None:
    """The tasks that both processes have counted are, added up, those that there are."""

    def add_up() -> bool:
        tasks = seen.plant.call("steady", "GET", "/v1/tasks?limit=100").json()
        assert tasks["next_cursor"] is None
        states = Counter(each["state"] for each in tasks["items"])
        counted = {
            state: seen.plant.counted("gateway_tasks_finished_total", tenant="steady", state=state) for state in ENDS
        }
        submitted = seen.plant.counted("gateway_tasks_submitted_total", tenant="steady")
        return submitted == states.total() and counted == {state: states[state] for state in ENDS}

    until(add_up, "agreement of what is counted with what there is")
    total = seen.prometheus.value('sum(gateway_tasks_submitted_total{tenant="steady"})')
    assert total == seen.plant.counted("gateway_tasks_submitted_total", tenant="steady")
