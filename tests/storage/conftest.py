"""What the tests of the storage share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.storage.store import Store, fresh
from tests.support.valkey import Valkey


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[Store]:
    """A store with a tenant and two accounts."""
    async with fresh(valkey) as found:
        yield found
