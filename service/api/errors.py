"""Errors as problem details, and the rate-limit headers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated, Any, NoReturn

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.types import Empty
from litestar.utils.scope.state import ScopeState
from msgspec import Struct
from structlog.typing import FilteringBoundLogger

from service.api.schemas import REPLAYED, yuan
from service.domain import errors
from service.domain.errors import (
    MalformedRequest,
    faults_of,
    wanted_of,
)
from service.domain.ledger import COUNTED_MONEY, COUNTED_TASKS, MAX_ACTIVE, RateLimit, Violation, policy_name
from service.domain.tenants import Window


def rate_limit_headers(limits: Sequence[RateLimit]) -> dict[str, str]:
    """Both headers, or none if nothing is limited. A limit that never resets has neither window nor reset."""
    if not limits:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{each.policy}";q={each.limit}{_seconds("w", each.window)}' for each in limits),
        "RateLimit": ", ".join(f'"{each.policy}";r={each.remaining}{_seconds("t", each.resets)}' for each in limits),
    }


def _seconds(parameter: str, value: int | None) -> str:
    return "" if value is None else f";{parameter}={value}"


class ClientLeft(Exception):
    """The client closed the connection, so there is nobody to answer."""


class TooSlow(MalformedRequest):
    """The body did not arrive in time; the connection is of no more use."""


MEDIA_TYPE = "application/problem+json"


REQUEST_ID = "request_id"


OUTCOME = "outcome"
"""Where the request's id and the code of its problem stand in the state of an ASGI scope."""


class ProblemType(Struct, frozen=True):
    """A kind of problem: what it is called, its status and title, and when it occurs (for the API's document)."""

    code: str
    status: int
    title: str
    when: str


class Problem(Struct, frozen=True):
    """A problem that occurred: what to do about it, members beside the standard ones, and headers."""

    type: ProblemType
    detail: str
    extras: Mapping[str, Any] = {}
    headers: Mapping[str, str] = {}


MALFORMED = ProblemType("malformed-request", 400, "Malformed request", "The request can't be read.")


UNAUTHENTICATED = ProblemType("unauthenticated", 401, "Authentication required", "The token is missing or not valid.")


FORBIDDEN = ProblemType("forbidden", 403, "Forbidden", "The token is good, but not for this.")


NOT_FOUND = ProblemType("not-found", 404, "Not found", "There is no such thing, or it belongs to somebody else.")


METHOD_NOT_ALLOWED = ProblemType("method-not-allowed", 405, "Method not allowed", "`Allow` names the methods.")


IMAGE_TOO_LARGE = ProblemType("image-too-large", 413, "Image too large", "It exceeds the limit on bytes or on pixels.")


INVALID_OPTIONS = ProblemType("invalid-options", 422, "Invalid options", "`errors` names each faulty field.")


QUOTA_EXCEEDED = ProblemType("quota-exceeded", 429, "Quota exceeded", "A limit of the tenant is used up.")


HEADERS_TOO_LARGE = ProblemType(
    "headers-too-large", 431, "Header fields too large", "The request line and the header fields exceed the limit."
)


RATE_LIMITED = ProblemType("rate-limited", 429, "Rate limited", "The limit of the current minute is used up.")


TOO_MANY_ACTIVE = ProblemType("too-many-active-tasks", 429, "Too many active tasks", "No more may run at once.")


INTERNAL = ProblemType("internal-error", 500, "Internal error", "A fault of the gateway; its operators see why.")


_TABLE: Mapping[type[errors.GatewayError], ProblemType] = {
    errors.MalformedRequest: MALFORMED,
    errors.Unauthenticated: UNAUTHENTICATED,
    errors.BalanceExhausted: ProblemType(
        "balance-exhausted", 402, "Balance exhausted", "No upstream account of the tenant can pay at the moment."
    ),
    errors.Forbidden: FORBIDDEN,
    errors.KindNotAllowed: ProblemType(
        "kind-not-allowed", 403, "Kind not allowed", "The tenant may not submit tasks of this kind."
    ),
    errors.TenantDisabled: ProblemType("tenant-disabled", 403, "Tenant disabled", "An operator switched it off."),
    errors.NotFound: NOT_FOUND,
    errors.Conflict: ProblemType("conflict", 409, "Conflict", "What stands in the way of the change is named."),
    errors.Outdated: ProblemType("outdated", 412, "Outdated", "It was changed since it was read: read it again."),
    errors.ImageTooLarge: IMAGE_TOO_LARGE,
    errors.UnsupportedMediaType: ProblemType(
        "unsupported-media-type", 415, "Unsupported media type", "Of the request, or of the image by its bytes."
    ),
    errors.RangeNotSatisfiable: ProblemType(
        "range-not-satisfiable", 416, "Range not satisfiable", "The result has no bytes there."
    ),
    errors.InvalidOptions: INVALID_OPTIONS,
    errors.InvalidImage: ProblemType("invalid-image", 422, "Invalid image", "It is broken or cut off."),
    errors.IdempotencyKeyInvalid: ProblemType(
        "idempotency-key-invalid", 400, "Invalid idempotency key", "It is malformed, too long, or given twice."
    ),
    errors.IdempotencyInFlight: ProblemType(
        "idempotency-in-flight", 409, "Still in flight", "What was sent first under this key has no outcome yet."
    ),
    errors.IdempotencyKeyReused: ProblemType(
        "idempotency-key-reused", 422, "Idempotency key reused", "Something else was sent under this key before."
    ),
    errors.QuotaDenied: QUOTA_EXCEEDED,
    errors.UpstreamRejected: ProblemType(
        "upstream-rejected", 502, "Rejected upstream", "`upstream_reason` says why; nothing was charged."
    ),
    errors.UpstreamInvalidResponse: ProblemType(
        "upstream-invalid-response", 502, "Invalid upstream response", "The upstream's answer can't be used."
    ),
    errors.LedgerUnavailable: ProblemType(
        "ledger-unavailable", 503, "Ledger unavailable", "Nothing can be reserved now; nothing was charged."
    ),
    errors.UpstreamUnavailable: ProblemType(
        "upstream-unavailable", 503, "Upstream unavailable", "It can't be reached; nothing was charged."
    ),
    errors.AccountMisconfigured: ProblemType(
        "account-misconfigured", 503, "Account misconfigured", "An operator has to mend the tenant's account."
    ),
    errors.Overloaded: ProblemType("overloaded", 503, "Overloaded", "Too much is in flight; nothing was charged."),
    errors.SubmissionUnknown: ProblemType(
        "submission-unknown", 504, "Submission unknown", "It was sent and may have been charged; never send it again."
    ),
}


