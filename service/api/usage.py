"""Routes for quota, usage and submissions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody, PathParameter, QueryParameter

from service.api import openapi, schemas
from service.api.params import check_query, day, some_of
from service.api.schemas import (
    PRIVATE,
    QuotaView,
    RefundBody,
    SubmissionView,
    UsageView,
    quota_view,
    submission_view,
    usage_table,
    usage_view,
)
from service.domain.tenants import Tenant
from service.usecases.reports import MOST_DAYS, Group, Interval, Question, Quota, Report, Submissions, Usage


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
    if not schemas.wants_csv(",".join(request.headers.getall("accept", []))):
        return Response(usage_view(report, for_operators=for_operators), headers=headers)
    content = schemas.table(*usage_table(report, for_operators=for_operators))
    return Response(content, media_type=schemas.MEDIA_TYPE, headers=headers)


Id = Annotated[str, PathParameter(description="The `submission_id`, as the problem `submission-unknown` names it.")]


def submission_routes(submissions: Submissions) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/v1/submissions`."""

    @get(
        "/submissions/{submission_id:str}",
        operation_id="read-submission",
        summary="Read what became of a submission",
        description="Its outcome may be provisional: an `unknown` one becomes `accepted` if its task turns up.",
        response_description="The submission",
        response_headers=openapi.headers("Cache-Control"),
        responses=openapi.problems(401, 404, "ledger-unavailable"),
    )
    async def read(tenant: NamedDependency[Tenant], submission_id: Id) -> Response[SubmissionView]:
        fate = await submissions.of(tenant, submission_id)
        return Response(submission_view(fate, for_operators=False), headers=PRIVATE)

    return [read]


def operator_submission_routes(submissions: Submissions) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/admin/v1/submissions` and `/admin/v1/refunds`."""

    @get(
        "/submissions/{submission_id:str}",
        operation_id="read-any-submission",
        summary="Read what became of a submission, and whose it is",
        response_description="The submission",
        responses=openapi.problems(401, 404, "ledger-unavailable"),
    )
    async def read(submission_id: Id) -> SubmissionView:
        return submission_view(await submissions.of_any(submission_id), for_operators=True)

    @post(
        "/refunds",
        operation_id="refund",
        summary="Give the cost of a submission back to its tenant's windows, once",
        description="From then on it counts for nothing in them, whatever else becomes of it. The usage shows why.",
        response_description="The submission",
        responses=openapi.problems(401, 404, "malformed-request", "conflict", "invalid-options", "ledger-unavailable"),
    )
    async def refund(data: JSONBody[RefundBody]) -> SubmissionView:
        reason = data.why()
        fate = await submissions.refund(data.means(submissions.of_task), reason)
        return submission_view(fate, for_operators=True)

    return [read, refund]
