"""The Prometheus rules, their cases, which promtool runs, and the dashboards; `tests/monitoring` runs all queries."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry

from deploy.grafana.objectives import OBJECTIVES
from service.telemetry.metrics import Metrics
from tests.deploy.queries import (
    ALERTS,
    DASHBOARDS,
    DEPLOY,
    PROMETHEUS,
    RULE_FILES,
    RULES,
    list_selectors,
    panel_queries,
)

CASE_FILES = sorted((PROMETHEUS / "tests").glob("*.yaml"))
RUNBOOK = "https://imaging-gateway.example/RUNBOOK.md#"
DASHBOARD = "https://grafana.example/d/"


def rule_id(rule: Mapping[str, Any]) -> str:
    return "-".join(filter(None, [rule.get("alert") or rule["record"], *rule.get("labels", {}).values()]))


def test_annotations() -> None:
    """Every alert links to a dashboard and to its entry of the runbook, which has no other entries."""
    dashboards = {DASHBOARD + dashboard["uid"] for dashboard in DASHBOARDS.values()}
    for alert in ALERTS:
        annotations = alert["annotations"]
        assert annotations.keys() == {"summary", "description", "runbook_url", "dashboard"}
        assert annotations["runbook_url"] == RUNBOOK + alert["alert"].lower()
        assert annotations["dashboard"] in dashboards
    entries = re.findall(r"^## (\w+)$", (DEPLOY / "RUNBOOK.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(entries) == sorted({alert["alert"] for alert in ALERTS})


def run_promtool(*arguments: str | Path) -> None:
    """Run promtool of Debian's package `prometheus`, which must succeed without warnings."""
    command = ["promtool", *arguments]
    environ = os.environ | {"GOGC": "400"}  # its cases allocate much, and collecting that takes a fifth of their time
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_syntax() -> None:
    """Prometheus accepts the rules, and the example configuration with all of them."""
    run_promtool("check", "rules", "--lint=all", "--lint-fatal", *RULE_FILES)
    run_promtool("check", "config", "--lint=all", "--lint-fatal", PROMETHEUS / "prometheus.yaml")


@pytest.mark.parametrize("file", CASE_FILES, ids=lambda file: file.stem)
def test_cases(file: Path) -> None:
    """Each alert fires when it must, with the right annotations, and not otherwise."""
    run_promtool("test", "rules", file)


def test_every_alert_has_cases() -> None:
    """Every alert has a case in which it fires and one in which it does not."""
    files = [yaml.safe_load(file.read_text("utf-8")) for file in CASE_FILES]
    moments = [moment for file in files for test in file["tests"] for moment in test.get("alert_rule_test", ())]
    for alert in ALERTS:
        own = [moment["exp_alerts"] for moment in moments if moment["alertname"] == alert["alert"]]
        fired = [item["exp_labels"] for expected in own for item in expected]
        assert any(alert["labels"].items() <= labels.items() for labels in fired), rule_id(alert)
        assert [] in own, rule_id(alert)


def test_example_configuration() -> None:
    """The example loads every rule file, has the rules' job name, and in Kubernetes the chart's label and port."""
    text = (PROMETHEUS / "prometheus.yaml").read_text("utf-8")
    example = yaml.safe_load(text)
    assert {file for pattern in example["rule_files"] for file in PROMETHEUS.glob(pattern)} == set(RULE_FILES)
    jobs = {job for rule in RULES for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert {config["job_name"] for config in example["scrape_configs"]} == jobs
    commented = yaml.safe_load("\n".join(re.findall(r"^    #   (.*)$", text, re.MULTILINE)))["relabel_configs"]
    kept = {(config["source_labels"][0], config["regex"]) for config in commented if "regex" in config}
    assert kept == {
        ("__meta_kubernetes_pod_label_app_kubernetes_io_name", "imaging-gateway"),
        ("__meta_kubernetes_pod_container_port_name", "operators"),
    }


def test_dashboards() -> None:
    """Every selector has the chosen namespace, and series are aggregated as their kind requires."""
    families = Metrics(CollectorRegistry()).ledger_collector.describe()
    ledger_series = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    for query in panel_queries():
        for selector in list_selectors(query.text):
            assert "namespace" in {label for label, _, _ in selector.matchers}, query.location
            if selector.name.endswith(("_total", "_bucket", "_sum", "_count")):
                assert selector.enclosing[0] in {"rate", "increase"}, query.location
            if selector.name in ledger_series:  # all processes export it alike
                around = [item for item in selector.enclosing if item not in {"rate", "increase", "deriv"}]
                assert around[0] in {"max", "min"}, query.location


def test_table_of_alerts() -> None:
    """Each alert leads to its entry in the runbook."""
    tables = [panel for panel in DASHBOARDS["now"]["panels"] if panel["type"] == "table"]
    overrides = {item["matcher"]["options"]: item["properties"] for item in tables[0]["fieldConfig"]["overrides"]}
    properties = {item["id"]: item["value"] for item in overrides["runbook"]}
    ((mapping,), (link,)) = properties["mappings"], properties["links"]
    assert link["url"] == "${runbook}#${__value.text}"
    fragments = {name: result["text"] for name, result in mapping["options"].items()}
    assert fragments == {alert["alert"]: alert["annotations"]["runbook_url"].partition("#")[2] for alert in ALERTS}


def test_burn_rate_of_the_alerts() -> None:
    """The burn rate shown as critical is the one that an alert fires on."""
    alerts = (PROMETHEUS / "alerts-slo.yaml").read_text("utf-8")
    for objective in OBJECTIVES:
        limit = f"14.4 * {1 - objective.target_ratio:.4g}"
        assert f'ratio_rate1h{{sli="{objective.sli}"}} > {limit}\n' in alerts
