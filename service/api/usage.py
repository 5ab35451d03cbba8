"""Routes for quota, usage and submissions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from litestar import Request, Response, get, post
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody, PathParameter, QueryParameter

from service.api import openapi, schemas
from service.api.params import check_query, parse_choices, parse_date
from service.domain.tenants import Tenant
from service.usecases.reports import (
    MAX_DAYS,
    Group,
    Interval,
    QuotaReports,
    SubmissionReports,
    UsageQuery,
    UsageReport,
    UsageReports,
)


def quota_routes(quota: QuotaReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/quota",
        summary="Read your quota",
        description="The present state of your policies, and whether an account can pay.",
        response_description="Your policies",
        responses=openapi.problem_responses(401, "tenant-disabled", "rate-limited", "ledger-unavailable"),
    )
    async def read_quota(tenant: NamedDependency[Tenant]) -> schemas.Quota:
        return schemas.render_quota(await quota.for_tenant(tenant))

    return [read_quota]


_CSV_NOTE = "As CSV, columns are named as in JSON, joined by `_`; the total and the lists are omitted."
_USAGE_DESCRIPTION = "A submission counts on its day in UTC, and `charged` is what your limits count. " + _CSV_NOTE
_OPERATOR_USAGE_DESCRIPTION = (
    "The usage of all tenants, including deleted ones, so that every yuan is accounted for. " + _CSV_NOTE
)
FirstDay = Annotated[
    str | None,
    QueryParameter(
        name="from", format="date", description="The first day. Default: the first of the last day's month."
    ),
]
LastDay = Annotated[
    str | None,
    QueryParameter(
        name="to", format="date", description=f"The last day, inclusive; at most {MAX_DAYS} days. Default: today."
    ),
]
PeriodLength = Annotated[Interval, QueryParameter(name="interval", description="The period of an item.")]


def usage_routes(usage: UsageReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/usage",
        summary="Read your usage",
        description=_USAGE_DESCRIPTION,
        response_description="Your usage",
        responses=openapi.problem_responses(
            401, "tenant-disabled", "rate-limited", "invalid-options", "ledger-unavailable"
        ),
    )
    async def read_usage(
        request: Request[Any, Any, Any],
        tenant: NamedDependency[Tenant],
        first: FirstDay = None,
        last: LastDay = None,
        interval: PeriodLength = Interval.DAY,
        group_by: Annotated[
            str, QueryParameter(schema_extra={"pattern": "^(kind|none)?$"}, description="`kind` or `none`.")
        ] = "kind",
    ) -> Response[schemas.Usage]:
        check_query(request, request.route_handler)
        groups = parse_choices("group_by", group_by, (Group.KIND,))
        report = await usage.for_tenant(
            tenant, UsageQuery(parse_date("from", first), parse_date("to", last), interval, groups)
        )
        return _usage_response(request, report, for_operators=False)

    return [read_usage]


def operator_usage_routes(usage: UsageReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/usage",
        summary="Read the usage of tenants",
        description=_OPERATOR_USAGE_DESCRIPTION,
        response_description="Their usage",
        responses=openapi.operator_problems("ledger-unavailable"),
    )
    async def read_all_usage(
        request: Request[Any, Any, Any],
        first: FirstDay = None,
        last: LastDay = None,
        interval: PeriodLength = Interval.DAY,
        group_by: Annotated[
            str,
            QueryParameter(
                schema_extra={"pattern": "^(tenant|kind|tenant,kind|kind,tenant|none)?$"},
                description="`tenant`, `kind`, both with a comma, or `none`.",
            ),
        ] = "tenant,kind",
        tenant: Annotated[str | None, QueryParameter(description="Only tenants of this name.")] = None,
    ) -> Response[schemas.Usage]:
        groups = parse_choices("group_by", group_by, tuple(Group))
        report = await usage.for_all_tenants(
            UsageQuery(parse_date("from", first), parse_date("to", last), interval, groups), tenant
        )
        return _usage_response(request, report, for_operators=True)

    return [read_all_usage]


def _usage_response(request: Request[Any, Any, Any], report: UsageReport, *, for_operators: bool) -> Response[Any]:
    headers = {"Vary": "Accept"}
    if not schemas.prefers_csv(",".join(request.headers.getall("accept", []))):
        return Response(schemas.render_usage(report, for_operators=for_operators), headers=headers)
    content = schemas.render_csv(*schemas.tabulate_usage(report, for_operators=for_operators))
    return Response(content, media_type=schemas.CSV_MEDIA_TYPE, headers=headers)


def submission_routes(submissions: SubmissionReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/submissions/{submission_id:str}",
        summary="Read a submission and its outcome",
        description="The outcome may be provisional: `unknown` becomes `accepted` if its task is discovered.",
        response_description="The submission",
        responses=openapi.problem_responses(401, "tenant-disabled", 404, "rate-limited", "ledger-unavailable"),
    )
    async def read_submission(
        tenant: NamedDependency[Tenant],
        submission_id: Annotated[
            str, PathParameter(description="The `submission_id` of the problem `submission-unknown`.")
        ],
    ) -> schemas.Submission:
        return schemas.render_submission(await submissions.for_tenant(tenant, submission_id), for_operators=False)

    return [read_submission]


def operator_submission_routes(submissions: SubmissionReports) -> Sequence[HTTPRouteHandler]:
    @get(
        "/submissions/{submission_id:str}",
        summary="Read any submission, its outcome and its tenant",
        description="Of an `unknown` one, `balance_suggests` compares the balance with what it would have cost.",
        response_description="The submission",
        responses=openapi.operator_problems(404, "ledger-unavailable"),
    )
    async def read_any_submission(
        submission_id: Annotated[str, PathParameter(description="The `id` of the submission, or of its task.")],
    ) -> schemas.Submission:
        return schemas.render_submission(await submissions.any_tenant(submission_id), for_operators=True)

    @post(
        "/refunds",
        summary="Refund a submission to its tenant's windows, once",
        description="Afterwards it no longer counts in them, whatever its outcome. The usage shows the reason.",
        response_description="The submission",
        responses=openapi.operator_problems("forbidden", 404, "malformed-request", "conflict", "ledger-unavailable"),
    )
    async def refund(data: JSONBody[schemas.RefundBody]) -> schemas.Submission:
        status = await submissions.refund(data.target_id(), data.checked_reason())
        return schemas.render_submission(status, for_operators=True)

    return [read_any_submission, refund]
