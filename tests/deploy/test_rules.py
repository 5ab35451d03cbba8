"""The Prometheus rules, and their cases, which promtool runs."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubernetes.release import render_release, resources_of_kind
from tests.deploy.queries import ALERTS, DASHBOARDS, DEPLOY, PROMETHEUS, RULE_FILES, RULES

CASE_FILES = sorted((PROMETHEUS / "tests").glob("*.yaml"))
RUNBOOK = "https://imaging-gateway.example/RUNBOOK.md#"
DASHBOARD = "https://grafana.example/d/"


def rule_id(rule: Mapping[str, Any]) -> str:
    return "-".join(filter(None, [rule.get("alert") or rule["record"], *rule.get("labels", {}).values()]))


def test_rules_are_unique() -> None:
    assert len({rule_id(rule) for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("alert", ALERTS, ids=rule_id)
def test_annotations(alert: Mapping[str, Any]) -> None:
    """Every alert links to its entry of the runbook and to a dashboard, and formats its value."""
    assert alert["labels"]["severity"] in {"page", "ticket"}
    annotations = alert["annotations"]
    assert set(annotations) == {"summary", "description", "runbook_url", "dashboard"}
    assert annotations["runbook_url"] == RUNBOOK + alert["alert"].lower()
    assert annotations["dashboard"] in {DASHBOARD + dashboard["uid"] for dashboard in DASHBOARDS.values()}
    templates = re.findall(r"\{\{.*?\}\}", "".join(annotations.values()), re.DOTALL)
    assert all("humanize" in template or "printf" in template for template in templates if "$value" in template)


def test_runbook() -> None:
    """The runbook has exactly one entry for each alert."""
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
    """The example loads every rule file, and has the job name used in the rules."""
    example = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text("utf-8"))
    assert {file for pattern in example["rule_files"] for file in PROMETHEUS.glob(pattern)} == set(RULE_FILES)
    jobs = {job for rule in RULES for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert {config["job_name"] for config in example["scrape_configs"]} == jobs


def test_kubernetes_example() -> None:
    """The commented Kubernetes example finds pods by the chart's label and port."""
    text = (PROMETHEUS / "prometheus.yaml").read_text("utf-8")
    commented = [line.removeprefix("    #   ") for line in text.splitlines() if line.startswith("    #   ")]
    configs = yaml.safe_load("\n".join(commented))["relabel_configs"]
    kept = {(config["source_labels"][0], config["regex"]) for config in configs if "regex" in config}
    assert len(kept) == 2
    for pod in (item["spec"]["template"] for item in resources_of_kind(render_release("default"), "Deployment")):
        ports = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
        labels = {re.sub(r"\W", "_", name): value for name, value in pod["metadata"]["labels"].items()}
        found = {("__meta_kubernetes_pod_container_port_name", port) for port in ports}
        assert kept <= found | {(f"__meta_kubernetes_pod_label_{name}", value) for name, value in labels.items()}
