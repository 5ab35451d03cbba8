"""Accounts, tenants and tokens as one value: what a process holds in memory, and what a change is made from."""

from __future__ import annotations

from collections.abc import Mapping

from service.domain.tenancy import Account, Tenant, Token


class Registry:
    """One version of the registry, indexed for the questions that requests ask. Never changes.

    `former` has the name of each deleted tenant by its id, so that what it spent stays explained.
    """

    def __init__(
        self,
        version: int = 0,
        next_id: int = 1,
        tenants: Mapping[str, Tenant] | None = None,
        accounts: Mapping[str, Account] | None = None,
        tokens: Mapping[str, Token] | None = None,
        former: Mapping[int, str] | None = None,
    ) -> None:
        self.version = version
        self.next_id = next_id
        self.tenants = tenants or {}
        self.accounts = accounts or {}
        self.tokens = tokens or {}
        self.former = former or {}
        self._tenants_by_id = {tenant.id: tenant for tenant in self.tenants.values()}
        self._accounts_by_id = {account.id: account for account in self.accounts.values()}
        self._tokens_by_digest = {token.digest: token for token in self.tokens.values()}

    def tenant_by_token(self, digest: bytes) -> tuple[Tenant, Token] | None:
        """Whose token has this hash, whether or not it has expired."""
        token = self._tokens_by_digest.get(digest)
        tenant = self._tenants_by_id.get(token.tenant) if token else None
        return (tenant, token) if tenant and token else None

    def tenant(self, tenant_id: int) -> Tenant | None:
        """A tenant by its id."""
        return self._tenants_by_id.get(tenant_id)

    def tenant_name(self, tenant_id: int) -> str | None:
        """What a tenant is or was called; None if it never was in this registry."""
        found = self.tenant(tenant_id)
        return found.name if found else self.former.get(tenant_id)

    def account(self, account_id: int) -> Account | None:
        """An account by its id."""
        return self._accounts_by_id.get(account_id)

    def accounts_of(self, tenant: Tenant) -> tuple[Account, ...]:
        """The accounts a tenant may use, in order; those that were deleted since are left out."""
        return tuple(self.accounts[name] for name in tenant.accounts if name in self.accounts)

    def tokens_of(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant, oldest first."""
        return tuple(
            sorted((t for t in self.tokens.values() if t.tenant == tenant.id), key=lambda t: (t.created, t.id))
        )
