"""Slots that tenants share."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from service.domain.errors import Overloaded
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
