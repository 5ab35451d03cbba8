"""Errors as problem details (RFC 9457), and the rate-limit headers.

One table maps errors to responses. An error that is not in it becomes a generic 500 that reveals nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from typing import Annotated, Any, NoReturn

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import Empty
from litestar.utils.scope.state import ScopeState
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from service.api.schemas import REPLAYED_HEADERS, to_datetime, to_yuan
from service.domain import errors
from service.domain.errors import MalformedRequest, RateLimit, expected_format, validate_tree
from service.domain.ledger import MAX_ACTIVE_POLICY, READS_POLICY, UNIT_MONEY, UNIT_TASKS, policy_name
from service.domain.tenants import Window


def rate_limit_headers(limits: Sequence[RateLimit]) -> dict[str, str]:
    """Return `RateLimit` and `RateLimit-Policy`, or nothing without limits; `w` and `t` only if a limit resets."""
    if not limits:
        return {}
    return {
        "RateLimit-Policy": ", ".join(
            f'"{limit.policy}";q={limit.limit}{_format_parameter("w", limit.window_seconds)}' for limit in limits
        ),
        "RateLimit": ", ".join(
            f'"{limit.policy}";r={limit.remaining}{_format_parameter("t", limit.resets_in_seconds)}' for limit in limits
        ),
    }


def _format_parameter(parameter: str, value: int | None) -> str:
    return "" if value is None else f";{parameter}={value}"


class ClientDisconnected(Exception):
    """The client closed the connection."""


class BodyTimeout(MalformedRequest):
    """The body did not arrive in time; the connection must be closed."""


MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "request_id"
OUTCOME = "outcome"
"""Keys in the state of an ASGI scope: the request's id, and the code of its problem."""


class ProblemType(Struct, frozen=True):
    """A kind of problem; `description` is for the OpenAPI document."""

    code: str
    status: int
    title: str
    description: str


class ProblemResponse(Struct, frozen=True):
    """A problem to send; `extras` are members beside the standard ones."""

    type: ProblemType
    detail: str
    extras: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}


