"""What a process has just now: asked for when somebody scrapes, and never kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from enum import Enum

from msgspec import Struct
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class Family(Struct, frozen=True):
    """A gauge: its name, its text of help, and its labels."""

    name: str
    text: str
    labels: tuple[str, ...] = ()


class Level(Enum):
    """The gauges of one process."""

    IN_PROGRESS = Family("gateway_http_requests_in_progress", "Requests under way, by port.", ("port",))
    WAITING = Family("gateway_waiting_clients", "Clients that wait for a task or follow one.")
    UPLOADS = Family("gateway_upload_bytes", "Bytes of uploads that are held in memory.")
    UPLOADS_LIMIT = Family("gateway_upload_limit_bytes", "How many bytes of uploads may be held in memory.")
    CONNECTIONS = Family(
        "gateway_upstream_connections",
        "Connections to the upstream, by operation and state (busy, or idle to be used again).",
        ("operation", "state"),
    )
    CONNECTIONS_LIMIT = Family(
        "gateway_upstream_connections_limit", "How many connections may be busy at once, by operation.", ("operation",)
    )
    CONNECTIONS_WAITING = Family(
        "gateway_upstream_waiting", "Requests to the upstream that wait for their turn, by operation.", ("operation",)
    )
    BREAKER = Family(
        "gateway_upstream_breaker_open",
        "1 while requests to an upstream are given up at once, since it could not be reached; by base address.",
        ("upstream",),
    )
    SETTLEMENTS = Family("gateway_settlements_waiting", "Outcomes of submissions that are still to be booked.")
    CHECKS = Family("gateway_watch_checks_in_progress", "Checks of tasks that are under way.")
    CHECKS_LIMIT = Family("gateway_watch_checks_limit", "How many checks may be under way at once.")


Read = Callable[[], Mapping[tuple[str, ...], float]]
"""Tells the values of a gauge now, by the values of its labels."""


class Levels(Collector):
    """Shows each gauge as those tell it who know; one that nobody told about is not there."""

    def __init__(self) -> None:
        self._reads: dict[Level, list[Read]] = {}

    def tell(self, level: Level, read: Read) -> None:
        """Ask `read` for values of a gauge at every scrape, from whichever thread."""
        self._reads.setdefault(level, []).append(read)

    def describe(self) -> Iterable[GaugeMetricFamily]:
        """All gauges, without values."""
        return [_family(level) for level in Level]

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """All gauges that somebody knows of."""
        for level, reads in self._reads.items():
            family = _family(level)
            for read in reads:
                for labels, value in read().items():
                    family.add_metric(labels, value)
            yield family


def _family(level: Level) -> GaugeMetricFamily:
    return GaugeMetricFamily(level.value.name, level.value.text, labels=level.value.labels)
