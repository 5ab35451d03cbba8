"""Slots that tenants share, and the rate of reads."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from service.api import auth
from service.api.auth import ReadLimiter
from service.domain.errors import Overloaded, QuotaDenied
from service.usecases.task_status import TenantSlots


def test_slots() -> None:
    slots = TenantSlots(4, 0.6)
    for _ in range(2):  # the first round leaves nothing behind
        with ExitStack() as stack:
            for tenant, is_granted in ((1, True), (1, True), (1, False), (2, True), (3, True), (4, False)):
                if is_granted:
                    stack.enter_context(slots.hold(tenant))
                else:
                    with pytest.raises(Overloaded), slots.hold(tenant):
                        pytest.fail("there is no slot")
    with TenantSlots(4, 0.01).hold(1):
        pass


def test_rate_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "_MAX_IDLE_TOKENS", 1)
    clock, burst = 100.0, 10
    limiter = ReadLimiter(2, now=lambda: 1_000.0, monotonic=lambda: clock)
    for _ in range(2):
        for _ in range(burst):
            limiter.count("a")
        for _ in range(2):  # a refused read does not count
            with pytest.raises(QuotaDenied) as refused:
                limiter.count("a")
            assert refused.value.retry_after == 0.5
            assert refused.value.violations[0].resets_at == 1_000_501
        limiter.count("b")
        clock += 0.5
        limiter.count("a")
        clock += burst / 2
    for token in "cde":
        limiter.count(token)
        clock += 1
    assert len(limiter._full_at) == 2