MALFORMED_REQUEST = ProblemType("malformed-request", 400, "Malformed request", "The request can't be read.")
UNAUTHENTICATED = ProblemType("unauthenticated", 401, "Authentication required", "The token is missing or not valid.")
FORBIDDEN = ProblemType("forbidden", 403, "Forbidden", "The token does not allow this.")
NOT_FOUND = ProblemType("not-found", 404, "Not found", "It does not exist, or belongs to another tenant.")
METHOD_NOT_ALLOWED = ProblemType("method-not-allowed", 405, "Method not allowed", "`Allow` names the methods.")
IMAGE_TOO_LARGE = ProblemType("image-too-large", 413, "Image too large", "It exceeds the limit on bytes or on pixels.")
QUOTA_EXCEEDED = ProblemType("quota-exceeded", 429, "Quota exceeded", "A limit of the tenant is used up.")
HEADERS_TOO_LARGE = ProblemType(
    "headers-too-large", 431, "Header fields too large", "The request line and the header fields exceed the limit."
)
RATE_LIMITED = ProblemType(
    "rate-limited",
    429,
    "Rate limited",
    "The limit of the current minute, that on reads of a token, or that on requests without a valid token is used up.",
)
TOO_MANY_ACTIVE_TASKS = ProblemType(
    "too-many-active-tasks", 429, "Too many active tasks", "The tenant has as many active tasks as it may have."
)
INTERNAL_ERROR = ProblemType(
    "internal-error", 500, "Internal error", "A fault of the gateway, which its operators find in the log."
)
_PROBLEM_TYPES: Mapping[type[errors.GatewayError], ProblemType] = {
    errors.MalformedRequest: MALFORMED_REQUEST,
    errors.Unauthenticated: UNAUTHENTICATED,
    errors.TooManyFailures: RATE_LIMITED,
    errors.BalanceExhausted: ProblemType(
        "balance-exhausted", 402, "Balance exhausted", "No upstream account of the tenant can pay at the moment."
    ),
    errors.Forbidden: FORBIDDEN,
    errors.KindNotAllowed: ProblemType(
        "kind-not-allowed", 403, "Kind not allowed", "The tenant may not submit tasks of this kind."
    ),
    errors.TenantDisabled: ProblemType("tenant-disabled", 403, "Tenant disabled", "An operator has disabled it."),
    errors.TenantReadOnly: ProblemType(
        "tenant-read-only", 403, "Tenant read-only", "An operator has stopped its submissions; it may read its tasks."
    ),
    errors.NotFound: NOT_FOUND,
    errors.Conflict: ProblemType("conflict", 409, "Conflict", "`detail` names what conflicts with the change."),
    errors.VersionConflict: ProblemType(
        "outdated", 412, "Outdated", "It has changed since it was read: read it again."
    ),
    errors.ImageTooLarge: IMAGE_TOO_LARGE,
    errors.UnsupportedMediaType: ProblemType(
        "unsupported-media-type", 415, "Unsupported media type", "That of the request, or of the image by its bytes."
    ),
    errors.RangeNotSatisfiable: ProblemType(
        "range-not-satisfiable", 416, "Range not satisfiable", "The result has no bytes there."
    ),
    errors.InvalidOptions: ProblemType("invalid-options", 422, "Invalid options", "`errors` names each faulty field."),
    errors.InvalidImage: ProblemType("invalid-image", 422, "Invalid image", "It is damaged or incomplete."),
    errors.ImageUnreachable: ProblemType(
        "image-unreachable", 422, "Image unreachable", "It can't be fetched from its `image_url`; nothing was charged."
    ),
    errors.IdempotencyKeyInvalid: ProblemType(
        "idempotency-key-invalid", 400, "Invalid idempotency key", "It is malformed, too long, or sent twice."
    ),
    errors.IdempotencyInFlight: ProblemType(
        "idempotency-in-flight", 409, "Still in flight", "The first submission under this key has no outcome yet."
    ),
    errors.IdempotencyKeyReused: ProblemType(
        "idempotency-key-reused", 422, "Idempotency key reused", "Other content was sent under this key before."
    ),
    errors.QuotaDenied: QUOTA_EXCEEDED,
    errors.UpstreamRejected: ProblemType(
        "upstream-rejected", 502, "Rejected upstream", "`upstream_reason` has the reason; nothing was charged."
    ),
    errors.UpstreamInvalidResponse: ProblemType(
        "upstream-invalid-response", 502, "Invalid upstream response", "The upstream's response can't be used."
    ),
    errors.LedgerUnavailable: ProblemType(
        "ledger-unavailable", 503, "Ledger unavailable", "Nothing can be reserved now; nothing was charged."
    ),
    errors.UpstreamUnavailable: ProblemType(
        "upstream-unavailable", 503, "Upstream unavailable", "It can't be reached; nothing was charged."
    ),
    errors.AccountMisconfigured: ProblemType(
        "account-misconfigured", 503, "Account misconfigured", "An operator has to correct the tenant's account."
    ),
    errors.Overloaded: ProblemType("overloaded", 503, "Overloaded", "Too much is in flight; nothing was charged."),
    errors.SubmissionUnknown: ProblemType(
        "submission-unknown",
        504,
        "Submission unknown",
        "It was sent, may have been charged, and is not sent again: the same `Idempotency-Key` returns its outcome.",
    ),
}
_UNMAPPED_TYPES = {METHOD_NOT_ALLOWED, HEADERS_TOO_LARGE, TOO_MANY_ACTIVE_TASKS, INTERNAL_ERROR}
PROBLEMS: tuple[ProblemType, ...] = tuple(
    sorted({*_PROBLEM_TYPES.values(), *_UNMAPPED_TYPES}, key=lambda problem: (problem.status, problem.code))
)
"""All kinds of problems, by status."""
INTERNAL_ERROR_RESPONSE = ProblemResponse(
    INTERNAL_ERROR, "The gateway failed. Its operators can find the cause by the request id."
)
_MONEY_POLICIES = frozenset(policy_name(window, UNIT_MONEY) for window in Window)
_RATE_POLICIES = {READS_POLICY, *(policy_name(Window.MINUTE, unit) for unit in (UNIT_TASKS, UNIT_MONEY))}
_ERROR_HEADERS: Mapping[type, Mapping[str, str]] = {
    errors.Unauthenticated: {"WWW-Authenticate": 'Bearer realm="imaging-gateway"'},
    errors.UnsupportedCoding: {"Accept-Encoding": "identity"},
    BodyTimeout: {"Connection": "close"},  # else a client that keeps sending slowly would keep its connection
}


