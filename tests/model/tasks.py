"""The rules of task checks and webhook deliveries in Python: the oracle of the property tests of the Lua scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from service.domain.ledger import LedgerClock, ReservationState
from service.domain.tasks import State, Task, TaskError
from service.domain.thresholds import Threshold
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import FAILING_MS, KEEP_MS, LEASE_MS, MAX_CONCURRENT
from service.storage.redis import AGE_PER_CHECK_INTERVAL, MAX_CHECK_BACKOFF_MS, MAX_CHECK_INTERVAL_MS
from service.usecases.ports import CheckOutcome, CheckResult, ClaimedCheck, ClaimedDelivery, Delivery, DeliveryResult
from tests.model.ledger import LedgerModel

_ENDS = {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}
_FAILURES = {CheckOutcome.NO_RESPONSE, CheckOutcome.INVALID}
_URL_HOST = re.compile(r"[a-z]+://([^/:?]+)")
_DIGITS = re.compile(r"[0-9.]+")


def queue_name(tenant: int, url: str) -> str:
    """Return the delivery queue of a URL: one per tenant and host, whatever the port, one for all IP addresses.

    Thus a tenant has at most as many queues as hosts on its allow list.
    """
    host = _URL_HOST.match(url)
    name = host[1] if host else ""
    return f"{tenant}:{'ip' if name.startswith('[') or _DIGITS.fullmatch(name) else name}"


def queue_of(delivery: Delivery) -> str:
    return queue_name(delivery.tenant, delivery.url)


@dataclass
class Stopwatch:
    """A duration that counts only between consecutive counting moments."""

    total_ms: int = 0
    running_since: int | None = None

    def advance(self, now: int, *, counts: bool) -> None:
        if counts:
            self.total_ms += 0 if self.running_since is None else now - self.running_since
        self.running_since = now if counts else None


@dataclass
class StoreModel(LedgerModel):
    """The ledger with its tasks and deliveries."""

    claimed_checks: dict[str, int] = field(default_factory=dict)
    watched_until: dict[str, int] = field(default_factory=dict)
    awaited: dict[str, int] = field(default_factory=dict)
    """The awaited tasks by the time of their next check, as it was when they were last touched."""
    failed_checks: dict[str, int] = field(default_factory=dict)
    not_found: dict[str, Stopwatch] = field(default_factory=dict)
    unresolved: dict[str, Stopwatch] = field(default_factory=dict)
    deliveries: dict[str, Delivery] = field(default_factory=dict)
    queued: dict[str, int] = field(default_factory=dict)
    leased: dict[str, int] = field(default_factory=dict)
    queue_turns: dict[str, int] = field(default_factory=dict)
    failing_until: dict[str, int] = field(default_factory=dict)
    failed_at: dict[str, int] = field(default_factory=dict)
    warned: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    """Start of the window and limit for which a threshold was queued last, by tenant and threshold."""

    def reset_clock(self, tenants: Sequence[int], account_ids: Sequence[int]) -> int:
        offset = self.read_clock().offset_ms
        for name, item in self.reservations.items():
            is_unknown = item.state is ReservationState.UNKNOWN and item.tenant in tenants
            is_running = name in self.due_checks or name in self.claimed_checks
            if (
                item.state is ReservationState.RESERVED
                or is_unknown
                or (is_running and item.state is ReservationState.ACCEPTED)
            ):
                self.reservations[name] = item.to_server_time(offset)
        for account in set(account_ids) & self.accounts.keys():
            self.accounts[account] = self.accounts[account].to_server_time(offset)
        for stopwatch in (*self.not_found.values(), *self.unresolved.values()):
            if stopwatch.running_since is not None:
                stopwatch.running_since -= offset
        for queue in self.failing_until.keys() & self.queue_turns.keys():
            self.failing_until[queue] -= offset
        for times in (self.due_checks, self.claimed_checks, self.queue_turns, self.queued, self.leased):
            for name in times:
                times[name] -= offset
        self.clock = LedgerClock(self.now_ms)
        return offset

    def touch(self, name: str, *, is_awaited: bool = False) -> Task | None:
        now = self.read_clock().ledger_ms
        if name in self.due_checks or name in self.claimed_checks:
            self.watched_until[name] = self.now_ms + self.retention.watched_ms
        is_far = self.due_checks.get(name, 0) > now + self.retention.check_interval_ms
        if is_far and not self.failed_checks.get(name):
            self.due_checks[name] = now
        if is_awaited and name in self.due_checks:
            self.awaited[name] = self.due_checks[name]
        return self.tasks.get(name)

    def claim_checks(self, limit: int) -> Sequence[ClaimedCheck]:
        now = self.read_clock().ledger_ms
        for name in [name for name, lease in self.claimed_checks.items() if lease <= now]:
            del self.claimed_checks[name]
            self.due_checks[name] = now
        ready = []
        for _, name in sorted((at, name) for name, at in self.awaited.items() if at <= now)[:limit]:
            del self.awaited[name]
            if self.due_checks.get(name, now + 1) <= now:
                ready.append((self.due_checks[name], name))
        others = sorted((at, name) for name, at in self.due_checks.items() if at <= now and (at, name) not in ready)
        ready += others[: limit - len(ready)]
        for _, name in ready:
            del self.due_checks[name]
            self.claimed_checks[name] = now + self.retention.claim_lease_ms
        return [ClaimedCheck(self.tasks[name], now, at) for at, name in ready]

    def release_checks(self, claimed: Sequence[ClaimedCheck]) -> None:
        now = self.read_clock().ledger_ms
        for name in {check.task.reservation for check in claimed} & self.claimed_checks.keys():
            del self.claimed_checks[name]
            self.due_checks[name] = now

    def record_check(self, claimed: ClaimedCheck, result: CheckResult) -> Task | None:
        name, at = claimed.task.reservation, self.read_clock()
        task, now = self.tasks.get(name), at.server_ms
        self.claimed_checks.pop(name, None)
        if task is None or task.state.is_final:
            self.due_checks.pop(name, None)
            return None
        outcome, error = self._judge(name, result, at.ledger_ms)
        if outcome in _ENDS:
            cost = self.complete_task(name, result, claimed.claimed_at, succeeded=outcome is CheckOutcome.SUCCEEDED)
            self.due_checks.pop(name, None)
            self.tasks[name] = replace(
                task,
                state=State(outcome),
                updated_at=now,
                finished_at=now,
                last_checked_at=now,
                artifacts=result.artifacts,
                error=error,
                cost=cost,
                version=task.version + 1,
            )
            if task.webhook_url is not None:
                delivery = Delivery(
                    id=name,
                    task_id=task.id,
                    tenant=task.tenant,
                    url=task.webhook_url,
                    state=DeliveryState.PENDING,
                    created_at=now,
                    updated_at=now,
                )
                self._enqueue(delivery, 0)
            return self.tasks[name]
        failures = self.failed_checks[name] = self.failed_checks.get(name, 0) + 1 if outcome in _FAILURES else 0
        is_watched = task.webhook_url is not None or self.watched_until.get(name, 0) > now
        self.due_checks[name] = at.ledger_ms + self._next_check_delay(now - task.created_at, failures, is_watched)
        if outcome not in _FAILURES:
            task = replace(task, last_checked_at=now)
        if outcome is CheckOutcome.RUNNING and task.state is State.QUEUED:
            task = replace(task, state=State.RUNNING, updated_at=now, version=task.version + 1)
        self.tasks[name] = task
        return task

    def _judge(self, name: str, result: CheckResult, now: int) -> tuple[CheckOutcome, TaskError | None]:
        """Return the outcome of a check, which fails a task that had no usable response for too long."""
        outcome = result.outcome
        if outcome not in {CheckOutcome.NOT_FOUND, *_FAILURES}:
            self.not_found.pop(name, None)
            self.unresolved.pop(name, None)
            return outcome, result.error
        not_found = self.not_found.setdefault(name, Stopwatch())
        unresolved = self.unresolved.setdefault(name, Stopwatch())
        not_found.advance(now, counts=outcome is CheckOutcome.NOT_FOUND)
        unresolved.advance(now, counts=outcome is not CheckOutcome.NO_RESPONSE)
        if outcome is CheckOutcome.NOT_FOUND and not_found.total_ms >= self.retention.lost_after_ms:
            return CheckOutcome.FAILED, TaskError("task-lost", "")
        if outcome is not CheckOutcome.NO_RESPONSE and unresolved.total_ms >= self.retention.unusable_after_ms:
            return CheckOutcome.FAILED, TaskError("result-unusable", "")
        return outcome, result.error

    def _next_check_delay(self, age_ms: int, failures: int, is_watched: bool) -> int:
        interval = self.retention.check_interval_ms
        if failures:
            return min(interval << failures, max(MAX_CHECK_BACKOFF_MS, interval))
        if is_watched:
            return interval
        return max(min(age_ms // AGE_PER_CHECK_INTERVAL, MAX_CHECK_INTERVAL_MS), interval)

    def queue_threshold(self, name: str, tenant: int, url: str, threshold: Threshold, body: bytes) -> bool:
        now, key = self.read_clock().server_ms, (tenant, threshold.name)
        start, limit = threshold.window_start, threshold.limit
        last_start, last_limit = self.warned.get(key, (-1, 0))
        is_known = limit <= last_limit if start == last_start else start < last_start and name in self.deliveries
        if is_known or tenant not in self.tenant_policies:
            return False
        self.warned[key] = max(self.warned.get(key, (-1, 0)), (start, limit))
        delivery = Delivery(
            id=name,
            task_id="",
            tenant=tenant,
            url=url,
            threshold=threshold.name,
            body=body.decode(),
            state=DeliveryState.PENDING,
            created_at=now,
            updated_at=now,
        )
        self._enqueue(delivery, 0)
        return True

    def claim_deliveries(self, limit: int) -> Sequence[ClaimedDelivery]:
        now = self.read_clock().ledger_ms
        claimed: list[ClaimedDelivery] = []
        for _, queue in sorted((at, name) for name, at in self.queue_turns.items() if at <= now)[:limit]:
            for name, expires_at in self._in_queue(queue, self.leased):
                if expires_at <= now:
                    del self.leased[name]
                    self.queued[name] = now
            free = min(self._max_parallel(queue) - len(self._in_queue(queue, self.leased)), limit - len(claimed))
            due = [name for name, at in self._in_queue(queue, self.queued) if at <= now]
            for name in due[: max(free, 0)]:
                del self.queued[name]
                self.leased[name] = now + LEASE_MS
                claimed.append(ClaimedDelivery(self.deliveries[name], now + LEASE_MS))
            self._schedule_queue(queue)
        return claimed

    def record_delivery(self, claimed: ClaimedDelivery, result: DeliveryResult) -> bool:
        at, name = self.read_clock(), claimed.delivery.id
        delivery, has_succeeded = self.deliveries[name], result.state is DeliveryState.DELIVERED
        if delivery.state is not DeliveryState.PENDING:
            return False
        if not has_succeeded and self.leased.get(name) != claimed.lease_expires_at:
            return False
        self.leased.pop(name, None)
        self.queued.pop(name, None)
        if has_succeeded:
            self.failing_until.pop(queue_of(delivery), None)
        elif result.attempted:
            self.failing_until[queue_of(delivery)] = at.ledger_ms + FAILING_MS
        delivery = self.deliveries[name] = replace(
            delivery,
            state=result.state,
            updated_at=at.server_ms,
            next_attempt_at=None,
            attempts=delivery.attempts + result.attempted,
            status=result.status,
            error=result.error,
            response_excerpt=result.response_excerpt,
        )
        if result.state is DeliveryState.PENDING:
            self._enqueue(delivery, result.retry_delay_ms)
        elif not has_succeeded:
            self.failed_at[name] = at.server_ms
            self.failed_at = {item: when for item, when in self.failed_at.items() if when > at.server_ms - KEEP_MS}
        self._schedule_queue(queue_of(delivery))
        return True

    def list_failed(self, limit: int) -> Sequence[Delivery]:
        newest = sorted(((at, name) for name, at in self.failed_at.items()), reverse=True)
        return [self.deliveries[name] for _, name in newest[:limit]]

    def redeliver(self, name: str) -> Delivery | None:
        if name in self.deliveries and name not in self.leased:
            self.failed_at.pop(name, None)
            self._enqueue(replace(self.deliveries[name], attempts=0), 0)
        return self.deliveries.get(name)

    def _enqueue(self, delivery: Delivery, delay_ms: int) -> None:
        at, name, next_attempt_at = self.read_clock(), delivery.id, self.now_ms + delay_ms
        self.deliveries[name] = replace(
            delivery, state=DeliveryState.PENDING, updated_at=at.server_ms, next_attempt_at=next_attempt_at
        )
        self.queued[name] = at.ledger_ms + delay_ms
        self._schedule_queue(queue_of(delivery))

    def _in_queue(self, queue: str, times: Mapping[str, int]) -> list[tuple[str, int]]:
        """Return the deliveries of a queue by time."""
        mine = ((name, at) for name, at in times.items() if queue_of(self.deliveries[name]) == queue)
        return sorted(mine, key=lambda item: (item[1], item[0]))

    def _max_parallel(self, queue: str) -> int:
        return 1 if self.failing_until.get(queue, 0) > self.read_clock().ledger_ms else MAX_CONCURRENT

    def _schedule_queue(self, queue: str) -> None:
        leases = [at for _, at in self._in_queue(queue, self.leased)]
        waits = [] if len(leases) >= self._max_parallel(queue) else self._in_queue(queue, self.queued)
        turns = [*leases, *(at for _, at in waits)]
        if turns:
            self.queue_turns[queue] = min(turns)
        else:
            self.queue_turns.pop(queue, None)
