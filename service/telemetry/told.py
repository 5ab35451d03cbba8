"""How the log tells of money and of what may be spent: in yuan, as operators know it."""

from __future__ import annotations

from typing import Any

import msgspec

from service.domain.tenants import AccountPolicy, TenantPolicy

_FEN = 100


def yuan(fen: int) -> float:
    """Fen as yuan."""
    return fen / _FEN


def account_policy(policy: AccountPolicy) -> dict[str, Any]:
    """What must stay in an account, and what its tasks cost at most."""
    return {
        "floor_count": policy.floor_count,
        "floor_money": yuan(policy.floor_money),
        "max_price": {kind.value: yuan(price) for kind, price in policy.max_price.items()},
    }


def tenant_policy(policy: TenantPolicy) -> dict[str, Any]:
    """What a tenant may spend."""
    limits = [
        {
            "window": each.window.value,
            "tasks": each.tasks,
            "money": None if each.money is None else yuan(each.money),
        }
        for each in policy.limits
    ]
    told: dict[str, Any] = msgspec.to_builtins(policy)
    return told | {"limits": limits}
