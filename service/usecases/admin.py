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
from service.domain.errors import Conflict, FieldError, InvalidOptions, LedgerUnavailable, NotFound, Overloaded, dotted
from service.domain.ledger import AccountState, Status
from service.domain.tasks import Sealer
from service.domain.tenants import (
    Account,
    AccountPolicy,
    Registry,
    Signing,
    Tenant,
    Token,
    digest,
    new_token,
    without_query,
)
from service.telemetry import logging
from service.usecases.ports import Agenda, Clock, Delivery, Ledger, RegistryChange, RegistryStore, RegistryView

_log = structlog.get_logger(__name__)


_TRIES = 10


R = TypeVar("R")


class Change:
    """Changes the registry. There is one of it in a process."""

    def __init__(self, store: RegistryStore, registry: RegistryView) -> None:
        self._store = store
        self._registry = registry
        self._changing = asyncio.Lock()

    async def __call__(self, what: str, make: Callable[[Registry], tuple[RegistryChange, R]], **about: Any) -> R:
        """Write what `make` makes of the newest version, again if another process was faster, and log it.

        Raises LedgerUnavailable or Overloaded, and what `make` raises.
        """
        async with self._changing:  # those of one process need not race each other
            for _ in range(_TRIES):
                await self._registry.refresh()
                change, result = make(self._registry.current)
                if await self._store.write(change):
                    _log.info(what, version=change.version + 1, **about)
                    with suppress(LedgerUnavailable):  # it was done all the same, and is followed in the background
                        await self._registry.refresh()
                    return result
        raise Overloaded("The registry is being changed by others. Try again.", retry_after=1)


class Resealed(Struct, frozen=True):
    """The accounts and tenants whose secrets were sealed anew, by name; and where there is what no key opens."""

    accounts: tuple[str, ...]
    tenants: tuple[str, ...]
    lost: tuple[str, ...]


class Reseal:
    """Brings under the first secret key what was sealed with others."""

    def __init__(
        self, *, change: Change, registry: RegistryView, user_keys: Sealer, webhook_secrets: Sealer, clock: Clock
    ) -> None:
        self._change = change
        self._registry = registry
        self._user_keys = user_keys
        self._webhook_secrets = webhook_secrets
        self._clock = clock

    async def __call__(self) -> Resealed:
        """Seal anew what is not sealed with the first key, and leave what no key opens as it is.

        Where all is, nothing is written. Raises LedgerUnavailable or Overloaded.
        """
        await self._registry.refresh()
        change, found = self._make(self._registry.current)
        if not change.accounts and not change.tenants:
            return found
        return await self._change("registry.resealed", self._make)

    def _make(self, now: Registry) -> tuple[RegistryChange, Resealed]:
        lost: list[str] = []
        accounts, tenants = list[Account](), list[Tenant]()
        for name, account in sorted(now.accounts.items()):
            sealed = _anew(self._user_keys, account.user_key)
            if sealed is None:
                lost.append(dotted("accounts", name, "user_key"))
            elif sealed != account.user_key:
                accounts.append(replace(account, user_key=sealed))
        for name, tenant in sorted(now.tenants.items()):
            before = tenant.webhook.signing
            signing = before and self._signing(before)
            if before and signing is None:
                lost.append(dotted("tenants", name, "webhook", "secret"))
            elif signing != before:
                tenants.append(replace(tenant, webhook=replace(tenant.webhook, signing=signing)))
        change = RegistryChange(
            version=now.version, next_id=now.next_id, accounts=tuple(accounts), tenants=tuple(tenants)
        )
        names = (tuple(each.name for each in accounts), tuple(each.name for each in tenants))
        return change, Resealed(*names, tuple(lost))

    def _signing(self, before: Signing) -> Signing | None:
        """The secrets that are in force, sealed anew; one that is no longer goes. None if no key opens one of them."""
        secret, *former = [_anew(self._webhook_secrets, each) for each in before.in_force(self._clock.now())]
        if secret is None or None in former:
            return None
        return replace(before, secret=secret, former=former[0] if former else None)


def _anew(sealer: Sealer, sealed: bytes) -> bytes | None:
    """The same sealed with the first key; None if no key opens it."""
    plain = sealer.open(sealed)
    return None if plain is None else sealer.seal(plain)


_TOKEN_ID_BYTES = 6


Owner = TypeVar("Owner", Account, Tenant)


class NewToken(Struct, frozen=True):
    """A token that was just made: the only time its text is known."""

    token: Token
    text: str


