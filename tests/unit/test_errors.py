"""Problem documents of errors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from service.api.errors import PROBLEMS, BodyTimeout, render, to_problem
from service.domain import errors
from service.domain.errors import RateLimit, Violation
from tests.unit.asgi_client import AsgiResponse


def leaf_errors(cls: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    """Return the error classes without subclasses."""
    children = [subclass for subclass in cls.__subclasses__() if subclass.__module__ == errors.__name__]
    if not children:
        yield cls
    for item in children:
        yield from leaf_errors(item)


def make_error(cls: type[errors.GatewayError]) -> errors.GatewayError:
    if cls is errors.InvalidOptions:
        return errors.InvalidOptions([errors.FieldError("scale", "must be a number")])
    if cls is errors.QuotaDenied:
        return make_quota_error(("day-tasks", 5, 1_767_312_000_000))
    if cls is errors.UpstreamRejected:
        return errors.UpstreamRejected("Mend it.", reason="too dark")
    if cls is errors.SubmissionUnknown:
        return errors.SubmissionUnknown("Ask.", submission_id="r1")
    if cls is errors.RangeNotSatisfiable:
        return errors.RangeNotSatisfiable("Mend it.", content_range="bytes */10")
    return cls("Mend it.")


def make_quota_error(*violations: tuple[str, int, int | None], retry_after: float | None = None) -> errors.QuotaDenied:
    return errors.QuotaDenied(
        "Later.", violations=[Violation(*violation) for violation in violations], retry_after=retry_after
    )


STATUS = {
    "MalformedRequest": (400, "malformed-request"),
    "Unauthenticated": (401, "unauthenticated"),
    "BalanceExhausted": (402, "balance-exhausted"),
    "KindNotAllowed": (403, "kind-not-allowed"),
    "TenantDisabled": (403, "tenant-disabled"),
    "TenantReadOnly": (403, "tenant-read-only"),
    "NotFound": (404, "not-found"),
    "Conflict": (409, "conflict"),
    "VersionConflict": (412, "outdated"),
    "ImageTooLarge": (413, "image-too-large"),
    "RangeNotSatisfiable": (416, "range-not-satisfiable"),
    "UnsupportedMediaType": (415, "unsupported-media-type"),
    "UnsupportedCoding": (415, "unsupported-media-type"),
    "InvalidOptions": (422, "invalid-options"),
    "InvalidImage": (422, "invalid-image"),
    "IdempotencyKeyInvalid": (400, "idempotency-key-invalid"),
    "IdempotencyKeyReused": (422, "idempotency-key-reused"),
    "IdempotencyInFlight": (409, "idempotency-in-flight"),
    "QuotaDenied": (429, "quota-exceeded"),
    "UpstreamRejected": (502, "upstream-rejected"),
    "UpstreamInvalidResponse": (502, "upstream-invalid-response"),
    "LedgerUnavailable": (503, "ledger-unavailable"),
    "UpstreamUnavailable": (503, "upstream-unavailable"),
    "AccountMisconfigured": (503, "account-misconfigured"),
    "Overloaded": (503, "overloaded"),
    "SubmissionUnknown": (504, "submission-unknown"),
}


@pytest.mark.parametrize("cls", list(leaf_errors(errors.GatewayError)), ids=lambda cls: cls.__name__)
def test_every_error_is_in_the_table(cls: type[errors.GatewayError]) -> None:
    problem = to_problem(make_error(cls))
    assert (problem.type.status, problem.type.code) == STATUS[cls.__name__]
    assert problem.type in PROBLEMS


def test_subclass_uses_its_closest_base() -> None:
    class ExpiredToken(errors.Unauthenticated):
        pass

    assert to_problem(ExpiredToken("Renew it.")) == to_problem(errors.Unauthenticated("Renew it."))
    assert to_problem(errors.Forbidden("Not for this.")).type.code == "forbidden"


@pytest.mark.parametrize(
    "error", [errors.GatewayError("secret"), errors.UpstreamFault("secret"), errors.Denial("secret")]
)
def test_unknown_error_is_a_silent_500(error: errors.GatewayError) -> None:
    status, _, body = render(to_problem(error), "r")
    assert status == 500
    assert b"secret" not in body


def test_document_members() -> None:
    _, headers, body = render(to_problem(make_error(errors.SubmissionUnknown)), "req-1")
    response = AsgiResponse(504, headers, body)
    assert headers["Content-Type"] == "application/problem+json"
    assert response.json() == {
        "type": "urn:imaging-gateway:problem:submission-unknown",
        "title": "Submission unknown",
        "status": 504,
        "detail": "Ask.",
        "instance": "req-1",
        "code": "submission-unknown",
        "submission_id": "r1",
    }


def test_extra_members() -> None:
    assert to_problem(make_error(errors.InvalidOptions)).extras == {
        "errors": [{"field": "scale", "detail": "must be a number"}]
    }
    assert to_problem(make_error(errors.UpstreamRejected)).extras == {"upstream_reason": "too dark"}
    problem = to_problem(make_quota_error(("day-tasks", 5, 1_767_312_000_000), ("total-money", 950, None)))
    assert AsgiResponse(*render(problem, "r")).json()["violated_policies"] == [
        {"policy": "day-tasks", "limit": 5, "resets_at": "2026-01-02T00:00:00Z"},
        {"policy": "total-money", "limit": 9.5, "resets_at": None},
    ]


@pytest.mark.parametrize(
    ("policies", "code"),
    [
        (["max-active"], "too-many-active-tasks"),
        (["minute-tasks"], "rate-limited"),
        (["minute-tasks", "minute-money"], "rate-limited"),
        (["minute-tasks", "max-active"], "quota-exceeded"),
        (["minute-tasks", "day-tasks"], "quota-exceeded"),
        (["total-money"], "quota-exceeded"),
    ],
)
def test_denial_code_by_policy(policies: list[str], code: str) -> None:
    assert to_problem(make_quota_error(*[(policy, 1, None) for policy in policies])).type.code == code


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.0, "2"), (-3.5, "0")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    assert to_problem(errors.Overloaded("Later.", retry_after=seconds)).headers == {"Retry-After": header}


def test_denial_has_rate_limit_headers() -> None:
    limits = [RateLimit("day-tasks", 5, 0, 86_400, 60), RateLimit("total-tasks", 100, 7, None, None)]
    headers = to_problem(errors.QuotaDenied("Later.", violations=[], limits=limits)).headers
    assert headers == {
        "RateLimit-Policy": '"day-tasks";q=5;w=86400, "total-tasks";q=100',
        "RateLimit": '"day-tasks";r=0;t=60, "total-tasks";r=7',
    }


def test_slow_client_is_disconnected() -> None:
    problem = to_problem(BodyTimeout("Too slow."))
    assert (problem.type.code, problem.headers) == ("malformed-request", {"Connection": "close"})
