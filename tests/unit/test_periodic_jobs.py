"""Rounds go on whatever happens, and do not fill the log with it."""

from __future__ import annotations

import asyncio

import pytest
from structlog.testing import capture_logs

from service.storage.redis import make_unavailable_error
from service.usecases import background


async def test_an_outage_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """However often the store is asked while it is away, rounds go on, and leave it to others to log that."""
    monkeypatch.setattr(background, "UNAVAILABLE_SECONDS", 0)
    monkeypatch.setattr(background, "IDLE_SECONDS", 0)
    answers = iter(["away", "away", "away", "here", "away", "away"])

    async def begin() -> bool:
        answer = next(answers, None)
        if answer is None:
            raise asyncio.CancelledError
        if answer == "away":
            raise make_unavailable_error()
        return False

    with capture_logs() as logs, pytest.raises(asyncio.CancelledError):
        await background.run_periodically("watch", begin)
    assert logs == []
