"""The upstream's own protocol, for programs written against it: they change the base address and the key.

Every response is HTTP 200 with `err_code`, as the upstream's are; the `user_key` is a tenant's token. Fields that the
upstream would ignore are ignored here too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import structlog
from litestar import Request, Response, post
from litestar.handlers import HTTPRouteHandler
from msgspec import UNSET, Meta, Struct, UnsetType

from service.api import openapi
from service.api.auth import FailureLimiter, TenantAuth
from service.api.errors import OUTCOME, BodyTimeout, to_problem
from service.api.uploads import UploadReader
from service.domain import errors
from service.domain.ledger import MAX_ACTIVE_POLICY
from service.domain.tasks import OPTIONS, VENDOR_FIELDS, ArtifactName, Catalogue, Kind, Options, State, parse_options
from service.domain.tenants import Tenant
from service.usecases.reports import QuotaReports
from service.usecases.submit import Submitter
from service.usecases.task_status import TaskReader

_log = structlog.get_logger(__name__)

NO_ACCOUNT = "账户不存在"
NOTHING_LEFT = "账户剩余次数不足"
REJECTED = "任务提交失败:{}"
NOT_FOUND = "任务未找到或状态未知"

_IMAGE_PART = "input_image"
_USER_KEY_FIELD = "user_key"
_ROUTES = {
    Kind.UPSCALE: "submit_task",
    Kind.VECTORIZE: "submit_vector_task",
    Kind.FACE_ENHANCE: "submit_face_enhance_task",
    Kind.SEAMLESS: "submit_seamless_task",
}
_FIELDS: Mapping[Kind, Mapping[str, str]] = {
    kind: {VENDOR_FIELDS[option]: option for option in options.__struct_fields__} for kind, options in OPTIONS.items()
}
"""Fields of the forms, each with its option."""
_STEPS_RANGE = (20, 40)
_BOOLEAN_OPTIONS = frozenset({"high_fidelity", "strong_inpaint", "vector"})
_TEXT_OPTIONS = frozenset({"model", "style", "prompt", "negative_prompt"})
_TRUE_WORDS = frozenset({"true", "1", "on", "yes", "t", "y"})
_FALSE_WORDS = frozenset({"false", "0", "off", "no", "f", "n"})
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_STATES = {State.QUEUED: "Queued", State.RUNNING: "Running", State.SUCCEEDED: "Completed", State.FAILED: "Failed"}
_URL_FIELDS = {ArtifactName.IMAGE: "images_url", ArtifactName.VECTOR: "vector_url", ArtifactName.GRID: "grid_url"}

_SUBMIT_DESCRIPTION = (
    "As the upstream: unknown fields are ignored, the last of a repeated field counts, and errors have status 200 with "
    "`err_code` 1. There is no idempotency: a repetition is another task."
)
_CHECK_DESCRIPTION = (
    "As the upstream: repeat it until `status` is `Completed` or `Failed`; errors have status 200 with `err_code` 1."
)
Count = Annotated[int, Meta(description="The uses left, if known.")]
Money = Annotated[int, Meta(description="The yuan left, if known.")]


class Failure(Struct, frozen=True):
    """An error, in the words of the upstream where they fit."""

    err_code: Literal[1]
    err_msg: str


class Submitted(Struct, frozen=True):
    """An accepted task."""

    err_code: Literal[0]
    task_id: str
    remaining_count: Count | UnsetType = UNSET
    remaining_money: Money | UnsetType = UNSET


class Checked(Struct, frozen=True):
    """The state of a task; with results and the remaining quota once it is `Completed`."""

    err_code: Literal[0]
    status: Annotated[str, Meta(description=f"{', '.join(_STATES.values())}.")]
    images_url: str | UnsetType = UNSET
    vector_url: str | UnsetType = UNSET
    grid_url: str | UnsetType = UNSET
    remaining_count: Count | UnsetType = UNSET
    remaining_money: Money | UnsetType = UNSET


A = TypeVar("A", Submitted, Checked)


def legacy_routes(
    *,
    tenant_auth: TenantAuth,
    failures: FailureLimiter,
    submitter: Submitter,
    reader: TaskReader,
    quota: QuotaReports,
    uploads: UploadReader,
    catalogue: Catalogue,
) -> Sequence[HTTPRouteHandler]:
    def authenticate(request: Request[Any, Any, Any], fields: Sequence[tuple[str, str]]) -> Tenant:
        return tenant_auth.authenticate(request, _find_user_key(fields))

    def make_submit_handler(kind: Kind) -> HTTPRouteHandler:
        @post(
            f"/{_ROUTES[kind]}",
            name=f"legacy-{kind}",
            summary=f"{openapi.SUBMIT_SUMMARIES[kind]}, in the upstream's protocol",
            description=_SUBMIT_DESCRIPTION,
            operation_class=openapi.legacy_operation(_IMAGE_PART, _FIELDS[kind], kind),
            response_description="The task, or an error",
            responses=openapi.UNREADABLE_REQUEST,
            status_code=200,
        )
        async def handler(request: Request[Any, Any, Any]) -> Response[Submitted | Failure]:
            def identify(name: str, value: str) -> int | None:
                # Programs send their fields before the file, so a refusal comes before the image is received.
                if name != _USER_KEY_FIELD:
                    return None
                tenant = tenant_auth.authenticate(request, value)
                submitter.check_allowed(tenant, kind)
                return tenant.id

            async def submit_upload() -> Submitted:
                async with uploads.receive(
                    request.scope,
                    request.receive,
                    part=_IMAGE_PART,
                    owner=None,
                    identify=identify,
                    has_digest=False,  # without an idempotency key
                ) as upload:
                    tenant = authenticate(request, upload.fields)
                    submitter.check_allowed(tenant, kind)
                    options = _parse_fields(kind, upload.fields, catalogue)
                    accepted = await submitter.submit(tenant, options, {}, upload.image)
                return Submitted(0, accepted.task.id, **await _remaining_fields(quota, tenant))

            return await _respond(request, failures, submit_upload, _submit_message)

        return handler

    @post(
        "/check_task_status",
        summary="Check a task, in the upstream's protocol",
        description=_CHECK_DESCRIPTION,
        operation_class=openapi.legacy_operation(None, {"task_id": "task_id"}),
        response_description="The state of the task, or an error",
        responses=openapi.UNREADABLE_REQUEST,
        status_code=200,
    )
    async def legacy_check(request: Request[Any, Any, Any]) -> Response[Checked | Failure]:
        async def read() -> Checked:
            fields = await uploads.read_form(request.scope, request.receive)
            tenant = tenant_auth.authenticate_read(request, dict(fields).get(_USER_KEY_FIELD, ""))
            task = (await reader.read(tenant, dict(fields).get("task_id", ""))).task
            if task.state is not State.SUCCEEDED:
                return Checked(0, _STATES[task.state])
            urls: dict[str, Any] = {_URL_FIELDS[artifact.name]: artifact.url for artifact in task.artifacts}
            return Checked(0, _STATES[task.state], **urls, **await _remaining_fields(quota, tenant))

        return await _respond(request, failures, read, _check_message)

    return [*(make_submit_handler(kind) for kind in Kind), legacy_check]


def _find_user_key(fields: Sequence[tuple[str, str]]) -> str:
    user_keys = {value for name, value in fields if name == _USER_KEY_FIELD} or {""}
    if len(user_keys) > 1:  # the memory of the upload may be that of another tenant
        raise errors.MalformedRequest(f"{_USER_KEY_FIELD} is given twice, with different values.")
    return user_keys.pop()


def _parse_fields(kind: Kind, fields: Sequence[tuple[str, str]], catalogue: Catalogue) -> Options:
    """Parse the upstream's fields as options. Raises InvalidOptions, with the upstream's names.

    The last of a repeated field counts; an empty one is its default.
    """
    names = _FIELDS[kind]
    options = {
        names[name]: _normalize_value(names[name], value) for name, value in dict(fields).items() if name in names
    }
    try:
        return parse_options(kind, list(options.items()), catalogue)
    except errors.InvalidOptions as error:
        fields_by_option = {option: name for name, option in names.items()}
        raise errors.InvalidOptions(
            [errors.FieldError(fields_by_option[invalid.field], invalid.detail) for invalid in error.errors]
        ) from None


def _normalize_value(option: str, text: str) -> str:
    """Return a flag or number in the spelling of options, from any spelling that form servers accept.

    Fractions of steps are rounded, since the upstream accepts them. Invalid values are returned as they are.
    """
    if option in _TEXT_OPTIONS:
        return text
    text = text.strip()
    if option in _BOOLEAN_OPTIONS:
        word = text.lower()
        return "true" if word in _TRUE_WORDS else "false" if word in _FALSE_WORDS else text
    if not _NUMBER.fullmatch(text):
        return text
    number = float(text)
    minimum, maximum = _STEPS_RANGE
    if option == "steps" and minimum <= number <= maximum:
        number = float(math.floor(number + 0.5))
    return str(int(number)) if number.is_integer() else repr(number)


async def _remaining_fields(quota: QuotaReports, tenant: Tenant) -> dict[str, Any]:
    """Return the remaining uses and whole yuan of a tenant, as far as they are known."""
    try:
        remaining = await quota.remaining(tenant)
    except errors.GatewayError:
        return {}  # an error here must not lose an accepted task
    except Exception:  # noqa: BLE001 - nor must any other
        _log.exception("submission.response_error")
        return {}
    yuan = None if remaining.money_fen is None else remaining.money_fen // 100
    fields = {"remaining_count": remaining.count, "remaining_money": yuan}
    return {name: value for name, value in fields.items() if value is not None}


async def _respond(
    request: Request[Any, Any, Any],
    failures: FailureLimiter,
    handle: Callable[[], Awaitable[A]],
    message: Callable[[errors.GatewayError], str],
) -> Response[A | Failure]:
    """Return the result of `handle`, or its error in the closest message of the upstream."""
    try:
        try:
            return Response(await handle())
        except errors.Unauthenticated:
            await failures.delay(request)
            raise
    except errors.GatewayError as error:
        request.scope["state"][OUTCOME] = to_problem(error).type.code
        if isinstance(error, errors.Unauthenticated | errors.TenantDisabled):
            return Response(Failure(1, NO_ACCOUNT))
        # Else a client that keeps sending slowly would keep its connection.
        headers = {"Connection": "close"} if isinstance(error, BodyTimeout) else None
        return Response(Failure(1, message(error)), headers=headers)


def _submit_message(error: errors.GatewayError) -> str:
    match error:
        # A limit of active tasks passes by itself, whereas a program may stop for good at "nothing left".
        case errors.BalanceExhausted() | errors.QuotaDenied() if not _is_active_limit_only(error):
            return NOTHING_LEFT
        case errors.UpstreamRejected():
            return REJECTED.format(error.reason)
        case errors.SubmissionUnknown():
            return REJECTED.format(f"{error.detail} (submission_id {error.submission_id})")
        case _:
            return REJECTED.format(error.detail)


def _is_active_limit_only(error: errors.GatewayError) -> bool:
    if not isinstance(error, errors.QuotaDenied):
        return False
    return {violation.policy for violation in error.violations} == {MAX_ACTIVE_POLICY}


def _check_message(error: errors.GatewayError) -> str:
    return NOT_FOUND if isinstance(error, errors.NotFound | errors.UpstreamUnavailable) else error.detail
