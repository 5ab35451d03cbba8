"""Fixtures of the storage tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.storage.seeded_store import SeededStore, open_seeded_store
from tests.support.valkey import RunningStore, Valkey, run_cluster, run_single, run_with_sentinel


@pytest.fixture
async def store(valkey: Valkey) -> AsyncIterator[SeededStore]:
    """Yield a store with a tenant and two accounts."""
    async with open_seeded_store(valkey.url) as seeded:
        yield seeded


@pytest.fixture(scope="session")
def single() -> Iterator[RunningStore]:
    with run_single() as running:
        yield running


@pytest.fixture(scope="session")
def sentinel() -> Iterator[RunningStore]:
    with run_with_sentinel() as running:
        yield running


@pytest.fixture(scope="session")
def cluster() -> Iterator[RunningStore]:
    with run_cluster() as running:
        yield running


@pytest.fixture(params=["single", "sentinel", "cluster"])
def topology(request: pytest.FixtureRequest) -> RunningStore:
    """Return an emptied store of each topology."""
    running = request.getfixturevalue(request.param)
    running.execute("FLUSHALL")
    assert isinstance(running, RunningStore)
    return running
