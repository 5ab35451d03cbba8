"""Fixtures of the use case tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from structlog.testing import capture_logs

from service.usecases import background, poller, settlement
from tests.support.valkey import Valkey
from tests.usecases.gateway_fixture import UseCases, open_use_cases


@pytest.fixture
async def gateway(valkey: Valkey, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[UseCases]:
    """Yield use cases whose background jobs pause for a moment only."""
    monkeypatch.setattr(settlement, "RETRY_SECONDS", (0,))
    for name in ("EXPIRY_INTERVAL_SECONDS", "BALANCE_REFRESH_SECONDS"):
        monkeypatch.setattr(poller, name, 0.001)
    for name in ("IDLE_SECONDS", "UNAVAILABLE_SECONDS"):
        monkeypatch.setattr(background, name, 0.001)
    with capture_logs():  # to print tracebacks takes seconds
        async with open_use_cases(valkey) as use_cases:
            yield use_cases
