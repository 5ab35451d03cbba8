"""The notes that the chart prints after installation."""

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
    """Return a copy of the chart with its notes as a resource, since Helm prints them only on installation."""
    copied = tmp_path / CHART.name
    shutil.copytree(CHART, copied)
    (copied / "templates" / "shown.yaml").write_text(NOTES_CONFIGMAP)
    return copied


def render_notes(chart: Path, name: str, *settings: str) -> str:
    text: str = get_resource(render(EXAMPLES[name], *settings, chart=chart), "ConfigMap", "-notes")["data"]["notes"]
    return text


def test_urls(chart: Path) -> None:
    """The notes show the URLs of both Services."""
    tenants, operators = resources_of_kind(render_release("default"), "Service")
    notes = render_notes(chart, "default")
    assert f"http://{tenants['metadata']['name']}.images:{tenants['spec']['ports'][0]['port']};" in notes
    assert f"service/{operators['metadata']['name']} {operators['spec']['ports'][0]['port']}" in notes


def test_grace_period(chart: Path) -> None:
    """The notes show the termination grace period of the pods."""
    pod = get_resource(render_release("default"), "Deployment", "-api")["spec"]["template"]
    assert f"up to {pod['spec']['terminationGracePeriodSeconds']} s" in render_notes(chart, "default")


def test_closed(chart: Path) -> None:
    """A release without peers is pointed out, and no other."""
    warning = "No client can reach it yet"
    assert warning in render_notes(chart, "default", "networkPolicy.tenants=[]")
    assert warning not in render_notes(chart, "default")
    assert warning not in render_notes(chart, "default", "networkPolicy.tenants=[]", "networkPolicy.enabled=false")


def test_registry(chart: Path) -> None:
    """With a registry file the notes show where the changes are logged."""
    job = get_resource(render_release("production"), "Job", "-registry")["metadata"]["name"]
    assert f"logs job/{job}" in render_notes(chart, "production")
    assert "gateway account list" in render_notes(chart, "default")
