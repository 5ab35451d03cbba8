"""Changes of accounts, tenants, tokens, webhooks and secrets."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from service.domain import tenants, webhooks
from service.domain.errors import (
    Conflict,
    FieldError,
    InvalidOptions,
    LedgerUnavailable,
    NotFound,
    Overloaded,
    field_path,
)
from service.domain.ledger import AccountState, AccountStatus
from service.domain.tasks import Cipher
from service.domain.tenants import (
    Account,
    AccountPolicy,
    Registry,
    Tenant,
    Token,
    WebhookSecrets,
    generate_token,
    hash_token,
    strip_query,
)
from service.telemetry import logging
from service.usecases.ports import Delivery, DeliveryQueue, Ledger, RegistryChange, RegistryStore, RegistryView

_log = structlog.get_logger(__name__)


_MAX_TRIES = 10


R = TypeVar("R")


class RegistryUpdater:
    """Changes the registry. There is one of it in a process."""

    def __init__(self, store: RegistryStore, registry: RegistryView) -> None:
        self._store = store
        self._registry = registry
        self._lock = asyncio.Lock()

    async def update_registry(
        self, event: str, make_change: Callable[[Registry], tuple[RegistryChange, R]], **log_fields: Any
    ) -> R:
        """Write what `make` makes of the newest version, again if another process was faster, and log it.

        Raises LedgerUnavailable or Overloaded, and what `make` raises.
        """
        async with self._lock:  # those of one process need not race each other
            for _ in range(_MAX_TRIES):
                await self._registry.refresh()
                change, result = make_change(self._registry.current)
                if await self._store.write(change):
                    _log.info(event, version=change.version + 1, **log_fields)
                    with suppress(LedgerUnavailable):  # it was done all the same, and is followed in the background
                        await self._registry.refresh()
                    return result
        raise Overloaded("The registry is being changed by others. Try again.", retry_after=1)


class ReencryptedSecrets(Struct, frozen=True):
    """The accounts and tenants whose secrets were sealed anew, by name; and where there is what no key opens."""

    accounts: tuple[str, ...]
    tenants: tuple[str, ...]
    undecryptable: tuple[str, ...]


def _reencrypt(cipher: Cipher, sealed: bytes) -> bytes | None:
    """The same sealed with the first key; None if no key opens it."""
    plain = cipher.decrypt(sealed)
    return None if plain is None else cipher.encrypt(plain)


_TOKEN_ID_BYTES = 6


Owner = TypeVar("Owner", Account, Tenant)


class NewToken(Struct, frozen=True):
    """A token that was just made: the only time its text is known."""

    token: Token
    text: str


class SavedTenant(Struct, frozen=True):
    """A tenant that was put, and the secret of its webhook if one was made for it: the only time it is known."""

    tenant: Tenant
    generated_secret: str | None


class RegistryAdmin:
    """Changes the registry."""

    def __init__(
        self,
        *,
        updater: RegistryUpdater,
        registry: RegistryView,
        ledger: Ledger,
        user_key_cipher: Cipher,
        webhook_cipher: Cipher,
        now: Callable[[], float],
    ) -> None:
        self._updater = updater
        self._registry = registry
        self._ledger = ledger
        self._user_key_cipher = user_key_cipher
        self._webhook_cipher = webhook_cipher
        self.now = now

    async def put_account(
        self, name: str, user_key: str | None, base_url: str | None, policy: AccountPolicy
    ) -> Account:
        """Make or replace an account; without a key the one it has is kept.

        What changed so that the account may be able to pay again gets it looked at anew, as `reopen` does.
        Raises InvalidOptions if a new account has no key.
        """
        sealed = self._user_key_cipher.encrypt(user_key.encode()) if user_key is not None else None

        def change(now: Registry) -> tuple[RegistryChange, tuple[Account, bool]]:
            known = now.accounts.get(name)
            key = sealed or (known.user_key if known else None)
            if key is None:
                raise InvalidOptions([FieldError("user_key", "is required for a new account")])
            origin = known.secret_ref if known and key == known.user_key else None
            account = Account(known.id if known else self._new_id(now), name, key, base_url, policy, origin)
            next_id = max(now.next_id, account.id + 1)
            made = RegistryChange(version=now.version, next_id=next_id, accounts=(account,))
            return made, (account, known is not None and affects_availability(known, account))

        about = {"base_url": base_url, "policy": logging.log_account_policy(policy), "key_given": user_key is not None}
        account, reopens = await self._updater.update_registry("account.updated", change, account=name, **about)
        closed = (await self._ledger.account_states([account.id]))[account.id].status is not AccountStatus.OPEN
        if reopens or (user_key is not None and closed):
            await self._ledger.reopen_account(account.id)
        return account

    def has_user_key(self, name: str, user_key: str) -> bool:
        """Whether there is an account of this name with this key."""
        account = self._registry.current.accounts.get(name)
        return account is not None and account.user_key == self._user_key_cipher.encrypt(user_key.encode())

    async def put_tenant(self, tenant: Tenant, secret: str | None = None) -> SavedTenant:
        """Make or replace a tenant; the id of the argument does not matter. Raises InvalidOptions.

        Its webhooks are signed with `secret`; without one, as they were, or with one that is made. Those that were
        switched off are sent again.
        """
        given = None if secret is None else self._webhook_cipher.encrypt(webhooks.parse_secret(secret))
        made = webhooks.generate_secret()
        fresh = self._webhook_cipher.encrypt(webhooks.parse_secret(made))

        def change(now: Registry) -> tuple[RegistryChange, SavedTenant]:
            missing = [each for each in tenant.accounts if each not in now.accounts]
            if missing:
                raise InvalidOptions([FieldError("accounts", f"there is no account {', '.join(missing)}")])
            known = now.tenants.get(tenant.name)
            signed = tenant.webhook.with_secret(known.webhook.secrets if known else None, given, fresh)
            put = msgspec.structs.replace(tenant, id=known.id if known else self._new_id(now), webhook=signed)
            shown = made if signed.secrets and signed.secrets.current == fresh else None
            next_id = max(now.next_id, put.id + 1)
            return RegistryChange(version=now.version, next_id=next_id, tenants=(put,)), SavedTenant(put, shown)

        about = msgspec.to_builtins(tenant)
        del about["id"], about["name"]
        about["policy"] = logging.log_tenant_policy(tenant.policy)
        url = tenant.webhook.url and strip_query(tenant.webhook.url)
        about["webhook"] = {"url": url, "allow": tenant.webhook.allow, "key_given": given is not None}
        return await self._updater.update_registry("tenant.updated", change, tenant=tenant.name, **about)

    async def delete_account(self, name: str, *, force: bool) -> None:
        """Take an account out. Unless forced it must have nothing open and no tenant that uses it.

        By force it is taken from its tenants too, so that none of them spends from another account that is given the
        name later. Raises Conflict or NotFound.
        """
        account = await self.get_account(name)
        state = (await self.account_states((account,)))[account.id]
        if state.open_submissions and not force:
            raise Conflict(
                f"{state.open_submissions} submissions of account {name} have not ended. Wait for them, or force it."
            )

        def change(now: Registry) -> tuple[RegistryChange, None]:
            _require_same_id(now.accounts, account, "account")
            users = [tenant for tenant in now.tenants.values() if name in tenant.accounts]
            if users and not force:
                names = ", ".join(tenant.name for tenant in users)
                raise Conflict(f"Account {name} is used by {names}. Change them first, or force it.")
            left = tuple(
                msgspec.structs.replace(each, accounts=tuple(other for other in each.accounts if other != name))
                for each in users
            )
            made = RegistryChange(version=now.version, next_id=now.next_id, tenants=left, drop_accounts=(account,))
            return made, None

        await self._updater.update_registry(
            "account.deleted", change, account=name, force=force, open=state.open_submissions
        )

    async def delete_tenant(self, name: str, *, force: bool) -> None:
        """Take a tenant and its tokens out. Unless forced it must have no active task. Raises Conflict or NotFound."""
        tenant = await self.get_tenant(name)
        active = (await self._ledger.tenant_snapshot(tenant.id)).state.active_tasks
        if active and not force:
            raise Conflict(f"{active} tasks of tenant {name} are active. Wait for them, or force it.")

        def change(now: Registry) -> tuple[RegistryChange, None]:
            found = _require_same_id(now.tenants, tenant, "tenant")
            tokens = now.tokens_of(found)
            made = RegistryChange(version=now.version, next_id=now.next_id, drop_tenants=(found,), drop_tokens=tokens)
            return made, None

        await self._updater.update_registry("tenant.deleted", change, tenant=name, force=force, active=active)

    async def create_token(self, tenant_name: str, label: str | None, expires_at: float | None) -> NewToken:
        """Make a token for a tenant, whose expired ones go; `expires` in seconds since the epoch.

        Raises NotFound.
        """
        text, token_id, created = generate_token(), secrets.token_hex(_TOKEN_ID_BYTES), self.now()

        def change(now: Registry) -> tuple[RegistryChange, Token]:
            tenant = _require(now.tenants, tenant_name, "tenant")
            expired = tuple(each for each in now.tokens_of(tenant) if not each.is_valid_at(created))
            token = Token(token_id, tenant.id, hash_token(text), label, created, expires_at)
            made = RegistryChange(version=now.version, next_id=now.next_id, tokens=(token,), drop_tokens=expired)
            return made, token

        about = {"id": token_id, "label": label, "expires": expires_at}
        return NewToken(await self._updater.update_registry("token.created", change, tenant=tenant_name, **about), text)

    async def revoke_token(self, tenant_name: str, token_id: str, grace_seconds: float) -> None:
        """Let a token expire in `grace` seconds, at once if 0; never later than it would. Raises NotFound."""
        end = self.now() + grace_seconds

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = _require(now.tenants, tenant_name, "tenant")
            token = _require({each.id: each for each in now.tokens_of(tenant)}, token_id, "token")
            if not grace_seconds:
                return RegistryChange(version=now.version, next_id=now.next_id, drop_tokens=(token,)), None
            left = msgspec.structs.replace(
                token, expires_at=end if token.expires_at is None else min(end, token.expires_at)
            )
            return RegistryChange(version=now.version, next_id=now.next_id, tokens=(left,)), None

        await self._updater.update_registry(
            "token.revoked", change, tenant=tenant_name, id=token_id, grace=grace_seconds
        )

    async def reopen_account(self, name: str) -> Account:
        """Let the next submission find out whether an exhausted or invalid account can be used. Raises NotFound."""
        account = await self.get_account(name)
        await self._ledger.reopen_account(account.id)
        _log.info("account.reopened", account=name)
        return account

    async def reset_clock(self, actor: str) -> int:
        """Make the ledger's time that of Redis again, and with it all that is due; by how many milliseconds."""
        await self._registry.refresh()
        now = self._registry.current
        tenants = [*(each.id for each in now.tenants.values()), *now.deleted_tenant_names]
        offset = await self._ledger.reset_clock(tenants, [each.id for each in now.accounts.values()])
        _log.warning("clock.reset", seconds=offset / 1000, actor=actor)
        return offset

    async def get_account(self, name: str) -> Account:
        """An account by its name. Raises NotFound."""
        await self._registry.refresh()
        return _require(self._registry.current.accounts, name, "account")

    async def list_accounts(self) -> tuple[Account, ...]:
        """All accounts, by name."""
        await self._registry.refresh()
        return tuple(account for _, account in sorted(self._registry.current.accounts.items()))

    async def get_tenant(self, name: str) -> Tenant:
        """A tenant by its name. Raises NotFound."""
        await self._registry.refresh()
        return _require(self._registry.current.tenants, name, "tenant")

    async def list_tenants(self) -> tuple[Tenant, ...]:
        """All tenants, by name."""
        await self._registry.refresh()
        return tuple(tenant for _, tenant in sorted(self._registry.current.tenants.items()))

    def list_tokens(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant that have not expired."""
        now = self.now()
        return tuple(token for token in self._registry.current.tokens_of(tenant) if token.is_valid_at(now))

    async def account_states(self, accounts: tuple[Account, ...]) -> Mapping[int, AccountState]:
        """What the ledger knows of each account, by id."""
        return await self._ledger.account_states([account.id for account in accounts])

    async def reencrypt_secrets(self) -> ReencryptedSecrets:
        """Encrypt all secrets with the first key; those that no key decrypts stay as they are.

        Nothing is written if nothing changes. Raises LedgerUnavailable or Overloaded.
        """
        await self._registry.refresh()
        change, result = self._reencrypt_all(self._registry.current)
        if not change.accounts and not change.tenants:
            return result
        return await self._updater.update_registry("registry.reencrypted", self._reencrypt_all)

    def _reencrypt_all(self, registry: Registry) -> tuple[RegistryChange, ReencryptedSecrets]:
        undecryptable: list[str] = []
        accounts, tenants = list[Account](), list[Tenant]()
        for name, account in sorted(registry.accounts.items()):
            user_key = _reencrypt(self._user_key_cipher, account.user_key)
            if user_key is None:
                undecryptable.append(field_path("accounts", name, "user_key"))
            elif user_key != account.user_key:
                accounts.append(replace(account, user_key=user_key))
        for name, tenant in sorted(registry.tenants.items()):
            before = tenant.webhook.secrets
            after = before and self._reencrypt_webhook(before)
            if before and after is None:
                undecryptable.append(field_path("tenants", name, "webhook", "secret"))
            elif after != before:
                tenants.append(replace(tenant, webhook=replace(tenant.webhook, secrets=after)))
        change = RegistryChange(
            version=registry.version, next_id=registry.next_id, accounts=tuple(accounts), tenants=tuple(tenants)
        )
        names = (tuple(account.name for account in accounts), tuple(tenant.name for tenant in tenants))
        return change, ReencryptedSecrets(*names, tuple(undecryptable))

    def _reencrypt_webhook(self, before: WebhookSecrets) -> WebhookSecrets | None:
        """Reencrypt the secrets in force and drop an expired one. Returns None if no key decrypts one of them."""
        current, *previous = [_reencrypt(self._webhook_cipher, secret) for secret in before.active_secrets(self.now())]
        if current is None or None in previous:
            return None
        return replace(before, current=current, previous=previous[0] if previous else None)

    def _new_id(self, now: Registry) -> int:
        """An id that was never used, not even by a registry that was lost with all it knew: ids follow the clock."""
        return max(now.next_id, int(self.now() * 1000))


def affects_availability(old: Account, new: Account) -> bool:
    """Whether an account that was found unable to pay deserves a new look: another key, place, or a lower floor."""
    return (
        new.user_key != old.user_key
        or new.base_url != old.base_url
        or new.policy.floor_count < old.policy.floor_count
        or new.policy.floor_money_fen < old.policy.floor_money_fen
    )


def _require(table: Mapping[str, R], name: str, what: str) -> R:
    if name not in table:
        raise NotFound(f"There is no {what} {name}.")
    return table[name]


def _require_same_id(table: Mapping[str, Owner], expected: Owner, what: str) -> Owner:
    """The owner that was looked at, as it is now, and not another one that was given its name since."""
    found = _require(table, expected.name, what)
    if found.id != expected.id:
        raise Conflict(f"The {what} {expected.name} was deleted and made anew meanwhile. Look at it again.")
    return found


class NewSecret(Struct, frozen=True):
    """A secret that was just made, the only time its text is known. The one before signs until `until` (seconds)."""

    text: str
    previous_expires_at: float


class TenantDelivery(Struct, frozen=True):
    """A delivery, and what its tenant is or was called; None if nobody remembers."""

    delivery: Delivery
    tenant: str | None


class WebhookAdmin:
    """Everything raises LedgerUnavailable while Redis is away."""

    def __init__(
        self,
        *,
        updater: RegistryUpdater,
        registry: RegistryView,
        deliveries: DeliveryQueue,
        cipher: Cipher,
        now: Callable[[], float],
    ) -> None:
        self._updater = updater
        self._registry = registry
        self._deliveries = deliveries
        self._cipher = cipher
        self._now = now

    async def rotate_secret(self, name: str, grace_seconds: float) -> NewSecret:
        """Give a tenant a new secret, beside which the one it has signs for `grace` seconds more.

        Raises NotFound, or Conflict if it has none.
        """
        text, until = webhooks.generate_secret(), self._now() + grace_seconds
        sealed = self._cipher.encrypt(webhooks.parse_secret(text))

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenants.get(name)
            if tenant is None:
                raise NotFound(f"There is no tenant {name}.")
            if tenant.webhook.secrets is None:
                raise Conflict(f"Tenant {name} has no webhook secret. It gets one with its webhook.")
            signing = WebhookSecrets(sealed, tenant.webhook.secrets.current if grace_seconds else None, until)
            return _replace_tenant(now, replace(tenant, webhook=replace(tenant.webhook, secrets=signing))), None

        await self._updater.update_registry("webhook.secret_rotated", change, tenant=name, grace=grace_seconds)
        return NewSecret(text, until)

    async def disable_url(self, tenant_id: int, url: str) -> None:
        """Send no more to an address of a tenant, until the tenant is put again. Raises Overloaded."""

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenant_by_id(tenant_id)
            if tenant is None:  # it was deleted meanwhile
                return RegistryChange(version=now.version, next_id=now.next_id), None
            return _replace_tenant(now, replace(tenant, webhook=tenant.webhook.with_disabled_url(url))), None

        await self._updater.update_registry(
            "webhook.disabled",
            change,
            tenant=self._registry.current.tenant_name(tenant_id),
            address=tenants.strip_query(url),
        )

    async def list_failed(self, limit: int) -> Sequence[TenantDelivery]:
        """Up to `most` deliveries that were given up in the last 30 days, the newest first."""
        return [self._with_tenant_name(each) for each in await self._deliveries.list_failed(limit)]

    async def redeliver(self, event: str) -> TenantDelivery:
        """Send an event again from the start, now. Raises NotFound if it is not known (any more)."""
        reservation = webhooks.parse_event_id(event)
        delivery = await self._deliveries.redeliver(reservation) if reservation else None
        if delivery is None:
            raise NotFound(f"There is no delivery {event}, or it was forgotten since.")
        owned = self._with_tenant_name(delivery)
        _log.info("webhook.redelivered", delivery=event, tenant=owned.tenant)
        return owned

    def _with_tenant_name(self, delivery: Delivery) -> TenantDelivery:
        return TenantDelivery(delivery, self._registry.current.tenant_name(delivery.tenant))


def _replace_tenant(now: Registry, tenant: Tenant) -> RegistryChange:
    return RegistryChange(version=now.version, next_id=now.next_id, tenants=(tenant,))
