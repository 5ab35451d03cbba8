"""What a caller is told when a submission is not accepted."""

from __future__ import annotations

from service.domain.availability import PROBE_INTERVAL
from service.domain.errors import (
    AccountMisconfigured,
    BalanceExhausted,
    GatewayError,
    IdempotencyInFlight,
    IdempotencyKeyReused,
    QuotaDenied,
    SubmissionUnknown,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.domain.ledger import NoAccount, PolicyDenied, RateLimit
from service.domain.reasons import in_english
from service.usecases.ports import SubmitOutcome, Submitted

CONNECT_AGAIN_AFTER = 5.0
BUSY_AGAIN_AFTER = 5.0
"""Where the upstream itself does not say when."""
IN_FLIGHT_AGAIN_AFTER = 2.0


def denied(verdict: PolicyDenied, limits: tuple[RateLimit, ...]) -> QuotaDenied:
    names = ", ".join(each.policy for each in verdict.violations)
    resets = [each.resets_at for each in verdict.violations]
    known = [each for each in resets if each is not None]
    wait = (max(known) - verdict.now) / 1000 if known and not _never_resets(verdict) else None
    return QuotaDenied(
        f"Not within the limits of this tenant: {names}.",
        violations=verdict.violations,
        limits=limits,
        retry_after=wait,
    )


def _never_resets(verdict: PolicyDenied) -> bool:
    """Whether a policy on the total refused, which no waiting helps."""
    return any(each.policy.startswith("total-") for each in verdict.violations)


def no_account(verdict: NoAccount) -> GatewayError:
    return misconfigured() if verdict.look_at is None else _exhausted((verdict.look_at - verdict.now) / 1000)


def _exhausted(seconds: float) -> BalanceExhausted:
    return BalanceExhausted(
        "The upstream account behind this tenant can't pay at the moment. Its owner has to top it up; it is "
        "looked at again after Retry-After.",
        retry_after=seconds,
    )


def misconfigured() -> AccountMisconfigured:
    return AccountMisconfigured(
        "The upstream account behind this tenant can't be used. The operators of the gateway have to act."
    )


def refusal(sent: Submitted, reservation: str) -> GatewayError:
    """What a caller is told of an outcome that is not an acceptance."""
    if sent.outcome is SubmitOutcome.REJECTED:
        gist = in_english(sent.reason) or sent.reason or "It gave no reason."
        return UpstreamRejected(
            f"The upstream refused this submission, and nothing was charged: {gist}", reason=sent.reason
        )
    if sent.outcome is SubmitOutcome.EXHAUSTED:
        return _exhausted(PROBE_INTERVAL / 1000)
    if sent.outcome in {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED}:
        return misconfigured()
    if sent.outcome is SubmitOutcome.BUSY:
        return UpstreamUnavailable(
            "The upstream takes no more submissions at the moment. Nothing was charged; try again after Retry-After.",
            retry_after=BUSY_AGAIN_AFTER if sent.retry_after is None else sent.retry_after,
        )
    if sent.outcome is SubmitOutcome.NOT_SENT:
        return UpstreamUnavailable(
            "The upstream can't be reached. Nothing was sent; try again.", retry_after=CONNECT_AGAIN_AFTER
        )
    return unknown(reservation)


def unknown(reservation: str, *, replayed: bool = False) -> SubmissionUnknown:
    return SubmissionUnknown(
        "The image was sent, but no usable answer came. It may have been charged and is not sent again. "
        f"GET /v1/submissions/{reservation} says what is known of it: look there before you submit it anew.",
        submission_id=reservation,
        replayed=replayed,
    )


def in_flight() -> IdempotencyInFlight:
    return IdempotencyInFlight(
        "What was first submitted under this Idempotency-Key has no outcome yet. Send the same again after "
        "Retry-After to be told of it.",
        retry_after=IN_FLIGHT_AGAIN_AFTER,
    )


def key_reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        "Something else was submitted under this Idempotency-Key before. Take a new key for each submission, and an "
        "old one only to send the very same again."
    )
