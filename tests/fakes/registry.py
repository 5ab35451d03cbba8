"""Test double of the registry store."""

from __future__ import annotations

from service.domain.errors import LedgerUnavailable
from service.domain.tenants import Registry
from service.usecases.caches import CachedRegistry
from service.usecases.ports import RegistryChange
from tests.fakes.ledger import FakeLedger


class FakeRegistry(CachedRegistry):
    """A registry that is its own store, and ready; policies are written to the ledger at once."""

    def __init__(self, ledger: FakeLedger, registry: Registry | None = None) -> None:
        super().__init__(self)
        self.ledger = ledger
        self.current = registry or Registry()
        self.is_ready = True

    async def load(self) -> Registry:
        if self.ledger.is_unavailable:
            raise LedgerUnavailable("away", retry_after=2)
        return self.current

    async def read_version(self) -> int:
        return (await self.load()).version

    async def write(self, change: RegistryChange) -> bool:
        now = await self.load()
        if change.version != now.version:
            return False
        tenants = dict(now.tenants) | {item.name: item for item in change.tenants}
        accounts = dict(now.accounts) | {item.name: item for item in change.accounts}
        tokens = dict(now.tokens) | {item.id: item for item in change.tokens}
        for tenant in change.drop_tenants:
            del tenants[tenant.name]
        for account in change.drop_accounts:
            del accounts[account.name]
        for token in change.drop_tokens:
            del tokens[token.id]
        for deleted_tenant in change.drop_tenants:
            self.ledger.tenant_policies.pop(deleted_tenant.id, None)
        for deleted_account in change.drop_accounts:
            self.ledger.account_policies.pop(deleted_account.id, None)
        self.ledger.tenant_policies |= {item.id: item.policy for item in change.tenants}
        self.ledger.account_policies |= {item.id: item.policy for item in change.accounts}
        names = {drop_tenant.id: drop_tenant.name for drop_tenant in change.drop_tenants}
        former = {**now.deleted_tenant_names, **change.deleted_tenant_names, **names}
        version = max(now.version, change.newer_than) + 1
        self.current = Registry(version, change.next_id, tenants, accounts, tokens, former)
        return True
