"""The rules and dashboards in the chart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.grafana.__main__ import FOLDER as DASHBOARDS
from tests.deploy.kubernetes.release import get_resource, matches_selector, render_release, resources_of_kind
from tests.deploy.rules import FILES

DEFAULT_LINKS = ("https://imaging-gateway.example/RUNBOOK.md", "https://grafana.example")
CUSTOM_LINKS = ("https://wiki.example/imaging-gateway/runbook", "https://graphs.example")


def rule_groups(text: str) -> Any:
    return yaml.safe_load(text)["groups"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_rules(file: Path) -> None:
    """Every rule is included unchanged, except for the links of alerts."""
    result = get_resource(render_release("production"), "PrometheusRule", f"-{file.stem}")
    text = file.read_text("utf-8")
    for default, chosen in zip(DEFAULT_LINKS, CUSTOM_LINKS, strict=True):
        text = text.replace(default, chosen)
    assert result["spec"] == {"groups": rule_groups(text)}
    assert result["metadata"]["labels"]["release"] == "prometheus"


def test_links() -> None:
    """Alerts link only to configured addresses."""
    results = [str(item) for item in resources_of_kind(render_release("production"), "PrometheusRule")]
    assert not [item for item in results for default in DEFAULT_LINKS if default in item]
    assert [item for item in results for chosen in CUSTOM_LINKS if chosen in item]


def test_all_rules() -> None:
    """Exactly the rule files are included."""
    results = {item["metadata"]["name"] for item in resources_of_kind(render_release("production"), "PrometheusRule")}
    assert results == {f"photos-imaging-gateway-{file.stem}" for file in FILES}


def test_dashboards() -> None:
    """All dashboards are included unchanged, with the label for Grafana's sidecar."""
    results = [
        item
        for item in resources_of_kind(render_release("production"), "ConfigMap")
        if "grafana_dashboard" in item["metadata"]["labels"]
    ]
    texts = {name: text for item in results for name, text in item["data"].items()}
    assert texts == {f"imaging-gateway-{file.name}": file.read_text("utf-8") for file in DASHBOARDS.glob("*.json")}


def test_monitor() -> None:
    """Prometheus scrapes the operators' port of all replicas under the job name used in the rules."""
    resources = render_release("production")
    monitor = get_resource(resources, "ServiceMonitor")
    selector = monitor["spec"]["selector"]["matchLabels"]
    services = resources_of_kind(resources, "Service")
    (service,) = [item for item in services if matches_selector(selector, item["metadata"]["labels"])]
    (endpoint,) = monitor["spec"]["endpoints"]
    assert service["metadata"]["name"] == "photos-imaging-gateway-operators"
    assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert endpoint["path"] == "/metrics"
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "imaging-gateway"
    assert 'job="imaging-gateway"' in FILES[0].with_name("alerts-service.yaml").read_text("utf-8")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


def test_job_name_is_fixed() -> None:
    """The job name does not depend on the release's name."""
    for item in resources_of_kind(render_release("production", 'fullnameOverride="other"'), "Service"):
        assert item["metadata"]["labels"]["app.kubernetes.io/name"] == "imaging-gateway"


def test_disabled_by_default() -> None:
    """The default values need no Prometheus operator."""
    results = {item["kind"] for item in render_release("default")}
    assert not results & {"ServiceMonitor", "PrometheusRule", "ConfigMap", "Ingress", "Job"}
