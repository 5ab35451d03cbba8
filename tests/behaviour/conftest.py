"""The same behaviour is expected of the gateway over the ports in memory and over the real things."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.behaviour.house import House, house_of_fakes, real_house
from tests.support.valkey import Valkey


@pytest.fixture(params=["fakes", "real"])
async def house(request: pytest.FixtureRequest, valkey: Valkey) -> AsyncIterator[House]:
    """A gateway, twice: with everything behind it in memory, and with a real Valkey and the sandbox."""
    if request.param == "fakes":
        async with house_of_fakes() as (found, _, _):
            yield found
    else:
        async with real_house(valkey) as found:
            yield found
