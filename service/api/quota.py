"""What the tenant may still spend."""

from __future__ import annotations

from collections.abc import Sequence

from litestar import Response, get
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler

from service.api import openapi
from service.api.views import PRIVATE, QuotaView, quota_view
from service.domain.tenants import Tenant
from service.usecases.reports import Quota


def quota_routes(quota: Quota) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/v1/quota`."""

    @get(
        "/quota",
        operation_id="read-quota",
        summary="Read your quota",
        description="All your policies, as they stand now, and whether the account behind them can pay.",
        response_description="Your policies",
        response_headers=openapi.headers("Cache-Control"),
        responses=openapi.problems(401, "ledger-unavailable"),
    )
    async def read(tenant: NamedDependency[Tenant]) -> Response[QuotaView]:
        return Response(quota_view(await quota.report(tenant)), headers=PRIVATE)

    return [read]
