"""Submissions: reserve, send, settle. Money is spent nowhere else.

The order makes it safe: nothing is sent that is not reserved; what was sent is settled, even if the client has left or
Redis is away by then; and another account is tried only after an outcome that certainly cost nothing.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import msgspec
import structlog
from msgspec import Struct

from service.crypto import TaskIdCodec
from service.domain import errors
from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.errors import RateLimit
from service.domain.ledger import (
    AccountStatus,
    Balance,
    Grant,
    Idempotency,
    InFlight,
    NoAccount,
    PolicyDenial,
    Replay,
    ReservationState,
    Verdict,
    compute_rate_limits,
    digest_submission,
)
from service.domain.tasks import Kind, Options, State, Task, TaskReference, new_task
from service.domain.tenants import Account, Tenant, TenantStatus
from service.telemetry import tracing
from service.telemetry.metrics import Metrics
from service.usecases.background import TaskSupervisor
from service.usecases.caches import CachedRegistry
from service.usecases.ports import (
    Image,
    Ledger,
    NewTask,
    ReserveRequest,
    Settlement,
    SubmitOutcome,
    SubmitResult,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import SettlementQueue

_log = structlog.get_logger(__name__)

CONNECT_RETRY_SECONDS = 5.0
BUSY_RETRY_SECONDS = 5.0
"""Used if the upstream sends no `Retry-After`."""
IN_FLIGHT_RETRY_SECONDS = 2.0
_UNKNOWN_RESULT = SubmitResult(outcome=SubmitOutcome.UNKNOWN)
LEASE_MARGIN_SECONDS = 60.0
"""Sending ends this long before the lease, so that its outcome is settled before it counts as unknown."""

_FAILOVER_STATUS = {
    SubmitOutcome.EXHAUSTED: AccountStatus.EXHAUSTED,
    SubmitOutcome.INVALID_ACCOUNT: AccountStatus.INVALID,
    SubmitOutcome.MISCONFIGURED: None,
    SubmitOutcome.NOT_SENT: None,
}

_RESERVATION_STATES = {
    SubmitOutcome.ACCEPTED: ReservationState.ACCEPTED,
    SubmitOutcome.UNKNOWN: ReservationState.UNKNOWN,
    SubmitOutcome.MISCONFIGURED: ReservationState.NOT_SENT,
    SubmitOutcome.NOT_SENT: ReservationState.NOT_SENT,
}


class Submission(Struct, frozen=True):
    """An accepted submission: its task as of `known_at` (server time, ms) and the rest of the tenant's limits.

    A replay is an earlier submission under the same idempotency key, with its task as it is now.
    """

    task: Task
    known_at: int
    rate_limits: tuple[RateLimit, ...]
    is_replay: bool = False


class _PendingSubmission(Struct, frozen=True):
    """A reservation before its settlement; sending ends at `deadline_at` (monotonic).

    `retarget_unconfirmed`: a change of account was not answered, so the reservation may be on the next account, though
    nothing was sent there. `options` and `metadata` are encoded before sending, when errors are still harmless.
    """

    request: ReserveRequest
    options: msgspec.Raw
    metadata: msgspec.Raw
    account: Account
    created_at: int
    deadline_at: float
    retarget_unconfirmed: bool = False


@dataclass(kw_only=True, eq=False, repr=False)
class Submitter:
    ledger: Ledger
    settlements: SettlementQueue
    tasks: TaskStore
    upstream: Upstream
    registry: CachedRegistry
    task_ids: TaskIdCodec
    supervisor: TaskSupervisor
    metrics: Metrics

    def check_allowed(self, tenant: Tenant, kind: Kind) -> None:
        """Raise TenantReadOnly or KindNotAllowed, which needs no image."""
        if tenant.state is not TenantStatus.ACTIVE:
            raise errors.TenantReadOnly("This tenant may not submit. Ask the operators of the gateway.")
        if not tenant.can_submit(kind):
            raise errors.KindNotAllowed(f"This tenant may not submit {kind} tasks. Ask the operators of the gateway.")

    async def submit(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image: Image,
        *,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
        image_url: str | None = None,
    ) -> Submission:
        """Submit once, also if called again with the same idempotency key; goes on if the client leaves.

        Events go to `webhook_url`, or to the tenant's default. The image is from `image_url` if given. Raises the
        errors of `Denial` and `UpstreamFault`, IdempotencyKeyReused, IdempotencyInFlight and LedgerUnavailable.
        """
        self.check_allowed(tenant, options.kind)
        idempotency = (
            None
            if idempotency_key is None
            else digest_submission(idempotency_key, options, metadata, image.sha256, webhook_url, image_url)
        )
        work = self.supervisor.spawn(self._submit(tenant, options, metadata, image, idempotency, webhook_url))
        try:
            return await asyncio.shield(work)
        finally:
            del work  # breaks the cycle error -> traceback -> this frame, which would keep the image

    async def find_replay(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image_url: str,
        *,
        idempotency_key: str,
        webhook_url: str | None,
    ) -> Submission | None:
        """Return the earlier submission of the same request, whose image then need not be fetched again.

        It may be gone from its URL by now. None leaves the decision to `submit`, which compares the image. Raises
        IdempotencyInFlight, SubmissionUnknown and LedgerUnavailable.
        """
        idempotency = digest_submission(idempotency_key, options, metadata, b"", webhook_url, image_url)
        verdict, snapshot = await self.ledger.find_replay(tenant.id, idempotency)
        match verdict:
            case Replay():
                limits = compute_rate_limits(tenant.policy, snapshot.state, snapshot.now)
                return await self._load_replay(verdict, limits)
            case InFlight():
                raise _in_flight()
        return None

    async def _submit(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image: Image,
        idempotency: Idempotency | None,
        webhook_url: str | None,
    ) -> Submission:
        accounts = self.registry.current.accounts_of(tenant)
        request = ReserveRequest(
            secrets.token_hex(16), tenant.id, tuple(account.id for account in accounts), options.kind, idempotency
        )
        encoded = msgspec.Raw(msgspec.json.encode(options)), msgspec.Raw(msgspec.json.encode(metadata))
        traceparent = tracing.trace_headers().get("traceparent")
        requested_at = time.monotonic()
        try:
            verdict, snapshot = await self.ledger.reserve(request)
            limits = compute_rate_limits(tenant.policy, snapshot.state, snapshot.now)
        except BaseException:
            self.settlements.write_tombstone(request)
            raise
        if isinstance(verdict, Replay):
            return await self._load_replay(verdict, limits)
        grant = self._require_grant(verdict, request, limits)
        account = next(candidate for candidate in accounts if candidate.id == grant.account)
        deadline = requested_at + (grant.lease_expires_at - grant.now) / 1000 - LEASE_MARGIN_SECONDS
        pending = _PendingSubmission(request, *encoded, account, grant.now, deadline)
        try:
            result, pending = await self._send_with_failover(pending, accounts, options, image)
            task = self._make_task(pending, result.upstream_id) if result.outcome is SubmitOutcome.ACCEPTED else None
        except asyncio.CancelledError:  # the process ends, and its drain period is over
            await self.settlements.settle(self._make_settlement(pending, _UNKNOWN_RESULT))
            raise
        except Exception:  # noqa: BLE001 - the image may have been sent already
            _log.exception("submission.error", reservation=pending.request.reservation)
            result, task = _UNKNOWN_RESULT, None
        with self._log_errors(request):
            self.metrics.submissions.labels(options.kind, result.outcome).inc()
        if task is None:
            await self.settlements.settle(self._make_settlement(pending, result))
            raise self._count_denial(request, _error_of(result, request.reservation))
        draft = NewTask(task.id, task.options, task.metadata, webhook_url or tenant.webhook.url, traceparent)
        with suppress(asyncio.CancelledError):  # the process ends; an acceptance is answered all the same
            await self.settlements.settle(self._make_settlement(pending, result, draft))
        with self._log_errors(request):
            self.metrics.tasks_submitted.labels(self.metrics.label_names.of_tenant(tenant.id), options.kind).inc()
        return Submission(task, task.created_at, limits)

    @contextmanager
    def _log_errors(self, request: ReserveRequest) -> Iterator[None]:
        try:
            yield
        except Exception:  # noqa: BLE001 - an error in a metric must not change the response
            _log.exception("submission.response_error", reservation=request.reservation)

    def _require_grant(self, verdict: Verdict, request: ReserveRequest, limits: tuple[RateLimit, ...]) -> Grant:
        """Return a grant. Raises the caller's error for any other verdict."""
        match verdict:
            case PolicyDenial():
                name = self.metrics.label_names.of_tenant(request.tenant)
                for violation in verdict.violations:
                    self.metrics.quota_denials.labels(name, violation.policy).inc()
                raise _quota_denied(verdict, limits)
            case NoAccount():
                raise self._count_denial(request, _no_account(verdict))
            case InFlight():
                raise _in_flight()
            case Grant():
                return verdict
            case _:
                raise errors.IdempotencyKeyReused(
                    "This Idempotency-Key was used for other content. Use a new key for each submission, and an old "
                    "one only to repeat the same submission."
                )

    def _count_denial(self, request: ReserveRequest, error: errors.GatewayError) -> errors.GatewayError:
        if isinstance(error, errors.BalanceExhausted):
            self.metrics.balance_denials.labels(self.metrics.label_names.of_tenant(request.tenant)).inc()
        return error

    async def _load_replay(self, verdict: Replay, limits: tuple[RateLimit, ...]) -> Submission:
        self.metrics.idempotent_replays.inc()
        stored = await self.tasks.get(verdict.reservation) if verdict.state is ReservationState.ACCEPTED else None
        if stored is None:
            raise _unknown_outcome(verdict.reservation, is_replay=True)
        return Submission(*stored, limits, is_replay=True)

    async def _send_with_failover(
        self, pending: _PendingSubmission, accounts: Sequence[Account], options: Options, image: Image
    ) -> tuple[SubmitResult, _PendingSubmission]:
        """Send to one account after the other while outcomes certainly cost nothing."""
        while True:
            timeout = pending.deadline_at - time.monotonic()
            result = await self.upstream.submit(pending.account, options, image, timeout_seconds=timeout)
            if result.outcome not in _FAILOVER_STATUS:
                return result, pending
            _log.warning("account.failover", account=pending.account.name, outcome=result.outcome)
            next_accounts = accounts[accounts.index(pending.account) + 1 :]
            if not next_accounts:
                return result, pending
            request = msgspec.structs.replace(pending.request, accounts=tuple(account.id for account in next_accounts))
            account_status = _FAILOVER_STATUS[result.outcome]
            try:
                verdict = await self.ledger.change_account(request, pending.account.id, account_status)
            except errors.LedgerUnavailable:
                return result, msgspec.structs.replace(pending, retarget_unconfirmed=True)
            if not isinstance(verdict, Grant):
                return result, pending
            account = next(candidate for candidate in next_accounts if candidate.id == verdict.account)
            pending = msgspec.structs.replace(pending, account=account)

    def _make_settlement(
        self, pending: _PendingSubmission, result: SubmitResult, draft: NewTask | None = None
    ) -> Settlement:
        """Build the settlement. If the account is uncertain, neither figures nor refusal are applied to it."""
        return Settlement(
            reservation=pending.request.reservation,
            tenant=pending.request.tenant,
            account=pending.account.id,
            kind=pending.request.kind,
            created_at=pending.created_at,
            outcome=_RESERVATION_STATES.get(result.outcome, ReservationState.REFUSED),
            balance=Balance() if pending.retarget_unconfirmed else result.balance,
            account_status=None if pending.retarget_unconfirmed else _FAILOVER_STATUS.get(result.outcome),
            new_task=draft,
            idempotency=pending.request.idempotency,
        )

    def _make_task(self, pending: _PendingSubmission, upstream_id: str) -> Task:
        request = pending.request
        reference = TaskReference(
            request.tenant, pending.account.id, request.kind, pending.created_at, request.reservation, upstream_id
        )
        return new_task(
            reference,
            self.task_ids.encode(reference),
            state=State.QUEUED,
            options=pending.options,
            metadata=pending.metadata,
            version=1,
        )


