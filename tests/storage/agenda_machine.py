"""As for the ledger: does the same to the deliveries on a real server and to their model."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, invariant, multiple, rule

from service.domain.ledger import Figures, ReservationState
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import RedisAgenda
from service.usecases.ports import Answered, Claimed, Outcome
from tests.fakes import FakeAgenda
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_pair import ACCOUNTS
from tests.storage.ledger_strategies import KINDS

WEBHOOKS = (
    None,
    "http://one.test/ended?for=17",
    "http://one.test:81/",
    "https://other.test:8443/x",
    "http://[fd00::1]/x",
    "http://10.0.0.1:80/x",
)

outcomes = st.one_of(
    st.just(Outcome(state=DeliveryState.DELIVERED, status=204)),
    st.builds(
        Outcome,
        state=st.just(DeliveryState.PENDING),
        wait=st.sampled_from([4_000, 30_000, 28_800_000]),
        status=st.none() | st.just(500),
        error=st.just("It failed."),
        answer=st.none() | st.just("失败"),
    ),
    st.builds(
        Outcome,
        state=st.sampled_from([DeliveryState.FAILED, DeliveryState.OFF]),
        attempted=st.booleans(),
        error=st.just("It is over."),
    ),
)


class AgendaMachine(LedgerMachine):
    """Delivers, beside all else, and compares who is handed what and when."""

    deliveries: Bundle[Claimed] = Bundle("deliveries")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.agenda = RedisAgenda(self.tasks._scripts, self.keys)
        self.told = FakeAgenda(self.model)

    def webhook(self, reservation: str) -> str | None:
        return WEBHOOKS[int(reservation[1:]) % len(WEBHOOKS)]

    @rule(succeeds=st.booleans())
    def some_tasks_end(self, *, succeeds: bool) -> None:
        """Without these, few sequences would come to a delivery."""
        for _ in range(6):
            if name := self.reserve(kind=KINDS[0], accounts=ACCOUNTS, idempotency=None):
                self.settle(name, ReservationState.ACCEPTED, Figures())
        self.wait(self.spans.check_after)
        self.claimed = []
        self.claim(9)
        for due in self.claimed:
            self.record(due, Answered.SUCCEEDED if succeeds else Answered.FAILED)

    @rule(target=deliveries, most=st.integers(1, 12))
    def claim_deliveries(self, most: int) -> Any:
        found, expected = self.run(self.agenda.claim(most)), self.run(self.told.claim(most))
        assert found == expected
        return multiple(*found)

    @rule(claimed=deliveries, outcome=outcomes)
    def record_delivery(self, claimed: Claimed, outcome: Outcome) -> None:
        assert self.run(self.agenda.record(claimed, outcome)) == self.run(self.told.record(claimed, outcome))

    @rule(claimed=deliveries)
    def redeliver(self, claimed: Claimed) -> None:
        name = claimed.delivery.reservation
        assert self.run(self.agenda.redeliver(name)) == self.run(self.told.redeliver(name))

    @invariant()
    def the_same_have_failed(self) -> None:
        assert self.run(self.agenda.failed(5)) == self.run(self.told.failed(5))

    @invariant()
    def receivers_take_the_same_turns(self) -> None:
        async def turns() -> dict[str, int]:
            rows = await self.client.zrange(self.keys.receivers, 0, -1, withscores=True)
            return {member.decode(): int(score) for member, score in rows}

        assert self.run(turns()) == self.model.turns
