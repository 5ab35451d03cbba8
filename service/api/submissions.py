"""What became of submissions, for tenants and for operators, and refunds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from litestar import Response, get, post
from litestar.di import NamedDependency
from litestar.handlers import HTTPRouteHandler
from litestar.params import JSONBody, PathParameter

from service.api import openapi
from service.api.submission_views import RefundBody, SubmissionView, submission_view
from service.api.views import PRIVATE
from service.domain.tenants import Tenant
from service.usecases.reports import Submissions

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
