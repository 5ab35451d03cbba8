"""The port Tasks in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from service.domain.errors import MalformedRequest
from service.domain.tasks import Backlog, Cost, Kind, State, Task, TaskError
from service.domain.webhooks import DeliveryState
from service.usecases.ports import Answered, Check, Delivery, Due, Page
from tests.fakes.agenda import FakeAgenda
from tests.fakes.clock import Stopwatch
from tests.fakes.memory import Memory
from tests.model import ledger_model
from tests.model.ledger_model import check_after


@dataclass
class FakeTasks(Memory):
    """The tasks that were accepted, their checks and their ends."""

    async def get(self, reservation: str) -> tuple[Task, int] | None:
        self._answer()
        task = self.tasks.get(reservation)
        return (task, self.clock.at) if task else None

    async def attend(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        self._answer()
        now = self.clock.at
        ledger_now = self.clock.moment().now
        for name in reservations:
            if name in self.due or name in self.claims:
                self.interest[name] = now + self.spans.interest
            if self.due.get(name, 0) > ledger_now + self.spans.check_after and not self.misses.get(name):
                self.due[name] = ledger_now
        return [(self.tasks[name], now) if name in self.tasks else None for name in reservations]

    async def page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> Page:
        self._answer()
        found = sorted(
            (
                task
                for task in self.tasks.values()
                if task.tenant == tenant and state in {None, task.state} and kind in {None, task.kind}
            ),
            key=lambda task: (task.created, task.reservation),
            reverse=True,
        )
        if cursor:
            position = next((index for index, task in enumerate(found) if task.reservation == cursor), None)
            if position is None:
                raise MalformedRequest("The cursor is none of this list.")
            found = found[position + 1 :]
        kept = tuple(found[:limit])
        return Page(kept, kept[-1].reservation if len(found) > limit else None)

    async def claim(self, most: int) -> Sequence[Due]:
        self._answer()
        now = self.clock.moment().now
        for name in [name for name, lease in self.claims.items() if lease <= now]:
            del self.claims[name]
            self.due[name] = now
        ready = sorted(((at, name) for name, at in self.due.items() if at <= now))[:most]
        for _, name in ready:
            del self.due[name]
            self.claims[name] = now + self.spans.claim
        return [Due(self.tasks[name], now, at) for at, name in ready]

    async def backlog(self) -> Backlog:
        self._answer()
        now = self.clock.moment().now
        return Backlog(len(self.due) + len(self.claims), max(now - min(self.due.values(), default=now), 0))

    async def record(self, due: Due, check: Check) -> tuple[Task, int] | None:
        self._answer()
        name, at = due.task.reservation, self.clock.moment()
        now = at.wall
        task = self.tasks.get(name)
        self.claims.pop(name, None)
        if task is None or task.state.ended:
            self.due.pop(name, None)
            return None
        answered, error = check.answered, check.error
        silent, useless = self.patience.pop(name, (Stopwatch(), Stopwatch()))
        if answered in {Answered.SILENT, Answered.UNUSABLE, Answered.NOTHING}:
            silent = silent.went_on(at.now, counts=answered is Answered.SILENT)
            useless = useless.went_on(at.now, counts=answered is not Answered.NOTHING)
            self.patience[name] = (silent, useless)
        if answered is Answered.SILENT and silent.total >= self.spans.lost_after:
            answered, error = Answered.FAILED, TaskError("task-lost", "")
        elif answered in {Answered.SILENT, Answered.UNUSABLE} and useless.total >= self.spans.unusable_after:
            answered, error = Answered.FAILED, TaskError("result-unusable", "")
        checked = task.checked if answered in {Answered.NOTHING, Answered.UNUSABLE} else now
        if answered in {Answered.SUCCEEDED, Answered.FAILED}:
            cost = self._end(name, due, check, succeeded=answered is Answered.SUCCEEDED)
            self.due.pop(name, None)
            changes = {"state": State(answered), "finished": now, "artifacts": check.artifacts, "error": error}
            self.tasks[name] = msgspec.structs.replace(
                task, updated=now, checked=checked, version=task.version + 1, cost=cost, **changes
            )
            if task.webhook is not None:
                self._tell(task, task.webhook)
        else:
            failed = answered in {Answered.NOTHING, Answered.UNUSABLE}
            misses = self.misses[name] = self.misses.get(name, 0) + 1 if failed else 0
            interesting = task.webhook is not None or self.interest.get(name, 0) > now
            poll, age = self.spans.check_after, now - task.created
            self.due[name] = at.now + check_after(poll, age, misses, interesting=interesting)
            begins = answered is Answered.RUNNING and task.state is State.QUEUED
            changes = {"state": State.RUNNING, "updated": now, "version": task.version + 1} if begins else {}
            self.tasks[name] = msgspec.structs.replace(task, checked=checked, **changes)
        if self.tasks[name].version > task.version:
            self.board.announced(self.tasks[name], now)
        return self.tasks[name], now

    def _tell(self, task: Task, url: str) -> None:
        now, state = self.clock.at, DeliveryState.PENDING
        delivery = Delivery(
            reservation=task.reservation,
            task=task.id,
            tenant=task.tenant,
            url=url,
            state=state,
            created=now,
            updated=now,
        )
        FakeAgenda(self).enqueue(delivery)

    def _end(self, name: str, due: Due, check: Check, *, succeeded: bool) -> Cost:
        reservation = self.reservations[name]
        account = self._candidate(reservation.account)
        cost = ledger_model.end(
            self._tenant(reservation.tenant),
            self._limits(reservation.tenant),
            account,
            name,
            reservation,
            check.figures,
            due.claimed,
            self._day(reservation),
            self.clock.moment(),
            succeeded=succeeded,
        )
        self._resolve(account)
        return cost
