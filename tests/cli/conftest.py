"""A command line whose `gateway` reaches a running gateway."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest
import structlog
from click.testing import CliRunner, Result

from service.cli import main
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, RunningGateway, run_fake_gateway


@dataclass
class Shell:
    """Runs commands against a gateway with the account `main` and the tenant `shop`."""

    gateway: RunningGateway
    environ: dict[str, str] = field(default_factory=dict)

    async def run(self, *arguments: str, code: int = 0, stdin: str | bytes = "") -> Result:
        """Run `gateway`; it must end with this exit code and without a traceback."""
        # In a thread, since the gateway it asks is served by this one's event loop.
        result = await asyncio.to_thread(CliRunner().invoke, main, arguments, input=stdin, env=dict(self.environ))
        assert result.exit_code == code, result.output
        assert isinstance(result.exception, SystemExit | None), result.exception
        return result

    async def run_table(self, *arguments: str) -> list[list[str]]:
        """Run a command that prints a table; returns the cells of each line."""
        printed = (await self.run(*arguments)).stdout
        return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in printed.splitlines()]

    async def run_json(self, *arguments: str, stdin: str = "") -> Any:
        """Run a command with `--json`; returns the decoded output."""
        return json.loads((await self.run(*arguments, "--json", stdin=stdin)).stdout)

    async def get_admin(self, path: str) -> Any:
        """Return a resource of the operators' API."""
        return (await self.gateway.call_admin("GET", path)).json()


@pytest.fixture
async def shell() -> AsyncIterator[Shell]:
    """Yield a shell whose environment leads to a running gateway."""
    # What the gateway logs would else be mixed into what the command prints: they share a process here.
    with structlog.testing.capture_logs():
        async with run_fake_gateway() as (gateway, _, _):
            address = urlsplit(gateway.ops_url)
            yield Shell(
                gateway,
                {
                    "GATEWAY_OPS_HOST": str(address.hostname),
                    "GATEWAY_OPS_PORT": str(address.port),
                    "GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN,
                },
            )
