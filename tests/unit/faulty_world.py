"""Processes of the gateway that share a faulty store and a faulty upstream, and die, in a time that moves when told."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from prometheus_client import CollectorRegistry

from service.crypto import Keyring
from service.domain.ledger import Figures, Granted, ReservationState, Verdict
from service.domain.tasks import FaceEnhanceOptions, Options, TaskIds
from service.domain.tenants import Account, Tenant
from service.storage.ledger import KEEP_KEY
from service.telemetry.metrics import Metrics
from service.usecases.background import Background
from service.usecases.poller import Watch
from service.usecases.ports import Answered, Ask, Check, Image, RegistryView, Snapshot, SubmitOutcome, Submitted
from service.usecases.settlement import Settle
from service.usecases.submit import LEASE_MARGIN, Submission, Submit
from service.usecases.task_cache import Board, Pace, Seen
from service.usecases.task_status import Follow
from tests.fakes import START, FakeClock
from tests.unit.faulty_store import Line, Post, Store

IMAGE = Image(b"bytes", b"digest", "image/png", 3, 2)
GOES_ON = {SubmitOutcome.EXHAUSTED, SubmitOutcome.INVALID_ACCOUNT, SubmitOutcome.MISCONFIGURED, SubmitOutcome.NOT_SENT}
"""After these, and only these, another account may be tried."""
_FREE = {*GOES_ON, SubmitOutcome.REJECTED, SubmitOutcome.REDIRECTED, SubmitOutcome.BUSY}
_NO_FIGURES = Figures()
_METRICS = Metrics(CollectorRegistry())


class _NoWaiting(selectors.SelectSelector):
    """Calls `idle` instead of waiting."""

    idle: Callable[[], None]

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            self.idle()
        return super().select(0)


class _NumberedTask(asyncio.Task[Any]):
    """A task whose place in a set is the same in every run, since sets of tasks decide who is cancelled first."""

    def __init__(self, number: int, work: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> None:
        self._number = number
        super().__init__(work, loop=loop)

    def __hash__(self) -> int:
        return self._number


class StandingLoop(asyncio.SelectorEventLoop):
    """An event loop by a clock that stands: `run_forever` ends once nothing is left to do at this time."""

    def __init__(self, clock: FakeClock) -> None:
        self._standing = clock
        selector = _NoWaiting()
        selector.idle = self.stop
        super().__init__(selector)
        numbers = count()
        self.set_task_factory(lambda loop, work: _NumberedTask(next(numbers), work, loop))

    def time(self) -> float:
        return (self._standing.at - START) / 1000


class LoopTime:
    """Stands in for the module `time` where deadlines are reckoned."""

    @staticmethod
    def monotonic() -> float:
        return asyncio.get_running_loop().time()


class Numbers:
    """Stands in for the module `secrets` where reservations are named, so that they sort alike in every run."""

    def __init__(self) -> None:
        self._made = count()

    def token_hex(self, size: int) -> str:
        return f"{next(self._made):0{2 * size}x}"


@dataclass(eq=False)
class Request:
    """An image that was handed to the client of the upstream; without an outcome nobody knows what became of it."""

    account: Account
    answer: asyncio.Future[Submitted]
    outcome: SubmitOutcome | None = None


@dataclass(eq=False)
class Caller:
    """Somebody who submits once: what was asked of the ledger and sent for it, and how it was answered."""

    tenant: Tenant
    process: Process
    key: str | None = None
    asked: list[str] = field(default_factory=list)
    refused: bool = False
    requests: list[Request] = field(default_factory=list)
    answer: asyncio.Task[Submission] = field(init=False)

    @property
    def outcome(self) -> SubmitOutcome | None:
        """What became of the last image that was sent; NOT_SENT if there was none."""
        return self.requests[-1].outcome if self.requests else SubmitOutcome.NOT_SENT


_CALLER: ContextVar[Caller] = ContextVar("caller")
"""For whom a submission is at work: whatever it starts inherits it."""


class CallersLine(Line):
    """Keeps in mind for whom was asked."""

    async def reserve(self, ask: Ask) -> tuple[Verdict, Snapshot]:
        caller = _CALLER.get()
        caller.asked.append(ask.reservation)
        verdict, snapshot = await super().reserve(ask)
        caller.refused = not isinstance(verdict, Granted)
        return verdict, snapshot


class FaultyUpstream:
    """The port Upstream for all processes: submissions wait until told what becomes of them, checks tell `ends`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.pending: list[Request] = []
        self._keys: dict[tuple[int, str], list[tuple[int, Request]]] = {}
        self.accepted: list[str] = []
        self.ends: dict[str, Check] = {}

    async def submit(self, account: Account, options: Options, image: Image, *, seconds: float) -> Submitted:
        del options, image
        caller = _CALLER.get()
        caller.process.hang_if_dead()
        request = Request(account, asyncio.get_running_loop().create_future())
        self._check(caller, request, seconds)
        caller.requests.append(request)
        if seconds <= 0:
            request.outcome = SubmitOutcome.NOT_SENT
            return Submitted(outcome=SubmitOutcome.NOT_SENT)
        self._check_key(caller, request)
        self.pending.append(request)
        caller.process.sending.append(request)
        try:
            async with asyncio.timeout(seconds):
                return await request.answer
        except TimeoutError:
            request.outcome = SubmitOutcome.UNKNOWN
            return Submitted(outcome=SubmitOutcome.UNKNOWN)
        except asyncio.CancelledError:
            self._store.expect(caller.process.stopping, "sending was broken off though the process goes on")
            raise
        finally:
            caller.process.sending.remove(request)
            if request in self.pending:
                self.pending.remove(request)

    def tell(self, request: Request, outcome: SubmitOutcome | None, told: Figures = _NO_FIGURES) -> None:
        """Answer a submission; without an outcome it meets with a fault of ours, maybe after it was sent."""
        if request.answer.done():  # its time was over in the same moment
            return
        self.pending.remove(request)
        request.outcome = outcome
        if outcome is None:
            request.answer.set_exception(RuntimeError("a fault of ours"))
            return
        upstream_id = ""
        if outcome is SubmitOutcome.ACCEPTED:
            upstream_id = f"up-{len(self.accepted)}"
            self.accepted.append(upstream_id)
        request.answer.set_result(Submitted(outcome=outcome, upstream_id=upstream_id, figures=told))

    def _check(self, caller: Caller, request: Request, seconds: float) -> None:
        """Sending is in order: it has a place on that account for as long as it may take, and nothing was charged."""
        expect = self._store.expect
        held = self._store.reservations.get(caller.asked[-1])
        expect(request.account not in [each.account for each in caller.requests], "an account was asked twice")
        expect({each.outcome for each in caller.requests} <= GOES_ON, "sent again although it may have been charged")
        if seconds > 0:
            place = (held.state, held.account) if held else None
            expect(place == (ReservationState.RESERVED, request.account.id), f"sent with a place on {place}")
            latest = self._store.clock.at + (seconds + LEASE_MARGIN) * 1000
            expect(held is None or latest <= held.lease + 1, "sending may outlast its lease")

    def _check_key(self, caller: Caller, request: Request) -> None:
        """For as long as an idempotency key is kept, nothing is sent under it after what may have been charged."""
        if caller.key is None:
            return
        now, sent = self._store.clock.at, self._keys.setdefault((caller.tenant.id, caller.key), [])
        charged = [
            each.outcome
            for at, each in sent
            if each.outcome not in _FREE and now < at + KEEP_KEY - self._store.spans.lease
        ]
        self._store.expect(charged == [], "a key was sent again although it may have been charged")
        sent.append((now, request))

    async def check(self, account: Account, upstream_id: str) -> Check:
        del account
        return self.ends.get(upstream_id, Check(answered=Answered.RUNNING))


