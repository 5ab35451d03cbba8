"""Run the contract tests on uvloop, the event loop of production."""

from __future__ import annotations

from asyncio import AbstractEventLoop
from collections.abc import Callable, Mapping

import pytest
import uvloop

from service.clients import artifacts


@pytest.fixture
def public_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the results of tests be at public addresses, which those of loopback stand for."""
    monkeypatch.setattr(artifacts, "is_public", lambda _: True)


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> Mapping[str, Callable[[], AbstractEventLoop]]:
    del config, item
    return {"uvloop": uvloop.new_event_loop}