PROBLEMS: tuple[ProblemType, ...] = tuple(
    sorted(
        {*_TABLE.values(), METHOD_NOT_ALLOWED, HEADERS_TOO_LARGE, RATE_LIMITED, TOO_MANY_ACTIVE, INTERNAL},
        key=lambda each: (each.status, each.code),
    )
)
"""Every kind of problem there is, by status."""


CRASHED = Problem(INTERNAL, "The gateway failed. Its operators can find out why by the request id.")


_IN_MONEY = frozenset(policy_name(window, COUNTED_MONEY) for window in Window)


_PER_MINUTE = frozenset(policy_name(Window.MINUTE, counted) for counted in (COUNTED_TASKS, COUNTED_MONEY))


_HEADERS: Mapping[type, Mapping[str, str]] = {
    errors.Unauthenticated: {"WWW-Authenticate": 'Bearer realm="imaging-gateway"'},
    errors.UnsupportedCoding: {"Accept-Encoding": "identity"},
    TooSlow: {"Connection": "close"},  # else a client that trickles on keeps its connection for as long as it likes
}


def to_problem(error: errors.GatewayError) -> Problem:
    """What the caller is told about an error: the closest class in the table decides."""
    kind = next((_TABLE[cls] for cls in type(error).__mro__ if cls in _TABLE), None)
    if kind is None:
        return CRASHED
    extras: dict[str, Any] = {}
    headers: dict[str, str] = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(math.ceil(error.retry_after), 0))
    match error:
        case errors.QuotaDenied():
            kind = _quota_problem({violation.policy for violation in error.violations})
            extras["violated_policies"] = [
                {"policy": each.policy, "limit": _limit(each), "resets_at": _rfc3339(each.resets_at)}
                for each in error.violations
            ]
            headers |= rate_limit_headers(error.limits)
        case errors.InvalidOptions():
            extras["errors"] = [{"field": each.field, "detail": each.detail} for each in error.errors]
        case errors.SubmissionUnknown():
            extras["submission_id"] = error.submission_id
            headers |= REPLAYED if error.replayed else {}
        case errors.UpstreamRejected():
            extras["upstream_reason"] = error.reason
        case errors.RangeNotSatisfiable() if error.content_range:
            headers["Content-Range"] = error.content_range
        case _:
            headers |= next((_HEADERS[cls] for cls in type(error).__mro__ if cls in _HEADERS), {})
    return Problem(kind, error.detail, extras, headers)


def render(problem: Problem, request_id: str) -> tuple[int, dict[str, str], bytes]:
    """The status, headers and body of the answer."""
    document = {
        "type": f"urn:imaging-gateway:problem:{problem.type.code}",
        "title": problem.type.title,
        "status": problem.type.status,
        "detail": problem.detail,
        "instance": request_id,
        "code": problem.type.code,
        **problem.extras,
    }
    headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store", **problem.headers}
    return problem.type.status, headers, msgspec.json.encode(document)