class Process:
    """A process of the gateway. Once `gone` it does nothing more; it may have been told to stop before."""

    def __init__(self, store: Store, post: Post, upstream: FaultyUpstream, registry: RegistryView) -> None:
        self.gone = False
        self.stopping = False
        self.sending: list[Request] = []
        self.background = Background()
        self._line = CallersLine(store, post)
        task_ids = TaskIds(Keyring([b"k" * 32]).purpose("task-id"))
        self._submit = Submit(
            ledger=self._line,
            settle=Settle(self._line, self.background, registry),
            tasks=self._line,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            background=self.background,
            metrics=_METRICS,
        )
        self._follow = Follow(
            tasks=self._line,
            ledger=self._line,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            board=Board(Pace(0)),
            clock=store.clock,
            metrics=_METRICS,
            interval=0,
        )
        watch = Watch(
            tasks=self._line,
            ledger=self._line,
            upstream=upstream,
            registry=registry,
            task_ids=task_ids,
            board=Board(Pace(0)),
            metrics=_METRICS,
        )
        loop = asyncio.get_running_loop()
        self._watching = [loop.create_task(watch.run()), loop.create_task(watch.expire())]

    async def submit(self, caller: Caller) -> Submission:
        """Submit for a caller."""
        _CALLER.set(caller)
        return await self._submit(caller.tenant, FaceEnhanceOptions(), {}, IMAGE, key=caller.key)

    async def read(self, tenant: Tenant, task_id: str) -> Seen:
        """Read a task."""
        return await self._follow.read(tenant, task_id)

    def die(self, *, heard: bool) -> None:
        """End without finishing anything; what it has asked for may still be carried out if it was `heard`."""
        self.gone = self.stopping = True
        self._line.cut(heard=heard)
        for request in self.sending:
            request.answer.cancel()
        for task in self._watching:
            task.cancel()

    async def stop(self, seconds: float) -> None:
        """End in good order: take nothing new, and finish what can be finished in that time."""
        self.stopping = True
        await self.background.drain(seconds)
        self.die(heard=True)

    def hang_if_dead(self) -> None:
        """Raises CancelledError in what goes on after the process has died."""
        if self.gone:
            raise asyncio.CancelledError
