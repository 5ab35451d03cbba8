"""A sandbox that works at once, and a caller of its API."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.sandbox.app import Balance, RunningSandbox, SandboxConfig, running
from tests.sandbox.caller import Caller, calling

ACCOUNTS = {"key": Balance(3, 10), "other": Balance(1, 0), "empty": Balance(0, 0)}


@pytest.fixture
async def sandbox() -> AsyncIterator[RunningSandbox]:
    async with running(SandboxConfig(accounts=ACCOUNTS, seconds=0)) as sandbox:
        yield sandbox


@pytest.fixture
async def caller(sandbox: RunningSandbox) -> AsyncIterator[Caller]:
    async with calling(sandbox.url) as caller:
        yield caller
