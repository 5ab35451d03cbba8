"""The scripts on Redis beside their model: the same calls must give the same answers and store the same data."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

import msgspec
import uvloop
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant
from msgspec.structs import replace

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.errors import LedgerUnavailable
from service.domain.ledger import (
    SPENT_WINDOWS,
    AccountState,
    AccountStatus,
    Balance,
    DayUsage,
    Grant,
    Idempotency,
    InferredCharge,
    LedgerClock,
    Reservation,
    ReservationState,
    SpentSums,
    Tally,
    TenantState,
    Verdict,
    current_spent,
    spent_starts,
)
from service.domain.tasks import Artifact, ArtifactName, CostBasis, Kind, Task, TaskError
from service.domain.tenants import Account, AccountPolicy, Tenant, TenantPolicy, Window
from service.storage.connections import connect
from service.storage.deliveries import RedisDeliveryQueue, _decode_delivery
from service.storage.ledger import RedisLedger, _parse_day_usage
from service.storage.redis import DAY_MS, Keys, RedisScripts, parse_withscores
from service.storage.registry import RedisRegistry
from service.storage.tasks import RedisTaskStore, _decode_task
from service.usecases.ports import (
    BalanceCheck,
    CheckOutcome,
    CheckResult,
    ClaimedCheck,
    NewTask,
    RegistryChange,
    ReserveRequest,
    Settlement,
)
from tests.model.ledger import is_open, is_reserved, roll_windows
from tests.model.tasks import StoreModel
from tests.storage.ledger_strategies import KINDS, MAX_CLOCK_STEP_MS, WEBHOOKS, SimulatedUpstream, SubmissionPlan
from tests.storage.seeded_store import RETENTION
from tests.support.server_time import install_server_time, set_server_time

T = TypeVar("T")
P = ParamSpec("P")

TENANT, ACCOUNTS = 1, (2, 3)
NO_FLOORS = AccountPolicy()
START_MS = 2_524_607_999_000
"""The server's clock at the start, one second before 2050: every window ends within the next second."""


def normalize(result: Any) -> Any:
    """Drop what only one side has: an empty balance, the detail of a timeout error, the type of raw JSON."""
    if isinstance(result, list | tuple):
        return tuple(map(normalize, result))
    if isinstance(result, ClaimedCheck):
        return normalize(result.task), result.claimed_at
    if isinstance(result, Reservation) and result.balance_after == Balance():
        return replace(result, balance_after=None)
    if isinstance(result, Task):
        error = result.error
        if error and error.code in {"task-lost", "result-unusable"}:
            error = TaskError(error.code, "")
        raw = {"options": bytes(result.options), "metadata": bytes(result.metadata)}
        return msgspec.to_builtins(replace(result, error=error, **raw))
    return result


def normalize_day(day: DayUsage) -> Any:
    """Drop the zero counters of a day's usage."""
    tallies = {kind: {item: number for item, number in tally.items() if number} for kind, tally in day.tallies.items()}
    return {kind: tally for kind, tally in tallies.items() if tally}, day.unknown, day.refunds


def decode(packed: bytes | None, kind: type[T]) -> T | None:
    return msgspec.msgpack.decode(packed, type=kind) if packed else None


