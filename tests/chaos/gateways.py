"""The gateways of a run: processes that are killed, stopped, terminated and started again on the same ports."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from service.crypto import generate_secret_key
from service.devstack import with_parent_death_signal
from tests.process.gateway import gateway_command
from tests.support.network import reserve_port

ROLES = ("api", "all", "worker")
START_SECONDS = 60.0
STOP_SECONDS = 100.0
"""A submission that hangs when the signal comes may take this long."""


@dataclass(eq=False)
class Gateway:
    """A gateway of one role; `process` is replaced when it is started again."""

    role: str
    folder: Path
    environ: dict[str, str]
    process: Process | None = None
    is_stopped: bool = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environ['GATEWAY_PORT']}"

    @property
    def ops_url(self) -> str:
        return f"http://127.0.0.1:{self.environ['GATEWAY_OPS_PORT']}"

    @property
    def serves(self) -> bool:
        """Return whether it has a tenants' port and runs."""
        return self.role != "worker" and not self.is_stopped and self.process is not None

    async def start(self) -> None:
        """Start and wait until it is ready."""
        self.is_stopped = False
        with (self.folder / f"{self.role}.log").open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *with_parent_death_signal(gateway_command("serve")),
                env=self.environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        async with asyncio.timeout(START_SECONDS), httpx2.AsyncClient(trust_env=False) as client:
            while not await self._is_ready(client):
                if self.process.returncode is not None:
                    raise AssertionError(f"the gateway ended with {self.process.returncode}: see {log.name}")
                await asyncio.sleep(0.1)

    async def _is_ready(self, client: httpx2.AsyncClient) -> bool:
        try:
            return (await client.get(f"{self.ops_url}/readyz")).status_code == httpx2.codes.OK
        except httpx2.TransportError:
            return False

    def send_signal(self, number: signal.Signals) -> None:
        if self.process is None or self.process.returncode is not None:
            raise AssertionError(f"the gateway {self.role} has ended by itself")
        self.is_stopped = number == signal.SIGSTOP
        self.process.send_signal(number)

    async def end(self, number: signal.Signals) -> int:
        """End it by a signal; return its exit code."""
        self.send_signal(number)
        self.is_stopped = True
        assert self.process
        async with asyncio.timeout(STOP_SECONDS):
            code = await self.process.wait()
        self.process = None
        return code


@dataclass
class Gateways:
    """All gateways of a run on one store, with the operators' API of the first that runs."""

    members: list[Gateway]
    client: httpx2.AsyncClient
    admin_token: str

    async def call_admin(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """Send a request to the operators' API, again until a gateway answers with another status than 503."""
        headers = {"Authorization": f"Bearer {self.admin_token}"}
        async with asyncio.timeout(START_SECONDS):
            while True:
                for gateway in self.members:
                    if not gateway.serves:
                        continue
                    try:
                        response = await self.client.request(
                            method, f"{gateway.ops_url}/admin/v1{path}", headers=headers, **more
                        )
                    except httpx2.TransportError:
                        continue
                    if response.status_code != httpx2.codes.SERVICE_UNAVAILABLE:
                        return response
                await asyncio.sleep(0.2)

    async def read_admin(self, path: str) -> Any:
        response = await self.call_admin("GET", path)
        assert response.is_success, response.text
        return response.json()


@asynccontextmanager
async def run_gateways(folder: Path, settings: Mapping[str, str]) -> AsyncIterator[Gateways]:
    """Run one gateway of each role; kill those that still run in the end."""
    token = secrets.token_hex(20)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    environ |= {
        "GATEWAY_ADMIN_TOKEN": token,
        "GATEWAY_SECRET_KEYS": generate_secret_key(),
        "GATEWAY_POLL_SECONDS": "0.5",
        "GATEWAY_READS_PER_SECOND": "0",
        "GATEWAY_TENANT_SHARE": "1",
        **settings,
    }
    members = []
    for role in ROLES:
        (folder / role).mkdir()
        ports = {"GATEWAY_PORT": str(reserve_port()), "GATEWAY_OPS_PORT": str(reserve_port())}
        own = {"GATEWAY_ROLE": role, "GATEWAY_DATA_DIR": str(folder / role)}
        members.append(Gateway(role, folder, environ | ports | own))
    async with httpx2.AsyncClient(
        trust_env=False, timeout=20, limits=httpx2.Limits(max_keepalive_connections=0)
    ) as client:
        try:
            await asyncio.gather(*(member.start() for member in members))
            yield Gateways(members, client, token)
        finally:
            for member in members:
                if member.process and member.process.returncode is None:
                    member.process.kill()
                    await member.process.wait()
