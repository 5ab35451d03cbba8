"""What a gateway in development begins with: an account and a tenant to try it with."""

from __future__ import annotations

from service.domain import tenants
from service.domain.tenants import AccountPolicy, Tenant
from service.usecases.admin import Operators
from service.usecases.ports import RegistryView

NAME = "demo"


async def demo_token(operators: Operators, registry: RegistryView, user_key: str, known: str | None) -> str:
    """Make the tenant `demo` and its account, with this key; a token that works, the `known` one if it does.

    Raises LedgerUnavailable.
    """
    await registry.refresh()
    if not operators.has_key(NAME, user_key):
        await operators.put_account(NAME, user_key, None, AccountPolicy())
    if NAME not in registry.current.tenants:
        await operators.put_tenant(Tenant(id=0, name=NAME, accounts=(NAME,)))
    if known and registry.current.tenant_by_token(tenants.digest(known)):
        return known
    return (await operators.create_token(NAME, "made at the first start", None)).text
