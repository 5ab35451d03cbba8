"""The metrics of both processes are well-formed, bounded, used and consistent."""

from __future__ import annotations

import re
import subprocess
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from service.telemetry.metrics import FINAL_STATES
from tests.deploy.queries import RULES, list_selectors, panel_queries
from tests.monitoring.conftest import MonitoredSystem
from tests.process.gateway import wait_until

MAX_SERIES = 4_000
"""For twenty tenants, eight accounts and every event."""
UNCOUNTED_LABELS = {"tenant", "account", "upstream", "method", "route", "status", "command"}
"""Labels of counters whose values are not known in advance, or need not all occur."""
UNREACHED_VALUES = {
    ("gateway_image_fetches", "outcome", "overloaded"): "it takes a machine without descriptors",
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


def test_format(monitored: MonitoredSystem) -> None:
    """Promtool accepts the metrics; series are unique and bounded, without ids of tasks and without tokens."""
    for scrape in monitored.gateway.scrape_all():
        command = ["promtool", "check", "metrics"]
        done = subprocess.run(command, input=scrape, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        names = [line.rpartition(" ")[0] for line in scrape.splitlines() if not line.startswith("#")]
        assert len(names) == len(set(names))
        assert len(names) < MAX_SERIES
        assert not re.search(r'="[^"]*(task_[\w-]{20}|igw_)', scrape)


def test_every_metric_is_used(monitored: MonitoredSystem) -> None:
    """Each metric is on a panel or in a rule."""
    queries = [*(query.text for query in panel_queries()), *(rule["expr"] for rule in RULES)]
    used = {selector.name for query in queries for selector in list_selectors(query)}
    used |= {re.sub("_(total|bucket|sum|count)$", "", name) for name in used}
    families = {
        family.name for scrape in monitored.gateway.scrape_all() for family in text_string_to_metric_families(scrape)
    }
    assert {name for name in families if name.startswith("gateway_")} - used == set()


def test_every_label_value_is_counted(monitored: MonitoredSystem) -> None:
    """Every counter and every known value of its labels has been counted at least once."""
    totals: Counter[tuple[str, str, str]] = Counter()
    for scrape in monitored.gateway.scrape_all():
        for family in text_string_to_metric_families(scrape):
            for sample in family.samples if family.name.startswith("gateway_") else ():
                if sample.name.endswith("_total"):
                    for label, value in {"": "", **sample.labels}.items():
                        totals[family.name, label, value] += int(sample.value > 0)
    missing = {item for item, total in totals.items() if not total and item[1] not in UNCOUNTED_LABELS}
    assert missing <= UNREACHED_VALUES.keys()


def test_task_counts_add_up(monitored: MonitoredSystem) -> None:
    """The tasks counted by both processes add up to all tasks."""
    gateway = monitored.gateway
    submitted = monitored.prometheus.query_value('sum(gateway_tasks_submitted_total{tenant="steady"})')

    def add_up() -> bool:
        tasks = gateway.call("steady", "GET", "/v1/tasks?limit=100").json()
        assert tasks["next_cursor"] is None
        states = Counter(item["state"] for item in tasks["items"])
        counted = {
            state: gateway.sum_samples("gateway_tasks_finished_total", tenant="steady", state=state)
            for state in FINAL_STATES
        }
        return states.total() == submitted and counted == {state: states[state] for state in FINAL_STATES}

    wait_until(add_up, "agreement of what is counted with what there is")
