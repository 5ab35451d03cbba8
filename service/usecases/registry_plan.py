"""Plan of the change from one version of the registry to a desired one.

It is decided purely. Ids are never reused: a document may assign ids to what is missing, which restores a lost registry
with the tasks and the usage of each tenant, but no id that may have belonged to another. Ids follow the clock, so a new
one is greater than all before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

from msgspec import Struct
from msgspec.structs import replace

from service.crypto import AesSivCipher, UserKeyCipher
from service.domain import webhooks
from service.domain.errors import ErrorCollector, FieldError, InvalidOptions, field_path, suggest
from service.domain.tenants import Account, Registry, SecretRef, Tenant, Token, Webhook, WebhookSecrets
from service.usecases.caches import no_change
from service.usecases.ports import RegistryChange

_DAY_MS = 86_400_000


class DesiredAccount(Struct, frozen=True):
    """A desired account; its id is 0 for any. Without a key it keeps its own."""

    account: Account
    user_key: bytes | None = None


class DesiredTenant(Struct, frozen=True):
    """A desired tenant; 0 stands for any id, and for any `created_at` of a token.

    Without `secret` its webhook keeps its own, or gets a generated one.
    """

    tenant: Tenant
    tokens: tuple[Token, ...] = ()
    secret: bytes | None = None
    secret_ref: SecretRef | None = None


class DesiredRegistry(Struct, frozen=True):
    """A desired registry. What it does not name stays, unless `prune`."""

    accounts: tuple[DesiredAccount, ...] = ()
    tenants: tuple[DesiredTenant, ...] = ()
    prune: bool = False


class RegistryPlan(Struct, frozen=True):
    """A plan: `change` (None if there is nothing to do) turns `before` into `after`.

    `unmanaged` lists the paths of what the document does not name and `prune` would remove.
    """

    before: Registry
    after: Registry
    change: RegistryChange | None
    changed_keys: frozenset[str]
    changed_secrets: frozenset[str]
    generated_secrets: Mapping[str, str]
    assigned_ids: frozenset[int]
    unmanaged: tuple[str, ...]


class RegistryPlanner:
    """Plans once, for one version of the registry at the time `now` (seconds since the epoch)."""

    def __init__(
        self,
        registry: Registry,
        now: float,
        *,
        user_key_cipher: UserKeyCipher,
        webhook_cipher: AesSivCipher,
        base_url_error: Callable[[str], str | None],
    ) -> None:
        self._registry = registry
        self._now = now
        self._user_key_cipher = user_key_cipher
        self._webhook_cipher = webhook_cipher
        self._base_url_error = base_url_error
        self._errors = ErrorCollector()
        self._changed_keys: set[str] = set()
        self._changed_secrets: set[str] = set()
        self._generated_secrets: dict[str, str] = {}
        self._assigned_ids: set[int] = set()
        self._requested_ids: Counter[int] = Counter()
        self._next_id = max(registry.next_id, int(now * 1000))

    def plan(self, desired: DesiredRegistry) -> RegistryPlan:
        """Return the plan. Raises InvalidOptions with all errors of the document."""
        before = self._registry
        requested = [account.account.id for account in desired.accounts]
        requested += [tenant.tenant.id for tenant in desired.tenants]
        self._requested_ids = Counter(requested)
        self._next_id = max([self._next_id, *(number + 1 for number in requested if self._is_plausible_id(number))])
        accounts = {account.account.name: self._plan_account(account) for account in desired.accounts}
        tenants = {tenant.tenant.name: self._plan_tenant(tenant) for tenant in desired.tenants}
        self._check_accounts(desired, {**({} if desired.prune else before.accounts), **accounts})
        tokens = self._plan_tokens(desired, tenants)
        unlisted = replace(
            no_change(before),
            drop_accounts=tuple(account for name, account in before.accounts.items() if name not in accounts),
            drop_tenants=tuple(tenant for name, tenant in before.tenants.items() if name not in tenants),
            drop_tokens=self._unlisted_tokens(tenants, tokens),
        )
        base = unlisted if desired.prune else no_change(before)
        ids = [*(account.id for account in accounts.values()), *(tenant.id for tenant in tenants.values())]
        change = replace(
            base,
            next_id=max([before.next_id - 1, *ids]) + 1,
            accounts=tuple(account for name, account in accounts.items() if account != before.accounts.get(name)),
            tenants=tuple(tenant for name, tenant in tenants.items() if tenant != before.tenants.get(name)),
            tokens=tuple(token for name, token in tokens.items() if token != before.tokens.get(name)),
        )
        after = _apply_change(before, change)
        self._check_digests(after)
        self._errors.raise_if_any()
        return RegistryPlan(
            before=before,
            after=after,
            change=None if change == no_change(before) else change,
            changed_keys=frozenset(self._changed_keys),
            changed_secrets=frozenset(self._changed_secrets),
            generated_secrets=self._generated_secrets,
            assigned_ids=frozenset(self._assigned_ids),
            unmanaged=() if desired.prune else _list_paths(before, unlisted),
        )

    def _plan_account(self, desired: DesiredAccount) -> Account:
        name, path = desired.account.name, field_path("accounts", desired.account.name)
        before = self._registry.accounts.get(name)
        account = replace(desired.account, id=self._resolve_id(path, desired.account, before))
        if error := find_base_url_error(before, account, self._base_url_error):
            self._errors.add(f"{path}.base_url", error)
        cipher, key = self._user_key_cipher, desired.user_key
        account = self._errors.collect(path, account, encrypt_user_key, cipher, account, key, before)
        if key is not None and not (before and before.user_key == account.user_key):
            self._changed_keys.add(name)
        return account

    def _plan_tenant(self, desired: DesiredTenant) -> Tenant:
        tenant, path = desired.tenant, field_path("tenants", desired.tenant.name)
        existing = self._registry.tenants.get(tenant.name)
        before = existing.webhook if existing else Webhook()
        webhook = replace(tenant.webhook, secrets=self._plan_secrets(path, desired, before.secrets))
        if webhook == replace(before, disabled_urls=()):
            # Disabled URLs stay disabled until the webhook changes.
            webhook = before
        return replace(tenant, id=self._resolve_id(path, tenant, existing), webhook=webhook)

    def _plan_secrets(self, path: str, desired: DesiredTenant, before: WebhookSecrets | None) -> WebhookSecrets | None:
        name = desired.tenant.name
        if desired.tenant.webhook.url is None:
            return before  # kept for a later URL
        if desired.secret is not None:
            if before and desired.secret == self._webhook_cipher.decrypt(before.current):
                return replace(before, secret_ref=desired.secret_ref)
            self._changed_secrets.add(name)
            return WebhookSecrets(self._webhook_cipher.encrypt(desired.secret), secret_ref=desired.secret_ref)
        if before:
            return replace(before, secret_ref=desired.secret_ref)
        if desired.secret_ref:
            self._errors.add(f"{path}.webhook.secret", "is required for a new webhook, which has none to keep")
        self._generated_secrets[name] = webhooks.generate_secret()
        return WebhookSecrets(self._webhook_cipher.encrypt(webhooks.parse_secret(self._generated_secrets[name])))

    def _plan_tokens(self, desired: DesiredRegistry, tenants: Mapping[str, Tenant]) -> dict[str, Token]:
        """Return the desired tokens by id, without those that have expired and do not exist."""
        tokens: dict[str, Token] = {}
        for listed in desired.tenants:
            owner = tenants[listed.tenant.name]
            for token in listed.tokens:
                existing = self._registry.tokens.get(token.id)
                if token.id in tokens or (existing and existing.tenant != owner.id):
                    path = field_path("tenants", owner.name, "tokens", token.id)
                    self._errors.add(path, "has the id of another tenant's token")
                created_at = token.created_at or (existing.created_at if existing else self._now)
                planned = replace(token, tenant=owner.id, created_at=created_at)
                if existing and (
                    _round_times(existing) == _round_times(planned)
                    or not (existing.is_valid_at(self._now) or planned.is_valid_at(self._now))
                ):
                    tokens[token.id] = existing
                elif existing or planned.is_valid_at(self._now):
                    tokens[token.id] = planned
        return tokens

    def _unlisted_tokens(self, tenants: Mapping[str, Tenant], tokens: Mapping[str, Token]) -> tuple[Token, ...]:
        """Return all tokens of unlisted tenants, and unlisted ones that have not expired."""
        kept_tenants = {tenant.id for tenant in tenants.values()}
        return tuple(
            token
            for token in self._registry.tokens.values()
            if token.tenant not in kept_tenants or (token.id not in tokens and token.is_valid_at(self._now))
        )

    def _resolve_id(self, path: str, desired: Account | Tenant, existing: Account | Tenant | None) -> int:
        """Return the existing id, else the desired one if nothing else had it, else a new one."""
        if existing:
            if desired.id not in {0, existing.id}:
                detail = f"must be {existing.id}: the one of this name is newer. Leave the id out, or delete it first"
                self._errors.add(f"{path}.id", detail)
            return existing.id
        if not desired.id:
            self._assigned_ids.add(self._next_id)
            self._next_id += 1
            return self._next_id - 1
        if error := self._id_error(desired):
            self._errors.add(f"{path}.id", error)
        return desired.id

    def _id_error(self, desired: Account | Tenant) -> str | None:
        """Return why an id can't be assigned, None if it can."""
        registry = self._registry
        if not self._is_plausible_id(desired.id):
            return "is no id that was ever given: leave it out"
        if self._requested_ids[desired.id] > 1:
            return "is given more than once"
        if holder := registry.tenant_by_id(desired.id) or registry.account_by_id(desired.id):
            return f"is the id of {holder.name}. A name can't be changed: leave the id out for another one"
        deleted_name = registry.deleted_tenant_names.get(desired.id)
        if deleted_name is not None and (isinstance(desired, Account) or deleted_name != desired.name):
            return f"was the id of the tenant {deleted_name}, and is not given to another: leave it out"
        return None

    def _is_plausible_id(self, number: int) -> bool:
        """Whether an id may have been assigned by now, allowing a day between clocks."""
        return number < max(self._registry.next_id, int(self._now * 1000) + _DAY_MS)

    def _check_accounts(self, desired: DesiredRegistry, accounts: Mapping[str, Account]) -> None:
        for listed in desired.tenants:
            for index, name in enumerate(listed.tenant.accounts):
                if name not in accounts:
                    path = field_path("tenants", listed.tenant.name, "accounts")
                    self._errors.add(f"{path}[{index}]", f"there is no account {name}{suggest(name, accounts)}")

    def _check_digests(self, after: Registry) -> None:
        counts = Counter(token.digest for token in after.tokens.values())
        for token in after.tokens.values():
            if counts[token.digest] > 1:
                path = field_path("tenants", after.tenant_name(token.tenant) or "", "tokens", token.id, "sha256")
                self._errors.add(path, "is the hash of another token too")


