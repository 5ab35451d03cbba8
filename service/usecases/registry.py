"""Operators' work on accounts, tenants and tokens.

Every change is made from the newest version and written only if it still is, so that two operators never undo each
other. `PUT` replaces: what is left out gets its default, only secrets are kept.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec
import structlog
from msgspec import Struct

from service.domain import tenancy
from service.domain.balance import AccountState
from service.domain.errors import Conflict, FieldError, InvalidOptions, NotFound, Overloaded
from service.domain.registry import Registry
from service.domain.taskid import Sealer
from service.domain.tenancy import Account, AccountPolicy, Tenant, Token
from service.usecases.ports import Clock, Ledger, RegistryChange, RegistryStore, RegistryView

_log = structlog.get_logger(__name__)

_TRIES = 10
_TOKEN_ID_BYTES = 6

R = TypeVar("R")


class NewToken(Struct, frozen=True):
    """A token that was just made: the only time its text is known."""

    token: Token
    text: str


class Operators:
    """Changes the registry."""

    def __init__(
        self, *, store: RegistryStore, registry: RegistryView, ledger: Ledger, user_keys: Sealer, clock: Clock
    ) -> None:
        self._store = store
        self._registry = registry
        self._ledger = ledger
        self._user_keys = user_keys
        self._clock = clock

    async def put_account(
        self, name: str, user_key: str | None, base_url: str | None, policy: AccountPolicy
    ) -> Account:
        """Make or replace an account; without a key the one it has is kept.

        Raises InvalidOptions if a new account has no key.
        """
        sealed = self._user_keys.seal(user_key.encode()) if user_key is not None else None

        def change(now: Registry) -> tuple[RegistryChange, Account]:
            known = now.accounts.get(name)
            key = sealed or (known.user_key if known else None)
            if key is None:
                raise InvalidOptions([FieldError("user_key", "is required for a new account")])
            account = Account(known.id if known else now.next_id, name, key, base_url, policy)
            next_id = now.next_id + (known is None)
            return RegistryChange(version=now.version, next_id=next_id, accounts=(account,)), account

        account = await self._change("account.put", change)
        if user_key is not None:
            await self._ledger.reopen(account.id)  # a new key deserves a new look
        return account

    async def put_tenant(self, tenant: Tenant) -> Tenant:
        """Make or replace a tenant; the id of the argument does not matter. Raises InvalidOptions."""

        def change(now: Registry) -> tuple[RegistryChange, Tenant]:
            missing = [each for each in tenant.accounts if each not in now.accounts]
            if missing:
                raise InvalidOptions([FieldError("accounts", f"there is no account {', '.join(missing)}")])
            known = now.tenants.get(tenant.name)
            put = msgspec.structs.replace(tenant, id=known.id if known else now.next_id)
            next_id = now.next_id + (known is None)
            return RegistryChange(version=now.version, next_id=next_id, tenants=(put,)), put

        return await self._change("tenant.put", change)

    async def delete_account(self, name: str, *, force: bool) -> None:
        """Take an account out. Unless forced it must have nothing open and no tenant that uses it. Raises Conflict."""
        account = self.account(name)
        state = (await self._ledger.accounts([account.id]))[account.id]
        if state.open and not force:
            raise Conflict(f"{state.open} submissions of account {name} have not ended. Wait for them, or force it.")

        def change(now: Registry) -> tuple[RegistryChange, None]:
            users = [tenant.name for tenant in now.tenants.values() if name in tenant.accounts]
            if users and not force:
                raise Conflict(f"Account {name} is used by {', '.join(users)}. Change them first, or force it.")
            drop = (now.accounts[name],) if name in now.accounts else ()
            return RegistryChange(version=now.version, next_id=now.next_id, drop_accounts=drop), None

        await self._change("account.delete", change)

    async def delete_tenant(self, name: str, *, force: bool) -> None:
        """Take a tenant and its tokens out. Unless forced it must have no active task. Raises Conflict."""
        tenant = self.tenant(name)
        counters = await self._ledger.counters(tenant.id)
        if counters.state.active and not force:
            raise Conflict(f"{counters.state.active} tasks of tenant {name} are active. Wait for them, or force it.")

        def change(now: Registry) -> tuple[RegistryChange, None]:
            drop = (now.tenants[name],) if name in now.tenants else ()
            tokens = tuple(token for each in drop for token in now.tokens_of(each))
            made = RegistryChange(version=now.version, next_id=now.next_id, drop_tenants=drop, drop_tokens=tokens)
            return made, None

        await self._change("tenant.delete", change)

    async def create_token(self, tenant_name: str, label: str | None, expires: float | None) -> NewToken:
        """Make a token for a tenant; `expires` in seconds since the epoch. Raises NotFound."""
        text = tenancy.new_token()

        def change(now: Registry) -> tuple[RegistryChange, Token]:
            tenant = _found(now.tenants, tenant_name, "tenant")
            token = Token(
                id=secrets.token_hex(_TOKEN_ID_BYTES),
                tenant=tenant.id,
                digest=tenancy.digest(text),
                label=label,
                created=self._clock.now(),
                expires=expires,
            )
            return RegistryChange(version=now.version, next_id=now.next_id, tokens=(token,)), token

        return NewToken(await self._change("token.create", change), text)

    async def revoke_token(self, tenant_name: str, token_id: str, grace: float) -> None:
        """Let a token expire in `grace` seconds, at once if 0. Raises NotFound."""

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = _found(now.tenants, tenant_name, "tenant")
            token = _found({each.id: each for each in now.tokens_of(tenant)}, token_id, "token")
            if not grace:
                return RegistryChange(version=now.version, next_id=now.next_id, drop_tokens=(token,)), None
            end = self._clock.now() + grace
            left = msgspec.structs.replace(token, expires=min(end, token.expires or end))
            return RegistryChange(version=now.version, next_id=now.next_id, tokens=(left,)), None

        await self._change("token.revoke", change)

    async def reopen(self, name: str) -> None:
        """Let the next submission find out whether an exhausted or invalid account can be used again."""
        await self._ledger.reopen(self.account(name).id)
        _log.info("account.reopen", account=name)

    def account(self, name: str) -> Account:
        """An account by its name. Raises NotFound."""
        return _found(self._registry.current.accounts, name, "account")

    def accounts(self) -> tuple[Account, ...]:
        """All accounts, by name."""
        return tuple(account for _, account in sorted(self._registry.current.accounts.items()))

    def tenant(self, name: str) -> Tenant:
        """A tenant by its name. Raises NotFound."""
        return _found(self._registry.current.tenants, name, "tenant")

    def tenants(self) -> tuple[Tenant, ...]:
        """All tenants, by name."""
        return tuple(tenant for _, tenant in sorted(self._registry.current.tenants.items()))

    def tokens(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant that have not expired."""
        now = self._clock.now()
        return tuple(token for token in self._registry.current.tokens_of(tenant) if token.valid_at(now))

    async def balances(self, accounts: tuple[Account, ...]) -> Mapping[int, AccountState]:
        """What the ledger knows of each account, by id."""
        return await self._ledger.accounts([account.id for account in accounts])

    async def _change(self, what: str, make: Callable[[Registry], tuple[RegistryChange, R]]) -> R:
        for _ in range(_TRIES):
            await self._registry.refresh()
            change, result = make(self._registry.current)
            if await self._store.write(change):
                await self._registry.refresh()
                _log.info(what, version=change.version + 1, **_named(change))
                return result
        raise Overloaded("The registry is being changed by others. Try again.", retry_after=1)


def _named(change: RegistryChange) -> dict[str, list[str]]:
    """Whom a change concerns, for the log."""
    return {
        "accounts": [each.name for each in (*change.accounts, *change.drop_accounts)],
        "tenants": [each.name for each in (*change.tenants, *change.drop_tenants)],
        "credentials": [each.id for each in (*change.tokens, *change.drop_tokens)],
    }


def _found(table: Mapping[str, R], name: str, what: str) -> R:
    if name not in table:
        raise NotFound(f"There is no {what} {name}.")
    return table[name]
