"""The vendor's API, one verb per operation, over HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from enum import StrEnum
from functools import partial
from io import BytesIO
from types import TracebackType
from typing import Self

import httpx2
import structlog
from msgspec.structs import replace

from service.clients import vendor_api
from service.clients.http import MAX_REQUESTS, BreakerRegistry, NotSent, ResponseLost, UpstreamPool, UpstreamResponse
from service.clients.vendor_api import mask_key, remove_key
from service.domain.tasks import Catalogue, Cipher, Options, TaskError
from service.domain.tenants import Account
from service.telemetry.gauges import GaugeName
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import NOOP_TRACER, Tracer
from service.usecases.ports import CheckOutcome, CheckResult, Image, SubmitOutcome, SubmitResult

_log = structlog.get_logger(__name__)

_DECRYPTION_FAILED = "None of the secret keys opens its user_key."
_MAX_REPORTED_LINKS = 1_000
CHECK_SECONDS = 20.0
"""How long a check may take, waiting for its turn included."""

OnCall = Callable[[StrEnum, StrEnum, float], None]
"""Is told of every call: its operation, its outcome, and the seconds it took."""


class UpstreamOperation(StrEnum):
    """The calls of the upstream."""

    SUBMIT = "submit"
    CHECK = "check"


class UpstreamClient:
    """The upstreams of all accounts: the default one, and those that accounts name. Open within its context.

    `user_keys` opens the accounts' keys; none of them appears in a log, an error, or a message for tenants.
    """

    def __init__(
        self,
        base_url: str,
        user_keys: Cipher,
        catalogue: Catalogue,
        *,
        on_call: OnCall,
        tracer: Tracer = NOOP_TRACER,
    ) -> None:
        self._base_url = base_url
        self._user_keys = user_keys
        self._catalogue = catalogue
        self._on_call = on_call
        breakers = self._breakers = BreakerRegistry()
        # A kept connection may be closed by the other side just as it is used. That is harmless for a check, but of a
        # submit nobody would know any more whether it arrived.
        breakers.get(base_url)  # so that it is shown from the start
        tls = httpx2.create_ssl_context()
        self._submit_pool = UpstreamPool(breakers, tls, keep_alive=False, tracer=tracer)
        self._check_pool = UpstreamPool(breakers, tls, keep_alive=True, tracer=tracer)
        self._exit_stack = AsyncExitStack()
        self._reported_links: dict[tuple[int, str, str], None] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(self._submit_pool)
            await opened.enter_async_context(self._check_pool)
            self._exit_stack = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._exit_stack.aclose()

    def register_metrics(self, metrics: Metrics) -> None:
        """Show the connections and the breakers in the metrics, and begin all outcomes of calls at zero."""
        metrics.preregister_upstream_calls(
            {UpstreamOperation.SUBMIT: SubmitOutcome, UpstreamOperation.CHECK: CheckOutcome}
        )
        levels = metrics.gauges
        lines = {UpstreamOperation.SUBMIT.value: self._submit_pool, UpstreamOperation.CHECK.value: self._check_pool}

        def connections() -> Mapping[tuple[str, ...], float]:
            return {
                (name, state): connections
                for name, line in lines.items()
                for state, connections in (("busy", line.busy_count), ("idle", line.idle_count))
            }

        levels.register(GaugeName.UPSTREAM_CONNECTIONS, connections)
        levels.register(GaugeName.UPSTREAM_CONNECTIONS_LIMIT, lambda: {(name,): MAX_REQUESTS for name in lines})
        levels.register(
            GaugeName.UPSTREAM_WAITING, lambda: {(name,): line.waiting_count for name, line in lines.items()}
        )
        levels.register(
            GaugeName.UPSTREAM_BREAKER_OPEN,
            lambda: {(url,): is_open for url, is_open in self._breakers.open_states().items()},
        )

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        """Send an image once, within `seconds` all told; NOT_SENT only if no connection was made."""
        submitted = SubmitResult(outcome=SubmitOutcome.UNKNOWN)
        started = time.monotonic()
        try:
            with upstream_wait():
                submitted = await self._submit(account, options, image, timeout_seconds)
        finally:
            self._record_call(UpstreamOperation.SUBMIT, submitted.outcome, started)
        return submitted

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        """Ask about a task."""
        check = CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        started = time.monotonic()
        try:
            with upstream_wait():
                check = await self._check(account, upstream_id)
        finally:
            self._record_call(UpstreamOperation.CHECK, check.outcome, started)
        return check

    def _record_call(self, operation: UpstreamOperation, outcome: StrEnum, started: float) -> None:
        """Count a call. A fault in that must not lose what the call returned."""
        try:
            self._on_call(operation, outcome, time.monotonic() - started)
        except Exception:  # noqa: BLE001 - whatever it is
            _log.exception("upstream.close_error")

    async def _submit(self, account: Account, options: Options, image: Image, seconds: float) -> SubmitResult:
        user_key = self._decrypt_user_key(account)
        if user_key is None:
            return SubmitResult(outcome=SubmitOutcome.MISCONFIGURED)
        fields = {vendor_api.USER_KEY_FIELD: user_key, **vendor_api.build_form_fields(options, self._catalogue)}
        # As a file it is sent in pieces, each with the whole write timeout; as bytes it would have that only once.
        file = (f"image.{image.media_type.rpartition('/')[2]}", BytesIO(image.data), image.media_type)
        path = vendor_api.SUBMIT_PATHS[options.kind]
        try:
            answer = await self._submit_pool.post(
                self._account_url(account), path, fields, {vendor_api.IMAGE_FIELD: file}, seconds=seconds
            )
        except NotSent as fault:
            self._log_failure(UpstreamOperation.SUBMIT, account, fault)
            return SubmitResult(outcome=SubmitOutcome.NOT_SENT)
        except ResponseLost as fault:
            self._log_failure(UpstreamOperation.SUBMIT, account, fault)
            return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
        submitted = vendor_api.parse_submit_response(answer.body, answer.status, answer.retry_after_seconds)
        if submitted.outcome in {SubmitOutcome.UNKNOWN, SubmitOutcome.REDIRECTED}:
            self._log_failure(UpstreamOperation.SUBMIT, account, _describe_unusable(answer))
        return replace(submitted, reason=remove_key(user_key, submitted.reason))

    async def _check(self, account: Account, upstream_id: str) -> CheckResult:
        user_key = self._decrypt_user_key(account)
        if user_key is None:
            return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        fields = {vendor_api.USER_KEY_FIELD: user_key, vendor_api.TASK_ID_FIELD: upstream_id}
        try:
            answer = await self._check_pool.post(
                self._account_url(account), vendor_api.CHECK_PATH, fields, seconds=CHECK_SECONDS
            )
        except (NotSent, ResponseLost) as fault:
            self._log_failure(UpstreamOperation.CHECK, account, fault)
            return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        unusable: list[str] = []

        def report(field: str, value: object) -> None:
            unusable.append(field)
            self._log_unusable_link(account, upstream_id, field, value)

        body = answer.body if 200 <= answer.status < 300 else b""
        mask = partial(mask_key, user_key)
        check = vendor_api.parse_check_response(body, self._account_url(account) + vendor_api.CHECK_PATH, report, mask)
        if check.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID} and not unusable:
            self._log_failure(UpstreamOperation.CHECK, account, _describe_unusable(answer))
        if check.error:
            error = TaskError(check.error.code, remove_key(user_key, check.error.detail))
            check = replace(check, error=error)
        return check

    def _log_unusable_link(self, account: Account, upstream_id: str, field: str, value: object) -> None:
        """Log a link that can't be used, once: its task is checked again and again."""
        key = (account.id, upstream_id, field)
        if key in self._reported_links:
            return
        self._reported_links[key] = None
        if len(self._reported_links) > _MAX_REPORTED_LINKS:
            self._reported_links.pop(next(iter(self._reported_links)))
        _log.warning("artifact.invalid_link", account=account.name, field=field, type=type(value).__name__)

    def _account_url(self, account: Account) -> str:
        return (account.base_url or self._base_url).rstrip("/")

    def _decrypt_user_key(self, account: Account) -> str | None:
        """The key of an account, which can't be opened if the secret key that sealed it was taken away."""
        opened = self._user_keys.decrypt(account.user_key)
        if opened is None:
            _log.error("account.decryption_failed", account=account.name, detail=_DECRYPTION_FAILED)
            return None
        return opened.decode()

    @staticmethod
    def _log_failure(operation: UpstreamOperation, account: Account, fault: NotSent | ResponseLost) -> None:
        sent = isinstance(fault, ResponseLost)
        _log.warning("upstream.request_failed", operation=operation, account=account.name, sent=sent, error=str(fault))


def _describe_unusable(answer: UpstreamResponse) -> ResponseLost:
    """An answer that came, and can't be used."""
    return ResponseLost(f"HTTP {answer.status}{answer.truncation and ', '}{answer.truncation}")
