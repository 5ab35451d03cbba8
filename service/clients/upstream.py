"""The vendor's API: submit a task, check a task."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from enum import StrEnum
from functools import partial
from typing import Self

import structlog
from msgspec.structs import replace
from opentelemetry.trace import Tracer

from service.clients import vendor_api
from service.clients.breaker import Breaker
from service.clients.connection import NotSent
from service.clients.forms import FormBody, FormFile
from service.clients.http import MAX_REQUESTS, ResponseLost, UpstreamPool, UpstreamResponse
from service.clients.network import OnCall, default_tls
from service.crypto import AesSivCipher, UserKeyCipher
from service.domain.tasks import Artifact, Catalogue, Options
from service.domain.tenants import Account
from service.telemetry import tracing
from service.telemetry.gauges import GaugeName
from service.telemetry.logging import upstream_wait
from service.telemetry.metrics import Metrics, preregister
from service.telemetry.redaction import replace_secret
from service.usecases.ports import CheckOutcome, CheckResult, Image, SubmitOutcome, SubmitResult

_log = structlog.get_logger(__name__)
_MAX_REPORTED_LINKS = 1_000
CHECK_SECONDS = 20.0
"""Time limit of a check, including the wait for a slot."""
_HIDDEN_KEY = "%7Buser_key%7D"
"""Stands for the account's key in a link that tenants see."""


class UpstreamOperation(StrEnum):
    SUBMIT = "submit"
    CHECK = "check"


