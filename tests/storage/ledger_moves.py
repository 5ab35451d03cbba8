"""What can be done to a ledger, done to the scripts and to their model alike."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from service.domain.availability import PROBE_INTERVAL
from service.domain.ledger import Figures, Granted, Idempotency, Reservation, ReservationState, Status
from service.domain.tasks import Artifact, ArtifactName, Kind, TaskError
from service.domain.tenants import Account, AccountPolicy, Tenant, TenantPolicy
from service.usecases.ports import Answered, Ask, Check, Due, Look, RegistryChange, Settlement, TaskDraft
from tests.storage.ledger_books import LedgerBooks
from tests.storage.ledger_pair import ACCOUNTS, TENANT
from tests.storage.ledger_strategies import KINDS, Whole
from tests.storage.ledger_upstream import Upstream
from tests.storage.ledger_views import canonical, is_reserved, plain

ARTIFACTS = (Artifact(ArtifactName.IMAGE, "http://up.test/1.png"),)
FAILED = TaskError("failed", "It failed.")


class LedgerMoves(LedgerBooks):
    """Does the same to both, with the figures that an upstream would tell.

    `claimed` are the checks under way, `looks` the looks.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.made = 0
        self.claimed: list[Due] = []
        self.looks: list[Look] = []
        self.set_upstream(late=False, now=True, count=2, money=1_000)
        self.write(TenantPolicy(), AccountPolicy(), AccountPolicy())

    def set_upstream(self, *, late: bool, now: bool, count: int, money: int) -> None:
        """Let the upstream charge at the end or at once, and tell the balance of now or of then."""
        self.upstream = Upstream(late, now, dict.fromkeys(KINDS, 100), dict.fromkeys(ACCOUNTS, Figures(count, money)))

    def write(self, tenant: TenantPolicy, first: AccountPolicy, second: AccountPolicy) -> None:
        """Write limits, of a tenant and accounts that may have been gone."""
        self._change(
            tenants=(Tenant(TENANT, "t", ("a", "b"), tenant),),
            accounts=(Account(2, "a", b"sealed", None, first), Account(3, "b", b"sealed", None, second)),
        )

    def write_tenant(self, policy: TenantPolicy) -> None:
        """Write the limits of the tenant alone."""
        self._change(tenants=(Tenant(TENANT, "t", ("a", "b"), policy),))

    def drop(self, name: str) -> None:
        """Remove the tenant or the account of a name."""
        now = self.registry.current
        self._change(
            drop_tenants=tuple(each for each in now.tenants.values() if each.name == name),
            drop_accounts=tuple(each for each in now.accounts.values() if each.name == name),
        )

    def _change(
        self,
        *,
        tenants: tuple[Tenant, ...] = (),
        accounts: tuple[Account, ...] = (),
        drop_tenants: tuple[Tenant, ...] = (),
        drop_accounts: tuple[Account, ...] = (),
    ) -> None:
        change = RegistryChange(
            version=self.registry.current.version,
            next_id=4,
            tenants=tenants,
            accounts=accounts,
            drop_tenants=drop_tenants,
            drop_accounts=drop_accounts,
        )
        assert self.both(self.store.write(change), self.registry.write(change))
        assert vars(self.run(self.store.load())) == vars(self.registry.current)

    def pick(self, number: int, wanted: Callable[[Reservation], bool]) -> str | None:
        """One of the reservations that are wanted, counted from the newest."""
        found = [name for name, each in reversed(self.model.reservations.items()) if wanted(each)]
        return found[number % len(found)] if found else None

    def reserve(self, kind: Kind, accounts: tuple[int, ...], idempotency: Idempotency | None) -> str | None:
        """Reserve under a new name; None if it was refused, which must not change anything."""
        self.made += 1
        ask = Ask(f"r{self.made}", TENANT, accounts, kind, idempotency)
        before = self.all_state()
        answer = self.both(self.ledger.reserve(ask), self.model.reserve(ask))
        if answer and isinstance(answer[0], Granted):
            self.within_limits()
            return ask.reservation
        assert self.all_state() == before, "a refusal changed something"
        return None

    def reserved(self, number: int, accounts: tuple[int, ...]) -> str | None:
        """A reservation without an outcome, a new one if there is none."""
        return self.pick(number, is_reserved) or self.reserve(KINDS[0], accounts, None)

    def reserve_again(self, reservation: str, kind: Kind) -> None:
        ask = Ask(reservation, TENANT, ACCOUNTS, kind)
        before = self.all_state()
        self.both(self.ledger.reserve(ask), self.model.reserve(ask))
        assert self.all_state() == before

    def retarget(self, reservation: str, left: int, accounts: tuple[int, ...], closes: Status | None) -> None:
        ask = Ask(reservation, TENANT, accounts, Kind.UPSCALE)
        self.both(self.ledger.retarget(ask, left, closes), self.model.retarget(ask, left, closes))

    def settle(
        self,
        reservation: str,
        outcome: ReservationState,
        told: Figures | None,
        closes: Status | None = None,
        idempotency: Idempotency | None = None,
        *,
        charged: bool = True,
        late: bool = False,
        elsewhere: bool = False,
    ) -> None:
        """Give it an outcome; `charged` if the upstream took it although the outcome is unknown.

        `elsewhere` names another account than the one it is on, as after a retarget whose answer was lost.
        """
        known = self.model.reservations.get(reservation)
        account, kind = (known.account, known.kind) if known else (ACCOUNTS[0], Kind.UPSCALE)
        if outcome is ReservationState.ACCEPTED or (outcome is ReservationState.UNKNOWN and charged):
            self.upstream.submit(reservation, account, kind)
        settlement = Settlement(
            reservation=reservation,
            tenant=TENANT,
            account=sum(ACCOUNTS) - account if elsewhere and known else account,
            kind=kind,
            created=known.created if known else self.model.clock.at - 1_000,
            outcome=outcome,
            figures=self.upstream.balances[account] if told is None else told,
            closes=closes if outcome is ReservationState.REFUSED else None,
            draft=TaskDraft(
                f"task_{reservation}",
                msgspec.Raw(b"{}"),
                msgspec.Raw(b'{"a":"b"}'),
                self.webhook(reservation),
                f"the trace of {reservation}",
            ),
            idempotency=idempotency,
            late=late,
        )
        self.both(self.ledger.settle(settlement), self.model.settle(settlement))

    def webhook(self, _reservation: str) -> str | None:
        """Where the end of a task is told: nowhere, unless a test of that says so."""
        return None

    def attend(self, reservation: str) -> None:
        """Look at a task."""
        names = [reservation]
        (found,), (expected,) = self.run(self.tasks.attend(names)), self.run(self.model.attend(names))
        assert plain(found and found[0]) == plain(expected and expected[0])

    def claim(self, most: int) -> None:
        found, expected = self.run(self.tasks.claim(most)), self.run(self.model.claim(most))
        assert [(plain(each.task), each.claimed) for each in found] == [
            (plain(each.task), each.claimed) for each in expected
        ]
        self.claimed = [*found, *self.claimed]

    def record(self, due: Due, answered: Answered, told: Figures | None = None) -> None:
        """Record a check; what ends a task tells figures, the true ones unless `told`."""
        task, succeeds = due.task, answered is Answered.SUCCEEDED
        figures, ends = Figures(), answered in {Answered.SUCCEEDED, Answered.FAILED}
        if ends:
            figures = self.upstream.end(task.reservation, task.account, task.kind, succeeds=succeeds)
        check = Check(
            answered=answered,
            artifacts=ARTIFACTS if succeeds else (),
            error=FAILED if answered is Answered.FAILED else None,
            figures=figures if told is None else told,
        )
        found, expected = self.run(self.tasks.record(due, check)), self.run(self.model.record(due, check))
        assert plain(found and found[0]) == plain(expected and expected[0])
        if ends:
            self.claimed = [each for each in self.claimed if each.task.reservation != task.reservation] + [due]

    def refund(self, tenant: int, reservation: str, reason: str) -> None:
        self.both(
            self.books.refund(tenant, reservation, reason), self.model.refund(tenant, reservation, reason), canonical
        )

    def look(self, account: int, *, count_only: bool) -> None:
        look = self.both(
            self.ledger.look(account, count_only=count_only), self.model.look(account, count_only=count_only)
        )
        if look:
            self.looks = [look, *self.looks]

    def looked(self, look: Look, told: Figures | None = None) -> None:
        figures = (
            self.upstream.end(look.reservation, look.account, Kind.UPSCALE, succeeds=True) if told is None else told
        )
        self.both(self.ledger.looked(look, figures), self.model.looked(look, figures))

    def whole(self, account: int, each: Whole, milliseconds: int) -> None:
        """A submission from its beginning to the first check of its task, each step of it after a while.

        Where the account can't pay it is looked at, if it can be, and tried once more.
        """
        self.wait(each.pause)
        self.upstream.prices[each.kind] = each.price
        name = self.reserve(each.kind, (account,), None)
        if name is None:
            self.wait(PROBE_INTERVAL)
            self.look(account, count_only=True)
            self.wait(milliseconds)
            for look in [one for one in self.looks[:1] if one.claimed + milliseconds == self.model.clock.at]:
                self.looked(look)
            name = self.reserve(each.kind, (account,), None)
        if name is None:
            return
        self.wait(milliseconds)
        if each.outcome is ReservationState.ACCEPTED and not self.upstream.can_pay(account, each.kind):
            self.settle(name, ReservationState.REFUSED, each.at_submit, Status.EXHAUSTED)
        else:
            self.settle(name, each.outcome, each.at_submit, charged=each.charged)
        if each.outcome is ReservationState.UNKNOWN and each.found:
            self.wait(milliseconds)
            if each.given_back:
                self.refund(TENANT, name, "")
            self.settle(name, each.found, each.at_submit)
        self.wait(self.spans.check_after)
        self.claim(9)
        self.wait(milliseconds)
        for due in [one for one in self.claimed if one.task.reservation == name]:
            self.record(due, each.answered, each.at_end)
        self.wait(milliseconds)

    def end_everything(self, *, succeeds: bool) -> None:
        """Once all has ended nothing is held any more. The ledger's time may run more slowly than the server's."""
        self.wait(2 * self.spans.lease)
        while self.both(self.ledger.expire(3), self.model.expire(3)):
            pass
        self.wait(2 * self.spans.claim)
        while self.model.due or self.model.claims:
            self.wait(2 * self.spans.claim)
            self.claimed = []
            self.claim(9)
            for due in self.claimed:
                self.record(due, Answered.SUCCEEDED if succeeds else Answered.FAILED)
        state = self.tenant_state()
        held = [each.tasks_reserved + each.money_reserved for each in state.windows.values()]
        assert self.lossy or (state.active, held) == (0, [0] * len(state.windows))

    def lose(self, reservation: str) -> None:
        """Let the store forget a settled reservation and its task, as after a restore of older data."""
        known = self.model.reservations.pop(reservation)
        assert not is_reserved(known)
        self.lossy = True
        self.final.pop(reservation, None)
        self.model.tasks.pop(reservation, None)
        self.model.due.pop(reservation, None)
        self.model.claims.pop(reservation, None)
        self.run(self._lose(reservation))

    async def _lose(self, reservation: str) -> None:
        await self.client.delete(self.keys.reservation(reservation), self.keys.task(reservation))
        await self.client.zrem(self.keys.watch, reservation)
        await self.client.zrem(self.keys.claims, reservation)
