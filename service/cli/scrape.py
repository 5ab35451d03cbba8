"""Reading the metrics of a gateway again and again, and how much they changed."""

from __future__ import annotations

import os
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping

import httpx2
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from service.client import Problem, single_line

WINDOW_SECONDS = 60.0
"""The time over which changes are kept."""
START = "process_start_time_seconds"
BUILD = "gateway_build_info"
_COUNTERS = (
    "gateway_http_requests_total",
    "gateway_poll_lag_seconds_sum",
    "gateway_poll_lag_seconds_count",
    "gateway_quota_denials_total",
    "gateway_balance_denials_total",
)
_GAUGES = (
    START,
    BUILD,
    "gateway_account_",
    "gateway_http_requests_in_progress",
    "gateway_poll_overdue_seconds",
    "gateway_poll_tasks",
    "gateway_quota_",
    "gateway_redis_up",
    "gateway_tasks_active",
    "gateway_upload_",
    "gateway_upstream_connections",
)
Labels = tuple[tuple[str, str], ...]
Metrics = Mapping[str, Mapping[Labels, float]]
"""Values by name and labels."""


class FetchError(Exception):
    """A response that did not come, or is no success; the text says why."""


async def fetch(http: httpx2.AsyncClient, url: str, headers: Mapping[str, str]) -> bytes:
    """Raises FetchError."""
    try:
        response = await http.get(url, headers=headers)
    except httpx2.RequestError as error:
        raise FetchError(_describe_cause(error)) from None
    if response.is_success:
        return response.content
    try:
        title = single_line(msgspec.json.decode(response.content, type=Problem).title)
    except msgspec.DecodeError:
        title = "no gateway of this version"
    raise FetchError(f"HTTP {response.status_code}: {title}")


def _describe_cause(error: BaseException) -> str:
    """Return the text of the first cause, such as `Connection refused`: the client's own is the same for all."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)  # the text of asyncio repeats the address
    return single_line(str(error)) or type(error).__name__


def select(metrics: Metrics, name: str, **labels: str) -> Iterator[tuple[Mapping[str, str], float]]:
    """Yield the labels and value of each series of a metric with these labels."""
    for pairs, value in metrics.get(name, {}).items():
        own = dict(pairs)
        if labels.items() <= own.items():
            yield own, value


def total(metrics: Metrics, name: str, **labels: str) -> float:
    return sum(value for _, value in select(metrics, name, **labels))


def parse_metrics(text: str) -> Metrics:
    """Return the metrics that are shown. Raises ValueError if the text has none of a gateway."""
    metrics: defaultdict[str, dict[Labels, float]] = defaultdict(dict)
    names = (*_COUNTERS, *_GAUGES)  # parsing the others would take most of the time
    lines = "".join(f"{line}\n" for line in text.splitlines() if line.startswith(names))
    for family in text_string_to_metric_families(lines):
        for sample in family.samples:
            metrics[sample.name][tuple(sorted(sample.labels.items()))] = sample.value
    if BUILD not in metrics:
        raise ValueError("no metrics of a gateway")
    return dict(metrics)


class Target:
    """A gateway, which may be away or restart meanwhile. `metrics` are the last ones that were read."""

    def __init__(self, url: str, http: httpx2.AsyncClient, metrics_token: str | None) -> None:
        self.url = url
        self.metrics: Metrics = {}
        self.read_at = 0.0
        """In seconds of a monotonic clock."""
        self.error: str | None = "not read yet"
        """Why the last read failed."""
        self._http = http
        self._headers = {"Authorization": f"Bearer {metrics_token}"} if metrics_token else {}
        self._changes: deque[tuple[float, float, Metrics]] = deque()
        """The time of each read, the seconds since the one before, and the increase of the counters."""

    async def refresh(self) -> None:
        try:
            metrics = parse_metrics((await fetch(self._http, f"{self.url}/metrics", self._headers)).decode())
        except (FetchError, ValueError) as error:
            self.error = str(error)
            return
        now = time.monotonic()
        if self.metrics:
            self._changes.append((now, now - self.read_at, _increase(self.metrics, metrics)))
        while self._changes and self._changes[0][0] < now - WINDOW_SECONDS:
            self._changes.popleft()
        self.metrics, self.read_at, self.error = metrics, now, None

    def last_rates(self, name: str, **labels: str) -> list[tuple[Mapping[str, str], float]] | None:
        """Return the increase per second of each series since the read before, or None if this is the first one."""
        if not self._changes:
            return None
        _, seconds, changes = self._changes[-1]
        return [(own, value / seconds) for own, value in select(changes, name, **labels)]

    def mean_rates(self, name: str) -> list[tuple[Mapping[str, str], float]]:
        """Return the mean increase per second of each series within the window."""
        sums: defaultdict[Labels, float] = defaultdict(float)
        seconds = sum(seconds for _, seconds, _ in self._changes)
        for _, _, changes in self._changes:
            for labels, value in changes.get(name, {}).items():
                sums[labels] += value
        return [(dict(labels), value / seconds) for labels, value in sums.items()]


def _increase(before: Metrics, after: Metrics) -> Metrics:
    """Return the increase of each counter. Those of a process that started meanwhile began at 0."""
    former = before if total(before, START) == total(after, START) else {}
    return {
        name: {labels: value - former.get(name, {}).get(labels, 0.0) for labels, value in after.get(name, {}).items()}
        for name in _COUNTERS
    }
