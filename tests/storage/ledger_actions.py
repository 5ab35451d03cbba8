"""The ledger's operations, run in Redis and in the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from service.domain.availability import PROBE_INTERVAL_MS
from service.domain.ledger import (
    AccountStatus,
    Balance,
    Grant,
    Idempotency,
    InferredCharge,
    Reservation,
    ReservationState,
)
from service.domain.tasks import Artifact, ArtifactName, CostBasis, Kind, TaskError
from service.domain.tenants import Account, AccountPolicy, Tenant, TenantPolicy
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
from tests.model.ledger import is_reserved
from tests.storage.ledger_comparison import ACCOUNTS, TENANT, LedgerComparison, normalize_task
from tests.storage.ledger_strategies import KINDS, WEBHOOKS, SimulatedUpstream, SubmissionPlan

ARTIFACTS = (Artifact(ArtifactName.IMAGE, "http://up.test/1.png"),)
FAILED = TaskError("failed", "It failed.")


class LedgerActions(LedgerComparison):
    """Runs each operation on both sides, with the balances that the simulated upstream reports.

    `claimed_checks` and `balance_checks` are those in progress.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reservation_count = 0
        self.claimed_checks: list[ClaimedCheck] = []
        self.balance_checks: list[BalanceCheck] = []
        self.set_upstream(late=False, now=True, count=2, money=1_000)
        self.write_policies(TenantPolicy(), AccountPolicy(), AccountPolicy())

    def set_upstream(self, *, late: bool, now: bool, count: int, money: int) -> None:
        """Choose when the upstream charges (`late`: at the end), and whether it reports the current balance."""
        self.upstream = SimulatedUpstream(
            late, now, dict.fromkeys(KINDS, 100), dict.fromkeys(ACCOUNTS, Balance(count, money))
        )

    def write_policies(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy) -> None:
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

    def choose_reservation(self, number: int, predicate: Callable[[Reservation], bool]) -> str | None:
        """Choose one of the matching reservations, counted from the newest."""
        results = [name for name, reservation in reversed(self.model.reservations.items()) if predicate(reservation)]
        return results[number % len(results)] if results else None

    def next_name(self) -> str:
        self.reservation_count += 1
        return f"r{self.reservation_count}"

    def reserve(self, kind: Kind, accounts: tuple[int, ...], idempotency: Idempotency | None) -> str | None:
        """Reserve under a new name. Returns None if refused; a refusal must not change anything."""
        ask = ReserveRequest(self.next_name(), TENANT, accounts, kind, idempotency)
        before = self.take_snapshot()
        answer = self.compare(self.ledger.reserve(ask), self.model.reserve, ask)
        if answer and isinstance(answer[0], Grant):
            self.check_limits()
            return ask.reservation
        assert self.take_snapshot() == before, "a refusal changed something"
        return None

    def ensure_reserved(self, number: int, accounts: tuple[int, ...]) -> str | None:
        """Return a reservation without an outcome; reserve if there is none."""
        return self.choose_reservation(number, is_reserved) or self.reserve(KINDS[0], accounts, None)

    def reserve_again(self, reservation: str, kind: Kind) -> None:
        ask = ReserveRequest(reservation, TENANT, ACCOUNTS, kind)
        before = self.take_snapshot()
        self.compare(self.ledger.reserve(ask), self.model.reserve, ask)
        assert self.take_snapshot() == before

    def change_account(
        self, reservation: str, left: int, accounts: tuple[int, ...], closes: AccountStatus | None
    ) -> None:
        ask = ReserveRequest(reservation, TENANT, accounts, Kind.UPSCALE)
        self.compare(self.ledger.change_account(ask, left, closes), self.model.change_account, ask, left, closes)

    def settle(
        self,
        reservation: str,
        outcome: ReservationState,
        reported: Balance | None,
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
            created_at=known.created_at if known else self.model.now_ms - 1_000,
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

    def touch_task(self, reservation: str) -> None:
        (actual,) = self.run(self.tasks.touch([reservation]))
        assert normalize_task(actual and actual[0]) == normalize_task(self.model.touch(reservation))

    def claim_checks(self, max_count: int) -> None:
        actual, expected = self.run(self.tasks.claim_checks(max_count)), self.model.claim_checks(max_count)
        assert [(normalize_task(item.task), item.claimed_at) for item in actual] == [
            (normalize_task(item.task), item.claimed_at) for item in expected
        ]
        self.claimed_checks = [*actual, *self.claimed_checks]

    def record_check(self, due: ClaimedCheck, answered: CheckOutcome, reported: Balance | None = None) -> None:
        """Record a check. A final answer reports the upstream's balance, unless `reported` is given."""
        task, succeeds = due.task, answered is CheckOutcome.SUCCEEDED
        figures, ends = Balance(), answered in {CheckOutcome.SUCCEEDED, CheckOutcome.FAILED}
        if ends:
            figures = self.upstream.finish_task(task.reservation, task.account, task.kind, succeeds=succeeds)
        check = CheckResult(
            outcome=answered,
            artifacts=ARTIFACTS if succeeds else (),
            error=FAILED if answered is CheckOutcome.FAILED else None,
            balance=figures if reported is None else reported,
        )
        actual, expected = self.run(self.tasks.record_check(due, check)), self.model.record_check(due, check)
        assert normalize_task(actual and actual[0]) == normalize_task(expected)
        if ends:
            self.claimed_checks = [
                claimed_check
                for claimed_check in self.claimed_checks
                if claimed_check.task.reservation != task.reservation
            ] + [due]

    def refund(self, tenant: int, reservation: str, reason: str) -> None:
        self.compare(self.ledger.refund(tenant, reservation, reason), self.model.refund, tenant, reservation, reason)

    def claim_balance_check(self, account: int, *, count_only: bool) -> None:
        claim = self.ledger.claim_balance_check(account, count_only=count_only)
        check = self.compare(claim, self.model.claim_balance_check, account, count_only=count_only)
        if check:
            self.balance_checks = [check, *self.balance_checks]

    def record_balance_check(self, check: BalanceCheck, reported: Balance | None = None) -> None:
        figures = (
            self.upstream.finish_task(check.reservation, check.account, Kind.UPSCALE, succeeds=True)
            if reported is None
            else reported
        )
        self.compare(self.ledger.record_balance_check(check, figures), self.model.record_balance_check, check, figures)

    def run_submission(self, account: int, plan: SubmissionPlan, milliseconds: int) -> None:
        """Run a submission up to the first check of its task, with a pause between steps.

        If the account cannot pay, check its balance if allowed and retry once.
        """
        self.advance_clock(plan.pause_ms)
        self.upstream.prices[plan.kind] = plan.price_fen
        name = self.reserve(plan.kind, (account,), None)
        if name is None:
            self.advance_clock(PROBE_INTERVAL_MS)
            self.claim_balance_check(account, count_only=True)
            self.advance_clock(milliseconds)
            for check in [one for one in self.balance_checks[:1] if one.claimed_at + milliseconds == self.model.now_ms]:
                self.record_balance_check(check)
            name = self.reserve(plan.kind, (account,), None)
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
        while self.compare(self.ledger.settle_expired(3), self.model.settle_expired, 3):
            pass
        self.advance_clock(2 * self.retention.claim_lease_ms)
        while self.model.due_checks or self.model.claimed_checks:
            self.advance_clock(2 * self.retention.claim_lease_ms)
            self.claimed_checks = []
            self.claim_checks(9)
            for due in self.claimed_checks:
                self.record_check(due, CheckOutcome.SUCCEEDED if succeeds else CheckOutcome.FAILED)
        state = self.tenant_state()
        held = [window.tasks_reserved + window.money_reserved_fen for window in state.windows.values()]
        assert self.model.deleted or (state.active_tasks, held) == (0, [0] * len(state.windows))

    def delete_reservation(self, reservation: str) -> None:
        """Delete a settled reservation and its task, as a restore of older data would."""
        known = self.model.reservations.pop(reservation)
        assert not is_reserved(known)
        self.model.deleted.append(known)
        self.final_states.pop(reservation, None)
        self.model.tasks.pop(reservation, None)
        self.model.due_checks.pop(reservation, None)
        self.model.claimed_checks.pop(reservation, None)
        keys = self.keys
        self.run(self.client.delete(keys.reservation(reservation), keys.task(reservation)))
        for times in (keys.poll_due, keys.poll_claimed):
            self.run(self.client.zrem(times, reservation))
