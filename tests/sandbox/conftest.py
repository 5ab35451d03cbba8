"""A sandbox whose tasks take no time, and a client."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.store import AccountBalance
from tests.sandbox.client import SandboxClient, open_client

ACCOUNTS = {"key": AccountBalance(3, 10), "other": AccountBalance(1, 0), "empty": AccountBalance(0, 0)}


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    async with open_sandbox(SandboxConfig(accounts=ACCOUNTS, seconds=0)) as sandbox:
        yield sandbox


@pytest.fixture
async def client(sandbox: RunningSandbox) -> AsyncIterator[SandboxClient]:
    async with open_client(sandbox.url) as client:
        yield client
