"""Plugins and settings of all tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = ["tests.support.no_skips", "tests.support.valkey"]

# The duration of an example depends on the machine.
settings.register_profile("short", deadline=None, max_examples=20, stateful_step_count=20)
settings.register_profile("long", deadline=None, max_examples=100, stateful_step_count=40)
settings.load_profile("short")

_SLOW_FOLDERS = {"chaos", "deploy", "monitoring", "process"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark whole folders: what `make test` leaves to `make test-all`, and what `make test-fast` runs."""
    for item in items:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        if folder in _SLOW_FOLDERS:
            item.add_marker("slow")
        elif folder == "unit":
            item.add_marker("smoke")
