"""One plant with its Prometheus, on which there was traffic of every sort, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.monitoring import plant, server, traffic

SERIES = pytest.StashKey[list[int]]()


class Seen(NamedTuple):
    """What runs, and who looked on."""

    plant: plant.Plant
    prometheus: server.Prometheus


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seen]:
    """Both, after everything has happened and was seen."""
    folder = tmp_path_factory.mktemp("monitoring")
    with plant.running(folder) as site, server.running(folder / "prometheus", site.targets) as prometheus:
        traffic.furnish(site)
        prometheus.scrape()  # an increase is seen only of what was seen before
        traffic.work(site)
        traffic.refuse(site)
        traffic.disappoint(site)
        traffic.leak(site)
        traffic.notify(site)
        traffic.lose_the_store(site, lambda: prometheus.value("max(gateway_ledger_up)") == 0)
        traffic.leave(site)
        traffic.give_up(site)
        prometheus.catch_up()
        yield Seen(site, prometheus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much each process exports."""
    for series in config.stash.get(SERIES, []):
        terminalreporter.write_line(f"A scrape has {series} series.")
