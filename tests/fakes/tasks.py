"""Test double of the task store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from service.domain.errors import MalformedRequest
from service.domain.tasks import Backlog, Cost, Kind, State, Task, TaskError
from service.domain.webhooks import DeliveryState
from service.usecases.ports import CheckOutcome, CheckResult, ClaimedCheck, Delivery, TaskPage
from tests.fakes.clock import Stopwatch
from tests.fakes.deliveries import FakeDeliveryQueue
from tests.fakes.store import InMemoryStore
from tests.model import ledger_model
from tests.model.ledger_model import next_check_delay


@dataclass
class FakeTaskStore(InMemoryStore):
    async def get(self, reservation: str) -> tuple[Task, int] | None:
        self._raise_if_unavailable()
        task = self.tasks.get(reservation)
        return (task, self.clock.now_ms) if task else None

    async def touch(self, reservations: Sequence[str]) -> Sequence[tuple[Task, int] | None]:
        self._raise_if_unavailable()
        now = self.clock.now_ms
        ledger_now = self.clock.read_times().ledger_ms
        for name in reservations:
            if name in self.due_checks or name in self.claimed_checks:
                self.watched_until[name] = now + self.retention.watched_ms
            if self.due_checks.get(
                name, 0
            ) > ledger_now + self.retention.check_interval_ms and not self.failed_checks.get(name):
                self.due_checks[name] = ledger_now
        return [(self.tasks[name], now) if name in self.tasks else None for name in reservations]

    async def list_page(
        self, tenant: int, *, state: State | None, kind: Kind | None, limit: int, cursor: str | None
    ) -> TaskPage:
        self._raise_if_unavailable()
        tasks = sorted(
            (
                task
                for task in self.tasks.values()
                if task.tenant == tenant and state in {None, task.state} and kind in {None, task.kind}
            ),
            key=lambda task: (task.created_at, task.reservation),
            reverse=True,
        )
        if cursor:
            position = next((index for index, task in enumerate(tasks) if task.reservation == cursor), None)
            if position is None:
                raise MalformedRequest("The cursor is none of this list.")
            tasks = tasks[position + 1 :]
        kept = tuple(tasks[:limit])
        return TaskPage(kept, kept[-1].reservation if len(tasks) > limit else None)

    async def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        self._raise_if_unavailable()
        now = self.clock.read_times().ledger_ms
        for name in [name for name, lease in self.claimed_checks.items() if lease <= now]:
            del self.claimed_checks[name]
            self.due_checks[name] = now
        ready = sorted(((at, name) for name, at in self.due_checks.items() if at <= now))[:limit]
        for _, name in ready:
            del self.due_checks[name]
            self.claimed_checks[name] = now + self.retention.claim_lease_ms
        return [ClaimedCheck(self.tasks[name], now, at) for at, name in ready]

    async def backlog(self) -> Backlog:
        self._raise_if_unavailable()
        now = self.clock.read_times().ledger_ms
        return Backlog(
            len(self.due_checks) + len(self.claimed_checks), max(now - min(self.due_checks.values(), default=now), 0)
        )

    async def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> tuple[Task, int] | None:
        self._raise_if_unavailable()
        name, at = claimed.task.reservation, self.clock.read_times()
        now = at.server_ms
        task = self.tasks.get(name)
        self.claimed_checks.pop(name, None)
        if task is None or task.state.is_final:
            self.due_checks.pop(name, None)
            return None
        answered, error = result.outcome, result.error
        silent, useless = self.failure_stopwatches.pop(name, (Stopwatch(), Stopwatch()))
        if answered in {CheckOutcome.NOT_FOUND, CheckOutcome.INVALID, CheckOutcome.NO_RESPONSE}:
            silent = silent.advance(at.ledger_ms, counts=answered is CheckOutcome.NOT_FOUND)
            useless = useless.advance(at.ledger_ms, counts=answered is not CheckOutcome.NO_RESPONSE)
            self.failure_stopwatches[name] = (silent, useless)
        if answered is CheckOutcome.NOT_FOUND and silent.total_ms >= self.retention.lost_after_ms:
            answered, error = CheckOutcome.FAILED, TaskError("task-lost", "")
        elif (
            answered in {CheckOutcome.NOT_FOUND, CheckOutcome.INVALID}
            and useless.total_ms >= self.retention.unusable_after_ms
        ):
            answered, error = CheckOutcome.FAILED, TaskError("result-unusable", "")
        checked = task.last_checked_at if answered in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID} else now
        if answered in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}:
            cost = self._complete_task(name, claimed, result, succeeded=answered is CheckOutcome.SUCCEEDED)
            self.due_checks.pop(name, None)
            changes = {"state": State(answered), "finished_at": now, "artifacts": result.artifacts, "error": error}
            self.tasks[name] = msgspec.structs.replace(
                task, updated_at=now, last_checked_at=checked, version=task.version + 1, cost=cost, **changes
            )
            if task.webhook_url is not None:
                self._enqueue_delivery(task, task.webhook_url)
        else:
            failed = answered in {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID}
            misses = self.failed_checks[name] = self.failed_checks.get(name, 0) + 1 if failed else 0
            interesting = task.webhook_url is not None or self.watched_until.get(name, 0) > now
            poll, age = self.retention.check_interval_ms, now - task.created_at
            self.due_checks[name] = at.ledger_ms + next_check_delay(poll, age, misses, is_watched=interesting)
            begins = answered is CheckOutcome.RUNNING and task.state is State.QUEUED
            changes = {"state": State.RUNNING, "updated_at": now, "version": task.version + 1} if begins else {}
            self.tasks[name] = msgspec.structs.replace(task, last_checked_at=checked, **changes)
        if self.tasks[name].version > task.version:
            self.cache.on_published(self.tasks[name], now)
        return self.tasks[name], now

    def _enqueue_delivery(self, task: Task, url: str) -> None:
        now, state = self.clock.now_ms, DeliveryState.PENDING
        delivery = Delivery(
            reservation=task.reservation,
            task_id=task.id,
            tenant=task.tenant,
            url=url,
            state=state,
            created_at=now,
            updated_at=now,
        )
        FakeDeliveryQueue(self).enqueue(delivery)

    def _complete_task(self, name: str, due: ClaimedCheck, check: CheckResult, *, succeeded: bool) -> Cost:
        reservation = self.reservations[name]
        account = self._candidate(reservation.account)
        cost = ledger_model.complete_task(
            self._tenant_state(reservation.tenant),
            self._tenant_policy(reservation.tenant),
            account,
            name,
            reservation,
            check.balance,
            due.claimed_at,
            self._usage_day(reservation),
            self.clock.read_times(),
            succeeded=succeeded,
        )
        self._store_inference(account)
        return cost
