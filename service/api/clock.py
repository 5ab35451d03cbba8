"""The operators' call for the ledger's time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from litestar import Request, post
from litestar.handlers import HTTPRouteHandler
from msgspec import Meta, Struct

from service.api import openapi
from service.usecases.admin import Operators


class ClockResetView(Struct, frozen=True):
    """What a reset of the ledger's time changed."""

    offset_seconds: Annotated[
        float, Meta(ge=0, description="How far the ledger's time was ahead of the clock of Redis.")
    ]


def clock_routes(operators: Operators) -> Sequence[HTTPRouteHandler]:
    """The handler under `/admin/v1/clock`."""

    @post(
        "/clock/reset",
        operation_id="reset-clock",
        summary="Set the ledger's time back to the clock of Redis",
        description=(
            "After the clock of Redis has stepped back, the ledger's time is ahead of it until it has made that good, "
            "ten times as slowly. This ends that at once: the offset becomes 0, and leases, checks, deliveries and "
            "probes become due earlier by as much."
        ),
        response_description="How far it was ahead",
        responses=openapi.problems(401, "ledger-unavailable"),
        status_code=200,
    )
    async def reset(request: Request[Any, Any, Any]) -> ClockResetView:
        address = request.client.host if request.client else "unknown"
        return ClockResetView(await operators.reset_clock(f"operator at {address}") / 1000)

    return [reset]
