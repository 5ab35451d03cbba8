"""A state machine that runs deliveries on Redis and in the model and compares them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, invariant, multiple, rule

from service.domain.ledger import Balance, ReservationState
from service.domain.webhooks import DeliveryState
from service.storage.deliveries import RedisDeliveryQueue
from service.usecases.ports import CheckOutcome, ClaimedDelivery, DeliveryResult
from tests.fakes import FakeDeliveryQueue
from tests.storage.ledger_comparison import ACCOUNTS
from tests.storage.ledger_machine import LedgerMachine
from tests.storage.ledger_strategies import KINDS

WEBHOOKS = (
    None,
    "http://one.test/ended?for=17",
    "http://one.test:81/",
    "https://other.test:8443/x",
    "http://[fd00::1]/x",
    "http://10.0.0.1:80/x",
)

delivery_results = st.one_of(
    st.just(DeliveryResult(state=DeliveryState.DELIVERED, status=204)),
    st.builds(
        DeliveryResult,
        state=st.just(DeliveryState.PENDING),
        retry_delay_ms=st.sampled_from([4_000, 30_000, 28_800_000]),
        status=st.none() | st.just(500),
        error=st.just("It failed."),
        response_excerpt=st.none() | st.just("失败"),
    ),
    st.builds(
        DeliveryResult,
        state=st.sampled_from([DeliveryState.FAILED, DeliveryState.DISABLED]),
        attempted=st.booleans(),
        error=st.just("It is over."),
    ),
)


class DeliveryMachine(LedgerMachine):
    """Runs deliveries beside the ledger's rules and compares what is claimed and when."""

    deliveries: Bundle[ClaimedDelivery] = Bundle("deliveries")

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.queue = RedisDeliveryQueue(self.tasks._scripts, self.keys)
        self.model_queue = FakeDeliveryQueue(self.model)

    def webhook_url(self, reservation: str) -> str | None:
        return WEBHOOKS[int(reservation[1:]) % len(WEBHOOKS)]

    @rule(succeeds=st.booleans())
    def finish_tasks(self, *, succeeds: bool) -> None:
        """Finish six tasks, since few random sequences get as far as a delivery."""
        for _ in range(6):
            if name := self.reserve(kind=KINDS[0], accounts=ACCOUNTS, idempotency=None):
                self.settle(name, ReservationState.ACCEPTED, Balance())
        self.advance_clock(self.retention.check_interval_ms)
        self.claimed_checks = []
        self.claim_checks(9)
        for due in self.claimed_checks:
            self.record_check(due, CheckOutcome.SUCCEEDED if succeeds else CheckOutcome.FAILED)

    @rule(target=deliveries, most=st.integers(1, 12))
    def claim_deliveries(self, most: int) -> Any:
        actual, expected = self.run(self.queue.claim(most)), self.run(self.model_queue.claim(most))
        assert actual == expected
        return multiple(*actual)

    @rule(claimed=deliveries, outcome=delivery_results)
    def record_delivery(self, claimed: ClaimedDelivery, outcome: DeliveryResult) -> None:
        assert self.run(self.queue.record_attempt(claimed, outcome)) == self.run(
            self.model_queue.record_attempt(claimed, outcome)
        )

    @rule(claimed=deliveries)
    def redeliver(self, claimed: ClaimedDelivery) -> None:
        name = claimed.delivery.reservation
        assert self.run(self.queue.redeliver(name)) == self.run(self.model_queue.redeliver(name))

    @invariant()
    def failed_deliveries_match(self) -> None:
        assert self.run(self.queue.list_failed(5)) == self.run(self.model_queue.list_failed(5))

    @invariant()
    def queue_turns_match(self) -> None:
        async def turns() -> dict[str, int]:
            rows = await self.client.zrange(self.keys.webhook_queues, 0, -1, withscores=True)
            return {member.decode(): int(score) for member, score in rows}

        assert self.run(turns()) == self.model.receiver_turns
