"""Errors of the client: problem documents as types, and failures without one.

GatewayError
├── NotConfigured             no address or token, or an address that is none
├── NoConnection              nothing was sent
├── ConnectionLost            no response: a submission may have been accepted
├── UnexpectedResponse        not of a gateway, or damaged: a submission may have been accepted
├── WaitTimeout, TaskFailed   of a task
├── NoResult                  of this name
├── InvalidWebhook
└── ProblemError              a problem document
    ├── InvalidRequest        400, 405, 413, 415, 416, 422, 431
    │   └── ImageUnreachable  422: the gateway can't fetch the image from its URL
    ├── Unauthenticated       401
    ├── BalanceExhausted      402
    ├── Forbidden             403
    ├── NotFound              404
    ├── SubmissionInFlight    409
    ├── QuotaExceeded         429
    ├── UpstreamRejected      502
    ├── SubmissionUnknown     504: it may have been charged
    └── GatewayUnavailable    500, 502, 503
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime

import msgspec

from service.client.models import Task


def single_line(text: str) -> str:
    """Join text onto one line, without control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


class GatewayError(Exception):
    """A call failed; the message is one line. `idempotency_key` is that of a submission, to repeat it with."""

    idempotency_key: str | None = None

    def __init__(self, message: str) -> None:
        super().__init__(single_line(message))


class NotConfigured(GatewayError):
    """The address or the token is missing or unusable."""


class NoConnection(GatewayError):
    """No connection could be made: nothing was sent."""


class ConnectionLost(GatewayError):
    """The connection ended, or the time ran out, before a whole response came."""


class UnexpectedResponse(GatewayError):
    """A response that no gateway sends; `status` is that of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class WaitTimeout(GatewayError):
    """The task has not ended in time, and continues."""

    def __init__(self, task: Task) -> None:
        super().__init__(f"{task.id} has not ended yet, it is {task.state}")
        self.task = task


class TaskFailed(GatewayError):
    """The task has ended without a result."""

    def __init__(self, task: Task) -> None:
        reason = task.error.detail if task.error and task.error.detail else "no reason is given"
        super().__init__(f"the task failed: {reason}")
        self.task = task


class NoResult(GatewayError):
    """The task has no result, or none of this name."""


class InvalidWebhook(GatewayError):
    """The signature or the time of a webhook is wrong: it may come from anyone."""


class FieldError(msgspec.Struct, frozen=True):
    field: str
    detail: str


class Violation(msgspec.Struct, frozen=True):
    """A policy that refused a submission."""

    policy: str
    limit: int | float
    resets_at: str | None = None


class Problem(msgspec.Struct, frozen=True):
    """A problem document (RFC 9457)."""

    title: str
    detail: str = ""
    code: str = ""
    instance: str = ""
    """The id of the request, for questions to the operators."""
    errors: tuple[FieldError, ...] = ()
    violated_policies: tuple[Violation, ...] = ()
    submission_id: str = ""
    upstream_reason: str = ""
    reason: str = ""


class ProblemError(GatewayError):
    """A problem document; `retry_after` in seconds, None without that header."""

    def __init__(self, status: int, problem: Problem, retry_after: float | None = None) -> None:
        super().__init__(": ".join(filter(None, (problem.title, problem.detail))))
        self.status = status
        self.problem = problem
        self.retry_after = retry_after

    @property
    def code(self) -> str:
        return self.problem.code


class InvalidRequest(ProblemError):
    """The caller can correct the request; `problem.errors` has the fields."""


class ImageUnreachable(InvalidRequest):
    """The image can't be fetched from its `image_url`, for `problem.reason`; nothing was charged."""


class Unauthenticated(ProblemError):
    """The token is missing or not valid."""


class BalanceExhausted(ProblemError):
    """No upstream account of the tenant can pay at the moment."""


class Forbidden(ProblemError):
    """The token does not permit it."""


class NotFound(ProblemError):
    """It does not exist, or belongs to another tenant."""


class SubmissionInFlight(ProblemError):
    """The first submission under this key has no outcome yet."""


class QuotaExceeded(ProblemError):
    """`problem.violated_policies` refused."""


class UpstreamRejected(ProblemError):
    """The upstream refused the image, for `problem.upstream_reason`; nothing was charged."""


class GatewayUnavailable(ProblemError):
    """The gateway or the upstream can't serve this now; nothing was charged."""


class SubmissionUnknown(ProblemError):
    """The image was sent and no response came: it may have been charged.

    The same key never sends it again. `get_submission(problem.submission_id)` has the outcome once it is known.
    """


_BY_CODE: Mapping[str, type[ProblemError]] = {
    "idempotency-in-flight": SubmissionInFlight,
    "image-unreachable": ImageUnreachable,
    "upstream-rejected": UpstreamRejected,
    "submission-unknown": SubmissionUnknown,
}
_BY_STATUS: Mapping[int, type[ProblemError]] = {
    401: Unauthenticated,
    402: BalanceExhausted,
    403: Forbidden,
    404: NotFound,
    429: QuotaExceeded,
}


def problem_error(status: int, content: bytes, retry_after: float | None) -> GatewayError:
    """Return the error of a response that is no success."""
    try:
        problem = msgspec.json.decode(content, type=Problem)
    except msgspec.DecodeError:
        return UnexpectedResponse(f"HTTP {status} without a problem document: is this a gateway?", status)
    default = GatewayUnavailable if status >= 500 else InvalidRequest
    kind = _BY_CODE.get(problem.code) or _BY_STATUS.get(status, default)
    return kind(status, problem, retry_after)


def may_be_served(error: Exception) -> bool:
    """Return whether the request that failed may have been served: a submission may have been charged."""
    if isinstance(error, UnexpectedResponse):  # a damaged acceptance, or a proxy that got no answer
        return error.status < 300 or error.status >= 500 or error.status == 408
    return isinstance(error, ConnectionLost | SubmissionInFlight | SubmissionUnknown)


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds that a header asks for, in seconds or as a date; None if it is missing or invalid."""
    if value is None:
        return None
    if value.isdecimal():
        return float(value)
    with suppress(ValueError):
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0)
    return None
