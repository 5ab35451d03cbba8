"""The Job that applies a registry file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.cli.conftest import Shell, shell
from tests.deploy.kubernetes.release import get_resource, pod_environment, render_release, resources_of_kind

__all__ = ["shell"]


def registry_job(*settings: str) -> Any:
    return get_resource(render_release("production", *settings), "Job", "-registry")


def job_container() -> Any:
    (container,) = registry_job()["spec"]["template"]["spec"]["containers"]
    return container


def test_runs_after_every_change() -> None:
    """The Job runs after each installation or upgrade, and replaces the previous one."""
    assert registry_job()["metadata"]["annotations"] == {
        "helm.sh/hook": "post-install,post-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }


def test_operators_api(tmp_path: Path) -> None:
    """It calls the operators' Service, and has no secret but their token."""
    service = get_resource(render_release("production"), "Service", "-operators")
    (port,) = service["spec"]["ports"]
    assert f"--url=http://{service['metadata']['name']}:{port['port']}" in job_container()["args"]
    result = pod_environment(registry_job()["spec"]["template"], tmp_path, "")
    settings = Settings.load({name: text for name, text in result.items() if name.startswith("GATEWAY_")})
    assert settings.admin_token
    assert settings.redis_url is None
    assert settings.secret_keys == ()


def test_secrets_of_the_file() -> None:
    """Secrets that the file references are mounted from their Secrets."""
    (value,) = [item for item in job_container()["env"] if "valueFrom" in item]
    assert value["name"] == "MAIN_USER_KEY"
    assert value["valueFrom"] == {"secretKeyRef": {"name": "gateway-accounts", "key": "main"}}


def test_file() -> None:
    """The file is in the ConfigMap, which may be an existing one."""
    args, spec = job_container()["args"], registry_job()["spec"]["template"]["spec"]
    (mount,) = [volumemount for volumemount in job_container()["volumeMounts"] if volumemount["name"] == "registry"]
    (volume,) = [entry for entry in spec["volumes"] if entry["name"] == "registry"]
    (item,) = volume["configMap"]["items"]
    assert args[:2] == ["apply", f"{mount['mountPath']}/{item['path']}"]
    assert item["key"] in get_resource(render_release("production"), "ConfigMap", "-registry")["data"]
    theirs = ('registry.toml=""', 'registry.existingConfigMap="theirs"')
    assert not [
        entry
        for entry in resources_of_kind(render_release("production", *theirs), "ConfigMap")
        if "registry" in str(entry["data"])
    ]
    assert "{'name': 'theirs', 'items':" in str(registry_job(*theirs))


async def test_apply(shell: Shell, tmp_path: Path) -> None:
    """The Job's command applies the file, and a second run changes nothing."""
    file = tmp_path / "registry.toml"
    file.write_text(get_resource(render_release("production"), "ConfigMap", "-registry")["data"]["registry.toml"])
    shell.environ["MAIN_USER_KEY"] = "key-of-main"
    command, _, _, *options = job_container()["args"]
    assert "Applied" in (await shell.run(command, str(file), *options)).stdout
    assert "nothing to change" in (await shell.run(command, str(file), *options)).stdout
    result = await shell.get_admin("/registry")
    assert result["tenants"]["shop"]["max_active"] == 10
    assert result["accounts"]["main"]["max_price"]["upscale"] == 3


@pytest.mark.parametrize(("prune", "is_given"), [("true", True), ("false", False)])
def test_prune(prune: str, is_given: bool) -> None:
    (container,) = registry_job(f"registry.prune={prune}")["spec"]["template"]["spec"]["containers"]
    assert ("--prune" in container["args"]) is is_given