def to_problem(error: errors.GatewayError) -> ProblemResponse:
    """Return the response to an error: that of its closest class in the table."""
    kind = next((_PROBLEM_TYPES[cls] for cls in type(error).__mro__ if cls in _PROBLEM_TYPES), None)
    if kind is None:
        return INTERNAL_ERROR_RESPONSE
    extras: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(math.ceil(error.retry_after), 0))
    match error:
        case errors.QuotaDenied():
            kind = _quota_problem_type({violation.policy for violation in error.violations})
            extras["violated_policies"] = [
                {
                    "policy": violation.policy,
                    "limit": to_yuan(violation.limit) if violation.policy in _MONEY_POLICIES else violation.limit,
                    "resets_at": to_datetime(violation.resets_at),
                }
                for violation in error.violations
            ]
            headers |= rate_limit_headers(error.limits)
        case errors.InvalidOptions():
            extras["errors"] = [{"field": item.field, "detail": item.detail} for item in error.errors]
        case errors.SubmissionUnknown():
            extras["submission_id"] = error.submission_id
            headers |= REPLAYED_HEADERS if error.is_replay else {}
        case errors.UpstreamRejected():
            extras["upstream_reason"] = error.reason
        case errors.ImageUnreachable():
            extras["reason"] = error.reason
        case errors.RangeNotSatisfiable() if error.content_range:
            headers["Content-Range"] = error.content_range
        case _:
            headers |= next((_ERROR_HEADERS[cls] for cls in type(error).__mro__ if cls in _ERROR_HEADERS), {})
    return ProblemResponse(kind, error.detail, extras, headers)


