"""A monitored gateway with its Prometheus and a workload of every kind, shared by all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tests.monitoring import monitored_gateway, prometheus_server, workload

SERIES = pytest.StashKey[list[int]]()


class MonitoredSystem(NamedTuple):
    """The gateway and its Prometheus."""

    gateway: monitored_gateway.MonitoredGateway
    prometheus: prometheus_server.Prometheus


@pytest.fixture(scope="session")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonitoredSystem]:
    """Yield both after the workload has run and was scraped."""
    folder = tmp_path_factory.mktemp("monitoring")
    with (
        monitored_gateway.run_monitored_gateway(folder) as gateway,
        prometheus_server.run_prometheus(folder / "prometheus", gateway.targets) as prometheus,
    ):
        workload.create_tenants(gateway)
        prometheus.wait_for_scrape()  # an increase needs an earlier sample
        workload.run_tasks(gateway)
        workload.send_refused(gateway)
        workload.inject_upstream_faults(gateway)
        workload.spend_outside(gateway)
        workload.deliver_webhooks(gateway)
        workload.interrupt_store(gateway, lambda: prometheus.query_value("max(gateway_redis_up)") == 0)
        workload.abandon_requests(gateway)
        workload.exhaust_webhook_retries(gateway)
        prometheus.wait_for_rules()
        yield MonitoredSystem(gateway, prometheus)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the number of series of each process."""
    for series in config.stash.get(SERIES, []):
        terminalreporter.write_line(f"A scrape has {series} series.")
