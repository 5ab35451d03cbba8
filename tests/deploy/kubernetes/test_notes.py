"""What whoever installed the chart is told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deploy.helm.chart import CHART, EXAMPLES, render
from tests.deploy.kubernetes.release import get_resource, render_release, resources_of_kind

NOTES_CONFIGMAP = """\
apiVersion: v1
kind: ConfigMap
metadata: {name: photos-imaging-gateway-notes}
data:
  notes: {{ include (print $.Template.BasePath "/NOTES.txt") . | quote }}
"""


@pytest.fixture
def chart(tmp_path: Path) -> Path:
    """The chart, with what it tells as one more resource: Helm prints it only to those who really install it."""
    copied = tmp_path / CHART.name
    shutil.copytree(CHART, copied)
    (copied / "templates" / "shown.yaml").write_text(NOTES_CONFIGMAP)
    return copied


def render_notes(chart: Path, name: str, *settings: str) -> str:
    """What is told about a release."""
    text: str = get_resource(render(EXAMPLES[name], *settings, chart=chart), "ConfigMap", "-notes")["data"]["notes"]
    return text


def test_addresses(chart: Path) -> None:
    """It is said where tenants and operators find the gateway, by the names and ports of the Services."""
    tenants, operators = resources_of_kind(render_release("default"), "Service")
    told = render_notes(chart, "default")
    assert f"http://{tenants['metadata']['name']}.images:{tenants['spec']['ports'][0]['port']};" in told
    assert f"service/{operators['metadata']['name']} {operators['spec']['ports'][0]['port']}" in told


def test_end(chart: Path) -> None:
    """It is said how long a pod may take to end, which is what it is given."""
    pod = get_resource(render_release("default"), "Deployment", "-api")["spec"]["template"]
    assert f"up to {pod['spec']['terminationGracePeriodSeconds']} s" in render_notes(chart, "default")


def test_closed(chart: Path) -> None:
    """Who has let nobody in is told so, and nobody else is."""
    warning = "NOBODY may reach it yet"
    assert warning in render_notes(chart, "default", "networkPolicy.tenants=[]")
    assert warning not in render_notes(chart, "default")
    assert warning not in render_notes(chart, "default", "networkPolicy.tenants=[]", "networkPolicy.enabled=false")


def test_registry(chart: Path) -> None:
    """Where accounts and tenants come from a file, it is said where to read what was changed."""
    job = get_resource(render_release("production"), "Job", "-registry")["metadata"]["name"]
    assert f"logs job/{job}" in render_notes(chart, "production")
    assert "gateway account list" in render_notes(chart, "default")
