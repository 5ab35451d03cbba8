"""The upstream's own protocol, for programs written against it: they change their base address and their key.

Every answer is HTTP 200 with `err_code`, as theirs are; the `user_key` is a tenant's token. Fields that the upstream
would ignore are ignored here too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler

from service.api import openapi
from service.api.auth import Tenants
from service.api.uploads import Uploads
from service.domain.errors import (
    BalanceExhausted,
    GatewayError,
    NotFound,
    QuotaDenied,
    Unauthenticated,
    UpstreamRejected,
)
from service.domain.task import ArtifactName, Catalogue, Kind, State, parse_options
from service.domain.tenancy import Tenant
from service.usecases.follow import Follow
from service.usecases.quota import Quota
from service.usecases.submit import Submit

NO_ACCOUNT = "账户不存在"
NOTHING_LEFT = "账户剩余次数不足"
REJECTED = "任务提交失败:{}"
NOT_FOUND = "任务未找到或状态未知"

_PART = "input_image"
_KEY = "user_key"
_ROUTES = {
    Kind.UPSCALE: "submit_task",
    Kind.VECTORIZE: "submit_vector_task",
    Kind.FACE_ENHANCE: "submit_face_enhance_task",
    Kind.SEAMLESS: "submit_seamless_task",
}
_FIELDS: Mapping[Kind, Mapping[str, str]] = {
    Kind.UPSCALE: {
        "sdxl_model_dropdown": "model",
        "style_dropdown": "style",
        "upscale": "scale",
        "s_noise": "noise",
        "steps": "steps",
        "high_fidelity": "high_fidelity",
        "strong_inpaint": "strong_inpaint",
        "strong_inpaint_intensity": "inpaint_strength",
        "prompt": "prompt",
        "neg_prompt": "negative_prompt",
        "vector_switch": "vector",
        "color_count": "colors",
    },
    Kind.VECTORIZE: {"color_count": "colors"},
    Kind.FACE_ENHANCE: {},
    Kind.SEAMLESS: {"fit": "fit"},
}
_STATES = {State.QUEUED: "Queued", State.RUNNING: "Running", State.SUCCEEDED: "Completed", State.FAILED: "Failed"}
_URLS = {ArtifactName.IMAGE: "images_url", ArtifactName.VECTOR: "vector_url", ArtifactName.GRID: "grid_url"}


def routes(
    *, tenants: Tenants, submit: Submit, follow: Follow, quota: Quota, uploads: Uploads, catalogue: Catalogue
) -> Sequence[HTTPRouteHandler]:
    """The handlers under `/api`."""

    def submitting(kind: Kind) -> HTTPRouteHandler:
        @post(
            f"/{_ROUTES[kind]}",
            name=f"legacy-{kind}",
            operation_id=f"legacy-{kind}",
            summary=f"{openapi.SUBMIT_SUMMARIES[kind]}, in the upstream's protocol",
            operation_class=openapi.legacy_operation(_PART, _FIELDS[kind], kind),
            status_code=200,
        )
        async def handler(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
            async def answer() -> dict[str, Any]:
                async with uploads.receive(request.scope, request.receive, part=_PART) as upload:
                    tenant = _tenant(request, tenants, upload.fields)
                    submit.admit(tenant, kind)
                    options = parse_options(kind, _translated(kind, upload.fields), catalogue)
                    accepted = await submit(tenant, options, {}, upload.image)
                return {"task_id": accepted.task.id} | await _left(quota, tenant)

            return await _answered(answer, REJECTED)

        return handler

    @post(
        "/check_task_status",
        operation_id="legacy-check",
        summary="Check a task, in the upstream's protocol",
        operation_class=openapi.legacy_operation(None, {"task_id": "task_id"}),
        status_code=200,
    )
    async def check(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
        async def answer() -> dict[str, Any]:
            fields = await uploads.read_form(request.scope, request.receive)
            tenant = _tenant(request, tenants, fields)
            seen = await follow.read(tenant, dict(fields).get("task_id", ""))
            told: dict[str, Any] = {"status": _STATES[seen.task.state]}
            if seen.task.state is State.SUCCEEDED:
                told |= {_URLS[each.name]: each.url for each in seen.task.artifacts}
                told |= await _left(quota, tenant)
            return told

        return await _answered(answer, "{}")

    return [*(submitting(kind) for kind in Kind), check]


def _tenant(request: Request[Any, Any, Any], tenants: Tenants, fields: Sequence[tuple[str, str]]) -> Tenant:
    tenant = tenants.by_token(dict(fields).get(_KEY, ""))
    request.scope["state"]["tenant"] = tenant.name
    return tenant


def _translated(kind: Kind, fields: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The upstream's fields as options; the last of a repeated field counts, an empty number is its default."""
    names = _FIELDS[kind]
    return [
        (names[name], value) for name, value in dict(fields).items() if name in names and (value or "prompt" in name)
    ]


async def _left(quota: Quota, tenant: Tenant) -> dict[str, int]:
    """What the tenant has left: whole uses, and whole yuan; what nobody knows is left out."""
    try:
        left = await quota.left(tenant)
    except GatewayError:
        return {}  # the figures are not worth losing an accepted task over
    told = {"remaining_count": left.count, "remaining_money": None if left.money is None else left.money // 100}
    return {name: value for name, value in told.items() if value is not None}


async def _answered(answer: Callable[[], Awaitable[dict[str, Any]]], otherwise: str) -> Response[dict[str, Any]]:
    """An answer, or an error in the message of the upstream that fits it best."""
    try:
        return Response({"err_code": 0} | await answer())
    except Unauthenticated:
        message = NO_ACCOUNT
    except (BalanceExhausted, QuotaDenied):
        message = NOTHING_LEFT
    except NotFound:
        message = NOT_FOUND
    except UpstreamRejected as error:
        message = otherwise.format(error.reason)
    except GatewayError as error:
        message = otherwise.format(error.detail)
    return Response({"err_code": 1, "err_msg": message})
