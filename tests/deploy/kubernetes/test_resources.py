"""The rendered resources are valid and consistent."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from click.testing import CliRunner

from deploy.helm.__main__ import FOLDER, find_drift, main, render_all
from deploy.helm.chart import CHART, EXAMPLES, helm
from service import __version__
from tests.deploy.kubernetes.release import (
    RELEASES,
    ROLES,
    get_resource,
    matches_selector,
    pod_templates,
    render_release,
    resources_of_kind,
)

CHART_METADATA = yaml.safe_load((CHART / "Chart.yaml").read_text("utf-8"))
OLDEST_KUBERNETES = re.sub(r"^>=(\d+\.\d+)\..*", r"\1", CHART_METADATA["kubeVersion"])


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", RELEASES)
def test_kubernetes_schemas(name: str, version: str) -> None:
    """Every resource is valid for the oldest and the newest Kubernetes, without unknown fields."""
    for item in render_release(name):
        if not item["apiVersion"].startswith("monitoring.coreos.com/"):
            assert version.startswith(kubernetes_validate.validate(dict(item), version, strict=True))


@pytest.mark.parametrize("name", RELEASES)
def test_helm_lint(name: str) -> None:
    """Helm's own checks pass without warnings."""
    assert helm("lint", "--strict", "--quiet", CHART, f"--values={EXAMPLES[name]}") == ""


def test_golden() -> None:
    """The rendered examples are up to date; `python -m deploy.helm` writes them."""
    assert list(find_drift(FOLDER, render_all())) == []


def test_drift(tmp_path: Path) -> None:
    """Missing, different and superfluous files fail the check, which names them."""
    (tmp_path / "default.yaml").write_text("--- {}\n")
    (tmp_path / "unwanted.yaml").write_text("--- {}\n")
    result = CliRunner().invoke(main, ["--folder", str(tmp_path), "--check"])
    assert result.exit_code == 1
    assert "cluster.yaml, default.yaml, production.yaml, sentinel.yaml, unwanted.yaml" in result.output
    assert "python -m deploy.helm" in result.output
    assert CliRunner().invoke(main, ["--folder", str(tmp_path)]).exit_code == 0
    assert CliRunner().invoke(main, ["--folder", str(tmp_path), "--check"]).exit_code == 0
    assert {item.stem for item in tmp_path.iterdir()} == set(RELEASES)


def test_version() -> None:
    """The chart has the version of the gateway."""
    assert CHART_METADATA["appVersion"] == __version__
    assert get_resource(render_release("default"), "Deployment", "-api")["spec"]["template"]["spec"]["containers"][0][
        "image"
    ].endswith(f":{__version__}")


def test_digest_goes_before_tag() -> None:
    """An image can be pinned by digest, which overrides the tag."""
    digest = f"sha256:{'0' * 64}"
    pinned = render_release("default", f'image.digest="{digest}"', 'image.tag="2"')
    assert {pod["spec"]["containers"][0]["image"] for _, pod in pod_templates(pinned)} == {
        f"registry/imaging-gateway@{digest}"
    }


@pytest.mark.parametrize("name", RELEASES)
def test_names(name: str) -> None:
    """Names are unique by kind, and start with the release's name."""
    names = [(item["kind"], item["metadata"]["name"]) for item in render_release(name)]
    assert len(set(names)) == len(names)
    assert all(item.startswith("photos-imaging-gateway") for _, item in names)


def test_long_names() -> None:
    """The longest release name gives valid names."""
    long = f'fullnameOverride="{"a" * 63}"'
    assert max(len(item["metadata"]["name"]) for item in render_release("production", long)) <= 63


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("role", ROLES)
def test_selectors(name: str, role: str) -> None:
    """The selectors of a role match exactly its pods."""
    resources = render_release(name)
    labels = {pod_template: pod["metadata"]["labels"] for pod_template, pod in pod_templates(resources)}
    policies = [get_resource(resources, item, f"-{role}") for item in ("Deployment", "PodDisruptionBudget")]
    selectors = [policy["spec"]["selector"]["matchLabels"] for policy in policies]
    selectors.append(get_resource(resources, "NetworkPolicy", f"-{role}")["spec"]["podSelector"]["matchLabels"])
    template = get_resource(resources, "Deployment", f"-{role}")["spec"]["template"]
    spread = template["spec"]["topologySpreadConstraints"]
    selectors += [item["labelSelector"]["matchLabels"] for item in spread]
    if role == "api":
        selectors.append(get_resource(resources, "Service")["spec"]["selector"])
    for selector in selectors:
        assert [label for label, found in labels.items() if matches_selector(selector, found)] == [
            f"photos-imaging-gateway-{role}"
        ]