class PutTenant(Struct, frozen=True):
    """A tenant that was put, and the secret of its webhook if one was made for it: the only time it is known."""

    tenant: Tenant
    secret: str | None


class Operators:
    """Changes the registry."""

    def __init__(
        self,
        *,
        change: Change,
        registry: RegistryView,
        ledger: Ledger,
        user_keys: Sealer,
        webhook_secrets: Sealer,
        clock: Clock,
    ) -> None:
        self._change = change
        self._registry = registry
        self._ledger = ledger
        self._user_keys = user_keys
        self._webhook_secrets = webhook_secrets
        self._clock = clock

    async def put_account(
        self, name: str, user_key: str | None, base_url: str | None, policy: AccountPolicy
    ) -> Account:
        """Make or replace an account; without a key the one it has is kept.

        What changed so that the account may be able to pay again gets it looked at anew, as `reopen` does.
        Raises InvalidOptions if a new account has no key.
        """
        sealed = self._user_keys.seal(user_key.encode()) if user_key is not None else None

        def change(now: Registry) -> tuple[RegistryChange, tuple[Account, bool]]:
            known = now.accounts.get(name)
            key = sealed or (known.user_key if known else None)
            if key is None:
                raise InvalidOptions([FieldError("user_key", "is required for a new account")])
            origin = known.origin if known and key == known.user_key else None
            account = Account(known.id if known else self._fresh_id(now), name, key, base_url, policy, origin)
            next_id = max(now.next_id, account.id + 1)
            made = RegistryChange(version=now.version, next_id=next_id, accounts=(account,))
            return made, (account, known is not None and may_pay_again(known, account))

        about = {"base_url": base_url, "policy": logging.account_policy(policy), "key_given": user_key is not None}
        account, reopens = await self._change("account.put", change, account=name, **about)
        closed = (await self._ledger.accounts([account.id]))[account.id].status is not Status.OPEN
        if reopens or (user_key is not None and closed):
            await self._ledger.reopen(account.id)
        return account

    def has_key(self, name: str, user_key: str) -> bool:
        """Whether there is an account of this name with this key."""
        account = self._registry.current.accounts.get(name)
        return account is not None and account.user_key == self._user_keys.seal(user_key.encode())

    async def put_tenant(self, tenant: Tenant, secret: str | None = None) -> PutTenant:
        """Make or replace a tenant; the id of the argument does not matter. Raises InvalidOptions.

        Its webhooks are signed with `secret`; without one, as they were, or with one that is made. Those that were
        switched off are sent again.
        """
        given = None if secret is None else self._webhook_secrets.seal(webhooks.parse_secret(secret))
        made = webhooks.new_secret()
        fresh = self._webhook_secrets.seal(webhooks.parse_secret(made))

        def change(now: Registry) -> tuple[RegistryChange, PutTenant]:
            missing = [each for each in tenant.accounts if each not in now.accounts]
            if missing:
                raise InvalidOptions([FieldError("accounts", f"there is no account {', '.join(missing)}")])
            known = now.tenants.get(tenant.name)
            signed = tenant.webhook.signed(known.webhook.signing if known else None, given, fresh)
            put = msgspec.structs.replace(tenant, id=known.id if known else self._fresh_id(now), webhook=signed)
            shown = made if signed.signing and signed.signing.secret == fresh else None
            next_id = max(now.next_id, put.id + 1)
            return RegistryChange(version=now.version, next_id=next_id, tenants=(put,)), PutTenant(put, shown)

        about = msgspec.to_builtins(tenant)
        del about["id"], about["name"]
        about["policy"] = logging.tenant_policy(tenant.policy)
        url = tenant.webhook.url and without_query(tenant.webhook.url)
        about["webhook"] = {"url": url, "allow": tenant.webhook.allow, "key_given": given is not None}
        return await self._change("tenant.put", change, tenant=tenant.name, **about)

    async def delete_account(self, name: str, *, force: bool) -> None:
        """Take an account out. Unless forced it must have nothing open and no tenant that uses it.

        By force it is taken from its tenants too, so that none of them spends from another account that is given the
        name later. Raises Conflict or NotFound.
        """
        account = await self.account(name)
        state = (await self.balances((account,)))[account.id]
        if state.open and not force:
            raise Conflict(f"{state.open} submissions of account {name} have not ended. Wait for them, or force it.")

        def change(now: Registry) -> tuple[RegistryChange, None]:
            _same(now.accounts, account, "account")
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

        await self._change("account.deleted", change, account=name, force=force, open=state.open)

    async def delete_tenant(self, name: str, *, force: bool) -> None:
        """Take a tenant and its tokens out. Unless forced it must have no active task. Raises Conflict or NotFound."""
        tenant = await self.tenant(name)
        active = (await self._ledger.counters(tenant.id)).state.active
        if active and not force:
            raise Conflict(f"{active} tasks of tenant {name} are active. Wait for them, or force it.")

        def change(now: Registry) -> tuple[RegistryChange, None]:
            found = _same(now.tenants, tenant, "tenant")
            tokens = now.tokens_of(found)
            made = RegistryChange(version=now.version, next_id=now.next_id, drop_tenants=(found,), drop_tokens=tokens)
            return made, None

        await self._change("tenant.deleted", change, tenant=name, force=force, active=active)

    async def create_token(self, tenant_name: str, label: str | None, expires: float | None) -> NewToken:
        """Make a token for a tenant, whose expired ones go; `expires` in seconds since the epoch.

        Raises NotFound.
        """
        text, token_id, created = new_token(), secrets.token_hex(_TOKEN_ID_BYTES), self._clock.now()

        def change(now: Registry) -> tuple[RegistryChange, Token]:
            tenant = _found(now.tenants, tenant_name, "tenant")
            expired = tuple(each for each in now.tokens_of(tenant) if not each.valid_at(created))
            token = Token(token_id, tenant.id, digest(text), label, created, expires)
            made = RegistryChange(version=now.version, next_id=now.next_id, tokens=(token,), drop_tokens=expired)
            return made, token

        about = {"id": token_id, "label": label, "expires": expires}
        return NewToken(await self._change("token.created", change, tenant=tenant_name, **about), text)

    async def revoke_token(self, tenant_name: str, token_id: str, grace: float) -> None:
        """Let a token expire in `grace` seconds, at once if 0; never later than it would. Raises NotFound."""
        end = self._clock.now() + grace

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = _found(now.tenants, tenant_name, "tenant")
            token = _found({each.id: each for each in now.tokens_of(tenant)}, token_id, "token")
            if not grace:
                return RegistryChange(version=now.version, next_id=now.next_id, drop_tokens=(token,)), None
            left = msgspec.structs.replace(token, expires=end if token.expires is None else min(end, token.expires))
            return RegistryChange(version=now.version, next_id=now.next_id, tokens=(left,)), None

        await self._change("token.revoked", change, tenant=tenant_name, id=token_id, grace=grace)

    async def reopen(self, name: str) -> Account:
        """Let the next submission find out whether an exhausted or invalid account can be used. Raises NotFound."""
        account = await self.account(name)
        await self._ledger.reopen(account.id)
        _log.info("account.reopened", account=name)
        return account

    async def reset_clock(self, actor: str) -> int:
        """Make the ledger's time that of Redis again, and with it all that is due; by how many milliseconds."""
        await self._registry.refresh()
        now = self._registry.current
        tenants = [*(each.id for each in now.tenants.values()), *now.former]
        offset = await self._ledger.reset_clock(tenants, [each.id for each in now.accounts.values()])
        _log.warning("clock.reset", seconds=offset / 1000, actor=actor)
        return offset

    async def account(self, name: str) -> Account:
        """An account by its name. Raises NotFound."""
        await self._registry.refresh()
        return _found(self._registry.current.accounts, name, "account")

    async def accounts(self) -> tuple[Account, ...]:
        """All accounts, by name."""
        await self._registry.refresh()
        return tuple(account for _, account in sorted(self._registry.current.accounts.items()))

    async def tenant(self, name: str) -> Tenant:
        """A tenant by its name. Raises NotFound."""
        await self._registry.refresh()
        return _found(self._registry.current.tenants, name, "tenant")

    async def tenants(self) -> tuple[Tenant, ...]:
        """All tenants, by name."""
        await self._registry.refresh()
        return tuple(tenant for _, tenant in sorted(self._registry.current.tenants.items()))

    def now(self) -> float:
        """The time, in seconds since the epoch, that tokens expire by."""
        return self._clock.now()

    def tokens(self, tenant: Tenant) -> tuple[Token, ...]:
        """The tokens of a tenant that have not expired."""
        now = self._clock.now()
        return tuple(token for token in self._registry.current.tokens_of(tenant) if token.valid_at(now))

    async def balances(self, accounts: tuple[Account, ...]) -> Mapping[int, AccountState]:
        """What the ledger knows of each account, by id."""
        return await self._ledger.accounts([account.id for account in accounts])

    def _fresh_id(self, now: Registry) -> int:
        """An id that was never used, not even by a registry that was lost with all it knew: ids follow the clock."""
        return max(now.next_id, int(self._clock.now() * 1000))


