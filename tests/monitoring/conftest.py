"""A monitored gateway with a Prometheus of its own and a workload of every kind, shared by all tests of this folder."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import yaml

from tests.deploy.queries import PROMETHEUS, RULE_FILES
from tests.monitoring import workload
from tests.monitoring.workload import MonitoredGateway, run_monitored_gateway
from tests.process.gateway import HTTP, wait_until

_LONGEST_CHAIN = 4
"""The longest chain of rules that depend on each other."""

Sample = Mapping[str, Any]
"""A series: its labels as `metric`, and its `value`, or its `values` over a range."""


@dataclass
class Prometheus:
    """A running server. `started_at` and `evaluated_at` (the final evaluation) are in seconds of the epoch."""

    url: str
    started_at: float
    targets: int
    evaluated_at: float = 0

    def query_value(self, query: str) -> float | None:
        """Return the single current value of a query, or None."""
        result = self._get("query", query=query)["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def query_history(self, query: str) -> Sequence[Sample]:
        """Return the series of a query that have a number at any second up to the final evaluation."""
        result = self._get("query_range", query=query, start=self.started_at, end=self.evaluated_at, step=1)["result"]
        return [item for item in result if not all(math.isnan(float(value)) for _, value in item["values"])]

    def list_series(self, selector: str) -> Sequence[Mapping[str, str]]:
        """Return the labels of all series that a selector has matched at any time."""
        times = {"start": self.started_at, "end": self.evaluated_at}
        return cast("list[Mapping[str, str]]", self._get("series", **times, **{"match[]": selector}))

    def rule_groups(self) -> Sequence[Mapping[str, Any]]:
        """Return the groups of all rules with their last evaluation."""
        return cast("list[Mapping[str, Any]]", self._get("rules")["groups"])

    def wait_for_scrape(self) -> None:
        """Wait until all targets have been scraped from now on."""
        since = time.time()
        query = f"min(timestamp(gateway_build_info)) and on () count(up == 1) == {self.targets}"
        wait_until(lambda: (self.query_value(query) or 0) > since, "a scrape of all targets")

    def wait_for_rules(self) -> None:
        """Wait until everything is scraped and every rule is evaluated on that; this is the final evaluation."""
        self.wait_for_scrape()
        for _ in range(_LONGEST_CHAIN):
            wait_until(partial(self._is_evaluated, time.time()), "an evaluation of all rules")
        self.evaluated_at = time.time()

    def _is_evaluated(self, since: float) -> bool:
        ends = [datetime.fromisoformat(group["lastEvaluation"]).timestamp() for group in self.rule_groups()]
        return min(ends) > since

    def _get(self, path: str, **query: Any) -> Any:
        answer = HTTP.get(f"{self.url}/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        assert "warnings" not in answer, answer
        return answer["data"]


@contextmanager
def run_prometheus(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Run a server that scrapes these targets often, with the shipped rules and example configuration."""
    folder.mkdir()
    for file in RULE_FILES:
        # Evaluate all rules at once, and shorten windows of an hour to a few seconds.
        text = re.sub(r"^ +interval: \w+\n", "", file.read_text("utf-8"), flags=re.MULTILINE)
        (folder / file.name).write_text(text.replace(":1h]", ":5s]"))
    configuration = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text("utf-8"))
    configuration["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"], configuration["alerting"]
    job["static_configs"] = [{"targets": targets, "labels": {"namespace": "imaging"}}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(configuration))
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", "--web.listen-address=127.0.0.1:0"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder / 'data'}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )

    def find_address() -> str | None:
        printed = (folder / "log.txt").read_text()
        assert process.poll() is None, printed
        address = re.search(r'msg="Listening on".* address=(\S+)', printed)
        return address and address[1]

    try:
        wait_until(lambda: find_address() is not None, "the address of Prometheus")
        server = Prometheus(f"http://{find_address()}", time.time(), len(targets))
        wait_until(lambda: HTTP.get(f"{server.url}/-/ready").status_code == 200, "the start of Prometheus")
        yield server
    finally:
        process.kill()
        process.wait()


class MonitoredSystem(NamedTuple):
    """The gateway and its Prometheus."""

    gateway: MonitoredGateway
    prometheus: Prometheus


@pytest.fixture(scope="session")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredSystem]:
    """Yield both after the workload has run and was scraped."""
    folder = tmp_path_factory.mktemp("monitoring")
    with run_monitored_gateway(folder) as gateway, run_prometheus(folder / "prometheus", gateway.targets) as prometheus:
        workload.create_tenants(gateway)
        prometheus.wait_for_scrape()  # an increase needs an earlier sample
        workload.run_tasks(gateway)
        workload.fetch_images(gateway)
        workload.send_refused(gateway)
        workload.inject_upstream_faults(gateway)
        workload.spend_outside(gateway)
        for name in workload.RECEIVER_STATUSES:
            gateway.run_task(name)
        workload.interrupt_store(gateway, lambda: prometheus.query_value("max(gateway_redis_up)") == 0)
        workload.abandon_request(gateway)
        workload.outlast_deadlines(gateway)
        prometheus.wait_for_rules()
        yield MonitoredSystem(gateway, prometheus)
