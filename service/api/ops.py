"""What both ports answer about the process itself, and the metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from msgspec import Struct

from service.telemetry.metrics import Metrics
from service.usecases.board import Board
from service.usecases.ports import RegistryView


class Health(StrEnum):
    """Whether the process takes requests."""

    OK = "ok"
    STARTING = "starting"
    DRAINING = "draining"


class HealthReport(Struct, frozen=True):
    """How the process is."""

    status: Health


class Lifecycle:
    """Where the process stands between its start and its end."""

    def __init__(self, registry: RegistryView, board: Board) -> None:
        self._registry = registry
        self._board = board
        self._draining = False

    def drain(self) -> None:
        """From now on the process is not ready, so that no new requests come, and nobody waits for a task."""
        self._draining = True
        self._board.close()

    def health(self) -> Health:
        """Whether the process takes requests."""
        if self._draining:
            return Health.DRAINING
        return Health.OK if self._registry.ready else Health.STARTING


def health_routes(health: Callable[[], Health]) -> Sequence[HTTPRouteHandler]:
    """`/healthz` and `/readyz`.

    Neither touches Redis: reads go on without it, so a Redis that went away must not take the process out of service.
    """

    @get(
        "/healthz",
        operation_id="healthz",
        summary="Whether the process lives",
        response_description="It does",
    )
    async def healthz() -> HealthReport:
        return HealthReport(Health.OK)

    @get(
        "/readyz",
        operation_id="readyz",
        summary="Whether the process takes requests",
        response_description="It does",
        responses={503: ResponseSpec(HealthReport, description="It is starting or ending", generate_examples=False)},
    )
    async def readyz() -> Response[HealthReport]:
        found = health()
        return Response(HealthReport(found), status_code=200 if found is Health.OK else 503)

    return [healthz, readyz]


def metrics_route(metrics: Metrics) -> HTTPRouteHandler:
    """`/metrics`, for Prometheus."""

    @get("/metrics", operation_id="metrics", summary="Metrics for Prometheus", include_in_schema=False)
    async def scrape() -> Response[bytes]:
        body, media_type = metrics.render()
        return Response(body, media_type=media_type.partition("; charset")[0])

    return scrape