class UpstreamClient:
    """Client for the upstreams of all accounts; an async context manager.

    `user_keys` decrypts the accounts' keys, which appear in no log, error, message or link for tenants; `links`
    encrypts links that contain one.
    """

    def __init__(
        self,
        base_url: str,
        user_keys: UserKeyCipher,
        catalogue: Catalogue,
        *,
        on_call: OnCall,
        links: AesSivCipher,
        tracer: Tracer = tracing.NOOP_TRACER,
    ) -> None:
        self._base_url = base_url
        self._user_keys = user_keys
        self._links = links
        self._catalogue = catalogue
        self._on_call = on_call
        # The gauge of the usual upstream exists from the start.
        self._breakers = defaultdict(Breaker, {base_url: Breaker()})
        # The server may close an idle connection just as it is reused. That is harmless for a check, but a submit
        # would have an unknown outcome.
        tls = default_tls()
        self._submit_pool = UpstreamPool(self._breakers, tls, keep_alive=False, tracer=tracer)
        self._check_pool = UpstreamPool(self._breakers, tls, keep_alive=True, tracer=tracer)
        self._reported_links: dict[tuple[int, str, str], None] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            await self._submit_pool.aclose()
        finally:
            await self._check_pool.aclose()

    def register_metrics(self, metrics: Metrics) -> None:
        preregister(metrics.upstream_requests, [UpstreamOperation.SUBMIT], SubmitOutcome)
        preregister(metrics.upstream_requests, [UpstreamOperation.CHECK], CheckOutcome)
        gauges = metrics.gauges
        pools = {UpstreamOperation.SUBMIT.value: self._submit_pool, UpstreamOperation.CHECK.value: self._check_pool}

        def count_connections() -> Mapping[tuple[str, ...], float]:
            return {
                (name, state): count
                for name, pool in pools.items()
                for state, count in (("busy", pool.busy_count), ("idle", pool.idle_count))
            }

        gauges.register(GaugeName.UPSTREAM_CONNECTIONS, count_connections)
        gauges.register(GaugeName.UPSTREAM_CONNECTIONS_LIMIT, lambda: {(name,): MAX_REQUESTS for name in pools})
        gauges.register(
            GaugeName.UPSTREAM_WAITING, lambda: {(name,): pool.waiting_count for name, pool in pools.items()}
        )
        gauges.register(
            GaugeName.UPSTREAM_BREAKER_OPEN,
            lambda: {(url,): breaker.is_open for url, breaker in list(self._breakers.items())},
        )

    async def submit(self, account: Account, options: Options, image: Image, *, timeout_seconds: float) -> SubmitResult:
        """Send an image once, within `timeout_seconds`; NOT_SENT only if no connection was made."""
        result = SubmitResult(outcome=SubmitOutcome.UNKNOWN)
        started_at = time.monotonic()
        try:
            with upstream_wait():
                result = await self._submit(account, options, image, timeout_seconds)
        finally:
            self._record_call(UpstreamOperation.SUBMIT, result.outcome, started_at)
        return result

    async def check(self, account: Account, upstream_id: str) -> CheckResult:
        result = CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        started_at = time.monotonic()
        try:
            with upstream_wait():
                result = await self._check(account, upstream_id)
        finally:
            self._record_call(UpstreamOperation.CHECK, result.outcome, started_at)
        return result

    def _record_call(self, operation: UpstreamOperation, outcome: StrEnum, started_at: float) -> None:
        try:
            self._on_call(operation, outcome, time.monotonic() - started_at)
        except Exception:  # noqa: BLE001 - must not lose the result of the call
            _log.exception("upstream.close_error")

    async def _submit(self, account: Account, options: Options, image: Image, timeout_seconds: float) -> SubmitResult:
        user_key = self._decrypt_user_key(account)
        if user_key is None:
            return SubmitResult(outcome=SubmitOutcome.MISCONFIGURED)
        fields = {vendor_api.USER_KEY_FIELD: user_key, **vendor_api.build_form_fields(options, self._catalogue)}
        file_name = f"image.{image.media_type.rpartition('/')[2]}"
        form = FormBody(fields, FormFile(vendor_api.IMAGE_FIELD, file_name, image.media_type, image.data))
        path = vendor_api.SUBMIT_PATHS[options.kind]
        try:
            response = await self._submit_pool.post(
                self._account_url(account), path, form, timeout_seconds=timeout_seconds
            )
        except NotSent as error:
            self._log_failure(UpstreamOperation.SUBMIT, account, error)
            return SubmitResult(outcome=SubmitOutcome.NOT_SENT)
        except ResponseLost as error:
            self._log_failure(UpstreamOperation.SUBMIT, account, error)
            return SubmitResult(outcome=SubmitOutcome.UNKNOWN)
        hide = partial(replace_secret, user_key, "…")
        result = vendor_api.parse_submit_response(response.body, response.status, response.retry_after_seconds, hide)
        if result.outcome in {SubmitOutcome.UNKNOWN, SubmitOutcome.REDIRECTED}:
            self._log_failure(UpstreamOperation.SUBMIT, account, _describe_unusable(response))
        return result

    async def _check(self, account: Account, upstream_id: str) -> CheckResult:
        user_key = self._decrypt_user_key(account)
        if user_key is None:
            return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        fields = {vendor_api.USER_KEY_FIELD: user_key, vendor_api.TASK_ID_FIELD: upstream_id}
        try:
            response = await self._check_pool.post(
                self._account_url(account), vendor_api.CHECK_PATH, FormBody(fields), timeout_seconds=CHECK_SECONDS
            )
        except (NotSent, ResponseLost) as error:
            self._log_failure(UpstreamOperation.CHECK, account, error)
            return CheckResult(outcome=CheckOutcome.NO_RESPONSE)
        unusable_fields: list[str] = []

        def report(field: str, value: object) -> None:
            unusable_fields.append(field)
            self._log_unusable_link(account, upstream_id, field, value)

        body = response.body if 200 <= response.status < 300 else b""
        url = self._account_url(account) + vendor_api.CHECK_PATH
        result = vendor_api.parse_check_response(body, url, report, partial(replace_secret, user_key, "…"))
        if result.outcome in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID} and not unusable_fields:
            self._log_failure(UpstreamOperation.CHECK, account, _describe_unusable(response))
        return replace(result, artifacts=tuple(self._hide_key(user_key, artifact) for artifact in result.artifacts))

    def _hide_key(self, user_key: str, artifact: Artifact) -> Artifact:
        shown = replace_secret(user_key, _HIDDEN_KEY, artifact.url)
        if shown == artifact.url:
            return artifact
        return Artifact(artifact.name, shown, self._links.encrypt(artifact.url.encode()))

    def _log_unusable_link(self, account: Account, upstream_id: str, field: str, value: object) -> None:
        """Log an unusable link only once, though its task is checked repeatedly."""
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
        user_key = self._user_keys.decrypt(account)
        if user_key is None:
            detail = "No secret key decrypts its user_key, or it was given for another base URL: give it again."
            _log.error("account.decryption_failed", account=account.name, detail=detail)
            return None
        return user_key.decode()

    @staticmethod
    def _log_failure(operation: UpstreamOperation, account: Account, error: NotSent | ResponseLost) -> None:
        is_sent = isinstance(error, ResponseLost)
        _log.warning(
            "upstream.request_failed", operation=operation, account=account.name, sent=is_sent, error=str(error)
        )


def _describe_unusable(response: UpstreamResponse) -> ResponseLost:
    return ResponseLost(f"HTTP {response.status}{response.truncation and ', '}{response.truncation}")
