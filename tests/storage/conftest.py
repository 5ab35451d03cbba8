"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.storage.seeded_store import SeededStore, open_seeded_store
from tests.support.valkey import Valkey


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[SeededStore]:
    """Yield a store with a tenant and two accounts."""
    async with open_seeded_store(valkey.url) as seeded:
        yield seeded