def _in_flight() -> errors.IdempotencyInFlight:
    return errors.IdempotencyInFlight(
        "The first submission under this Idempotency-Key has no outcome yet. Send the same again after Retry-After.",
        retry_after=IN_FLIGHT_RETRY_SECONDS,
    )


def _quota_denied(verdict: PolicyDenial, limits: tuple[RateLimit, ...]) -> errors.QuotaDenied:
    names = ", ".join(violation.policy for violation in verdict.violations)
    resets = [violation.resets_at for violation in verdict.violations if violation.resets_at is not None]
    never_resets = any(violation.policy.startswith("total-") for violation in verdict.violations)
    wait = (max(resets) - verdict.now) / 1000 if resets and not never_resets else None
    return errors.QuotaDenied(
        f"Not within the limits of this tenant: {names}.",
        violations=verdict.violations,
        limits=limits,
        retry_after=wait,
    )


def _no_account(verdict: NoAccount) -> errors.GatewayError:
    if verdict.retry_at is None:
        return _account_misconfigured()
    return _balance_exhausted((verdict.retry_at - verdict.now) / 1000)


def _balance_exhausted(seconds: float) -> errors.BalanceExhausted:
    return errors.BalanceExhausted(
        "The upstream account behind this tenant can't pay at the moment. Its owner has to top it up; try "
        "again after Retry-After.",
        retry_after=seconds,
    )