def encrypt_user_key(
    cipher: UserKeyCipher, account: Account, user_key: bytes | None, before: Account | None
) -> Account:
    """Return an account with the key that is given, else with the one that it had `before`.

    Raises InvalidOptions if it had none, or if its key is not for the new origin: a change of the base URL sends no key
    to an address for which it was not given.
    """
    kept = before and replace(account, user_key=before.user_key)
    if user_key is not None and not (kept and cipher.decrypt(kept) == user_key):
        return replace(account, user_key=cipher.encrypt(user_key, account))
    if before is None or kept is None:
        raise InvalidOptions([FieldError("user_key", "is required for a new account, which has none to keep")])
    if user_key is None and cipher.origin(kept) != cipher.origin(before) and cipher.decrypt(kept) is None:
        detail = "is required again, since scheme, host or port of the base URL change"
        raise InvalidOptions([FieldError("user_key", detail)])
    return kept


def _apply_change(registry: Registry, change: RegistryChange) -> Registry:
    dropped_names = {tenant.id: tenant.name for tenant in change.drop_tenants}
    dropped_accounts = {account.id for account in change.drop_accounts}
    dropped_tokens = {token.id for token in change.drop_tokens}
    tenants = [*registry.tenants.values(), *change.tenants]
    accounts = [*registry.accounts.values(), *change.accounts]
    tokens = [*registry.tokens.values(), *change.tokens]
    return Registry(
        registry.version + 1,
        change.next_id,
        {tenant.name: tenant for tenant in tenants if tenant.id not in dropped_names},
        {account.name: account for account in accounts if account.id not in dropped_accounts},
        {token.id: token for token in tokens if token.id not in dropped_tokens},
        {**registry.deleted_tenant_names, **dropped_names},
    )


