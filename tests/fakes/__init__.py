"""Test doubles of the ports, over the ledger model."""

from tests.fakes.clock import START, FakeClock
from tests.fakes.deliveries import FakeDeliveryQueue, FakeWebhookClient
from tests.fakes.ledger import FakeLedger
from tests.fakes.registry import FakeRegistry
from tests.fakes.upstream import FakeUpstream

__all__ = ["START", "FakeClock", "FakeDeliveryQueue", "FakeLedger", "FakeRegistry", "FakeUpstream", "FakeWebhookClient"]
