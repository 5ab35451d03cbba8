"""A real Prometheus with the shipped rules, sped up."""

from __future__ import annotations

import math
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import httpx2
import yaml

from tests.monitoring.queries import DEPLOY, RULES
from tests.monitoring.tools import find_prometheus
from tests.process.gateway import TIMEOUT_SECONDS, wait_until
from tests.support.network import reserve_port

NAMESPACE = "imaging"
SCRAPE_SECONDS = 1
_LONGEST_CHAIN = 4
"""The longest chain of rules that depend on each other."""

Sample = Mapping[str, Any]
"""A series: its labels as `metric`, and its `value`, or its `values` over a range."""


@dataclass
class Prometheus:
    """A running server. `started_at` and `evaluated_at` (the final evaluation) are in seconds of the epoch."""

    url: str
    http: httpx2.Client
    started_at: float
    targets: int
    evaluated_at: float = 0

    def query_final(self, query: str) -> list[Sample]:
        """Return the result of a query at the final evaluation."""
        return self._query_at(self.evaluated_at, query)

    def query_value(self, query: str) -> float | None:
        """Return the single current value of a query, or None."""
        result = self._query_at(time.time(), query)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def query_history(self, query: str) -> list[float]:
        """Return all values of a query at any second up to the final evaluation, without NaN."""
        result = self._get("query_range", query=query, start=self.started_at, end=self.evaluated_at, step=1)["result"]
        values = (float(value) for series in result for _, value in series["values"])
        return [value for value in values if not math.isnan(value)]

    def label_values(self, label: str, series: str) -> list[str]:
        """Return the values of a label of some series."""
        return cast("list[str]", self._get(f"label/{label}/values", **{"match[]": series}))

    def rules(self) -> list[Mapping[str, Any]]:
        """Return all rules with their last evaluation."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def wait_for_scrape(self) -> None:
        """Wait until all targets have been scraped from now on."""
        since = time.time() + SCRAPE_SECONDS
        last = "min(timestamp(gateway_build_info)) and on () count(up == 1) == "
        wait_until(lambda: (self.query_value(f"{last}{self.targets}") or 0) > since, "a scrape of all targets")

    def wait_for_rules(self) -> None:
        """Wait until everything is scraped and every rule is evaluated on that; this is the final evaluation."""
        self.wait_for_scrape()
        for _ in range(_LONGEST_CHAIN):
            wait_until(partial(self._is_evaluated, time.time()), "an evaluation of all rules")
        self.wait_for_scrape()
        self.evaluated_at = time.time()

    def _is_evaluated(self, since: float) -> bool:
        groups = self._get("rules")["groups"]
        return all(datetime.fromisoformat(group["lastEvaluation"]).timestamp() > since for group in groups)

    def _query_at(self, moment: float, query: str) -> list[Sample]:
        return cast("list[Sample]", self._get("query", query=query, time=moment)["result"])

    def _get(self, path: str, **query: Any) -> Any:
        answer = self.http.get(f"{self.url}/api/v1/{path}", params=query).json()
        assert answer["status"] == "success", answer
        assert "warnings" not in answer, answer
        return answer["data"]


@contextmanager
def run_prometheus(folder: Path, targets: list[str]) -> Iterator[Prometheus]:
    """Run a server that scrapes these targets with the shipped example configuration."""
    folder.mkdir()
    for file in RULES:
        (folder / file.name).write_text(speed_up_rules(file.read_text("utf-8")))
    (folder / "prometheus.yaml").write_text(_configuration(targets))
    address = f"127.0.0.1:{reserve_port()}"
    command = [str(find_prometheus()), f"--config.file={folder / 'prometheus.yaml'}", f"--web.listen-address={address}"]
    command += [f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        with httpx2.Client(timeout=TIMEOUT_SECONDS, trust_env=False) as http:
            result = Prometheus(f"http://{address}", http, time.time(), len(targets))
            wait_until(lambda: _is_ready(result, process, folder / "log.txt"), "the start of Prometheus")
            yield result
    finally:
        process.kill()
        process.wait()


def speed_up_rules(rules: str) -> str:
    """Evaluate all rules at once, and shorten windows of an hour to a few seconds."""
    return re.sub(r":1h\]", ":5s]", re.sub(r"^ +interval: \w+\n", "", rules, flags=re.MULTILINE))


def _configuration(targets: list[str]) -> str:
    configuration = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text("utf-8"))
    configuration["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{SCRAPE_SECONDS}s")
    (job,) = configuration["scrape_configs"]
    del job["dns_sd_configs"], configuration["alerting"]
    job["static_configs"] = [{"targets": targets, "labels": {"namespace": NAMESPACE}}]
    return yaml.safe_dump(configuration)


def _is_ready(server: Prometheus, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return server.http.get(f"{server.url}/-/ready").status_code == 200
    except httpx2.TransportError:
        return False
