"""Random events between a gateway and its upstream."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import rule

from service.domain.ledger import ReservationState
from service.domain.tasks import Kind, TaskError
from service.usecases.ports import CheckOutcome, CheckResult, ReserveRequest
from tests.unit.ledger_model_base import ACCOUNTS, MONEY_TENANT, PREPAID_TENANT, PRICES, LedgerModelBase, pick_item
from tests.unit.vendor_model import NO_BALANCE, Progress

OUTCOMES_BY_PROGRESS = {
    Progress.RUNNING: CheckOutcome.RUNNING,
    Progress.COMPLETED: CheckOutcome.SUCCEEDED,
    Progress.FAILED: CheckOutcome.FAILED,
}
FAILED = TaskError("failed", "It failed.")

numbers = st.integers(0, 5)
kinds = st.sampled_from(sorted(PRICES))
accounts = st.sampled_from(ACCOUNTS)
mostly_true = st.sampled_from([True, True, True, False])


class LedgerModelMachine(LedgerModelBase):
    @rule(prepaid_only=st.booleans(), kind=kinds, accounts=st.sampled_from([(3,), (4,), (3, 4)]))
    def reserve(self, kind: Kind, accounts: tuple[int, ...], *, prepaid_only: bool) -> None:
        name, tenant = f"r{len(self.ledger.reservations)}", PREPAID_TENANT if prepaid_only else MONEY_TENANT
        self.record_grant(
            name, tenant, kind, self.run_call(self.ledger.reserve(ReserveRequest(name, tenant, accounts, kind)))[0]
        )

    @rule(number=numbers, reported=st.sampled_from([(True, True)] * 3 + [(True, False), (False, True), (False, False)]))
    def deliver_submission(self, number: int, reported: tuple[bool, bool]) -> None:
        sent = self.pick_submission(number, arrived=False)
        if sent:
            self.deliver_to_vendor(sent, reported)

    @rule(number=numbers)
    def receive_response(self, number: int) -> None:
        sent = self.pick_submission(number, arrived=True, settled=False)
        if sent:
            self.settle_with_response(sent)

    @rule(number=numbers)
    def submit_and_respond(self, number: int) -> None:
        sent = self.pick_submission(number, arrived=False, settled=False)
        if sent and sent.deadline is None:
            self.deliver_to_vendor(sent)
            self.settle_with_response(sent)

    @rule(succeeds=mostly_true)
    def finish_and_check_all(self, *, succeeds: bool) -> None:
        for name in [name for name, job in self.vendor.tasks.items() if job.progress is Progress.RUNNING]:
            self.finish_task(name, succeeds=succeeds)
        self.ledger.clock.now_ms += 3_000
        while claimed := self.run_call(self.ledger.claim_checks(9)):
            self.claimed_checks += [(item, None) for item in claimed]
        for _ in range(len(self.claimed_checks)):
            self.run_check(0, reported=True)
            self.record_check(0, lost=False)

    @rule(kind=kinds, prepaid_only=st.booleans(), pause=st.sampled_from([3, 60]))
    def run_single_task(self, kind: Kind, pause: int, *, prepaid_only: bool) -> None:
        self.advance_time(pause)
        names_before = set(self.submissions)
        self.reserve(kind, ACCOUNTS[:1], prepaid_only=prepaid_only)
        for name in self.submissions.keys() - names_before:
            self.deliver_to_vendor(self.submissions[name])
            self.settle_with_response(self.submissions[name])
            self.finish_and_check_all(succeeds=True)

    @rule(number=numbers)
    def fail_to_connect(self, number: int) -> None:
        sent = self.pick_submission(number, arrived=False, settled=False)
        if sent and sent.deadline is None and not self.try_failover(sent, None):
            self.settle_submission(sent, ReservationState.NOT_SENT)

    @rule(number=numbers, arrives=st.booleans())
    def lose_response(self, number: int, *, arrives: bool) -> None:
        """Lose a response, or receive it only after the submission was settled as unknown."""
        sent = self.pick_submission(number, settled=False)
        if sent and sent.deadline is None:
            if arrives and not sent.arrived:
                self.deliver_to_vendor(sent)
            self.settle_as_unknown(sent)

    @rule(number=numbers, succeeds=mostly_true)
    def finish_running_task(self, number: int, *, succeeds: bool) -> None:
        running = [name for name, job in self.vendor.tasks.items() if job.progress is Progress.RUNNING]
        name = pick_item(running, number)
        if name:
            self.finish_task(name, succeeds=succeeds)

    @rule()
    def claim_check(self) -> None:
        self.claimed_checks += [(item, None) for item in self.run_call(self.ledger.claim_checks(1))]

    @rule(number=numbers, reported=mostly_true)
    def run_check(self, number: int, *, reported: bool) -> None:
        open_index = pick_item([index for index, (_, check) in enumerate(self.claimed_checks) if check is None], number)
        if open_index is None:
            return
        due = self.claimed_checks[open_index][0]
        progress, figures = self.vendor.check(due.task.reservation)
        check = CheckResult(
            outcome=OUTCOMES_BY_PROGRESS[progress],
            error=FAILED if progress is Progress.FAILED else None,
            balance=figures if reported else NO_BALANCE,
        )
        self.ledger.clock.now_ms += 1
        self.claimed_checks[open_index] = (due, check)

    @rule(number=numbers, lost=st.booleans())
    def record_check(self, number: int, *, lost: bool) -> None:
        answered = pick_item([index for index, (_, check) in enumerate(self.claimed_checks) if check], number)
        if answered is not None:
            due, check = self.claimed_checks.pop(answered)
            if check and not lost:
                self.run_call(self.ledger.record_check(due, check))

    @rule(account=accounts)
    def claim_balance_check(self, account: int) -> None:
        check = self.run_call(self.ledger.claim_balance_check(account, count_only=True))
        if check:
            self.balance_checks.append((check, None))

    @rule(number=numbers)
    def run_balance_check(self, number: int) -> None:
        open_index = pick_item(
            [index for index, (_, balance) in enumerate(self.balance_checks) if balance is None], number
        )
        if open_index is not None:
            self.ledger.clock.now_ms += 1
            check = self.balance_checks[open_index][0]
            self.balance_checks[open_index] = check, self.vendor.check(check.reservation)[1]

    @rule(number=numbers)
    def record_balance_check(self, number: int) -> None:
        done_index = pick_item([index for index, (_, balance) in enumerate(self.balance_checks) if balance], number)
        if done_index is not None:
            check, balance = self.balance_checks.pop(done_index)
            self.run_call(self.ledger.record_balance_check(check, balance or NO_BALANCE))

    @rule(account=accounts, count=st.integers(0, 3), money=st.integers(0, 6))
    def top_up(self, account: int, count: int, money: int) -> None:
        self.ledger.clock.now_ms += 1
        holding = self.vendor.accounts[account]
        if holding.count >= self.policy.floor_count:  # the vendor would spend unknown uses below the floor
            holding.count += count
        holding.money += money * 100
        self.topped_up_accounts.add(account)
        if self.account_state(account).open_submissions:
            self.uncertain_accounts.add(account)

    @rule(account=accounts)
    def reopen_account(self, account: int) -> None:
        self.run_call(self.ledger.reopen_account(account))
        for sent in self.submissions.values():
            sent.bound = sent.bound and sent.account != account

    @rule(seconds=st.sampled_from([3, 60, 700]))
    def advance_time(self, seconds: int) -> None:
        """Advance the time; expired leases are settled as unknown, late tasks finish."""
        for _ in range(seconds // 60 + 1):
            self.ledger.clock.now_ms += min(seconds, 60) * 1000
            for sent in [*self.submissions.values()]:
                if sent.deadline and sent.deadline < self.ledger.clock.now_ms + 60_000:
                    self.finish_unsettled_task(sent)
                elif not sent.settled and sent.deadline is None:
                    lease = self.ledger.reservations[sent.name].lease_expires_at
                    if lease < self.ledger.clock.now_ms + 60_000:
                        self.settle_as_unknown(sent)