class LedgerComparison(RuleBasedStateMachine):
    """Runs each operation in Redis and in the model, with the balances that the simulated upstream reports.

    `claimed_checks` and `balance_checks` are those in progress, the newest first.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        install_server_time()
        self.loop = uvloop.new_event_loop()
        self.retention = replace(
            RETENTION,
            lost_after_ms=90_000,
            unusable_after_ms=200_000,
            keep_finished_ms=settings().stateful_step_count * MAX_CLOCK_STEP_MS,  # no submission expires in the model
        )
        self.model = StoreModel(START_MS, self.retention)
        self.latest_ms = START_MS
        self.keys = Keys("model")
        self.reservation_count = 0
        self.claimed_checks: list[ClaimedCheck] = []
        self.balance_checks: list[BalanceCheck] = []
        self.run(self._open(url))
        self.set_upstream(late=False, now=True, count=2, money=1_000)
        self.write_policies(TenantPolicy())

    async def _open(self, url: str) -> None:
        self.connections = connect(url, timeout=5)
        self.client: Any = self.connections.commands
        await self.client.flushall()
        self.scripts = scripts = RedisScripts(self.client)
        self.ledger = RedisLedger(scripts, self.keys, self.retention)
        self.tasks = RedisTaskStore(scripts, self.keys, self.retention)
        self.deliveries = RedisDeliveryQueue(scripts, self.keys)
        self.registry_store = RedisRegistry(scripts, self.keys)
        await set_server_time(self.client, self.keys, START_MS)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(work)

    def teardown(self) -> None:
        self.run(self.connections.aclose())
        self.loop.close()

    def compare(
        self, real: Coroutine[Any, Any, T], model_call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> T | None:
        """Return the answer of both, or None if both raised LedgerUnavailable."""
        actual = expected = None
        with suppress(LedgerUnavailable):
            expected = model_call(*args, **kwargs)
        with suppress(LedgerUnavailable):
            actual = self.run(real)
        assert normalize(actual) == normalize(expected)
        return actual

    # The clock, the upstream and the registry

    def advance_clock(self, milliseconds: int) -> None:
        """Move the server's clock, in either direction, and delete the keys that Redis would have expired."""
        if milliseconds:
            self.model.now_ms += milliseconds
            self.latest_ms = max(self.latest_ms, self.model.now_ms)
            self.run(self._expire_keys())

    async def _expire_keys(self) -> None:
        model, now = self.model, self.model.now_ms
        await set_server_time(self.client, self.keys, now)
        for tenant, key in [item for item, (_, _, until) in model.idempotency_keys.items() if until <= now]:
            del model.idempotency_keys[tenant, key]
            await self.client.delete(self.keys.idempotency(tenant, key))
        for name in [item for item, until in model.watched_until.items() if until <= now]:
            del model.watched_until[name]
            await self.client.delete(self.keys.poll_watched(name))

    def set_upstream(self, *, late: bool, now: bool, count: int, money: int) -> None:
        """Choose when the upstream charges (`late`: at the end), and whether it reports the current balance."""
        self.upstream = SimulatedUpstream(
            late, now, dict.fromkeys(KINDS, 100), dict.fromkeys(ACCOUNTS, Balance(count, money))
        )

    def write_policies(
        self, tenant: TenantPolicy, first: AccountPolicy = NO_FLOORS, second: AccountPolicy = NO_FLOORS
    ) -> None:
        """Write the policies of the tenant and both accounts, which are created again if they were deleted."""
        self._write_registry(
            tenants=(Tenant(TENANT, "t", ("a", "b"), tenant),),
            accounts=(Account(2, "a", b"encrypted", None, first), Account(3, "b", b"encrypted", None, second)),
        )

    def write_tenant_policy(self, policy: TenantPolicy) -> None:
        self._write_registry(tenants=(Tenant(TENANT, "t", ("a", "b"), policy),))

    def delete_from_registry(self, name: str) -> None:
        """Delete the tenant or the account with this name."""
        registry = self.run(self.registry_store.load())
        self._write_registry(
            drop_tenants=tuple(tenant for tenant in registry.tenants.values() if tenant.name == name),
            drop_accounts=tuple(account for account in registry.accounts.values() if account.name == name),
        )

    def _write_registry(self, **changes: Any) -> None:
        version = self.run(self.registry_store.read_version())
        change = RegistryChange(version=version, next_id=4, **changes)
        assert self.run(self.registry_store.write(change))
        self.model.tenant_policies |= {item.id: item.policy for item in change.tenants}
        self.model.account_policies |= {item.id: item.policy for item in change.accounts}
        for tenant in change.drop_tenants:
            del self.model.tenant_policies[tenant.id]
        for account in change.drop_accounts:
            del self.model.account_policies[account.id]

    # Submissions

    def tenant_state(self) -> TenantState:
        return self.model.tenant_state(TENANT)

    def choose_reservation(self, number: int, predicate: Callable[[Reservation], bool]) -> str | None:
        """Choose one of the matching reservations, counted from the newest."""
        results = [name for name, reservation in reversed(self.model.reservations.items()) if predicate(reservation)]
        return results[number % len(results)] if results else None

    def next_name(self) -> str:
        self.reservation_count += 1
        return f"r{self.reservation_count}"

    def reserve(
        self, kind: Kind, accounts: tuple[int, ...], idempotency: Idempotency | None = None, name: str | None = None
    ) -> str | None:
        """Reserve, under a new name unless one is given. Returns None if refused."""
        ask = ReserveRequest(name or self.next_name(), TENANT, accounts, kind, idempotency)
        answer = self.compare(self.ledger.reserve(ask), self.model.reserve, ask)
        if idempotency:
            self.compare(self._find_replay(idempotency), self.model.find_replay, TENANT, idempotency)
        return ask.reservation if answer and isinstance(answer[0], Grant) else None

    async def _find_replay(self, idempotency: Idempotency) -> Verdict | None:
        return (await self.ledger.find_replay(TENANT, idempotency))[0]

    def change_account(
        self, reservation: str, left: int, accounts: tuple[int, ...], closes: AccountStatus | None
    ) -> None:
        ask = ReserveRequest(reservation, TENANT, accounts, Kind.UPSCALE)
        self.compare(self.ledger.change_account(ask, left, closes), self.model.change_account, ask, left, closes)

    def settle(
        self,
        reservation: str,
        outcome: ReservationState,
        reported: Balance | None = None,
        closes: AccountStatus | None = None,
        idempotency: Idempotency | None = None,
        *,
        charged: bool = True,
        late: bool = False,
        wrong_account: bool = False,
    ) -> None:
        """Settle a reservation. `charged`: the upstream charged it although the outcome is unknown.

        `wrong_account` names the other account, as after a change of account whose response was lost.
        """
        known = self.model.reservations.get(reservation)
        account, kind = (known.account, known.kind) if known else (ACCOUNTS[0], Kind.UPSCALE)
        if outcome is ReservationState.ACCEPTED or (outcome is ReservationState.UNKNOWN and charged):
            self.upstream.submit(reservation, account, kind)
        settlement = Settlement(
            reservation=reservation,
            tenant=TENANT,
            account=sum(ACCOUNTS) - account if wrong_account and known else account,
            kind=kind,
            created_at=known.created_at if known else self.latest_ms - 1_000,
            outcome=outcome,
            balance=self.upstream.balances[account] if reported is None else reported,
            account_status=closes if outcome is ReservationState.REFUSED else None,
            new_task=NewTask(
                f"task_{reservation}",
                msgspec.Raw(b"{}"),
                msgspec.Raw(b'{"a":"b"}'),
                WEBHOOKS[int(reservation[1:]) % len(WEBHOOKS)],
                f"the trace of {reservation}",
            ),
            idempotency=idempotency,
            is_late=late,
        )
        self.compare(self.ledger.settle(settlement), self.model.settle, settlement)

    def refund(self, tenant: int, reservation: str, reason: str) -> None:
        self.compare(self.ledger.refund(tenant, reservation, reason), self.model.refund, tenant, reservation, reason)

    def settle_expired(self, limit: int) -> bool:
        """Settle so many expired reservations. Returns whether there were any."""
        return bool(self.compare(self.ledger.settle_expired(limit), self.model.settle_expired, limit))

    # Checks

    def touch_task(self, reservation: str, *, is_awaited: bool = False) -> None:
        (actual,) = self.run(self.tasks.touch([reservation], is_awaited=is_awaited))
        assert normalize(actual and actual[0]) == normalize(self.model.touch(reservation, is_awaited=is_awaited))

    def claim_checks(self, limit: int) -> list[ClaimedCheck]:
        claimed = self.compare(self.tasks.claim_checks(limit), self.model.claim_checks, limit) or ()
        self.claimed_checks = [*claimed, *self.claimed_checks]
        return list(claimed)

    def record_check(self, due: ClaimedCheck, answered: CheckOutcome, reported: Balance | None = None) -> None:
        """Record a check. A final answer reports the upstream's balance, unless `reported` is given."""
        task, succeeds = due.task, answered is CheckOutcome.SUCCEEDED
        figures, ends = Balance(), answered in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}
        if ends:
            figures = self.upstream.finish_task(task.reservation, task.account, task.kind, succeeds=succeeds)
        check = CheckResult(
            outcome=answered,
            artifacts=(Artifact(ArtifactName.IMAGE, "http://up.test/1.png"),) if succeeds else (),
            error=TaskError("failed", "It failed.") if answered is CheckOutcome.FAILED else None,
            balance=figures if reported is None else reported,
        )
        actual, expected = self.run(self.tasks.record_check(due, check)), self.model.record_check(due, check)
        assert normalize(actual and actual[0]) == normalize(expected)
        if ends:
            others = [item for item in self.claimed_checks if item.task.reservation != task.reservation]
            self.claimed_checks = [*others, due]

    def record_running(self, claimed: list[ClaimedCheck]) -> None:
        actual, running = self.run(self.tasks.record_running(claimed)), CheckResult(outcome=CheckOutcome.RUNNING)
        versions = {name: task.version for name, task in self.model.tasks.items()}
        recorded = [self.model.record_check(due, running) for due in claimed]
        changed = [task for task in recorded if task and task.version > versions[task.reservation]]
        assert [normalize(task) for task, _ in actual] == list(map(normalize, changed))

    def release_checks(self, claimed: list[ClaimedCheck]) -> None:
        self.run(self.tasks.release_checks(claimed))
        self.model.release_checks(claimed)

    def claim_balance_check(self, account: int, *, count_only: bool) -> BalanceCheck | None:
        claim = self.ledger.claim_balance_check(account, count_only=count_only)
        check = self.compare(claim, self.model.claim_balance_check, account, count_only=count_only)
        if check:
            self.balance_checks = [check, *self.balance_checks]
        return check

    def record_balance_check(self, check: BalanceCheck, reported: Balance | None = None) -> None:
        if reported is None:
            reported = self.upstream.finish_task(check.reservation, check.account, Kind.UPSCALE, succeeds=True)
        recording = self.ledger.record_balance_check(check, reported)
        self.compare(recording, self.model.record_balance_check, check, reported)

    # Several operations in a row

    def run_submission(self, account: int, plan: SubmissionPlan, milliseconds: int) -> None:
        """Run a submission up to the first check of its task, with a pause between steps.

        If the account cannot pay, check its balance if allowed and retry once.
        """
        self.advance_clock(plan.pause_ms)
        self.upstream.prices[plan.kind] = plan.price_fen
        name = self.reserve(plan.kind, (account,))
        if name is None:
            self.advance_clock(PROBE_INTERVAL_MS)
            check = self.claim_balance_check(account, count_only=True)
            self.advance_clock(milliseconds)
            if check:
                self.record_balance_check(check)
            name = self.reserve(plan.kind, (account,))
        if name is None:
            return
        self.advance_clock(milliseconds)
        if plan.outcome is ReservationState.ACCEPTED and not self.upstream.can_pay(account, plan.kind):
            self.settle(name, ReservationState.REFUSED, plan.balance_at_submit, AccountStatus.EXHAUSTED)
        else:
            self.settle(name, plan.outcome, plan.balance_at_submit, charged=plan.is_charged)
        if plan.outcome is ReservationState.UNKNOWN and plan.later_outcome:
            self.advance_clock(milliseconds)
            if plan.is_refunded:
                self.refund(TENANT, name, "")
            self.settle(name, plan.later_outcome, plan.balance_at_submit)
        self.advance_clock(self.retention.check_interval_ms)
        self.claim_checks(9)
        self.advance_clock(milliseconds)
        for due in [one for one in self.claimed_checks if one.task.reservation == name]:
            self.record_check(due, plan.answered, plan.balance_at_end)
        self.advance_clock(milliseconds)

    def check_conclusions(self, account: int) -> None:
        """Require that what the ledger concluded from true balances is true, while no other submission was open."""
        state = self.model.account_state(account)
        assert (state.unexplained_count, state.unexplained_money_fen) == (0, 0)
        for name, item in self.model.reservations.items():
            was_charged = name in self.upstream.charged_tasks
            if item.inferred_charge:
                assert item.inferred_charge is (InferredCharge.CHARGED if was_charged else InferredCharge.NOT_CHARGED)
            if item.cost and item.cost.basis is CostBasis.OBSERVED:
                assert (item.cost.count + item.cost.money_fen > 0) is was_charged

    def finish_all(self, *, succeeds: bool) -> None:
        """Finish everything and require that nothing is held. The ledger's clock may run slower than the server's."""
        self.advance_clock(2 * self.retention.lease_ms)
        while self.settle_expired(3):
            pass
        self.advance_clock(2 * self.retention.claim_lease_ms)
        while self.model.due_checks or self.model.claimed_checks:
            self.advance_clock(2 * self.retention.claim_lease_ms)
            for due in self.claim_checks(9):
                self.record_check(due, CheckOutcome.SUCCEEDED if succeeds else CheckOutcome.FAILED)
        state = self.tenant_state()
        held = [window.tasks_reserved + window.money_reserved_fen for window in state.windows.values()]
        assert (state.active_tasks, held) == (0, [0] * len(state.windows))

    # What has to hold

    @invariant()
    def stored_data_matches(self) -> None:
        """Require that both stored the same, and that no lease, check, queue or key is kept longer than its purpose."""
        self.run(self._compare_state())
        self.run(self._compare_values())

    async def _compare_state(self) -> None:
        model, keys = self.model, self.keys
        days = sorted({item.created_at // DAY_MS for item in model.reservations.values()})
        leases = {name: item.lease_expires_at for name, item in model.reservations.items() if is_reserved(item)}
        times = {
            keys.leases: leases,
            keys.poll_due: model.due_checks,
            keys.poll_claimed: model.claimed_checks,
            keys.webhook_queues: model.queue_turns,
            keys.failed_deliveries: model.failed_at,
        }
        (last, offset), spent, listed, *rows = await self.scripts.read(
            ("MGET", keys.clock, keys.clock_offset),
            ("HMGET", keys.tenant(TENANT), *(f"spent {kind}" for kind in Kind)),
            ("ZRANGE", keys.tenant_tasks(TENANT), 0, -1, "WITHSCORES"),
            *(("HGET", key, "state") for key in (keys.tenant(TENANT), *map(keys.account, ACCOUNTS))),
            *(("ZRANGE", key, 0, -1, "WITHSCORES") for key in times),
            *(("HGETALL", keys.usage(TENANT, day)) for day in days),
        )
        clock = LedgerClock(int(last or 0), int(offset or 0))
        assert clock.advance(model.now_ms) == model.clock.advance(model.now_ms)
        oldest = self.latest_ms - self.retention.keep_ms
        new_tasks = {name: task.created_at for name, task in model.tasks.items() if task.created_at > oldest}
        assert {name: at for name, at in parse_withscores(listed) if name in new_tasks} == new_tasks
        state = decode(rows.pop(0), TenantState) or TenantState()
        roll_windows(state, model.now_ms)
        assert state == self.tenant_state()
        for account in ACCOUNTS:
            known = decode(rows.pop(0), AccountState) or AccountState()
            assert known == model.accounts.get(account, AccountState()), account
        for key, expected in times.items():
            assert dict(parse_withscores(rows.pop(0))) == expected, key
        for day in days:
            assert normalize_day(_parse_day_usage(rows.pop(0))) == normalize_day(model.usage(TENANT, day))
        first = max(days[-1] - 400, days[0]) if days else 0
        for day, usage in (await self.ledger.sum_usage(TENANT, first, days[-1]) if days else {}).items():
            of_days = [model.usage(TENANT, other) for other in days if other >= first]
            total = DayUsage()
            for other in of_days if day == first else ():
                for kind, tally in other.tallies.items():
                    total.tallies.setdefault(kind, Tally()).update(tally)
            listed = model.usage(TENANT, day)
            expected_usage = DayUsage(total.tallies, listed.unknown, listed.refunds)
            assert normalize_day(usage) == normalize_day(expected_usage)
        for kind, packed in zip(Kind, spent, strict=True):
            self._compare_spent(kind, decode(packed, SpentSums))

    def _compare_spent(self, kind: Kind, sums: SpentSums | None) -> None:
        """Compare the sums for the metrics; those of a day or month are current from the first change in it on."""
        starts = spent_starts(self.model.now_ms)
        shown = zip(*current_spent(sums, starts), strict=True) if sums else [(0, 0)] * len(SPENT_WINDOWS)
        for index, (window, amounts) in enumerate(zip(SPENT_WINDOWS, shown, strict=True)):
            expected = self.model.spent(TENANT, window).get(kind, (0, 0))
            if sums and sums[3 * index] == starts[index]:
                assert amounts == expected, window
            else:
                assert amounts == (0, 0)
                assert window is not Window.TOTAL or expected == (0, 0)

    async def _compare_values(self) -> None:
        model, keys = self.model, self.keys
        kept = {
            keys.idempotency(TENANT, key): f"{name} {digests}"
            for (_, key), (name, digests, _) in model.idempotency_keys.items()
        }
        names, *values = await self.scripts.read(
            ("KEYS", keys.idempotency(TENANT, "*").replace("{", "\\{")),
            *(("GET", key) for key in kept),
            *(("GET", keys.reservation(name)) for name in model.reservations),
            *(("GET", keys.task(name)) for name in model.tasks),
            *(("GET", keys.delivery(name)) for name in model.deliveries),
        )
        stored = iter(values)
        assert {str(name, "utf-8") for name in names} == kept.keys()
        assert [str(next(stored), "utf-8") for _ in kept] == list(kept.values())
        for name, reservation in model.reservations.items():
            assert normalize(decode(next(stored), Reservation)) == normalize(reservation), name
        for name, task in model.tasks.items():
            assert normalize(_decode_task(name, next(stored))) == normalize(task)
        for name, delivery in model.deliveries.items():
            assert _decode_delivery(name, next(stored)) == delivery

    @invariant()
    def account_counters_add_up(self) -> None:
        """Require that the counters of the accounts follow from the reservations."""
        for account, known in self.model.accounts.items():
            mine = [item for item in self.model.reservations.values() if item.account == account]
            assert known.open_submissions == sum(map(is_open, mine))
            assert known.unsettled == sum(map(is_reserved, mine))
            assert known.unknown_outcomes == sum(item.state is ReservationState.UNKNOWN for item in mine)
            assert known.pending_prepaid_only == sum(item.prepaid_only for item in mine)
            assert known.pending_charges == sum(item.charge_pending for item in mine if is_open(item))
            assert 0 <= known.untracked_charges <= sum(item.charge_pending for item in mine if not is_open(item))