def _account_misconfigured() -> errors.AccountMisconfigured:
    return errors.AccountMisconfigured(
        "The upstream account behind this tenant can't be used. The operators of the gateway have to act."
    )


def _error_of(result: SubmitResult, reservation: str) -> errors.GatewayError:
    """Return the caller's error for an outcome other than an acceptance."""
    if result.outcome is SubmitOutcome.REJECTED:
        reason = result.reason_en or result.reason or "It gave no reason."
        return errors.UpstreamRejected(
            f"The upstream refused this submission, and nothing was charged: {reason}", reason=result.reason
        )
    if result.outcome is SubmitOutcome.EXHAUSTED:
        return _balance_exhausted(PROBE_INTERVAL_MS / 1000)
    if result.outcome in {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED}:
        return _account_misconfigured()
    if result.outcome is SubmitOutcome.BUSY:
        return errors.UpstreamUnavailable(
            "The upstream takes no more submissions at the moment. Nothing was charged; try again after Retry-After.",
            retry_after=BUSY_RETRY_SECONDS if result.retry_after_seconds is None else result.retry_after_seconds,
        )
    if result.outcome is SubmitOutcome.NOT_SENT:
        return errors.UpstreamUnavailable(
            "The upstream can't be reached. Nothing was sent; try again.", retry_after=CONNECT_RETRY_SECONDS
        )
    return _unknown_outcome(reservation)


def _unknown_outcome(reservation: str, *, is_replay: bool = False) -> errors.SubmissionUnknown:
    return errors.SubmissionUnknown(
        "The image was sent, but no usable response came. It may have been charged and is not sent again: a request "
        f"with the same Idempotency-Key, and GET /v1/submissions/{reservation}, return its outcome. Check it before "
        "you submit the image under another key or without one.",
        submission_id=reservation,
        is_replay=is_replay,
    )
