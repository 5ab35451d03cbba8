"""Three gateways, for the tests that kill none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos.process_cluster import ProcessCluster, run_cluster


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessCluster]:
    with run_cluster(tmp_path_factory.mktemp("cluster"), 3) as running:
        yield running


@pytest.fixture
def cluster(shared_cluster: ProcessCluster) -> ProcessCluster:
    """Return them at noon, with an upstream that answers at once."""
    shared_cluster.upstream.set_faults()
    shared_cluster.set_clock_to_noon()
    return shared_cluster
