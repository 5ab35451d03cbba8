"""The Job that makes the registry what a file says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.cli.conftest import Shell, shell
from tests.deploy.kubernetes.release import get_resource, pod_environment, render_release, resources_of_kind

__all__ = ["shell"]


def registry_job(*settings: str) -> Any:
    """The Job of the example that has one."""
    return get_resource(render_release("production", *settings), "Job", "-registry")


def job_container() -> Any:
    """What runs in it."""
    (found,) = registry_job()["spec"]["template"]["spec"]["containers"]
    return found


def test_after_every_change() -> None:
    """The Job runs when a release was installed or changed, in the place of the one before."""
    assert registry_job()["metadata"]["annotations"] == {
        "helm.sh/hook": "post-install,post-upgrade",
        "helm.sh/hook-delete-policy": "before-hook-creation",
    }


def test_it_asks_the_operators(tmp_path: Path) -> None:
    """It asks the operators' Service by its name and port, and has no secret but their token."""
    service = get_resource(render_release("production"), "Service", "-operators")
    (port,) = service["spec"]["ports"]
    assert f"--url=http://{service['metadata']['name']}:{port['port']}" in job_container()["args"]
    found = pod_environment(registry_job()["spec"]["template"], tmp_path, "")
    settings = Settings.load({name: text for name, text in found.items() if name.startswith("GATEWAY_")})
    assert settings.admin_token
    assert settings.redis_url is None
    assert settings.secret_keys == ()


def test_secrets_of_the_file() -> None:
    """The secrets that the file speaks of come from the Secrets that hold them."""
    (given,) = [each for each in job_container()["env"] if "valueFrom" in each]
    assert given["name"] == "MAIN_USER_KEY"
    assert given["valueFrom"] == {"secretKeyRef": {"name": "gateway-accounts", "key": "main"}}


def test_file_is_where_it_looks() -> None:
    """The file that the command names is that of the ConfigMap, which may be somebody else's."""
    args, spec = job_container()["args"], registry_job()["spec"]["template"]["spec"]
    (mount,) = [each for each in job_container()["volumeMounts"] if each["name"] == "registry"]
    (volume,) = [each for each in spec["volumes"] if each["name"] == "registry"]
    (item,) = volume["configMap"]["items"]
    assert args[:2] == ["apply", f"{mount['mountPath']}/{item['path']}"]
    assert item["key"] in get_resource(render_release("production"), "ConfigMap", "-registry")["data"]
    theirs = ('registry.toml=""', 'registry.existingConfigMap="theirs"')
    assert not [
        each
        for each in resources_of_kind(render_release("production", *theirs), "ConfigMap")
        if "registry" in str(each["data"])
    ]
    assert "{'name': 'theirs', 'items':" in str(registry_job(*theirs))


async def test_it_applies(shell: Shell, tmp_path: Path) -> None:
    """What the Job runs makes the registry of a gateway what the file says, and a second time finds nothing to do."""
    file = tmp_path / "registry.toml"
    file.write_text(get_resource(render_release("production"), "ConfigMap", "-registry")["data"]["registry.toml"])
    shell.environ["MAIN_USER_KEY"] = "key-of-main"
    command, _, _, *options = job_container()["args"]
    assert "Applied" in (await shell.run(command, str(file), *options)).stdout
    assert "nothing to change" in (await shell.run(command, str(file), *options)).stdout
    found = await shell.get_admin("/registry")
    assert found["tenants"]["shop"]["max_active"] == 10
    assert found["accounts"]["main"]["max_price"]["upscale"] == 3


@pytest.mark.parametrize(("prune", "given"), [("true", True), ("false", False)])
def test_prune(prune: str, given: bool) -> None:
    """What is not in the file is removed only if that is said."""
    (found,) = registry_job(f"registry.prune={prune}")["spec"]["template"]["spec"]["containers"]
    assert ("--prune" in found["args"]) is given
