"""What was spent, for tenants and for operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from litestar import Request, Response, get
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import QueryParameter

from service.api import openapi, tabular
from service.api.queries import check_query, day, some_of
from service.api.usage_views import UsageView, usage_table, usage_view
from service.api.views import PRIVATE
from service.domain.tenants import Tenant
from service.usecases.reports import MOST_DAYS, Group, Interval, Question, Report, Usage

_DESCRIPTION = (
    "A submission counts on the day on which it was made, in UTC, and `charged` is what your limits count. "
    "As CSV, the names of columns are those of JSON, joined by `_`; the total and the lists are left out."
)
_OPERATORS_DESCRIPTION = (
    "As tenants see their own, over all of them, deleted ones too, so that every yuan is explained. As CSV, the names "
    "of columns are those of JSON, joined by `_`; the total and the lists are left out."
)

First = Annotated[
    str | None,
    QueryParameter(
        name="from", format="date", description="The first day. Default: the first of the month of the last day."
    ),
]
Last = Annotated[
    str | None,
    QueryParameter(
        name="to", format="date", description=f"The last day, included; at most {MOST_DAYS} in all. Default: today."
    ),
]
Every = Annotated[Interval, QueryParameter(name="interval", description="How long the period of an item is.")]


def usage_routes(usage: Usage) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/v1/usage`."""

    @get(
        "/usage",
        operation_id="read-usage",
        summary="Read what you have spent",
        description=_DESCRIPTION,
        response_description="What you have spent",
        response_headers=openapi.headers("Cache-Control"),
        responses=openapi.problems(401, "invalid-options", "ledger-unavailable"),
    )
    async def read(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        first: First = None,
        last: Last = None,
        interval: Every = Interval.DAY,
        group_by: Annotated[str, QueryParameter(description="`kind` or `none`.")] = "kind",
    ) -> Response[UsageView]:
        check_query(request, request.route_handler)
        groups = some_of("group_by", group_by, (Group.KIND,))
        report = await usage.of(tenant, Question(day("from", first), day("to", last), interval, groups))
        return _answer(request, report, for_operators=False)

    return [read]


def operator_usage_routes(usage: Usage) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1/usage`."""

    @get(
        "/usage",
        operation_id="read-all-usage",
        summary="Read what tenants have spent",
        description=_OPERATORS_DESCRIPTION,
        response_description="What they have spent",
        responses=openapi.problems(401, "invalid-options", "ledger-unavailable"),
    )
    async def read(
        request: Request[Any, Any, Any],
        first: First = None,
        last: Last = None,
        interval: Every = Interval.DAY,
        group_by: Annotated[str, QueryParameter(description="`tenant`, `kind`, both with a comma, or `none`.")] = (
            "tenant,kind"
        ),
        tenant: Annotated[str | None, QueryParameter(description="Only tenants of this name.")] = None,
    ) -> Response[UsageView]:
        groups = some_of("group_by", group_by, tuple(Group))
        report = await usage.of_all(Question(day("from", first), day("to", last), interval, groups), tenant)
        return _answer(request, report, for_operators=True)

    return [read]


def _answer(request: Request[Any, Any, Any], report: Report, *, for_operators: bool) -> Response[Any]:
    headers = {"Vary": "Accept"} | ({} if for_operators else PRIVATE)
    if not tabular.wants_csv(",".join(request.headers.getall("accept", []))):
        return Response(usage_view(report, for_operators=for_operators), headers=headers)
    content = tabular.table(*usage_table(report, for_operators=for_operators))
    return Response(content, media_type=tabular.MEDIA_TYPE, headers=headers)
