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

VARIABLE_NAMES = {setting.name for setting in SETTINGS} | {setting.name + FILE_SUFFIX for setting in SETTINGS}
TOPOLOGIES = {
    "default": Topology.SINGLE,
    "production": Topology.SINGLE,
    "sentinel": Topology.SENTINEL,
    "cluster": Topology.CLUSTER,
}


def pod_template(name: str, role: str, *settings: str) -> Any:
    return get_resource(render_release(name, *settings), "Deployment", f"-{role}")["spec"]["template"]


@pytest.mark.parametrize("name", RELEASES)
def test_restricted(name: str) -> None:
    """Every pod fulfils the restricted security standard, with a read-only root."""
    for _, pod in pod_templates(render_release(name)):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert spec["automountServiceAccountToken"] is False
        assert spec["enableServiceLinks"] is False
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
            assert not any("hostPort" in port for port in container.get("ports", ()))
        assert {next(iter(volume.keys() - {"name"})) for volume in spec["volumes"]} <= {
            "projected",
            "emptyDir",
            "configMap",
        }


@pytest.mark.parametrize("name", RELEASES)
def test_service_account_has_no_rights(name: str) -> None:
    """The service account exists, mounts no token and has no role."""
    resources = render_release(name)
    account = get_resource(resources, "ServiceAccount")
    assert account["automountServiceAccountToken"] is False
    assert {pod["spec"]["serviceAccountName"] for _, pod in pod_templates(resources)} == {account["metadata"]["name"]}
    assert not {resource["kind"] for resource in resources if "rbac" in resource["apiVersion"]}


@pytest.mark.parametrize("name", RELEASES)
def test_user_of_the_image(name: str) -> None:
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text("utf-8")
    for _, pod in pod_templates(render_release(name)):
        context = pod["spec"]["securityContext"]
        assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize("role", ROLES)
def test_settings(name: str, role: str, tmp_path: Path) -> None:
    """With its Secrets, a pod's environment is valid in production, on the chart's ports."""
    pod = pod_template(name, role)
    settings = Settings.load(pod_environment(pod, tmp_path, REDIS_URLS[name]))
    assert settings.is_production
    assert settings.role is Role(role)
    assert settings.redis_url == REDIS_URLS[name]
    assert parse_redis_url(settings.redis_url).topology is TOPOLOGIES[name]
    ports = {port["name"]: port["containerPort"] for port in pod["spec"]["containers"][0]["ports"]}
    expected = {"operators": settings.ops_port} | ({"tenants": settings.port} if role == "api" else {})
    assert ports == expected
    # On every address, for clients outside the pod.
    assert settings.host == settings.ops_host == "0.0.0.0"


def test_given_settings(tmp_path: Path) -> None:
    """Given settings arrive unchanged: numbers as written, and the upstream's names."""
    settings = Settings.load(pod_environment(pod_template("production", "api"), tmp_path, REDIS_URLS["production"]))
    assert settings.upstream_url == "https://upstream.example/api"
    assert settings.max_image_bytes == 20 << 20
    assert settings.max_image_pixels == 25_000_000
    assert settings.traces_url == "http://collector.tracing.svc:4318"
    assert settings.traces_share == 0.05
    assert settings.models == {"general": "通用模型", "anime": "动漫模型"}


@pytest.mark.parametrize(("text", "value"), [("0.5", 0.5), ("3", 3.0)])
def test_fractions(tmp_path: Path, text: str, value: float) -> None:
    pod = pod_template("default", "worker", f"settings.pollSeconds={text}")
    assert Settings.load(pod_environment(pod, tmp_path, REDIS_URLS["default"])).poll_seconds == value


def test_ipv6(tmp_path: Path) -> None:
    """The wildcard address of both ports is set once."""
    pod = pod_template("default", "api", 'settings.host="::"')
    settings = Settings.load(pod_environment(pod, tmp_path, REDIS_URLS["default"]))
    assert settings.host == settings.ops_host == "::"


@pytest.mark.parametrize("name", RELEASES)
def test_only_known_variables(name: str) -> None:
    """Every GATEWAY variable is a setting, given once, and holds no secret."""
    secret = {setting.name for setting in SETTINGS if setting.is_secret}
    for _, pod in pod_templates(render_release(name)):
        names = [item["name"] for item in pod["spec"]["containers"][0]["env"]]
        assert len(set(names)) == len(names)
        assert {item for item in names if item.startswith("GATEWAY_")} <= VARIABLE_NAMES - secret


@pytest.mark.parametrize("name", RELEASES)
def test_no_secrets(name: str) -> None:
    """The chart creates no Secret, and references existing ones."""
    resources = render_release(name)
    assert resources_of_kind(resources, "Secret") == []
    for _, pod in pod_templates(resources):
        (volume,) = [item for item in pod["spec"]["volumes"] if item["name"] == "secrets"]
        assert all(source["secret"]["name"] for source in volume["projected"]["sources"])
        # Group-readable: the group is fsGroup, since the files belong to root.
        assert volume["projected"]["defaultMode"] == 0o440
        assert pod["spec"]["securityContext"]["fsGroup"] == pod["spec"]["securityContext"]["runAsGroup"]


@pytest.mark.parametrize("lease", [90, 180, 3600])
@pytest.mark.parametrize("role", ROLES)
def test_termination(tmp_path: Path, role: str, lease: int) -> None:
    """The grace period covers open requests and then the settlement of their leases."""
    pod = pod_template("default", role, f"settings.leaseSeconds={lease}")
    spec, (container,) = pod["spec"], pod["spec"]["containers"]
    settings = Settings.load(pod_environment(pod, tmp_path, REDIS_URLS["default"]))
    before = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert spec["terminationGracePeriodSeconds"] > before + 2 * settings.lease_seconds


def test_pre_stop() -> None:
    """A terminating replica keeps serving until the endpoints are updated, without needing a shell."""
    assert pod_template("default", "api")["spec"]["containers"][0]["lifecycle"] == {
        "preStop": {"sleep": {"seconds": 10}}
    }
    assert "lifecycle" not in pod_template("default", "api", "preStopSeconds=0")["spec"]["containers"][0]


@pytest.mark.parametrize("role", ROLES)
def test_probes(role: str) -> None:
    """Readiness probes the role's own port, liveness the one that closes last."""
    (container,) = pod_template("default", role)["spec"]["containers"]
    served = "tenants" if role == "api" else "operators"
    assert container["readinessProbe"]["httpGet"] == {"path": "/readyz", "port": served}
    for probe in ("livenessProbe", "startupProbe"):
        assert container[probe]["httpGet"] == {"path": "/healthz", "port": "operators"}


@pytest.mark.parametrize("role", ROLES)
def test_rolling_update(role: str) -> None:
    """An upgrade stops no replica before its replacement is ready."""
    strategy = get_resource(render_release("default"), "Deployment", f"-{role}")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}


@pytest.mark.parametrize("role", ROLES)
def test_memory_limit(role: str) -> None:
    """Memory is limited; CPU is not throttled."""
    resources = pod_template("default", role)["spec"]["containers"][0]["resources"]
    assert resources["limits"].keys() == {"memory"}
    assert resources["requests"].keys() == {"cpu", "memory"}