def may_pay_again(old: Account, new: Account) -> bool:
    """Whether an account that was found unable to pay deserves a new look: another key, place, or a lower floor."""
    return (
        new.user_key != old.user_key
        or new.base_url != old.base_url
        or new.policy.floor_count < old.policy.floor_count
        or new.policy.floor_money < old.policy.floor_money
    )


def _found(table: Mapping[str, R], name: str, what: str) -> R:
    if name not in table:
        raise NotFound(f"There is no {what} {name}.")
    return table[name]


def _same(table: Mapping[str, Owner], looked_at: Owner, what: str) -> Owner:
    """The owner that was looked at, as it is now, and not another one that was given its name since."""
    found = _found(table, looked_at.name, what)
    if found.id != looked_at.id:
        raise Conflict(f"The {what} {looked_at.name} was deleted and made anew meanwhile. Look at it again.")
    return found


class NewSecret(Struct, frozen=True):
    """A secret that was just made, the only time its text is known. The one before signs until `until` (seconds)."""

    text: str
    until: float


class Owned(Struct, frozen=True):
    """A delivery, and what its tenant is or was called; None if nobody remembers."""

    delivery: Delivery
    tenant: str | None


class Webhooks:
    """Everything raises LedgerUnavailable while Redis is away."""

    def __init__(
        self, *, change: Change, registry: RegistryView, agenda: Agenda, secrets: Sealer, clock: Clock
    ) -> None:
        self._change = change
        self._registry = registry
        self._agenda = agenda
        self._secrets = secrets
        self._clock = clock

    async def rotate(self, name: str, grace: float) -> NewSecret:
        """Give a tenant a new secret, beside which the one it has signs for `grace` seconds more.

        Raises NotFound, or Conflict if it has none.
        """
        text, until = webhooks.new_secret(), self._clock.now() + grace
        sealed = self._secrets.seal(webhooks.parse_secret(text))

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenants.get(name)
            if tenant is None:
                raise NotFound(f"There is no tenant {name}.")
            if tenant.webhook.signing is None:
                raise Conflict(f"Tenant {name} has no webhook secret. It gets one with its webhook.")
            signing = Signing(sealed, tenant.webhook.signing.secret if grace else None, until)
            return _put(now, replace(tenant, webhook=replace(tenant.webhook, signing=signing))), None

        await self._change("webhook.rotated", change, tenant=name, grace=grace)
        return NewSecret(text, until)

    async def switch_off(self, tenant_id: int, url: str) -> None:
        """Send no more to an address of a tenant, until the tenant is put again. Raises Overloaded."""

        def change(now: Registry) -> tuple[RegistryChange, None]:
            tenant = now.tenant(tenant_id)
            if tenant is None:  # it was deleted meanwhile
                return RegistryChange(version=now.version, next_id=now.next_id), None
            return _put(now, replace(tenant, webhook=tenant.webhook.switched_off(url))), None

        await self._change(
            "webhook.switched-off",
            change,
            tenant=self._registry.current.tenant_name(tenant_id),
            address=tenants.without_query(url),
        )

    async def failed(self, most: int) -> Sequence[Owned]:
        """Up to `most` deliveries that were given up in the last 30 days, the newest first."""
        return [self._owned(each) for each in await self._agenda.failed(most)]

    async def redeliver(self, event: str) -> Owned:
        """Send an event again from the start, now. Raises NotFound if it is not known (any more)."""
        reservation = webhooks.reservation_of(event)
        delivery = await self._agenda.redeliver(reservation) if reservation else None
        if delivery is None:
            raise NotFound(f"There is no delivery {event}, or it was forgotten since.")
        owned = self._owned(delivery)
        _log.info("delivery.revived", delivery=event, tenant=owned.tenant)
        return owned

    def _owned(self, delivery: Delivery) -> Owned:
        return Owned(delivery, self._registry.current.tenant_name(delivery.tenant))


def _put(now: Registry, tenant: Tenant) -> RegistryChange:
    return RegistryChange(version=now.version, next_id=now.next_id, tenants=(tenant,))