def render(problem: ProblemResponse, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """Return the status, headers and body of a response."""
    document = {
        "type": f"urn:imaging-gateway:problem:{problem.type.code}",
        "title": problem.type.title,
        "status": problem.type.status,
        "detail": problem.detail,
        "instance": request_id,
        "code": problem.type.code,
        **problem.extras,
    }
    headers = {
        "Content-Type": MEDIA_TYPE,
        "Cache-Control": "no-store",
        "Link": f'</docs/problems#{problem.type.code}>; rel="help"',
        **problem.headers,
    }
    return problem.type.status, headers, msgspec.json.encode(document)


def exception_handlers(logger: FilteringBoundLogger) -> dict[int | type[Exception], Callable[[Any, Any], Any]]:
    """Return Litestar's exception handlers, which also serve unknown paths and methods.

    An unexpected error is logged with its traceback, of which the response reveals nothing.
    """

    def gateway_error(request: Request[Any, Any, Any], error: errors.GatewayError) -> Response[bytes]:
        problem = to_problem(error)
        if problem is INTERNAL_ERROR_RESPONSE:
            return internal_error(request, error)
        if problem.type is UNAUTHENTICATED and "authorization" in request.headers:
            challenge = problem.headers["WWW-Authenticate"] + ', error="invalid_token"'
            problem = msgspec.structs.replace(problem, headers={**problem.headers, "WWW-Authenticate": challenge})
        return _respond(request, problem)

    def framework_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
        if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return internal_error(request, error)
        return _respond(request, _framework_problem(request, error))

    def decode_error(request: Request[Any, Any, Any], error: UnicodeDecodeError) -> Response[bytes]:
        # Litestar raises this for a JSON body. It is logged in case it ever comes from elsewhere.
        logger.warning("request.invalid_utf8", exc_info=error)
        return _respond(request, ProblemResponse(MALFORMED_REQUEST, "The body of the request is not UTF-8."))

    def internal_error(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        logger.error("request.error", exc_info=error)
        return _respond(request, INTERNAL_ERROR_RESPONSE)

    def client_disconnected(*_: object) -> NoReturn:
        # A new error: frames of Litestar hold the original, which would hold them and with them the upload.
        raise ClientDisconnected from None

    return {
        errors.GatewayError: gateway_error,
        HTTPException: framework_error,
        UnicodeDecodeError: decode_error,
        ClientDisconnected: client_disconnected,
        Exception: internal_error,
    }


async def send_problem(scope: Any, send: Any, problem: ProblemResponse) -> None:
    """Send a response from middleware."""
    state = scope["state"]
    state[OUTCOME] = problem.type.code
    status, headers, body = render(problem, state.get(REQUEST_ID, ""))
    fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    fields.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _respond(request: Request[Any, Any, Any], problem: ProblemResponse) -> Response[bytes]:
    state = request.scope["state"]
    state[OUTCOME] = problem.type.code
    status, headers, body = render(problem, state.get(REQUEST_ID, ""))
    return Response(body, status_code=status, headers=headers, media_type=headers.pop("Content-Type"))


_FRAMEWORK_PROBLEMS = {
    HTTPStatus.UNAUTHORIZED: to_problem(errors.Unauthenticated("Send a bearer token.")),
    HTTPStatus.FORBIDDEN: ProblemResponse(FORBIDDEN, "This is not allowed."),
    HTTPStatus.NOT_FOUND: ProblemResponse(NOT_FOUND, "Nothing exists at this path."),
}


def _framework_problem(request: Request[Any, Any, Any], error: HTTPException) -> ProblemResponse:
    if problem := _FRAMEWORK_PROBLEMS.get(HTTPStatus(error.status_code)):
        return problem
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("allow", "")
        return ProblemResponse(METHOD_NOT_ALLOWED, f"Use one of {allowed}.", headers={"Allow": allowed})
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        is_form = request.headers.get("content-type", "").startswith("multipart/")
        kind = IMAGE_TOO_LARGE if is_form else MALFORMED_REQUEST
        return ProblemResponse(kind, "The body of the request is too large.")
    if not isinstance(error, ValidationException):
        return ProblemResponse(MALFORMED_REQUEST, "The request can't be read.")
    # The detail of a validation error is not used: it repeats the query, which may hold anything.
    if field_errors := _field_errors(request, error):
        return to_problem(errors.InvalidOptions(field_errors))
    return ProblemResponse(MALFORMED_REQUEST, "The request is not valid.")


_MISSING_PARAMETER = re.compile(r"Missing required \w+ parameter '([^']*)'")


def _field_errors(request: Request[Any, Any, Any], error: ValidationException) -> list[errors.FieldError]:
    """Return the invalid fields and parameters, each with its expected format."""
    if missing := _MISSING_PARAMETER.match(error.detail):
        return [errors.FieldError(missing[1], "is required")]
    invalid: dict[str, errors.FieldError] = {}
    for item in error.extra if isinstance(error.extra, list) else ():
        key = str(item.get("key", _BODY_PARAMETER))
        if key == _BODY_PARAMETER or item.get("source") == "body":
            invalid |= {field_error.field: field_error for field_error in _body_errors(request, key)}
        else:
            field_error = _parameter_error(request, key)
            invalid[field_error.field] = field_error
    return list(invalid.values())


_BODY_PARAMETER = "data"


def _body_errors(request: Request[Any, Any, Any], key: str) -> list[errors.FieldError]:
    """Return all errors of a body of which msgspec reported one, at `key`."""
    body = ScopeState.from_scope(request.scope).json
    if body is Empty or body is None:
        return [errors.FieldError("body", "is required" if body is Empty else "must be an object")]
    body_type = request.route_handler.parsed_fn_signature.parameters[_BODY_PARAMETER].annotation
    return find_body_errors(body, body_type) or [
        errors.FieldError("body" if key == _BODY_PARAMETER else key, "is not valid")
    ]


def find_body_errors(body: Any, body_type: Any) -> list[errors.FieldError]:
    """Return all errors of a JSON body against its type."""
    return [
        errors.FieldError(item.field or "body", item.detail.replace("must be a table", "must be an object"))
        for item in validate_tree(body, body_type, "")
    ]


def _parameter_error(request: Request[Any, Any, Any], name: str) -> errors.FieldError:
    # Under the name in the request, which may differ from that of the handler's parameter.
    parameter = request.route_handler.parsed_fn_signature.parameters[name]
    definition = parameter.kwarg_definition
    minimum, maximum = (getattr(definition, bound, None) for bound in ("ge", "le"))
    kind = parameter.annotation
    if minimum is not None or maximum is not None:
        kind = Annotated[kind, msgspec.Meta(ge=minimum, le=maximum)]
    return errors.FieldError(getattr(definition, "name", None) or name, expected_format(kind))


def _quota_problem_type(policies: set[str]) -> ProblemType:
    if policies == {MAX_ACTIVE_POLICY}:
        return TOO_MANY_ACTIVE_TASKS
    return RATE_LIMITED if policies and policies <= _RATE_POLICIES else QUOTA_EXCEEDED
