"""Fixtures of the behaviour tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.behaviour.gateway_fixture import RunningGateway, run_fake_gateway, run_real_gateway
from tests.support.valkey import Valkey


@pytest.fixture(params=["fakes", "real"])
async def gateway(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[RunningGateway]:
    """Run a gateway twice: over in-memory ports, and over a real Valkey and the sandbox."""
    if request.param == "fakes":
        async with run_fake_gateway() as (running_gateway, _, _):
            yield running_gateway
    else:
        async with run_real_gateway(valkey) as running_gateway:
            yield running_gateway