@pytest.mark.parametrize("name", RELEASES)
def test_operators_service(name: str) -> None:
    """The operators' Service selects the pods of both roles, but not the Job."""
    resources = render_release(name)
    selector = get_resource(resources, "Service", "-operators")["spec"]["selector"]
    results = [
        pod_template
        for pod_template, pod in pod_templates(resources)
        if matches_selector(selector, pod["metadata"]["labels"])
    ]
    assert results == [f"photos-imaging-gateway-{role}" for role in ROLES]


@pytest.mark.parametrize("name", RELEASES)
def test_ports(name: str) -> None:
    """Every referenced port exists on its pods; tenants reach only theirs."""
    resources = render_release(name)
    for service in resources_of_kind(resources, "Service"):
        selector = service["spec"]["selector"]
        behind = [pod for _, pod in pod_templates(resources) if matches_selector(selector, pod["metadata"]["labels"])]
        (port,) = service["spec"]["ports"]
        for pod in behind:
            (container,) = pod["spec"]["containers"]
            assert port["targetPort"] in {item["name"] for item in container["ports"]}
    assert get_resource(resources, "Service")["spec"]["ports"][0]["targetPort"] == "tenants"
    operators = get_resource(resources, "Service", "-operators")["spec"]
    assert (operators["type"], operators["ports"][0]["targetPort"]) == ("ClusterIP", "operators")
    for ingress in resources_of_kind(resources, "Ingress"):
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        assert path["backend"]["service"] == {"name": "photos-imaging-gateway", "port": {"name": "tenants"}}


def test_ingress_timeouts() -> None:
    """The example's ingress waits for a submission, and never retries it."""
    resources = render_release("production")
    (container,) = get_resource(resources, "Deployment", "-api")["spec"]["template"]["spec"]["containers"]
    (lease,) = [int(item["value"]) for item in container["env"] if item["name"] == "GATEWAY_LEASE_SECONDS"]
    annotations = get_resource(resources, "Ingress")["metadata"]["annotations"]
    assert int(annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"]) >= lease
    assert annotations["nginx.ingress.kubernetes.io/proxy-next-upstream"] == "off"


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("scales", [True, False])
def test_replicas(role: str, scales: bool) -> None:
    """Either the autoscaler or the Deployment sets the replicas, and one may always be evicted."""
    flag = str(scales).lower()
    resources = render_release("default", f"{role}.autoscaling.enabled={flag}")
    deployment = get_resource(resources, "Deployment", f"-{role}")
    scalers = [
        item
        for item in resources_of_kind(resources, "HorizontalPodAutoscaler")
        if item["metadata"]["name"].endswith(role)
    ]
    assert ("replicas" in deployment["spec"]) is not scales
    assert len(scalers) == scales
    least = deployment["spec"].get("replicas") or scalers[0]["spec"]["minReplicas"]
    budget = get_resource(resources, "PodDisruptionBudget", f"-{role}")["spec"]
    assert 1 <= budget["maxUnavailable"] < least
    for scaler in scalers:
        assert scaler["spec"]["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
        assert scaler["spec"]["minReplicas"] <= scaler["spec"]["maxReplicas"]
        # The autoscaler measures usage as a share of the request.
        assert deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"]


def test_package(tmp_path: Path) -> None:
    """The packaged chart renders like its folder, with its links resolved."""
    helm("package", CHART, f"--destination={tmp_path}")
    (archive,) = tmp_path.iterdir()
    values = f"--values={EXAMPLES['production']}"
    assert helm("template", "photos", archive, values) == helm("template", "photos", CHART, values)
    with tarfile.open(archive) as opened:
        names = opened.getnames()
    assert "imaging-gateway/files/prometheus/recording.yaml" in names
    assert not [name for name in names if "/tests/" in name]
