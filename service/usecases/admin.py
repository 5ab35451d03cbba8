"""Changes of accounts, tenants, tokens, webhooks and secrets.

A PUT replaces: what is left out gets its default, only secrets are kept. Everything raises LedgerUnavailable while
Redis is away.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog
from msgspec import Struct
from msgspec.structs import replace

from service.crypto import AesSivCipher, UserKeyCipher
from service.domain import webhooks
from service.domain.errors import (
    Conflict,
    FieldError,
    InvalidOptions,
    LedgerUnavailable,
    NotFound,
    VersionConflict,
    field_path,
)
from service.domain.ledger import AccountState, AccountStatus
from service.domain.tenants import (
    Account,
    Registry,
    Tenant,
    Token,
    WebhookSecrets,
    generate_token,
    hash_token,
)
from service.usecases.caches import CachedRegistry, no_change
from service.usecases.ports import Ledger, RegistryChange
from service.usecases.registry_plan import (
    DesiredAccount,
    DesiredRegistry,
    DesiredTenant,
    RegistryPlan,
    RegistryPlanner,
    affects_availability,
    encrypt_user_key,
    find_base_url_error,
)

_log = structlog.get_logger(__name__)

_TOKEN_ID_BYTES = 6
R = TypeVar("R")
AccountOrTenant = TypeVar("AccountOrTenant", Account, Tenant)
LogFields = Callable[[Account | Tenant], Mapping[str, Any]]
"""Returns the settings of an account or a tenant in the form of the log."""


class NewToken(Struct, frozen=True):
    """A new token: the only time its text is known."""

    token: Token
    text: str


class _SavedAccount(Struct, frozen=True):
    account: Account
    key_given: bool
    reopens: bool


class SavedTenant(Struct, frozen=True):
    """A saved tenant, with its webhook secret if one was generated: the only time it is known."""

    tenant: Tenant
    key_given: bool
    generated_secret: str | None


class ReencryptedSecrets(Struct, frozen=True):
    """Names of accounts and tenants whose secrets were encrypted again, and paths of those that no key decrypts."""

    accounts: tuple[str, ...]
    tenants: tuple[str, ...]
    undecryptable: tuple[str, ...]


@dataclass(kw_only=True, eq=False, repr=False)
class RegistryAdmin:
    """Changes accounts, tenants and tokens, one by one or by a registry document."""

    registry: CachedRegistry
    ledger: Ledger
    user_key_cipher: UserKeyCipher
    webhook_cipher: AesSivCipher
    now: Callable[[], float]
    log_fields: LogFields
    base_url_error: Callable[[str], str | None]
    """Returns why an account may not have a base URL. One that it keeps is not checked, so that it can be changed."""

    async def save_account(self, name: str, desire: Callable[[Account | None], DesiredAccount]) -> Account:
        """Save what `desire` returns for the current account, None for a new one; without a key it keeps its own.

        Reopens the account if the change may allow it to pay again. Raises InvalidOptions without a key if the account
        is new or gets another origin, if the base URL is not permitted, and what `desire` raises.
        """
        cipher = self.user_key_cipher

        def change(registry: Registry) -> tuple[RegistryChange, _SavedAccount]:
            before = registry.accounts.get(name)
            desired = desire(before)
            if error := find_base_url_error(before, desired.account, self.base_url_error):
                raise InvalidOptions([FieldError("base_url", error)])
            is_same_key = before is not None and desired.user_key in {None, cipher.decrypt(before)}
            account = replace(
                desired.account,
                id=before.id if before else self._new_id(registry),
                secret_ref=before.secret_ref if before and is_same_key else None,
            )
            account = encrypt_user_key(cipher, account, desired.user_key, before)
            next_id = max(registry.next_id, account.id + 1)
            reopens = before is not None and affects_availability(before, account)
            result = _SavedAccount(account, desired.user_key is not None, reopens)
            return replace(no_change(registry), next_id=next_id, accounts=(account,)), result

        def describe(saved: _SavedAccount) -> Mapping[str, Any]:
            return {**self.log_fields(saved.account), "key_given": saved.key_given}

        saved = await self.registry.write_change("account.updated", change, describe, account=name)
        account = saved.account
        is_closed = (await self.ledger.account_states([account.id]))[account.id].status is not AccountStatus.OPEN
        if saved.reopens or (saved.key_given and is_closed):
            await self.ledger.reopen_account(account.id)
        return account

    def has_user_key(self, name: str, user_key: str) -> bool:
        account = self.registry.current.accounts.get(name)
        return account is not None and self.user_key_cipher.decrypt(account) == user_key.encode()

    async def save_tenant(self, name: str, desire: Callable[[Tenant | None], DesiredTenant]) -> SavedTenant:
        """Save what `desire` returns for the current tenant, None for a new one.

        Without a secret its webhook keeps its own, or gets a generated one. Raises InvalidOptions for an unknown
        account, and what `desire` raises.
        """
        text = webhooks.generate_secret()
        generated = self.webhook_cipher.encrypt(webhooks.parse_secret(text))

        def change(registry: Registry) -> tuple[RegistryChange, SavedTenant]:
            before = registry.tenants.get(name)
            desired = desire(before)
            missing = [account for account in desired.tenant.accounts if account not in registry.accounts]
            if missing:
                raise InvalidOptions([FieldError("accounts", f"there is no account {', '.join(missing)}")])
            new_secret = None if desired.secret is None else self.webhook_cipher.encrypt(desired.secret)
            webhook = desired.tenant.webhook.with_secret(
                before.webhook.secrets if before else None, new_secret, generated
            )
            tenant = replace(desired.tenant, id=before.id if before else self._new_id(registry), webhook=webhook)
            is_generated = webhook.secrets is not None and webhook.secrets.current == generated
            next_id = max(registry.next_id, tenant.id + 1)
            result = SavedTenant(tenant, new_secret is not None, text if is_generated else None)
            return replace(no_change(registry), next_id=next_id, tenants=(tenant,)), result

        def describe(saved: SavedTenant) -> Mapping[str, Any]:
            return {**self.log_fields(saved.tenant), "key_given": saved.key_given}

        return await self.registry.write_change("tenant.updated", change, describe, tenant=name)

    async def delete_account(self, name: str, *, force: bool) -> None:
        """Delete an account. Unless forced, it must have no open submission and no tenant.

        Force removes it from its tenants too, so that none of them uses a later account of this name. Raises Conflict
        or NotFound.
        """
        account = await self.get_account(name)
        state = (await self.account_states((account,)))[account.id]
        if state.open_submissions and not force:
            raise Conflict(
                f"{state.open_submissions} submissions of account {name} have not ended. Wait for them, or force it."
            )

        def change(registry: Registry) -> tuple[RegistryChange, None]:
            _require_same_id(registry.accounts, account, "account")
            users = [tenant for tenant in registry.tenants.values() if name in tenant.accounts]
            if users and not force:
                names = ", ".join(tenant.name for tenant in users)
                raise Conflict(f"Account {name} is used by tenants: {names}. Change them first, or force it.")
            changed = tuple(
                replace(tenant, accounts=tuple(other for other in tenant.accounts if other != name)) for tenant in users
            )
            return replace(no_change(registry), tenants=changed, drop_accounts=(account,)), None

        await self.registry.write_change(
            "account.deleted", change, account=name, force=force, open=state.open_submissions
        )

    async def delete_tenant(self, name: str, *, force: bool) -> None:
        """Delete a tenant and its tokens. Unless forced, it must have no active task. Raises Conflict or NotFound."""
        tenant = await self.get_tenant(name)
        active = (await self.ledger.tenant_snapshot(tenant.id)).state.active_tasks
        if active and not force:
            raise Conflict(f"{active} tasks of tenant {name} are active. Wait for them, or force it.")

        def change(registry: Registry) -> tuple[RegistryChange, None]:
            current = _require_same_id(registry.tenants, tenant, "tenant")
            dropped = registry.tokens_of(current)
            return replace(no_change(registry), drop_tenants=(current,), drop_tokens=dropped), None

        await self.registry.write_change("tenant.deleted", change, tenant=name, force=force, active=active)

    async def create_token(self, tenant_name: str, label: str | None, expires_at: float | None) -> NewToken:
        """Create a token and delete expired ones; `expires_at` in seconds since the epoch. Raises NotFound."""
        text, token_id, created_at = generate_token(), secrets.token_hex(_TOKEN_ID_BYTES), self.now()

        def change(registry: Registry) -> tuple[RegistryChange, Token]:
            tenant = require(registry.tenants.get(tenant_name), tenant_name, "tenant")
            expired = tuple(token for token in registry.tokens_of(tenant) if not token.is_valid_at(created_at))
            token = Token(token_id, tenant.id, hash_token(text), label, created_at, expires_at)
            return replace(no_change(registry), tokens=(token,), drop_tokens=expired), token

        token = await self.registry.write_change(
            "token.created", change, tenant=tenant_name, id=token_id, label=label, expires=expires_at
        )
        return NewToken(token, text)

    async def revoke_token(self, tenant_name: str, token_id: str, grace_seconds: float) -> None:
        """Let a token expire after the grace, at once if 0, never later than before. Raises NotFound."""
        end = self.now() + grace_seconds

        def change(registry: Registry) -> tuple[RegistryChange, None]:
            tenant = require(registry.tenants.get(tenant_name), tenant_name, "tenant")
            token = require({token.id: token for token in registry.tokens_of(tenant)}.get(token_id), token_id, "token")
            if not grace_seconds:
                return replace(no_change(registry), drop_tokens=(token,)), None
            expires_at = end if token.expires_at is None else min(end, token.expires_at)
            return replace(no_change(registry), tokens=(replace(token, expires_at=expires_at),)), None

        await self.registry.write_change("token.revoked", change, tenant=tenant_name, id=token_id, grace=grace_seconds)

    async def revoke_all_tokens(self, tenant_name: str) -> tuple[str, ...]:
        """Revoke all tokens of a tenant at once; return their ids. Raises NotFound."""

        def change(registry: Registry) -> tuple[RegistryChange, tuple[str, ...]]:
            tokens = registry.tokens_of(require(registry.tenants.get(tenant_name), tenant_name, "tenant"))
            return replace(no_change(registry), drop_tokens=tokens), tuple(token.id for token in tokens)

        return await self.registry.write_change(
            "token.all_revoked", change, lambda ids: {"ids": ids}, tenant=tenant_name
        )

    async def reopen_account(self, name: str) -> Account:
        """Let the next submission try an exhausted or invalid account. Raises NotFound."""
        account = await self.get_account(name)
        await self.ledger.reopen_account(account.id)
        _log.info("account.reopened", account=name)
        return account

    async def reset_clock(self) -> int:
        """Set ledger time to server time, and all due times with it; return the offset in milliseconds."""
        registry = await self.load_registry()
        tenant_ids = [*(tenant.id for tenant in registry.tenants.values()), *registry.deleted_tenant_names]
        offset = await self.ledger.reset_clock(tenant_ids, [account.id for account in registry.accounts.values()])
        _log.warning("clock.reset", seconds=offset / 1000)
        return offset

    async def load_registry(self) -> Registry:
        """Return the latest version."""
        await self.registry.refresh()
        return self.registry.current

    async def get_account(self, name: str) -> Account:
        """Return an account. Raises NotFound."""
        return require((await self.load_registry()).accounts.get(name), name, "account")

    async def list_accounts(self) -> tuple[Account, ...]:
        """Return all accounts by name."""
        return tuple(account for _, account in sorted((await self.load_registry()).accounts.items()))

    async def get_tenant(self, name: str) -> Tenant:
        """Return a tenant. Raises NotFound."""
        return require((await self.load_registry()).tenants.get(name), name, "tenant")

    async def list_tenants(self) -> tuple[Tenant, ...]:
        """Return all tenants by name."""
        return tuple(tenant for _, tenant in sorted((await self.load_registry()).tenants.items()))

    def list_tokens(self, tenant: Tenant) -> tuple[Token, ...]:
        """Return the tokens of a tenant that have not expired."""
        now = self.now()
        return tuple(token for token in self.registry.current.tokens_of(tenant) if token.is_valid_at(now))

    async def account_states(self, accounts: tuple[Account, ...]) -> Mapping[int, AccountState]:
        return await self.ledger.account_states([account.id for account in accounts])

    async def apply(
        self, desired: DesiredRegistry, *, force: bool, dry_run: bool, version_matches: Callable[[int], bool]
    ) -> RegistryPlan:
        """Apply a document, all of it or nothing; a dry run only plans.

        Unless forced, nothing is removed that has running tasks, nor everything. `version_matches` is the caller's
        precondition. Raises InvalidOptions with all errors, Conflict, VersionConflict or Overloaded.
        """
        registry = await self.load_registry()
        if not version_matches(registry.version):
            raise VersionConflict("The registry was changed since you read it. Read it again, and compare.")
        planner = RegistryPlanner(
            registry,
            self.now(),
            user_key_cipher=self.user_key_cipher,
            webhook_cipher=self.webhook_cipher,
            base_url_error=self.base_url_error,
        )
        plan = planner.plan(desired)
        if plan.change is None:
            return plan
        if not force:
            await self._require_idle(plan.change)
            if not plan.after.accounts and not plan.after.tenants:  # as after an export that failed
                raise Conflict(
                    "Nothing would be left: the document has no account and no tenant. Check it, or force it."
                )
        if not dry_run:
            await self._write_plan(plan, plan.change, force=force)
        return plan

    async def _require_idle(self, change: RegistryChange) -> None:
        """Raise Conflict if something to be removed has running tasks."""
        states = await self.ledger.account_states([account.id for account in change.drop_accounts])
        busy = [
            f"{number} submissions of {field_path('accounts', account.name)} have not ended"
            for account in change.drop_accounts
            if (number := states[account.id].open_submissions)
        ]
        for tenant in change.drop_tenants:
            active = (await self.ledger.tenant_snapshot(tenant.id)).state.active_tasks
            if active:
                busy.append(f"{active} tasks of {field_path('tenants', tenant.name)} are active")
        if busy:
            raise Conflict(f"{'; '.join(busy)}. Wait for them, or force it.")

    async def _write_plan(self, plan: RegistryPlan, change: RegistryChange, *, force: bool) -> None:
        def make_change(registry: Registry) -> tuple[RegistryChange, None]:
            if registry.version != plan.before.version:
                raise VersionConflict("The registry was changed meanwhile. Read it again, and compare.")
            return change, None

        await self.registry.write_change(
            "registry.applied",
            make_change,
            force=force,
            removed_accounts=[account.name for account in change.drop_accounts],
            removed_tenants=[tenant.name for tenant in change.drop_tenants],
            removed=[token.id for token in change.drop_tokens],
        )
        # Each change is logged as a single one would be.
        for account in change.accounts:
            key_given = account.name in plan.changed_keys
            _log.info("account.updated", account=account.name, **self.log_fields(account), key_given=key_given)
        for tenant in change.tenants:
            key_given = tenant.name in plan.changed_secrets
            _log.info("tenant.updated", tenant=tenant.name, **self.log_fields(tenant), key_given=key_given)
        for token in change.tokens:
            owner = plan.after.tenant_name(token.tenant)
            _log.info("token.updated", tenant=owner, id=token.id, label=token.label, expires=token.expires_at)
        for account in change.accounts:
            before = plan.before.accounts.get(account.name)
            if before and affects_availability(before, account):
                with suppress(LedgerUnavailable):  # the plan is written; the account is probed later anyway
                    await self.ledger.reopen_account(account.id)

    async def reencrypt_secrets(self) -> ReencryptedSecrets:
        """Encrypt all secrets with the first key; those that no key decrypts stay as they are.

        Nothing is written if nothing changes. Raises LedgerUnavailable or Overloaded.
        """
        change, result = self._reencrypt_all(await self.load_registry())
        if not change.accounts and not change.tenants:
            return result
        return await self.registry.write_change("registry.reencrypted", self._reencrypt_all)

    def _reencrypt_all(self, registry: Registry) -> tuple[RegistryChange, ReencryptedSecrets]:
        undecryptable: list[str] = []
        accounts, tenants = list[Account](), list[Tenant]()
        for name, account in sorted(registry.accounts.items()):
            plaintext = self.user_key_cipher.decrypt(account)
            if plaintext is None:
                undecryptable.append(field_path("accounts", name, "user_key"))
            elif (user_key := self.user_key_cipher.encrypt(plaintext, account)) != account.user_key:
                accounts.append(replace(account, user_key=user_key))
        for name, tenant in sorted(registry.tenants.items()):
            before = tenant.webhook.secrets
            after = before and self._reencrypt_webhook(before)
            if before and after is None:
                undecryptable.append(field_path("tenants", name, "webhook", "secret"))
            elif after != before:
                tenants.append(replace(tenant, webhook=replace(tenant.webhook, secrets=after)))
        change = replace(no_change(registry), accounts=tuple(accounts), tenants=tuple(tenants))
        names = (tuple(account.name for account in accounts), tuple(tenant.name for tenant in tenants))
        return change, ReencryptedSecrets(*names, tuple(undecryptable))

    def _reencrypt_webhook(self, before: WebhookSecrets) -> WebhookSecrets | None:
        """Reencrypt the secrets in force and drop an expired one. Returns None if no key decrypts one of them."""
        current, *previous = [_reencrypt(self.webhook_cipher, secret) for secret in before.active_secrets(self.now())]
        if current is None or None in previous:
            return None
        return replace(before, current=current, previous=previous[0] if previous else None)

    def _new_id(self, registry: Registry) -> int:
        # Ids follow the clock, so that one is never used again, not even if the registry was lost.
        return max(registry.next_id, int(self.now() * 1000))


def require(entry: R | None, name: str, kind: str) -> R:
    """Return the entry. Raises NotFound if it is None."""
    if entry is None:
        raise NotFound(f"There is no {kind} {name}.")
    return entry


def _require_same_id(table: Mapping[str, AccountOrTenant], expected: AccountOrTenant, kind: str) -> AccountOrTenant:
    """Return the current object. Raises Conflict if its name belongs to another one since `expected` was read."""
    current = require(table.get(expected.name), expected.name, kind)
    if current.id != expected.id:
        raise Conflict(f"The {kind} {expected.name} was deleted and created again meanwhile. Read it again.")
    return current


def _reencrypt(cipher: AesSivCipher, ciphertext: bytes) -> bytes | None:
    plaintext = cipher.decrypt(ciphertext)
    return None if plaintext is None else cipher.encrypt(plaintext)
