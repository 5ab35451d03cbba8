"""One plant with its Prometheus, on which there was traffic of every sort, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.monitoring import plant, server, traffic

SERIES = pytest.StashKey[list[int]]()


class MonitoredSystem(NamedTuple):
    """What runs, and who looked on."""

    gateway: plant.MonitoredGateway
    prometheus: server.Prometheus


@pytest.fixture(scope="session")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredSystem]:
    """Both, after everything has happened and was seen."""
    folder = tmp_path_factory.mktemp("monitoring")
    with (
        plant.run_monitored_gateway(folder) as site,
        server.run_prometheus(folder / "prometheus", site.targets) as prometheus,
    ):
        traffic.create_tenants(site)
        prometheus.wait_for_scrape()  # an increase is seen only of what was seen before
        traffic.run_tasks(site)
        traffic.send_refused(site)
        traffic.inject_upstream_faults(site)
        traffic.spend_outside(site)
        traffic.deliver_webhooks(site)
        traffic.interrupt_store(site, lambda: prometheus.query_value("max(gateway_redis_up)") == 0)
        traffic.abandon_requests(site)
        traffic.exhaust_webhook_retries(site)
        prometheus.wait_for_rules()
        yield MonitoredSystem(site, prometheus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how much each process exports."""
    for series in config.stash.get(SERIES, []):
        terminalreporter.write_line(f"A scrape has {series} series.")
