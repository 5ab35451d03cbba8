"""The Prometheus rules, checked without Prometheus."""

from __future__ import annotations

import json
import re

import pytest
import yaml

from tests.deploy import rules
from tests.deploy.kubernetes.release import render_release, resources_of_kind
from tests.deploy.promql import find_errors
from tests.deploy.rules import Rule
from tests.deploy.series import exported_series

ALERTS = rules.alerts()
TEMPLATE = re.compile(r"\{\{.*?\}\}", re.DOTALL)
DASHBOARD = re.compile(r"https://grafana\.example/d/([a-z-]+)")
RUNBOOK = "https://imaging-gateway.example/RUNBOOK.md#"


def rule_id(rule: Rule) -> str:
    return "-".join(filter(None, [rule.get("alert") or rule["record"], *rule.get("labels", {}).values()]))


parametrize_alert = pytest.mark.parametrize("alert", ALERTS, ids=rule_id)


@pytest.mark.parametrize("rule", rules.rules(), ids=rule_id)
def test_series_and_labels_exist(rule: Rule) -> None:
    assert find_errors(rule["expr"], exported_series()) == []


def test_rules_are_unique() -> None:
    created = [(rule.get("alert") or rule["record"], *sorted(rule.get("labels", {}).items())) for rule in rules.rules()]
    assert len(created) == len(set(created))


@parametrize_alert
def test_severity(alert: Rule) -> None:
    assert alert["labels"]["severity"] in {"page", "ticket"}


@parametrize_alert
def test_annotations(alert: Rule) -> None:
    """Every alert has a summary, a description and links."""
    output = alert["annotations"]
    assert set(output) == {"summary", "description", "runbook_url", "dashboard"}
    assert output["runbook_url"] == RUNBOOK + alert["alert"].lower()
    assert len(TEMPLATE.sub("", output["summary"])) <= 80
    assert "\n" not in output["summary"]
    assert output["description"].endswith(".")


@parametrize_alert
def test_values_are_formatted(alert: Rule) -> None:
    """No alert shows a number with all its digits."""
    templates = TEMPLATE.findall("".join(alert["annotations"].values()))
    assert all("humanize" in template or "printf" in template for template in templates if "$value" in template)


@parametrize_alert
def test_dashboard_exists(alert: Rule) -> None:
    known = {json.loads(file.read_text("utf-8"))["uid"] for file in (rules.DEPLOY / "grafana").rglob("*.json")}
    uid = DASHBOARD.fullmatch(alert["annotations"]["dashboard"])
    assert uid is not None
    assert uid[1] in known


def test_runbook() -> None:
    """The runbook has exactly one entry for each alert."""
    assert sorted(rules.runbook_entries()) == sorted({alert["alert"] for alert in ALERTS})


@parametrize_alert
def test_cases(alert: Rule) -> None:
    """Every alert has a case in which it fires and one in which it does not."""
    own = [fired for named, fired in rules.cases() if named == alert["alert"]]
    assert any(alert["labels"].items() <= labels.items() for fired in own for labels in fired)
    assert [] in own


def test_example_configuration() -> None:
    """The example loads every rule file, and has the job name used in the rules."""
    example = yaml.safe_load((rules.FOLDER / "prometheus.yaml").read_text("utf-8"))
    taken = {file for pattern in example["rule_files"] for file in rules.FOLDER.glob(pattern)}
    assert taken == set(rules.FILES)
    known = {job for rule in rules.rules() for job in re.findall(r'job="([^"]*)"', rule["expr"])}
    assert {scrape_config["job_name"] for scrape_config in example["scrape_configs"]} == known


def test_kubernetes_example() -> None:
    """The commented Kubernetes example finds pods by the chart's label and port."""
    text = (rules.FOLDER / "prometheus.yaml").read_text("utf-8")
    commented = [line.removeprefix("    #   ") for line in text.splitlines() if line.startswith("    #   ")]
    config = yaml.safe_load("\n".join(commented))
    kept = {
        (relabel_config["source_labels"][0], relabel_config["regex"])
        for relabel_config in config["relabel_configs"]
        if "regex" in relabel_config
    }
    for pod in (item["spec"]["template"] for item in resources_of_kind(render_release("default"), "Deployment")):
        ports = [port["name"] for container in pod["spec"]["containers"] for port in container["ports"]]
        result = {("__meta_kubernetes_pod_container_port_name", port) for port in ports}
        for name, value in pod["metadata"]["labels"].items():
            result.add((f"__meta_kubernetes_pod_label_{re.sub('[^a-zA-Z0-9_]', '_', name)}", value))
        assert len(kept) == 2
        assert kept <= result
