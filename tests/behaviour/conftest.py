"""Fixtures of the behaviour tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.api import auth
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.support.valkey import Valkey


@pytest.fixture
async def gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway over a real Valkey and the sandbox."""
    async with run_real_gateway(valkey) as running_gateway:
        yield running_gateway


@pytest.fixture(autouse=True)
def respond_to_failures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Delay no response to a wrong token: some tests send many."""
    monkeypatch.setattr(auth, "DELAY_SECONDS", 0)
