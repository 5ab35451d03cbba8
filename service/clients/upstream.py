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
from service.clients.http import MAX_REQUESTS, Answer, Breakers, Line, Lost, NotSent
from service.clients.vendor_api import mask_key, without_key
from service.domain.tasks import Catalogue, Options, Sealer, TaskError
from service.domain.tenants import Account
from service.telemetry.gauges import Level
from service.telemetry.logging import waiting
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import UNTRACED, Tracer
from service.usecases.ports import Answered, Check, Image, SubmitOutcome, Submitted

_log = structlog.get_logger(__name__)

_KEY_LOST = "None of the secret keys opens its user_key."
_MOST_REPORTED = 1_000
CHECK_SECONDS = 20.0
"""How long a check may take, waiting for its turn included."""

Observer = Callable[[StrEnum, StrEnum, float], None]
"""Is told of every call: its operation, its outcome, and the seconds it took."""


class Operation(StrEnum):
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
        user_keys: Sealer,
        catalogue: Catalogue,
        *,
        observe: Observer,
        tracer: Tracer = UNTRACED,
    ) -> None:
        self._base_url = base_url
        self._user_keys = user_keys
        self._catalogue = catalogue
        self._observe = observe
        breakers = self._breakers = Breakers()
        # A kept connection may be closed by the other side just as it is used. That is harmless for a check, but of a
        # submit nobody would know any more whether it arrived.
        breakers.of(base_url)  # so that it is shown from the start
        tls = httpx2.create_ssl_context()
        self._submits = Line(breakers, tls, keep_alive=False, tracer=tracer)
        self._checks = Line(breakers, tls, keep_alive=True, tracer=tracer)
        self._closing = AsyncExitStack()
        self._reported: dict[tuple[int, str, str], None] = {}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as opened:
            await opened.enter_async_context(self._submits)
            await opened.enter_async_context(self._checks)
            self._closing = opened.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._closing.aclose()

    def tell(self, metrics: Metrics) -> None:
        """Show the connections and the breakers in the metrics, and begin all outcomes of calls at zero."""
        metrics.expect_calls({Operation.SUBMIT: SubmitOutcome, Operation.CHECK: Answered})
        levels = metrics.levels
        lines = {Operation.SUBMIT.value: self._submits, Operation.CHECK.value: self._checks}

        def connections() -> Mapping[tuple[str, ...], float]:
            return {
                (name, state): connections
                for name, line in lines.items()
                for state, connections in (("busy", line.busy), ("idle", line.idle))
            }

        levels.tell(Level.CONNECTIONS, connections)
        levels.tell(Level.CONNECTIONS_LIMIT, lambda: {(name,): MAX_REQUESTS for name in lines})
        levels.tell(Level.CONNECTIONS_WAITING, lambda: {(name,): line.waiting for name, line in lines.items()})
        levels.tell(Level.BREAKER, lambda: {(url,): is_open for url, is_open in self._breakers.open().items()})

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        """Send an image once, within `seconds` all told; NOT_SENT only if no connection was made."""
        submitted = Submitted(outcome=SubmitOutcome.UNKNOWN)
        started = time.monotonic()
        try:
            with waiting():
                submitted = await self._submit(account, options, image, seconds)
        finally:
            self._count(Operation.SUBMIT, submitted.outcome, started)
        return submitted

    async def check(self, account: Account, upstream_id: str) -> Check:
        """Ask about a task."""
        check = Check(answered=Answered.NOTHING)
        started = time.monotonic()
        try:
            with waiting():
                check = await self._check(account, upstream_id)
        finally:
            self._count(Operation.CHECK, check.answered, started)
        return check

    def _count(self, operation: Operation, outcome: StrEnum, started: float) -> None:
        """Count a call. A fault in that must not lose what the call returned."""
        try:
            self._observe(operation, outcome, time.monotonic() - started)
        except Exception:  # noqa: BLE001 - whatever it is
            _log.exception("call.end-crashed")

    async def _submit(self, account: Account, options: Options, image: Image, seconds: float) -> Submitted:
        user_key = self._user_key(account)
        if user_key is None:
            return Submitted(outcome=SubmitOutcome.MISCONFIGURED)
        fields = {vendor_api.USER_KEY: user_key, **vendor_api.to_fields(options, self._catalogue)}
        # As a file it is sent in pieces, each with the whole write timeout; as bytes it would have that only once.
        file = (f"image.{image.media_type.rpartition('/')[2]}", BytesIO(image.data), image.media_type)
        path = vendor_api.SUBMIT_PATHS[options.kind]
        try:
            answer = await self._submits.post(
                self._base(account), path, fields, {vendor_api.IMAGE: file}, seconds=seconds
            )
        except NotSent as fault:
            self._say(Operation.SUBMIT, account, fault)
            return Submitted(outcome=SubmitOutcome.NOT_SENT)
        except Lost as fault:
            self._say(Operation.SUBMIT, account, fault)
            return Submitted(outcome=SubmitOutcome.UNKNOWN)
        submitted = vendor_api.read_submit(answer.body, answer.status, answer.retry_after)
        if submitted.outcome in {SubmitOutcome.UNKNOWN, SubmitOutcome.REDIRECTED}:
            self._say(Operation.SUBMIT, account, _unread(answer))
        return replace(submitted, reason=without_key(user_key, submitted.reason))

    async def _check(self, account: Account, upstream_id: str) -> Check:
        user_key = self._user_key(account)
        if user_key is None:
            return Check(answered=Answered.NOTHING)
        fields = {vendor_api.USER_KEY: user_key, vendor_api.TASK_ID: upstream_id}
        try:
            answer = await self._checks.post(self._base(account), vendor_api.CHECK_PATH, fields, seconds=CHECK_SECONDS)
        except (NotSent, Lost) as fault:
            self._say(Operation.CHECK, account, fault)
            return Check(answered=Answered.NOTHING)
        unusable: list[str] = []

        def report(field: str, value: object) -> None:
            unusable.append(field)
            self._report_link(account, upstream_id, field, value)

        body = answer.body if 200 <= answer.status < 300 else b""
        mask = partial(mask_key, user_key)
        check = vendor_api.read_check(body, self._base(account) + vendor_api.CHECK_PATH, report, mask)
        if check.answered in {Answered.NOTHING, Answered.UNUSABLE} and not unusable:
            self._say(Operation.CHECK, account, _unread(answer))
        if check.error:
            error = TaskError(check.error.code, without_key(user_key, check.error.detail))
            check = replace(check, error=error)
        return check

    def _report_link(self, account: Account, upstream_id: str, field: str, value: object) -> None:
        """Log a link that can't be used, once: its task is checked again and again."""
        key = (account.id, upstream_id, field)
        if key in self._reported:
            return
        self._reported[key] = None
        if len(self._reported) > _MOST_REPORTED:
            self._reported.pop(next(iter(self._reported)))
        _log.warning("link.unusable", account=account.name, field=field, type=type(value).__name__)

    def _base(self, account: Account) -> str:
        return (account.base_url or self._base_url).rstrip("/")

    def _user_key(self, account: Account) -> str | None:
        """The key of an account, which can't be opened if the secret key that sealed it was taken away."""
        opened = self._user_keys.open(account.user_key)
        if opened is None:
            _log.error("account.key-lost", account=account.name, detail=_KEY_LOST)
            return None
        return opened.decode()

    @staticmethod
    def _say(operation: Operation, account: Account, fault: NotSent | Lost) -> None:
        sent = isinstance(fault, Lost)
        _log.warning("call.failed", operation=operation, account=account.name, sent=sent, error=str(fault))


def _unread(answer: Answer) -> Lost:
    """An answer that came, and can't be used."""
    return Lost(f"HTTP {answer.status}{answer.cut and ', '}{answer.cut}")
