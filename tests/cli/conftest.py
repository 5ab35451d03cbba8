"""A command line whose `gateway` reaches a running gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from click.testing import CliRunner, Result

from service.cli import main
from service.crypto import Keyring, UserKeyCipher
from service.domain.tenants import Account
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, RunningGateway, run_real_gateway
from tests.support.valkey import Valkey

UNREACHABLE_URL = "http://127.0.0.1:1"


def run_command(
    *arguments: str, code: int = 0, stdin: str | bytes = "", env: Mapping[str, str] | None = None
) -> Result:
    """Run `gateway`; it must end with this exit code and without a traceback."""
    result = CliRunner().invoke(main, arguments, input=stdin, env=dict(env or {}))
    assert result.exit_code == code, (arguments, result.output)
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


@dataclass
class Shell:
    """Runs commands against a gateway with the account `main` and the tenant `shop`."""

    gateway: RunningGateway
    environ: dict[str, str]

    async def run(self, *arguments: str, code: int = 0, stdin: str | bytes = "") -> Result:
        # In a thread, since the gateway it asks is served by this one's event loop.
        return await asyncio.to_thread(run_command, *arguments, code=code, stdin=stdin, env=self.environ)

    async def run_table(self, *arguments: str, stdin: str = "") -> list[list[str]]:
        """Run a command that prints a table; return the cells of each line."""
        printed = (await self.run(*arguments, stdin=stdin)).stdout
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]

    async def run_record(self, *arguments: str) -> dict[str, str]:
        """Run a command that prints a record; return its values by name."""
        return dict(await self.run_table(*arguments))

    async def run_json(self, *arguments: str) -> Any:
        return json.loads((await self.run(*arguments, "--json")).stdout)

    async def get_admin(self, path: str) -> Any:
        return (await self.gateway.call_admin("GET", path)).json()

    async def is_accepted(self, token: str | None = None) -> bool:
        return (await self.gateway.call("GET", "/v1/quota", token=token)).status_code == 200

    def stored_user_key(self, name: str) -> str | None:
        """Return the decrypted user_key of an account."""
        account = self.gateway.services.registry.current.accounts[name]
        key = self.user_key_cipher(SECRET_KEY).decrypt(account)
        return None if key is None else key.decode()

    @property
    def upstream_url(self) -> str:
        return self.gateway.services.registry_admin.user_key_cipher.origin(Account(0, "", b""))

    def user_key_cipher(self, secret_key: bytes) -> UserKeyCipher:
        return UserKeyCipher(Keyring([secret_key]), self.upstream_url)


@asynccontextmanager
async def run_shell(valkey: Valkey, **settings: str) -> AsyncIterator[Shell]:
    # What the gateway logs would else be mixed into what the command prints: they share a process here.
    with structlog.testing.capture_logs():
        async with run_real_gateway(valkey, None, **settings) as gateway:
            port = str(urlsplit(gateway.ops_url).port)
            yield Shell(gateway, {"GATEWAY_OPS_PORT": port, "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN})


@pytest.fixture
async def shell(valkey: Valkey) -> AsyncIterator[Shell]:
    async with run_shell(valkey) as running:
        yield running
