"""Every metric of the gateway, in the words of those who report to it.

Label values come from enums, from the templates of routes and from the names of policies, never from what a client
sent, so that their number is bounded. Durations are in seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from enum import Enum, StrEnum
from platform import python_version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from service import __version__
from service.domain.task import Basis, Cost, Kind, State
from service.domain.tenancy import Window
from service.domain.webhook import DeliveryState
from service.domain.windows import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, policy_name

OTHER = "other"
"""Stands for a method or a policy that is not known."""
UNMATCHED = "unmatched"
"""Stands for the route of a request that fits none."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_POLICIES = (
    *(policy_name(window, counted) for window in Window for counted in (COUNTED_TASKS, COUNTED_MONEY)),
    MAX_ACTIVE,
)
_REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_HELD_SECONDS = (1.0, 5.0, 15.0, 30.0, 60.0, 300.0, 600.0)
_UPSTREAM_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Port(StrEnum):
    """Whom a port serves."""

    TENANTS = "tenants"
    OPERATORS = "operators"


def _values(enum: type[Enum]) -> str:
    return ", ".join(str(each.value) for each in enum)


class Metrics:
    """The metrics of one process, on a registry of its own."""

    def __init__(self, registry: CollectorRegistry, *, version: str = __version__) -> None:
        self.registry = registry
        self._requests = Counter(
            "gateway_http_requests",
            f"Requests answered, by port ({_values(Port)}), method, template of the route and status;"
            " 499 if the client left before its answer.",
            ("port", "method", "route", "status"),
            registry=registry,
        )
        self._request_seconds = Histogram(
            "gateway_http_request_duration_seconds",
            "How long requests took that were not held open, by port, method and template of the route.",
            ("port", "method", "route"),
            buckets=_REQUEST_SECONDS,
            registry=registry,
        )
        self._held_seconds = Histogram(
            "gateway_http_held_duration_seconds",
            "How long requests were held open, as streams or to wait for the end of a task, by port, method and"
            " template of the route.",
            ("port", "method", "route"),
            buckets=_HELD_SECONDS,
            registry=registry,
        )
        self._waiting = Gauge(
            "gateway_waiting_clients", "Clients that wait for a task or follow one.", registry=registry
        )
        self._in_progress = Gauge(
            "gateway_http_requests_in_progress",
            f"Requests under way, by port ({_values(Port)}).",
            ("port",),
            registry=registry,
        )
        self._upstream = Counter(
            "gateway_upstream_requests",
            "Requests to the upstream, by operation and outcome.",
            ("operation", "outcome"),
            registry=registry,
        )
        self._upstream_seconds = Histogram(
            "gateway_upstream_request_duration_seconds",
            "How long requests to the upstream took, by operation and outcome.",
            ("operation", "outcome"),
            buckets=_UPSTREAM_SECONDS,
            registry=registry,
        )
        self._submissions = Counter(
            "gateway_submissions",
            f"Submissions that were sent or should have been, by kind ({_values(Kind)}) and outcome.",
            ("kind", "outcome"),
            registry=registry,
        )
        self._denied = Counter(
            "gateway_quota_denials",
            f"Submissions refused, by the policy that refused ({', '.join(_POLICIES)}).",
            ("policy",),
            registry=registry,
        )
        self._finished = Counter(
            "gateway_tasks_finished",
            f"Tasks that ended, by kind ({_values(Kind)}) and state.",
            ("kind", "state"),
            registry=registry,
        )
        self._spent_count = Counter(
            "gateway_spent_count",
            f"Prepaid uses that ended tasks took, by kind ({_values(Kind)}) and how that is known ({_values(Basis)}).",
            ("kind", "basis"),
            registry=registry,
        )
        self._spent_money = Counter(
            "gateway_spent_yuan",
            f"Money that ended tasks took, by kind ({_values(Kind)}) and how that is known ({_values(Basis)}).",
            ("kind", "basis"),
            registry=registry,
        )
        self._replays = Counter(
            "gateway_idempotent_replays",
            "Submissions that were answered with what an earlier one under the same key became.",
            registry=registry,
        )
        self._checks = Counter(
            "gateway_watch_checks",
            "Checks of tasks at the upstream, by what was answered.",
            ("answer",),
            registry=registry,
        )
        self._deliveries = Counter(
            "gateway_webhook_attempts",
            f"Attempts to tell of the end of a task, by where its delivery stands then ({_values(DeliveryState)}).",
            ("state",),
            registry=registry,
        )
        build = Gauge("gateway_build_info", "What runs; always 1.", ("version", "python"), registry=registry)
        build.labels(version, python_version()).set(1)
        # What is known beforehand begins at zero: an alert on an increase would miss the first event otherwise.
        self._policies = {policy: self._denied.labels(policy) for policy in (*_POLICIES, OTHER)}
        self._ports = {port: self._in_progress.labels(port.value) for port in Port}
        for each in DeliveryState:
            self._deliveries.labels(each.value)
        for kind in Kind:
            for state in State:
                if state.ended:
                    self._finished.labels(kind.value, state.value)
            for basis in Basis:
                self._spent_count.labels(kind.value, basis.value)
                self._spent_money.labels(kind.value, basis.value)
        # Looking a child up by its labels costs more than counting, and these two are counted for every request.
        self._request_children: dict[tuple[Port, str, str, int, bool], tuple[Counter, Histogram]] = {}

    def in_progress(self, port: Port) -> AbstractContextManager[None]:
        """Count a request as under way within the block."""
        return self._ports[port].track_inprogress()

    def waiting(self, count: Callable[[], int]) -> None:
        """Have `count` say how many clients wait, whenever somebody asks."""
        self._waiting.set_function(count)

    def request(self, port: Port, method: str, route: str, status: int, seconds: float, *, held: bool = False) -> None:
        """A request ended; `route` is the template of its route, or UNMATCHED; it was `held` open on purpose or not."""
        key = port, method if method in _METHODS else OTHER, route, status, held
        children = self._request_children.get(key)
        if children is None:
            children = self._request_children[key] = (
                self._requests.labels(port.value, key[1], route, str(status)),
                (self._held_seconds if held else self._request_seconds).labels(port.value, key[1], route),
            )
        children[0].inc()
        children[1].observe(seconds)

    def upstream(self, operation: StrEnum, outcome: StrEnum, seconds: float) -> None:
        """A request to the upstream ended, in whatever way."""
        self._upstream.labels(operation.value, outcome.value).inc()
        self._upstream_seconds.labels(operation.value, outcome.value).observe(seconds)

    def submission(self, kind: Kind, outcome: StrEnum) -> None:
        """A submission that had its place was sent, or could not be."""
        self._submissions.labels(kind.value, outcome.value).inc()

    def denied(self, policy: str) -> None:
        """A policy of a tenant refused a submission."""
        self._policies.get(policy, self._policies[OTHER]).inc()

    def finished(self, kind: Kind, state: State, cost: Cost) -> None:
        """A task ended, and took what its receipt says."""
        self._finished.labels(kind.value, state.value).inc()
        self._spent_count.labels(kind.value, cost.basis.value).inc(cost.count)
        self._spent_money.labels(kind.value, cost.basis.value).inc(cost.money / 100)

    def replayed(self) -> None:
        """A submission was answered with what an earlier one under the same idempotency key became."""
        self._replays.inc()

    def checked(self, answered: StrEnum) -> None:
        """The watch asked the upstream about a task."""
        self._checks.labels(answered.value).inc()

    def delivered(self, state: DeliveryState) -> None:
        """An attempt to tell a tenant of the end of a task left its delivery in a state."""
        self._deliveries.labels(state.value).inc()

    def render(self) -> tuple[bytes, str]:
        """Everything on the registry, in Prometheus' text format, and the content type of that."""
        return generate_latest(self.registry), CONTENT_TYPE_PLAIN_0_0_4
