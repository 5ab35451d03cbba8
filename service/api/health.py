"""Probes and metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from enum import StrEnum

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from msgspec import Struct

from service.telemetry.metrics import Metrics
from service.usecases.ledger_snapshot import LedgerSnapshot


class Health(StrEnum):
    """Whether the process takes requests."""

    OK = "ok"
    STARTING = "starting"
    DRAINING = "draining"


class HealthReport(Struct, frozen=True):
    """How the process is."""

    status: Health


def health_routes(get_health: Callable[[], Health]) -> Sequence[HTTPRouteHandler]:
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
        found = get_health()
        return Response(HealthReport(found), status_code=200 if found is Health.OK else 503)

    return [healthz, readyz]


def metrics_route(metrics: Metrics, snapshot: LedgerSnapshot) -> HTTPRouteHandler:
    """`/metrics`, for Prometheus. Writing it all out takes a while, and is done where no request waits for it."""

    @get("/metrics", operation_id="metrics", summary="Metrics for Prometheus", include_in_schema=False)
    async def scrape() -> Response[bytes]:
        await snapshot.refresh()
        body, media_type = await asyncio.to_thread(metrics.render)
        return Response(body, media_type=media_type.partition("; charset")[0])

    return scrape
