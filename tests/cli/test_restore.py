"""Restoring from a file after the store has lost data."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import structlog
from httpx2 import AsyncClient

from service.app import create_app, create_ops_app
from service.container import open_container
from service.sandbox.app import SandboxConfig, open_sandbox
from service.sandbox.store import AccountBalance
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import Keys
from tests.behaviour.audit import expect_problem
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, ENVIRONMENT, RunningGateway
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.behaviour.usage_requests import read_all_usage
from tests.cli.conftest import Shell
from tests.support.network import serve_app
from tests.support.valkey import Valkey

INITIAL_FILE = """
[accounts.main]
user_key = { env = "MAIN_USER_KEY" }

[tenants.shop]
accounts = ["main"]
limits = [{ window = "total", tasks = 10 }]
webhook = { url = "https://hooks.example/", secret = { file = "hook.secret" } }

[tenants.press]
accounts = ["main"]
"""


class Deployment:
    """A store, a sandbox and a folder with secrets, for successive gateway processes."""

    def __init__(self, valkey: Valkey, upstream: str, control: SandboxUpstreamControl, folder: Path) -> None:
        self._valkey = valkey
        self._upstream = upstream
        self._control = control
        self.file = folder / "registry.toml"
        (folder / "hook.secret").write_text("whsec_" + "c" * 40)

    @asynccontextmanager
    async def run_process(self) -> AsyncIterator[Shell]:
        """Run a process with no state but that of the store."""
        where = {"GATEWAY_REDIS_URL": self._valkey.url, "GATEWAY_UPSTREAM_URL": self._upstream}

        async def pass_time(_: float) -> None:
            raise AssertionError("time only passes by itself here")

        async with (
            open_container(Settings.load(ENVIRONMENT | where)) as services,
            serve_app(create_app(services)) as url,
            serve_app(create_ops_app(services)) as ops_url,
            AsyncClient(timeout=30, trust_env=False) as http,
        ):
            address = urlsplit(ops_url)
            yield Shell(
                RunningGateway(url, ops_url, http, services, self._control, pass_time),
                {
                    "GATEWAY_OPS_HOST": str(address.hostname),
                    "GATEWAY_OPS_PORT": str(address.port),
                    "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
                    "MAIN_USER_KEY": USER_KEY,
                },
            )

    async def delete_keys(self, *keys: str) -> None:
        """Delete some keys, or everything."""
        connections = connect(self._valkey.url, timeout=5)
        client: Any = connections.commands
        await (client.delete(*keys) if keys else client.flushall())
        await connections.aclose()

    async def apply_file(self, shell: Shell) -> str:
        """Apply the file; returns the output."""
        return (await shell.run("apply", str(self.file))).stdout


@asynccontextmanager
async def open_deployment(valkey: Valkey, folder: Path) -> AsyncIterator[Deployment]:
    """Open an empty deployment."""
    config = SandboxConfig(accounts={USER_KEY: AccountBalance(count=10, money=0)}, seconds=0)
    with structlog.testing.capture_logs():
        async with open_sandbox(config) as sandbox:
            deployment = Deployment(valkey, sandbox.url, SandboxUpstreamControl(sandbox.control), folder)
            await deployment.delete_keys()
            yield deployment


async def create_tenants(deployment: Deployment, shell: Shell) -> dict[str, str]:
    """Create two tenants, one of them with a task, and export them to the file. Returns their tokens."""
    deployment.file.write_text(INITIAL_FILE)
    await deployment.apply_file(shell)
    tokens = {name: (await shell.run("token", "create", name)).stdout.strip() for name in ("shop", "press")}
    deployment.file.write_text((await shell.run("export")).stdout)
    return tokens


async def test_everything_lost(valkey: Valkey, tmp_path: Path) -> None:
    """The file restores tokens and the ownership of tasks; usage is counted per tenant again."""
    async with open_deployment(valkey, tmp_path) as deployment:
        async with deployment.run_process() as shell:
            tokens = await create_tenants(deployment, shell)
            task = (await shell.gateway.submit(token=tokens["shop"])).json()
            await shell.gateway.upstream.wait_until_idle()
        await deployment.delete_keys()
        async with deployment.run_process() as shell:
            expect_problem(await shell.gateway.call("GET", "/v1/quota", token=tokens["shop"]), 401, "unauthenticated")
            assert "Applied" in await deployment.apply_file(shell)
            assert (await shell.run("export")).stdout == deployment.file.read_text()
            read = await shell.gateway.call("GET", task["links"]["self"], token=tokens["shop"])
            assert (read.status_code, read.json()["state"]) == (200, "succeeded")
            foreign = await shell.gateway.call("GET", task["links"]["self"], token=tokens["press"])
            expect_problem(foreign, 404, "not-found")
            for _ in range(3):
                assert (await shell.gateway.submit(token=tokens["press"])).status_code == 201
            assert (await shell.gateway.submit(token=tokens["shop"])).status_code == 201
            spent = (await read_all_usage(shell.gateway, "interval=total&group_by=tenant"))["items"]
            assert {item["tenant"]: item["charged"]["tasks"] for item in spent} == {"shop": 2, "press": 3}, (
                "of shop the task that was read counts again, and the one since"
            )
            created = await shell.gateway.call_admin("PUT", "/tenants/late", json={"accounts": ["main"]})
            assert created.status_code == 200
            known = shell.gateway.services.registry.current
            assert known.tenants["late"].id > max(known.tenants["shop"].id, known.tenants["press"].id)


async def test_registry_lost(valkey: Valkey, tmp_path: Path) -> None:
    """Usage and limits continue under the same tenants when only the registry was lost."""
    async with open_deployment(valkey, tmp_path) as deployment:
        async with deployment.run_process() as shell:
            tokens = await create_tenants(deployment, shell)
            await shell.gateway.submit(token=tokens["shop"])
            spent = await read_all_usage(shell.gateway)
            left = (await shell.gateway.call("GET", "/v1/quota", token=tokens["shop"])).json()
        await deployment.delete_keys(Keys("gw").registry)
        async with deployment.run_process() as shell:
            await deployment.apply_file(shell)
            assert await read_all_usage(shell.gateway) == spent
            assert [item["tenant"] for item in spent["items"]] == ["shop"]
            assert (await shell.gateway.call("GET", "/v1/quota", token=tokens["shop"])).json() == left
            assert "nothing to change" in await deployment.apply_file(shell)
