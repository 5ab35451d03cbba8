"""Everything that can go wrong in a way a caller is told about.

    GatewayError
    ├── CallerFault                 the caller can mend the request
    │   ├── MalformedRequest
    │   ├── Unauthenticated
    │   ├── Forbidden
    │   │   ├── KindNotAllowed
    │   │   └── TenantDisabled
    │   ├── NotFound
    │   ├── Conflict                an operator's change that would strand something
    │   ├── Outdated                it was made for a version that is not the newest any more
    │   ├── ImageTooLarge
    │   ├── RangeNotSatisfiable
    │   ├── UnsupportedMediaType
    │   │   └── UnsupportedCoding   of the request's body
    │   ├── InvalidOptions          names every faulty field
    │   ├── InvalidImage
    │   ├── IdempotencyKeyInvalid
    │   ├── IdempotencyKeyReused    for something else
    │   └── IdempotencyInFlight     the first submission under the key has no outcome yet
    ├── Denied                      the request is fine, but may not be spent on now
    │   ├── QuotaDenied             a policy of the tenant
    │   └── BalanceExhausted        the upstream account can't pay
    ├── UpstreamFault
    │   ├── UpstreamRejected        it refused this submission, nothing was charged
    │   ├── UpstreamInvalidResponse it answered a read with nonsense
    │   ├── UpstreamUnavailable     it can't be reached, or not now; nothing was charged
    │   ├── AccountMisconfigured    it does not know the tenant's account
    │   └── SubmissionUnknown       it was sent, and nobody knows what became of it
    └── Unavailable                 the gateway's own trouble, it passes
        ├── LedgerUnavailable
        └── Overloaded

The message of an error is public: it says what to do. Secrets, figures of accounts and the upstream's
addresses never belong in it. Which HTTP answer each becomes is decided in one table, `service.api.problems`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.domain.reservation import Violation
    from service.domain.windows import RateLimit


class GatewayError(Exception):
    """The root: `detail` tells the caller what to do, `retry_after` (seconds) when it may help."""

    def __init__(self, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after


class CallerFault(GatewayError):
    """The caller can mend the request."""


class MalformedRequest(CallerFault):
    """The request can't be read: broken multipart, a body that stopped half-way, a wrong query."""


class Unauthenticated(CallerFault):
    """No token, or one that is wrong, expired or revoked."""


class Forbidden(CallerFault):
    """The token is good, but not for this."""


class KindNotAllowed(Forbidden):
    """The tenant may not submit tasks of this kind."""


class TenantDisabled(Forbidden):
    """The tenant was switched off by an operator."""


class NotFound(CallerFault):
    """There is no such thing, or it belongs to somebody else: the two are not told apart."""


class Conflict(CallerFault):
    """An operator's change was refused because of what stands in its way."""


class Outdated(CallerFault):
    """What was to be changed has been changed by somebody else since it was read."""


class ImageTooLarge(CallerFault):
    """The image exceeds the limit on bytes or on pixels."""


class RangeNotSatisfiable(CallerFault):
    """A result has no bytes in the range asked for; `content_range` says how many it has, in HTTP's words."""

    def __init__(self, detail: str, *, content_range: str | None) -> None:
        super().__init__(detail)
        self.content_range = content_range


class UnsupportedMediaType(CallerFault):
    """The request is of the wrong media type, or the image is by its bytes."""


class UnsupportedCoding(UnsupportedMediaType):
    """The body of the request is compressed, or encoded otherwise."""


class InvalidImage(CallerFault):
    """The bytes claim to be an image that they are not."""


class IdempotencyKeyInvalid(CallerFault):
    """The idempotency key is malformed, too long, or given more than once."""


class IdempotencyKeyReused(CallerFault):
    """The idempotency key was used before for something else."""


class IdempotencyInFlight(CallerFault):
    """What was submitted first under the idempotency key has no outcome yet."""


class FieldError(Exception):
    """One faulty field, and what it must be instead."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class InvalidOptions(CallerFault):
    """At least one field is unknown, repeated, mistyped or out of range; `errors` names each of them."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = tuple(errors)


class Denied(GatewayError):
    """The request is in order, but may not be spent on now."""


class QuotaDenied(Denied):
    """At least one policy of the tenant refused; `violations` names each that did, `limits` what is left of all."""

    def __init__(
        self,
        detail: str,
        *,
        violations: Sequence[Violation],
        limits: Sequence[RateLimit] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.violations = tuple(violations)
        self.limits = tuple(limits)


class BalanceExhausted(Denied):
    """No account of the tenant can pay at the moment."""


class UpstreamFault(GatewayError):
    """The upstream, or the way to it, failed."""


class UpstreamRejected(UpstreamFault):
    """The upstream refused the submission: nothing was charged. `reason` is in its own words."""

    def __init__(self, detail: str, *, reason: str) -> None:
        super().__init__(detail)
        self.reason = reason


class UpstreamInvalidResponse(UpstreamFault):
    """The upstream answered a read with something that can't be used."""


class UpstreamUnavailable(UpstreamFault):
    """The upstream can't be reached, or can't take or give this now: nothing was charged."""


class AccountMisconfigured(UpstreamFault):
    """The tenant's account is not known upstream, or the tenant has none: an operator has to act."""


class SubmissionUnknown(UpstreamFault):
    """The submission was sent and no usable answer came: it may have been charged and is never sent again.

    `replayed` if that is what became of an earlier one under the same idempotency key.
    """

    def __init__(self, detail: str, *, submission_id: str, replayed: bool = False) -> None:
        super().__init__(detail)
        self.submission_id = submission_id
        self.replayed = replayed


class Unavailable(GatewayError):
    """The gateway itself can't serve this now."""


class LedgerUnavailable(Unavailable):
    """Redis is away, so nothing can be reserved."""


class Overloaded(Unavailable):
    """Too much is in flight already."""