def _round_times(token: Token) -> Token:
    """Round times to the precision of a document."""
    return replace(
        token, created_at=round(token.created_at, 6), expires_at=token.expires_at and round(token.expires_at, 6)
    )


def _list_paths(registry: Registry, unlisted: RegistryChange) -> tuple[str, ...]:
    dropped_tenants = {tenant.id for tenant in unlisted.drop_tenants}
    tokens = [token for token in unlisted.drop_tokens if token.tenant not in dropped_tenants]
    return (
        *(field_path("accounts", account.name) for account in unlisted.drop_accounts),
        *(field_path("tenants", tenant.name) for tenant in unlisted.drop_tenants),
        *(field_path("tenants", registry.tenant_name(token.tenant) or "", "tokens", token.id) for token in tokens),
    )


def find_base_url_error(
    before: Account | None, account: Account, base_url_error: Callable[[str], str | None]
) -> str | None:
    """Return why a new base URL is not permitted, None if it is, or if it is the one from before."""
    is_kept = before is not None and before.base_url == account.base_url
    return None if account.base_url is None or is_kept else base_url_error(account.base_url)


def affects_availability(old: Account, new: Account) -> bool:
    """Whether a change may let an account pay again: another key or URL, or a lower floor."""
    return (
        new.user_key != old.user_key
        or new.base_url != old.base_url
        or new.policy.floor_count < old.policy.floor_count
        or new.policy.floor_money_fen < old.policy.floor_money_fen
    )
