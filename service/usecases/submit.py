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

from service.domain.availability import PROBE_INTERVAL
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
    Figures,
    Granted,
    InFlight,
    NoAccount,
    PolicyDenied,
    RateLimit,
    Replayed,
    ReservationState,
    Status,
    Verdict,
    identify,
    rate_limits,
)
from service.domain.tasks import Basis, Cost, Kind, Options, Reference, State, Task, TaskIds
from service.domain.tenants import Account, Tenant, TenantPolicy
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.background import Background
from service.usecases.ports import (
    Ask,
    Image,
    Ledger,
    RegistryView,
    Settlement,
    SubmitOutcome,
    Submitted,
    TaskDraft,
    Tasks,
    Upstream,
)
from service.usecases.settlement import Settle

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
        gist = sent.reason_en or sent.reason or "It gave no reason."
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


_log = structlog.get_logger(__name__)


_LOST = Submitted(outcome=SubmitOutcome.UNKNOWN)


LEASE_MARGIN = 60.0
"""Sending ends this many seconds before the lease does, so that its outcome is booked before it counts as unknown."""


_CLOSES = {
    SubmitOutcome.EXHAUSTED: Status.EXHAUSTED,
    SubmitOutcome.INVALID_ACCOUNT: Status.INVALID,
    SubmitOutcome.MISCONFIGURED: None,
    SubmitOutcome.NOT_SENT: None,
}