def exception_handlers(logger: FilteringBoundLogger) -> dict[int | type[Exception], Callable[[Any, Any], Any]]:
    """What Litestar does with exceptions, also for addresses and methods it does not know.

    A crash is logged with its traceback and answered without any of it.
    """

    def known(request: Request[Any, Any, Any], error: errors.GatewayError) -> Response[bytes]:
        problem = to_problem(error)
        if problem is CRASHED:
            return crashed(request, error)
        if problem.type is UNAUTHENTICATED and "authorization" in request.headers:
            challenge = problem.headers["WWW-Authenticate"] + ', error="invalid_token"'
            problem = msgspec.structs.replace(problem, headers={**problem.headers, "WWW-Authenticate": challenge})
        return _respond(request, problem)

    def framework(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
        if error.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
            return crashed(request, error)
        return _respond(request, _framework_problem(request, error))

    def undecodable(request: Request[Any, Any, Any], error: UnicodeDecodeError) -> Response[bytes]:
        # Litestar lets this one through for a JSON body; logged, should it ever come from elsewhere.
        logger.warning("request.garbled", exc_info=error)
        return _respond(request, Problem(MALFORMED, "The body of the request is not UTF-8."))

    def crashed(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
        logger.error("request.crashed", exc_info=error)
        return _respond(request, CRASHED)

    def left(*_: object) -> NoReturn:
        # A new one: frames of Litestar hold the other, which would hold them, and with them all that was uploaded.
        raise ClientLeft from None

    return {
        errors.GatewayError: known,
        HTTPException: framework,
        UnicodeDecodeError: undecodable,
        ClientLeft: left,
        Exception: crashed,
    }


def _respond(request: Request[Any, Any, Any], problem: Problem) -> Response[bytes]:
    state = request.scope["state"]
    state[OUTCOME] = problem.type.code
    status, headers, body = render(problem, state.get(REQUEST_ID, ""))
    return Response(body, status_code=status, headers=headers, media_type=headers.pop("Content-Type"))


_FRAMEWORK = {
    HTTPStatus.UNAUTHORIZED: to_problem(errors.Unauthenticated("Send a bearer token.")),
    HTTPStatus.FORBIDDEN: Problem(FORBIDDEN, "This is not allowed."),
    HTTPStatus.NOT_FOUND: Problem(NOT_FOUND, "There is nothing at this address."),
}


def _framework_problem(request: Request[Any, Any, Any], error: HTTPException) -> Problem:
    if problem := _FRAMEWORK.get(HTTPStatus(error.status_code)):
        return problem
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = (error.headers or {}).get("allow", "")
        return Problem(METHOD_NOT_ALLOWED, f"Use one of {allowed}.", headers={"Allow": allowed})
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        uploads = request.headers.get("content-type", "").startswith("multipart/")
        return Problem(IMAGE_TOO_LARGE if uploads else MALFORMED, "The body of the request is too large.")
    if not isinstance(error, ValidationException):
        return Problem(MALFORMED, "The request can't be read.")
    # The detail of a validation error repeats the query, which may hold anything.
    faults = _faults(request, error)
    return to_problem(errors.InvalidOptions(faults)) if faults else Problem(MALFORMED, "The request is not valid.")


_PARAMETER_FAULT = re.compile(r"Missing required \w+ parameter '([^']*)'")


def _faults(request: Request[Any, Any, Any], error: ValidationException) -> list[errors.FieldError]:
    """The faulty fields and parameters, each with what it must be."""
    if missing := _PARAMETER_FAULT.match(error.detail):
        return [errors.FieldError(missing[1], "is required")]
    found: dict[str, errors.FieldError] = {}
    for each in error.extra if isinstance(error.extra, list) else ():
        key = str(each.get("key", _BODY))
        if key == _BODY or each.get("source") == "body":
            found |= {fault.field: fault for fault in _body_faults(request, key)}
        else:
            fault = _parameter_fault(request, key)
            found[fault.field] = fault
    return list(found.values())


_BODY = "data"


def _body_faults(request: Request[Any, Any, Any], key: str) -> list[errors.FieldError]:
    """What is wrong with a body in which something is, at `key` for one."""
    sent = ScopeState.from_scope(request.scope).json
    if sent is Empty or sent is None:
        return [errors.FieldError("body", "is required" if sent is Empty else "must be an object")]
    found = faults_of(sent, request.route_handler.parsed_fn_signature.parameters[_BODY].annotation, "")
    return [
        errors.FieldError(each.field or "body", each.detail.replace("must be a table", "must be an object"))
        for each in found
    ] or [errors.FieldError("body" if key == _BODY else key, "is not what it must be")]


def _parameter_fault(request: Request[Any, Any, Any], name: str) -> errors.FieldError:
    """What a parameter must be, under the name that callers know."""
    parameter = request.route_handler.parsed_fn_signature.parameters[name]
    about = parameter.kwarg_definition
    least, most = (getattr(about, each, None) for each in ("ge", "le"))
    kind = parameter.annotation
    if least is not None or most is not None:
        kind = Annotated[kind, msgspec.Meta(ge=least, le=most)]
    return errors.FieldError(getattr(about, "name", None) or name, wanted_of(kind))


def _quota_problem(policies: set[str]) -> ProblemType:
    if policies == {MAX_ACTIVE}:
        return TOO_MANY_ACTIVE
    return RATE_LIMITED if policies and policies <= _PER_MINUTE else QUOTA_EXCEEDED


def _limit(violation: Violation) -> int | float:
    """The limit in what callers count: tasks, or yuan."""
    return yuan(violation.limit) if violation.policy in _IN_MONEY else violation.limit


def _rfc3339(milliseconds: int | None) -> str | None:
    if milliseconds is None:
        return None
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
