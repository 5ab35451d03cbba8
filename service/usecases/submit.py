"""Submissions: reserve, send, settle."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.errors import (
    AccountMisconfigured,
    BalanceExhausted,
    GatewayError,
    IdempotencyInFlight,
    IdempotencyKeyReused,
    KindNotAllowed,
    LedgerUnavailable,
    QuotaDenied,
    SubmissionUnknown,
    TenantDisabled,
    UpstreamRejected,
    UpstreamUnavailable,
)
from service.domain.ledger import (
    AccountStatus,
    Balance,
    Grant,
    InFlight,
    NoAccount,
    PolicyDenial,
    RateLimit,
    Replay,
    ReservationState,
    Verdict,
    compute_rate_limits,
    digest_submission,
)
from service.domain.tasks import Cost, CostBasis, Kind, Options, State, Task, TaskIdCodec, TaskReference
from service.domain.tenants import Account, Tenant, TenantPolicy
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.background import TaskSupervisor
from service.usecases.ports import (
    Image,
    Ledger,
    NewTask,
    RegistryView,
    ReserveRequest,
    Settlement,
    SubmitOutcome,
    SubmitResult,
    TaskStore,
    Upstream,
)
from service.usecases.settlement import SettlementQueue

CONNECT_RETRY_SECONDS = 5.0


BUSY_RETRY_SECONDS = 5.0
"""Where the upstream itself does not say when."""


IN_FLIGHT_RETRY_SECONDS = 2.0


def _quota_denied(verdict: PolicyDenial, limits: tuple[RateLimit, ...]) -> QuotaDenied:
    names = ", ".join(each.policy for each in verdict.violations)
    resets = [each.resets_at for each in verdict.violations]
    known = [each for each in resets if each is not None]
    wait = (max(known) - verdict.now) / 1000 if known and not _has_total_violation(verdict) else None
    return QuotaDenied(
        f"Not within the limits of this tenant: {names}.",
        violations=verdict.violations,
        limits=limits,
        retry_after=wait,
    )


def _has_total_violation(verdict: PolicyDenial) -> bool:
    """Whether a policy on the total refused, which no waiting helps."""
    return any(each.policy.startswith("total-") for each in verdict.violations)


def _no_account(verdict: NoAccount) -> GatewayError:
    return (
        _account_misconfigured()
        if verdict.retry_at is None
        else _balance_exhausted((verdict.retry_at - verdict.now) / 1000)
    )


def _balance_exhausted(seconds: float) -> BalanceExhausted:
    return BalanceExhausted(
        "The upstream account behind this tenant can't pay at the moment. Its owner has to top it up; it is "
        "looked at again after Retry-After.",
        retry_after=seconds,
    )


def _account_misconfigured() -> AccountMisconfigured:
    return AccountMisconfigured(
        "The upstream account behind this tenant can't be used. The operators of the gateway have to act."
    )


def _error_of(result: SubmitResult, reservation: str) -> GatewayError:
    """What a caller is told of an outcome that is not an acceptance."""
    if result.outcome is SubmitOutcome.REJECTED:
        gist = result.reason_en or result.reason or "It gave no reason."
        return UpstreamRejected(
            f"The upstream refused this submission, and nothing was charged: {gist}", reason=result.reason
        )
    if result.outcome is SubmitOutcome.EXHAUSTED:
        return _balance_exhausted(PROBE_INTERVAL_MS / 1000)
    if result.outcome in {SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.REDIRECTED}:
        return _account_misconfigured()
    if result.outcome is SubmitOutcome.BUSY:
        return UpstreamUnavailable(
            "The upstream takes no more submissions at the moment. Nothing was charged; try again after Retry-After.",
            retry_after=BUSY_RETRY_SECONDS if result.retry_after_seconds is None else result.retry_after_seconds,
        )
    if result.outcome is SubmitOutcome.NOT_SENT:
        return UpstreamUnavailable(
            "The upstream can't be reached. Nothing was sent; try again.", retry_after=CONNECT_RETRY_SECONDS
        )
    return _unknown_outcome(reservation)


def _unknown_outcome(reservation: str, *, is_replay: bool = False) -> SubmissionUnknown:
    return SubmissionUnknown(
        "The image was sent, but no usable answer came. It may have been charged and is not sent again. "
        f"GET /v1/submissions/{reservation} says what is known of it: look there before you submit it anew.",
        submission_id=reservation,
        is_replay=is_replay,
    )


def _in_flight() -> IdempotencyInFlight:
    return IdempotencyInFlight(
        "What was first submitted under this Idempotency-Key has no outcome yet. Send the same again after "
        "Retry-After to be told of it.",
        retry_after=IN_FLIGHT_RETRY_SECONDS,
    )


def _key_reused() -> IdempotencyKeyReused:
    return IdempotencyKeyReused(
        "Something else was submitted under this Idempotency-Key before. Take a new key for each submission, and an "
        "old one only to send the very same again."
    )


_log = structlog.get_logger(__name__)


_UNKNOWN_RESULT = SubmitResult(outcome=SubmitOutcome.UNKNOWN)


LEASE_MARGIN_SECONDS = 60.0
"""Sending ends this many seconds before the lease does, so that its outcome is booked before it counts as unknown."""


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
    """An accepted submission: its task as it is `now` (the ledger's time), and what is left of the tenant's limits.

    `replayed` if it is an earlier one under the same idempotency key, with its task as it is now.
    """

    task: Task
    known_at: int
    rate_limits: tuple[RateLimit, ...]
    is_replay: bool = False


class _PendingSubmission(Struct, frozen=True):
    """A reservation under way: where it stands, and by when (of the monotonic clock) sending has to end.

    It is `astray` if a retarget was not answered: it may stand on the next account, though nothing was sent there.
    `options` and `metadata` are JSON, made before anything is sent: what can fail fails then.
    """

    request: ReserveRequest
    options: msgspec.Raw
    metadata: msgspec.Raw
    account: Account
    created_at: int
    deadline_at: float
    retarget_unconfirmed: bool = False


class Submitter:
    """Submits an image for a tenant."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        settlements: SettlementQueue,
        tasks: TaskStore,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIdCodec,
        supervisor: TaskSupervisor,
        metrics: Metrics,
        tracer: Tracer = NOOP_TRACER,
    ) -> None:
        self._ledger = ledger
        self._settlements = settlements
        self._tasks = tasks
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._supervisor = supervisor
        self._metrics = metrics
        self._tracer = tracer

    def check_allowed(self, tenant: Tenant, kind: Kind) -> None:
        """Refuse what needs no look at the image. Raises TenantDisabled or KindNotAllowed."""
        if tenant.disabled:
            raise TenantDisabled("This tenant was switched off. Ask the operators of the gateway.")
        if not tenant.can_submit(kind):
            raise KindNotAllowed(f"This tenant may not submit {kind} tasks. Ask the operators of the gateway.")

    async def submit(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image: Image,
        *,
        idempotency_key: str | None = None,
        webhook_url: str | None = None,
    ) -> Submission:
        """Submit once, even if it is called again with the same `key`. What has begun is finished if the caller leaves.

        The end of the task is told to `webhook`, an address that the tenant may have, else to its own.
        Raises the errors of `Denied` and `UpstreamFault`, IdempotencyKeyReused, IdempotencyInFlight and
        LedgerUnavailable.
        """
        self.check_allowed(tenant, options.kind)
        work = self._supervisor.spawn(self._submit(tenant, options, metadata, image, idempotency_key, webhook_url))
        try:
            return await asyncio.shield(work)
        finally:
            del work  # it holds its error, whose traceback holds this frame, and with it the image

    async def _submit(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image: Image,
        key: str | None,
        webhook: str | None,
    ) -> Submission:
        accounts = self._registry.current.accounts_of(tenant)
        idempotency = None if key is None else digest_submission(key, options, metadata, image.sha256, webhook)
        ask = ReserveRequest(
            secrets.token_hex(16), tenant.id, tuple(each.id for each in accounts), options.kind, idempotency
        )
        written = msgspec.Raw(msgspec.json.encode(options)), msgspec.Raw(msgspec.json.encode(metadata))
        trace = self._tracer.current_traceparent()
        verdict, limits, asked = await self._reserve(ask, tenant.policy)
        if isinstance(verdict, Replay):
            return await self._load_replay(verdict, limits)
        place = self._require_grant(verdict, ask, written, accounts, limits, asked)
        try:
            sent, place = await self._send_with_failover(place, accounts, options, image)
            task = self._make_task(place, sent.upstream_id) if _is_accepted(sent) else None
        except asyncio.CancelledError:  # the process ends, and has waited for long enough
            await self._settlements.settle(self._make_settlement(place, _UNKNOWN_RESULT))
            raise
        except Exception:  # noqa: BLE001 - a fault of our own, and it may have come after the image was sent
            _log.exception("submission.error", reservation=place.request.reservation)
            sent, task = _UNKNOWN_RESULT, None
        self._count_safely(ask, self._metrics.record_submission, options.kind, sent.outcome)
        if task is None:
            await self._settlements.settle(self._make_settlement(place, sent))
            raise self._count_denial(ask, _error_of(sent, ask.reservation))
        draft = NewTask(task.id, task.options, task.metadata, webhook or tenant.webhook.url, trace)
        with suppress(asyncio.CancelledError):  # the process ends; what was accepted is answered all the same
            await self._settlements.settle(msgspec.structs.replace(self._make_settlement(place, sent), new_task=draft))
        self._count_safely(ask, self._metrics.record_submitted_task, tenant.id, options.kind)
        return Submission(task, task.created_at, limits)

    def _count_safely(self, ask: ReserveRequest, count: Callable[..., None], *labels: Any) -> None:
        """Count an outcome. A fault in that is no reason to tell the caller of another one."""
        try:
            count(*labels)
        except Exception:  # noqa: BLE001 - whatever it is
            _log.exception("submission.response_error", reservation=ask.reservation)

    async def _reserve(self, ask: ReserveRequest, policy: TenantPolicy) -> tuple[Verdict, tuple[RateLimit, ...], float]:
        """Ask for a place; the verdict, what is left, and when (of the monotonic clock) it was asked for."""
        asked = time.monotonic()
        try:
            verdict, snapshot = await self._ledger.reserve(ask)
            return verdict, compute_rate_limits(policy, snapshot.state, snapshot.now), asked
        except BaseException:
            self._settlements.write_tombstone(ask)
            raise

    def _require_grant(
        self,
        verdict: Verdict,
        ask: ReserveRequest,
        written: tuple[msgspec.Raw, msgspec.Raw],
        accounts: Sequence[Account],
        limits: tuple[RateLimit, ...],
        asked: float,
    ) -> _PendingSubmission:
        """The place that was granted. Raises what a caller is told if none was."""
        match verdict:
            case PolicyDenial():
                for violation in verdict.violations:
                    self._metrics.record_quota_denial(ask.tenant, violation.policy)
                raise _quota_denied(verdict, limits)
            case NoAccount():
                raise self._count_denial(ask, _no_account(verdict))
            case InFlight():
                raise _in_flight()
            case Grant():
                deadline = asked + (verdict.lease_expires_at - verdict.now) / 1000 - LEASE_MARGIN_SECONDS
                account = next(each for each in accounts if each.id == verdict.account)
                return _PendingSubmission(ask, *written, account, verdict.now, deadline)
            case _:
                raise _key_reused()

    def _count_denial(self, ask: ReserveRequest, error: GatewayError) -> GatewayError:
        """What a caller is told, counted if it is that no account can pay, whoever said so."""
        if isinstance(error, BalanceExhausted):
            self._metrics.record_balance_denial(ask.tenant)
        return error

    async def _load_replay(self, verdict: Replay, limits: tuple[RateLimit, ...]) -> Submission:
        """What became of the first submission under the key, as it is now."""
        self._metrics.record_replay()
        found = await self._tasks.get(verdict.reservation) if verdict.state is ReservationState.ACCEPTED else None
        if found is None:
            raise _unknown_outcome(verdict.reservation, is_replay=True)
        return Submission(*found, limits, is_replay=True)

    async def _send_with_failover(
        self, place: _PendingSubmission, accounts: Sequence[Account], options: Options, image: Image
    ) -> tuple[SubmitResult, _PendingSubmission]:
        """Send to one account after the other for as long as that surely costs nothing."""
        while True:
            left = place.deadline_at - time.monotonic()
            sent = await self._upstream.submit(place.account, options, image, timeout_seconds=left)
            if sent.outcome not in _FAILOVER_STATUS:
                return sent, place
            _log.warning("account.failover", account=place.account.name, outcome=sent.outcome)
            following = accounts[accounts.index(place.account) + 1 :]
            try:
                verdict = await self._change_account(place, following, _FAILOVER_STATUS[sent.outcome])
            except LedgerUnavailable:
                return sent, msgspec.structs.replace(place, retarget_unconfirmed=True)
            if not isinstance(verdict, Grant):
                return sent, place
            account = next(each for each in following if each.id == verdict.account)
            place = msgspec.structs.replace(place, account=account)

    async def _change_account(
        self, place: _PendingSubmission, following: Sequence[Account], closes: AccountStatus | None
    ) -> Verdict | None:
        if not following:
            return None
        ask = msgspec.structs.replace(place.request, accounts=tuple(each.id for each in following))
        return await self._ledger.change_account(ask, place.account.id, closes)

    def _make_settlement(self, place: _PendingSubmission, sent: SubmitResult) -> Settlement:
        """The outcome to book. Where nobody knows on which account, none is closed for another's refusal."""
        return Settlement(
            reservation=place.request.reservation,
            tenant=place.request.tenant,
            account=place.account.id,
            kind=place.request.kind,
            created_at=place.created_at,
            outcome=_RESERVATION_STATES.get(sent.outcome, ReservationState.REFUSED),
            balance=Balance() if place.retarget_unconfirmed else sent.balance,
            account_status=None if place.retarget_unconfirmed else _FAILOVER_STATUS.get(sent.outcome),
            idempotency=place.request.idempotency,
        )

    def _make_task(self, place: _PendingSubmission, upstream_id: str) -> Task:
        ask = place.request
        reference = TaskReference(
            ask.tenant, place.account.id, ask.kind, place.created_at, ask.reservation, upstream_id
        )
        return Task(
            id=self._task_ids.encode(reference),
            reservation=ask.reservation,
            tenant=ask.tenant,
            account=place.account.id,
            kind=ask.kind,
            state=State.QUEUED,
            created_at=place.created_at,
            updated_at=place.created_at,
            finished_at=None,
            options=place.options,
            metadata=place.metadata,
            artifacts=(),
            error=None,
            cost=Cost(0, 0, CostBasis.UNKNOWN),
            version=1,
            last_checked_at=place.created_at,
        )


def _is_accepted(sent: SubmitResult) -> bool:
    return sent.outcome is SubmitOutcome.ACCEPTED
