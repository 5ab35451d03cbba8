"""The pods of the chart: user, settings, start and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.settings import FILE_SUFFIX, SETTINGS, Role, Settings
from service.storage.connections import Topology, parse_redis_url
from tests.deploy.kubernetes.release import (
    REDIS_URLS,
    RELEASES,
    ROLES,
    get_resource,
    pod_environment,
    pod_templates,
    render_release,
    resources_of_kind,
)

TOPOLOGIES = {
    "default": Topology.SINGLE,
    "production": Topology.SINGLE,
    "sentinel": Topology.SENTINEL,
    "cluster": Topology.CLUSTER,
}


def pod_template(name: str, role: str, *settings: str) -> Any:
    return get_resource(render_release(name, *settings), "Deployment", f"-{role}")["spec"]["template"]


def pod_settings(folder: Path, name: str, role: str, *settings: str) -> Settings:
    return Settings.load(pod_environment(pod_template(name, role, *settings), folder, REDIS_URLS[name]))


@pytest.mark.parametrize("name", RELEASES)
def test_restricted(name: str) -> None:
    """Every pod fulfils the restricted security standard, with the image's user, no rights and a read-only root."""
    resources = render_release(name)
    account = get_resource(resources, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert not {resource["kind"] for resource in resources if "rbac" in resource["apiVersion"]}
    for _, pod in pod_templates(resources):
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert spec["serviceAccountName"] == account["metadata"]["name"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text("utf-8")
        assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert not any("hostPort" in port for port in container.get("ports", ()))
        kinds = {kind for volume in spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"projected", "emptyDir", "configMap"}


@pytest.mark.parametrize("name", RELEASES)
def test_environment(name: str) -> None:
    """Every GATEWAY variable is a setting, given once; secrets are files of existing Secrets."""
    known = {setting.name for setting in SETTINGS if not setting.is_secret}
    known |= {setting.name + FILE_SUFFIX for setting in SETTINGS}
    resources = render_release(name)
    assert resources_of_kind(resources, "Secret") == []
    for _, pod in pod_templates(resources):
        names = [item["name"] for item in pod["spec"]["containers"][0]["env"]]
        assert len(set(names)) == len(names)
        assert {item for item in names if item.startswith("GATEWAY_")} <= known
        (volume,) = [item for item in pod["spec"]["volumes"] if item["name"] == "secrets"]
        assert all(source["secret"]["name"] for source in volume["projected"]["sources"])
        # Group-readable: the group is fsGroup, since the files belong to root.
        assert volume["projected"]["defaultMode"] == 0o440
        assert pod["spec"]["securityContext"]["fsGroup"] == pod["spec"]["securityContext"]["runAsGroup"]


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("role", ROLES)
def test_settings(name: str, role: str, tmp_path: Path) -> None:
    """With its Secrets, a pod's environment is valid in production, on the chart's ports."""
    settings = pod_settings(tmp_path, name, role)
    assert settings.is_production
    assert (settings.role, settings.redis_url) == (Role(role), REDIS_URLS[name])
    assert parse_redis_url(REDIS_URLS[name]).topology is TOPOLOGIES[name]
    (container,) = pod_template(name, role)["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"operators": settings.ops_port} | ({"tenants": settings.port} if role == "api" else {})
    # On every address, for clients outside the pod.
    assert settings.host == settings.ops_host == "0.0.0.0"


def test_given_settings(tmp_path: Path) -> None:
    """Given settings arrive unchanged: numbers as written, and the upstream's names."""
    settings = pod_settings(tmp_path, "production", "api")
    assert settings.upstream_url == "https://upstream.example/api"
    assert (settings.max_image_bytes, settings.max_image_pixels) == (20 << 20, 25_000_000)
    assert (settings.traces_url, settings.traces_share) == ("http://collector.tracing.svc:4318", 0.05)
    assert settings.models == {"general": "通用模型", "anime": "动漫模型"}
    assert pod_settings(tmp_path, "default", "worker", "settings.pollSeconds=0.5").poll_seconds == 0.5
    everywhere = pod_settings(tmp_path, "default", "api", 'settings.host="::"')
    assert everywhere.host == everywhere.ops_host == "::"


@pytest.mark.parametrize("lease", [90, 3600])
@pytest.mark.parametrize("role", ROLES)
def test_termination(tmp_path: Path, role: str, lease: int) -> None:
    """The grace period covers open requests and then the settlement of their leases."""
    setting = f"settings.leaseSeconds={lease}"
    spec = pod_template("default", role, setting)["spec"]
    before = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    settings = pod_settings(tmp_path, "default", role, setting)
    assert spec["terminationGracePeriodSeconds"] > before + 2 * settings.lease_seconds


def test_pre_stop() -> None:
    """A terminating replica keeps serving until the endpoints are updated, without needing a shell."""
    sleeping, ending = (pod_template("default", "api", *setting) for setting in ([], ["preStopSeconds=0"]))
    assert sleeping["spec"]["containers"][0]["lifecycle"] == {"preStop": {"sleep": {"seconds": 10}}}
    assert "lifecycle" not in ending["spec"]["containers"][0]


@pytest.mark.parametrize("role", ROLES)
def test_operation(role: str) -> None:
    """Readiness probes the role's own port, liveness the one that closes last; an update starts before it stops."""
    spec = get_resource(render_release("default"), "Deployment", f"-{role}")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    (container,) = spec["template"]["spec"]["containers"]
    served = "tenants" if role == "api" else "operators"
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": served}
    for probe in ("livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "operators"}
    # CPU is not throttled.
    assert container["resources"]["limits"].keys() == {"memory"}
    assert container["resources"]["requests"].keys() == {"cpu", "memory"}
