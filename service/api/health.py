"""Routes for probes and metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum

from litestar import Response, get
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.types import Guard
from msgspec import Struct
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from service.api.compression import CompressionMiddleware
from service.api.openapi import UNREADABLE_REQUEST
from service.telemetry.exposition import format_exposition
from service.telemetry.metrics import Metrics
from service.usecases.background import run_in_turns
from service.usecases.ledger_snapshot import LedgerSnapshot


class Health(StrEnum):
    """Readiness of the process."""

    OK = "ok"
    STARTING = "starting"
    DRAINING = "draining"


class HealthReport(Struct, frozen=True):
    """Report of a probe."""

    status: Health


def health_routes(get_health: Callable[[], Health]) -> Sequence[HTTPRouteHandler]:
    # Neither probe touches Redis: reads work without it, so losing Redis must not take the process out of service.

    @get(
        "/healthz",
        summary="Check that the process is alive",
        description="Touches nothing else. If it does not respond, restart the process.",
        response_description="It is alive",
        responses=UNREADABLE_REQUEST,
    )
    async def healthz() -> HealthReport:
        return HealthReport(Health.OK)

    @get(
        "/readyz",
        summary="Check that the process accepts requests",
        description="Send it requests only if this is 200. An unreachable Redis does not change it: reads go on.",
        response_description="It accepts requests",
        responses=UNREADABLE_REQUEST
        | {503: ResponseSpec(HealthReport, description="It is starting or draining", generate_examples=False)},
    )
    async def readyz() -> Response[HealthReport]:
        status = get_health()
        return Response(HealthReport(status), status_code=200 if status is Health.OK else 503)

    return [healthz, readyz]


def metrics_route(metrics: Metrics, snapshot: LedgerSnapshot, guards: Sequence[Guard]) -> HTTPRouteHandler:
    @get("/metrics", include_in_schema=False, guards=guards, middleware=[CompressionMiddleware])
    async def scrape() -> Response[bytes]:
        await snapshot.refresh()
        parts = await run_in_turns(format_exposition(metrics.registry))
        return Response("".join(parts).encode(), media_type=CONTENT_TYPE_PLAIN_0_0_4.partition("; charset")[0])

    return scrape
