"""Periodic jobs."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from service.domain.errors import LedgerUnavailable
from service.usecases import background


async def test_job_survives_an_outage_without_logging_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "UNAVAILABLE_SECONDS", 0)
    monkeypatch.setattr(background, "IDLE_SECONDS", 0)
    states = iter(["away", "away", "away", "here", "away", "away"])

    async def begin() -> bool:
        state = next(states, None)
        if state is None:
            raise asyncio.CancelledError
        if state == "away":
            raise LedgerUnavailable("away")
        return False

    with capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        await background.run_periodically("watch", begin)
    assert logs == []
