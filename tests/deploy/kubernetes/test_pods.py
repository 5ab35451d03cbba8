"""The pods of the chart: user, settings, and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.settings import Role, Settings
from tests.deploy.kubernetes.release import (
    REDIS_URL,
    RELEASES,
    ROLES,
    get_resource,
    pod_environment,
    pod_templates,
    render_release,
)


def pod_template(name: str, role: str, *settings: str) -> Any:
    return get_resource(render_release(name, *settings), "Deployment", f"-{role}")["spec"]["template"]


def pod_settings(folder: Path, name: str, role: str, *settings: str) -> Settings:
    return Settings.load(pod_environment(pod_template(name, role, *settings), folder))


@pytest.mark.parametrize("name", RELEASES)
def test_restricted(name: str) -> None:
    """Every pod fulfils the restricted security standard, with the image's user, no rights and a read-only root."""
    dockerfile = (Path(__file__).parents[3] / "Dockerfile").read_text("utf-8")
    for _, pod in pod_templates(render_release(name)):
        spec, context = pod["spec"], pod["spec"]["securityContext"]
        assert spec["automountServiceAccountToken"] is False
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert f"\nUSER {context['runAsUser']}:{context['runAsGroup']}\n" in dockerfile
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }
        # Secrets can be read by the group: it is fsGroup, since their files belong to root.
        assert context["fsGroup"] == context["runAsGroup"]
        kinds = {kind for volume in spec["volumes"] for kind in volume.keys() - {"name"}}
        assert kinds <= {"projected", "emptyDir", "configMap"}


@pytest.mark.parametrize("name", ["default", "production"])
@pytest.mark.parametrize("role", ROLES)
def test_settings(name: str, role: str, tmp_path: Path) -> None:
    """With its Secrets, a pod's environment is valid in production, on the chart's ports."""
    settings = pod_settings(tmp_path, name, role)
    assert settings.is_production
    assert (settings.role, settings.redis_url) == (Role(role), REDIS_URL)
    (container,) = pod_template(name, role)["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"operators": settings.ops_port} | ({"tenants": settings.port} if role == "api" else {})
    # On every address, for clients outside the pod.
    assert settings.host == settings.ops_host == "0.0.0.0"


def test_given_settings(tmp_path: Path) -> None:
    """Given settings arrive unchanged: numbers as written, and the upstream's names."""
    settings = pod_settings(tmp_path, "production", "api", "settings.pollSeconds=0.5", 'settings.host="::"')
    assert (settings.max_image_bytes, settings.max_image_pixels) == (20 << 20, 25_000_000)
    assert (settings.traces_share, settings.poll_seconds) == (0.05, 0.5)
    assert settings.models == {"general": "通用模型", "anime": "动漫模型"}
    assert settings.host == settings.ops_host == "::"


@pytest.mark.parametrize("role", ROLES)
def test_termination(tmp_path: Path, role: str) -> None:
    """The grace period covers open requests and then the settlement of their leases."""
    setting = "settings.leaseSeconds=3600"
    spec = pod_template("default", role, setting)["spec"]
    before = spec["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    settings = pod_settings(tmp_path, "default", role, setting)
    assert spec["terminationGracePeriodSeconds"] > before + 2 * settings.lease_seconds