_SETTLES = {
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
    now: int
    limits: tuple[RateLimit, ...]
    replayed: bool = False


class _Place(Struct, frozen=True):
    """A reservation under way: where it stands, and by when (of the monotonic clock) sending has to end.

    It is `astray` if a retarget was not answered: it may stand on the next account, though nothing was sent there.
    `options` and `metadata` are JSON, made before anything is sent: what can fail fails then.
    """

    ask: Ask
    options: msgspec.Raw
    metadata: msgspec.Raw
    account: Account
    created: int
    deadline: float
    astray: bool = False


class Submit:
    """Submits an image for a tenant."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        settle: Settle,
        tasks: Tasks,
        upstream: Upstream,
        registry: RegistryView,
        task_ids: TaskIds,
        background: Background,
        metrics: Metrics,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._ledger = ledger
        self._settle = settle
        self._tasks = tasks
        self._upstream = upstream
        self._registry = registry
        self._task_ids = task_ids
        self._background = background
        self._metrics = metrics
        self._tracer = tracer

    def admit(self, tenant: Tenant, kind: Kind) -> None:
        """Refuse what needs no look at the image. Raises TenantDisabled or KindNotAllowed."""
        if tenant.disabled:
            raise TenantDisabled("This tenant was switched off. Ask the operators of the gateway.")
        if not tenant.may_submit(kind):
            raise KindNotAllowed(f"This tenant may not submit {kind} tasks. Ask the operators of the gateway.")

    async def __call__(
        self,
        tenant: Tenant,
        options: Options,
        metadata: dict[str, str],
        image: Image,
        *,
        key: str | None = None,
        webhook: str | None = None,
    ) -> Submission:
        """Submit once, even if it is called again with the same `key`. What has begun is finished if the caller leaves.

        The end of the task is told to `webhook`, an address that the tenant may have, else to its own.
        Raises the errors of `Denied` and `UpstreamFault`, IdempotencyKeyReused, IdempotencyInFlight and
        LedgerUnavailable.
        """
        self.admit(tenant, options.kind)
        work = self._background.spawn(self._submit(tenant, options, metadata, image, key, webhook))
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
        idempotency = None if key is None else identify(key, options, metadata, image.sha256, webhook)
        ask = Ask(secrets.token_hex(16), tenant.id, tuple(each.id for each in accounts), options.kind, idempotency)
        written = msgspec.Raw(msgspec.json.encode(options)), msgspec.Raw(msgspec.json.encode(metadata))
        trace = self._tracer.context()
        verdict, limits, asked = await self._reserve(ask, tenant.policy)
        if isinstance(verdict, Replayed):
            return await self._replay(verdict, limits)
        place = self._place(verdict, ask, written, accounts, limits, asked)
        try:
            sent, place = await self._send(place, accounts, options, image)
            task = self._task(place, sent.upstream_id) if _accepted(sent) else None
        except asyncio.CancelledError:  # the process ends, and has waited for long enough
            await self._settle(self._settlement(place, _LOST))
            raise
        except Exception:  # noqa: BLE001 - a fault of our own, and it may have come after the image was sent
            _log.exception("submission.crashed", reservation=place.ask.reservation)
            sent, task = _LOST, None
        self._count(ask, self._metrics.submission, options.kind, sent.outcome)
        if task is None:
            await self._settle(self._settlement(place, sent))
            raise self._refused(ask, refusal(sent, ask.reservation))
        draft = TaskDraft(task.id, task.options, task.metadata, webhook or tenant.webhook.url, trace)
        with suppress(asyncio.CancelledError):  # the process ends; what was accepted is answered all the same
            await self._settle(msgspec.structs.replace(self._settlement(place, sent), draft=draft))
        self._count(ask, self._metrics.submitted, tenant.id, options.kind)
        return Submission(task, task.created, limits)

    def _count(self, ask: Ask, count: Callable[..., None], *labels: Any) -> None:
        """Count an outcome. A fault in that is no reason to tell the caller of another one."""
        try:
            count(*labels)
        except Exception:  # noqa: BLE001 - whatever it is
            _log.exception("submission.answer-crashed", reservation=ask.reservation)

    async def _reserve(self, ask: Ask, policy: TenantPolicy) -> tuple[Verdict, tuple[RateLimit, ...], float]:
        """Ask for a place; the verdict, what is left, and when (of the monotonic clock) it was asked for."""
        asked = time.monotonic()
        try:
            verdict, snapshot = await self._ledger.reserve(ask)
            return verdict, rate_limits(policy, snapshot.state, snapshot.now), asked
        except BaseException:
            self._settle.give_up(ask)
            raise

    def _place(
        self,
        verdict: Verdict,
        ask: Ask,
        written: tuple[msgspec.Raw, msgspec.Raw],
        accounts: Sequence[Account],
        limits: tuple[RateLimit, ...],
        asked: float,
    ) -> _Place:
        """The place that was granted. Raises what a caller is told if none was."""
        match verdict:
            case PolicyDenied():
                for violation in verdict.violations:
                    self._metrics.denied(ask.tenant, violation.policy)
                raise denied(verdict, limits)
            case NoAccount():
                raise self._refused(ask, no_account(verdict))
            case InFlight():
                raise in_flight()
            case Granted():
                deadline = asked + (verdict.lease - verdict.now) / 1000 - LEASE_MARGIN
                account = next(each for each in accounts if each.id == verdict.account)
                return _Place(ask, *written, account, verdict.now, deadline)
            case _:
                raise key_reused()

    def _refused(self, ask: Ask, error: GatewayError) -> GatewayError:
        """What a caller is told, counted if it is that no account can pay, whoever said so."""
        if isinstance(error, BalanceExhausted):
            self._metrics.unpaid(ask.tenant)
        return error

    async def _replay(self, verdict: Replayed, limits: tuple[RateLimit, ...]) -> Submission:
        """What became of the first submission under the key, as it is now."""
        self._metrics.replayed()
        found = await self._tasks.get(verdict.reservation) if verdict.state is ReservationState.ACCEPTED else None
        if found is None:
            raise unknown(verdict.reservation, replayed=True)
        return Submission(*found, limits, replayed=True)

    async def _send(
        self, place: _Place, accounts: Sequence[Account], options: Options, image: Image
    ) -> tuple[Submitted, _Place]:
        """Send to one account after the other for as long as that surely costs nothing."""
        while True:
            left = place.deadline - time.monotonic()
            sent = await self._upstream.submit(place.account, options, image, seconds=left)
            if sent.outcome not in _CLOSES:
                return sent, place
            _log.warning("account.passed-over", account=place.account.name, outcome=sent.outcome)
            following = accounts[accounts.index(place.account) + 1 :]
            try:
                verdict = await self._retarget(place, following, _CLOSES[sent.outcome])
            except LedgerUnavailable:
                return sent, msgspec.structs.replace(place, astray=True)
            if not isinstance(verdict, Granted):
                return sent, place
            account = next(each for each in following if each.id == verdict.account)
            place = msgspec.structs.replace(place, account=account)

    async def _retarget(self, place: _Place, following: Sequence[Account], closes: Status | None) -> Verdict | None:
        if not following:
            return None
        ask = msgspec.structs.replace(place.ask, accounts=tuple(each.id for each in following))
        return await self._ledger.retarget(ask, place.account.id, closes)

    def _settlement(self, place: _Place, sent: Submitted) -> Settlement:
        """The outcome to book. Where nobody knows on which account, none is closed for another's refusal."""
        return Settlement(
            reservation=place.ask.reservation,
            tenant=place.ask.tenant,
            account=place.account.id,
            kind=place.ask.kind,
            created=place.created,
            outcome=_SETTLES.get(sent.outcome, ReservationState.REFUSED),
            figures=Figures() if place.astray else sent.figures,
            closes=None if place.astray else _CLOSES.get(sent.outcome),
            idempotency=place.ask.idempotency,
        )

    def _task(self, place: _Place, upstream_id: str) -> Task:
        ask = place.ask
        reference = Reference(ask.tenant, place.account.id, ask.kind, place.created, ask.reservation, upstream_id)
        return Task(
            id=self._task_ids.seal(reference),
            reservation=ask.reservation,
            tenant=ask.tenant,
            account=place.account.id,
            kind=ask.kind,
            state=State.QUEUED,
            created=place.created,
            updated=place.created,
            finished=None,
            options=place.options,
            metadata=place.metadata,
            artifacts=(),
            error=None,
            cost=Cost(0, 0, Basis.UNKNOWN),
            version=1,
            checked=place.created,
        )


def _accepted(sent: Submitted) -> bool:
    return sent.outcome is SubmitOutcome.ACCEPTED
