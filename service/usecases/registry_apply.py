"""Application of a whole registry document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from service.domain import tenants, webhooks
from service.domain.errors import Conflict, ErrorCollector, LedgerUnavailable, VersionConflict, field_path, suggest
from service.domain.tasks import Cipher
from service.domain.tenants import Account, Registry, SecretRef, Tenant, Token, Webhook, WebhookSecrets
from service.telemetry import logging
from service.usecases.admin import RegistryUpdater, affects_availability
from service.usecases.ports import Ledger, RegistryChange, RegistryView

_DAY_MS = 86_400_000


class DesiredAccount(Struct, frozen=True):
    """An account as it is to be; its id is 0 if that does not matter. Without a `key` it keeps the one it has."""

    account: Account
    user_key: bytes | None = None


class DesiredTenant(Struct, frozen=True):
    """A tenant as it is to be; its id is 0 if that does not matter, and so is the `created` of its tokens.

    Its webhooks are signed with `secret`; without one as they were, or with one that is made.
    """

    tenant: Tenant
    tokens: tuple[Token, ...] = ()
    secret: bytes | None = None
    secret_ref: SecretRef | None = None


class DesiredRegistry(Struct, frozen=True):
    """The registry as it is to be. What is not named in it stays, unless `prune` is said."""

    accounts: tuple[DesiredAccount, ...] = ()
    tenants: tuple[DesiredTenant, ...] = ()
    prune: bool = False


class RegistryPlan(Struct, frozen=True):
    """What is to be done: `change`, None if there is nothing to do, which makes `after` of `before`.

    `rekeyed` has the accounts that get another key, `resigned` the tenants whose webhooks get another secret, `made`
    the secrets that are made for tenants that have none, `fresh` the ids that are. `kept` says where there is what is
    not wanted, and stays.
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
    """Plans for one version of a registry, `now`, at a time `at` in seconds since the epoch."""

    def __init__(self, registry: Registry, now: float, *, user_key_cipher: Cipher, webhook_cipher: Cipher) -> None:
        self._registry = registry
        self._now = now
        self._user_key_cipher = user_key_cipher
        self._webhook_cipher = webhook_cipher
        self._errors = ErrorCollector()
        self._changed_keys: set[str] = set()
        self._changed_secrets: set[str] = set()
        self._generated_secrets: dict[str, str] = {}
        self._assigned_ids: set[int] = set()
        self._requested_ids: Counter[int] = Counter()
        self._next_id = max(registry.next_id, int(now * 1000))

    def plan(self, desired: DesiredRegistry) -> RegistryPlan:
        """The way to what is wanted. Raises InvalidOptions, with all that is wrong with it. Plans once."""
        now = self._registry
        said = [*(each.account.id for each in desired.accounts), *(each.tenant.id for each in desired.tenants)]
        self._requested_ids = Counter(said)
        self._next_id = max([self._next_id, *(each + 1 for each in said if self._is_plausible_id(each))])
        accounts = {each.account.name: self._plan_account(each) for each in desired.accounts}
        tenants = {each.tenant.name: self._plan_tenant(each) for each in desired.tenants}
        self._check_accounts(desired, {**({} if desired.prune else now.accounts), **accounts})
        tokens = self._plan_tokens(desired, tenants)
        others = RegistryChange(
            version=now.version,
            next_id=now.next_id,
            drop_accounts=tuple(each for name, each in now.accounts.items() if name not in accounts),
            drop_tenants=tuple(each for name, each in now.tenants.items() if name not in tenants),
            drop_tokens=self._unlisted_tokens(tenants, tokens),
        )
        unchanged = others if desired.prune else RegistryChange(version=now.version, next_id=now.next_id)
        change = replace(
            unchanged,
            next_id=max(
                [now.next_id, *(each.id + 1 for each in accounts.values()), *(each.id + 1 for each in tenants.values())]
            ),
            accounts=tuple(each for name, each in accounts.items() if each != now.accounts.get(name)),
            tenants=tuple(each for name, each in tenants.items() if each != now.tenants.get(name)),
            tokens=tuple(each for name, each in tokens.items() if each != now.tokens.get(name)),
        )
        after = _apply_change(now, change)
        self._check_digests(after)
        self._errors.raise_if_any()
        return RegistryPlan(
            before=now,
            after=after,
            change=None if change == RegistryChange(version=now.version, next_id=now.next_id) else change,
            changed_keys=frozenset(self._changed_keys),
            changed_secrets=frozenset(self._changed_secrets),
            generated_secrets=self._generated_secrets,
            assigned_ids=frozenset(self._assigned_ids),
            unmanaged=() if desired.prune else _list_paths(now, others),
        )

    def _plan_account(self, wanted: DesiredAccount) -> Account:
        name, path = wanted.account.name, field_path("accounts", wanted.account.name)
        known = self._registry.accounts.get(name)
        made = replace(wanted.account, id=self._resolve_id(path, wanted.account, known))
        if known and wanted.user_key in {None, self._user_key_cipher.decrypt(known.user_key)}:
            return replace(made, user_key=known.user_key)
        if wanted.user_key is None:
            self._errors.add(f"{path}.user_key", "is required for a new account, which has none to keep")
            return made
        self._changed_keys.add(name)
        return replace(made, user_key=self._user_key_cipher.encrypt(wanted.user_key))

    def _plan_tenant(self, wanted: DesiredTenant) -> Tenant:
        tenant, path = wanted.tenant, field_path("tenants", wanted.tenant.name)
        known = self._registry.tenants.get(tenant.name)
        before = known.webhook if known else Webhook()
        signed = replace(tenant.webhook, secrets=self._plan_secrets(path, wanted, before.secrets))
        if signed == replace(before, disabled_urls=()):
            # What has said that it is gone stays switched off, until its tenant's webhook is another one.
            signed = before
        return replace(tenant, id=self._resolve_id(path, tenant, known), webhook=signed)

    def _plan_secrets(self, path: str, wanted: DesiredTenant, before: WebhookSecrets | None) -> WebhookSecrets | None:
        name = wanted.tenant.name
        if wanted.tenant.webhook.url is None:
            return before  # for the day when it has an address again
        if wanted.secret is not None:
            if before and wanted.secret == self._webhook_cipher.decrypt(before.current):
                return replace(before, secret_ref=wanted.secret_ref)
            self._changed_secrets.add(name)
            return WebhookSecrets(self._webhook_cipher.encrypt(wanted.secret), secret_ref=wanted.secret_ref)
        if before:
            return replace(before, secret_ref=wanted.secret_ref)
        if wanted.secret_ref:
            self._errors.add(f"{path}.webhook.secret", "is required for a new webhook, which has none to keep")
        self._generated_secrets[name] = webhooks.generate_secret()
        return WebhookSecrets(self._webhook_cipher.encrypt(webhooks.parse_secret(self._generated_secrets[name])))

    def _plan_tokens(self, wanted: DesiredRegistry, tenants: Mapping[str, Tenant]) -> dict[str, Token]:
        """The tokens that are wanted, by id, without those that have ended and are not there."""
        tokens: dict[str, Token] = {}
        for each in wanted.tenants:
            owner = tenants[each.tenant.name]
            for token in each.tokens:
                held = self._registry.tokens.get(token.id)
                if token.id in tokens or (held and held.tenant != owner.id):
                    path = field_path("tenants", owner.name, "tokens", token.id)
                    self._errors.add(path, "has the id of another tenant's token")
                created = token.created_at or (held.created_at if held else self._now)
                made = replace(token, tenant=owner.id, created_at=created)
                if held and (
                    _round_times(held) == _round_times(made)
                    or not (self._is_valid_token(held) or self._is_valid_token(made))
                ):
                    tokens[token.id] = held
                elif held or self._is_valid_token(made):
                    tokens[token.id] = made
        return tokens

    def _unlisted_tokens(self, tenants: Mapping[str, Tenant], tokens: Mapping[str, Token]) -> tuple[Token, ...]:
        """The tokens that are not wanted: all of a tenant that is not, else those that have not ended by themselves."""
        kept = {each.id for each in tenants.values()}
        return tuple(
            each
            for each in self._registry.tokens.values()
            if each.tenant not in kept or (each.id not in tokens and self._is_valid_token(each))
        )

    def _resolve_id(self, path: str, wanted: Account | Tenant, known: Account | Tenant | None) -> int:
        """The id of what is known; else the one that is wanted, if nothing else ever had it; else a fresh one."""
        if known:
            if wanted.id not in {0, known.id}:
                wanting = (
                    f"must be {known.id}: what has this name was made anew. Leave the id out, or delete that first"
                )
                self._errors.add(f"{path}.id", wanting)
            return known.id
        if not wanted.id:
            self._assigned_ids.add(self._next_id)
            self._next_id += 1
            return self._next_id - 1
        if fault := self._id_error(wanted):
            self._errors.add(f"{path}.id", fault)
        return wanted.id

    def _id_error(self, wanted: Account | Tenant) -> str | None:
        """Why an id can't be given to what is missing."""
        now = self._registry
        if not self._is_plausible_id(wanted.id):
            return "is no id that was ever given: leave it out"
        if self._requested_ids[wanted.id] > 1:
            return "is given more than once"
        if holder := now.tenant_by_id(wanted.id) or now.account_by_id(wanted.id):
            return f"is the id of {holder.name}. A name can't be changed: leave the id out for another one"
        former = now.deleted_tenant_names.get(wanted.id)
        if former is not None and (isinstance(wanted, Account) or former != wanted.name):
            return f"was the id of the tenant {former}, and is not given to another: leave it out"
        return None

    def _is_plausible_id(self, number: int) -> bool:
        """Whether an id can have been given by now, by whichever clock."""
        return number < max(self._registry.next_id, int(self._now * 1000) + _DAY_MS)

    def _is_valid_token(self, token: Token) -> bool:
        return token.is_valid_at(self._now)

    def _check_accounts(self, wanted: DesiredRegistry, accounts: Mapping[str, Account]) -> None:
        for each in wanted.tenants:
            for place, name in enumerate(each.tenant.accounts):
                if name not in accounts:
                    path = field_path("tenants", each.tenant.name, "accounts")
                    self._errors.add(f"{path}[{place}]", f"there is no account {name}{suggest(name, accounts)}")

    def _check_digests(self, after: Registry) -> None:
        often = Counter(each.digest for each in after.tokens.values())
        for each in after.tokens.values():
            if often[each.digest] > 1:
                path = field_path("tenants", after.tenant_name(each.tenant) or "", "tokens", each.id, "sha256")
                self._errors.add(path, "is the hash of another token too")


def _apply_change(now: Registry, change: RegistryChange) -> Registry:
    """The registry that comes of a change."""
    gone = {each.id: each.name for each in change.drop_tenants}
    dropped = {each.id for each in change.drop_accounts}
    dropped_tokens = {each.id for each in change.drop_tokens}
    tenants = [*now.tenants.values(), *change.tenants]
    accounts = [*now.accounts.values(), *change.accounts]
    tokens = [*now.tokens.values(), *change.tokens]
    return Registry(
        now.version + 1,
        change.next_id,
        {each.name: each for each in tenants if each.id not in gone},
        {each.name: each for each in accounts if each.id not in dropped},
        {each.id: each for each in tokens if each.id not in dropped_tokens},
        {**now.deleted_tenant_names, **gone},
    )


def _round_times(token: Token) -> Token:
    """A token with its times as precise as they can be written."""
    return replace(
        token, created_at=round(token.created_at, 6), expires_at=token.expires_at and round(token.expires_at, 6)
    )


def _list_paths(now: Registry, others: RegistryChange) -> tuple[str, ...]:
    """Where what is not wanted stands; what a tenant has goes without saying."""
    gone = {each.id for each in others.drop_tenants}
    tokens = [each for each in others.drop_tokens if each.tenant not in gone]
    return (
        *(field_path("accounts", each.name) for each in others.drop_accounts),
        *(field_path("tenants", each.name) for each in others.drop_tenants),
        *(field_path("tenants", now.tenant_name(each.tenant) or "", "tokens", each.id) for each in tokens),
    )


_log = structlog.get_logger(__name__)


class RegistryApply:
    """Everything raises LedgerUnavailable while Redis is away."""

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

    async def load_current(self) -> Registry:
        """The newest version."""
        await self._registry.refresh()
        return self._registry.current

    async def apply(
        self, desired: DesiredRegistry, *, force: bool, dry_run: bool, version_matches: Callable[[int], bool]
    ) -> RegistryPlan:
        """Make the registry what is wanted, all of it or nothing; a dry run only says what that would be.

        Unless forced, nothing is removed that has tasks running, and never all there is. `fits` says whether a version
        is the one that was thought of. Raises InvalidOptions with all faults, Conflict, Outdated or Overloaded.
        """
        now = await self.load_current()
        if not version_matches(now.version):
            raise VersionConflict(
                "The registry was changed since you read it. Read it again, and see what is different now."
            )
        planner = RegistryPlanner(
            now, self.now(), user_key_cipher=self._user_key_cipher, webhook_cipher=self._webhook_cipher
        )
        plan = planner.plan(desired)
        if plan.change is None:
            return plan
        if not force:
            await self._require_idle(plan.change)
            _require_remaining(plan.after)
        if not dry_run:
            await self._write_plan(plan, plan.change, force=force)
        return plan

    async def _require_idle(self, change: RegistryChange) -> None:
        """Raise Conflict if something is to be removed under tasks that run."""
        states = await self._ledger.account_states([each.id for each in change.drop_accounts])
        busy = [
            f"{states[each.id].open_submissions} submissions of {field_path('accounts', each.name)} have not ended"
            for each in change.drop_accounts
            if states[each.id].open_submissions
        ]
        for tenant in change.drop_tenants:
            active = (await self._ledger.tenant_snapshot(tenant.id)).state.active_tasks
            if active:
                busy.append(f"{active} tasks of {field_path('tenants', tenant.name)} are active")
        if busy:
            raise Conflict(f"{'; '.join(busy)}. Wait for them, or force it.")

    async def _write_plan(self, plan: RegistryPlan, change: RegistryChange, *, force: bool) -> None:
        def make(now: Registry) -> tuple[RegistryChange, None]:
            if now.version != plan.before.version:
                raise VersionConflict(
                    "The registry was changed meanwhile. Read it again, and see what is different now."
                )
            return change, None

        removed = {
            "removed_accounts": [each.name for each in change.drop_accounts],
            "removed_tenants": [each.name for each in change.drop_tenants],
            "removed": [each.id for each in change.drop_tokens],
        }
        await self._updater.update_registry("registry.applied", make, force=force, **removed)
        self._log_changes(plan, change)
        for account in change.accounts:
            known = plan.before.accounts.get(account.name)
            if known and affects_availability(known, account):
                with suppress(LedgerUnavailable):  # what was made has to be shown; it is looked at by itself, later
                    await self._ledger.reopen_account(account.id)

    @staticmethod
    def _log_changes(plan: RegistryPlan, change: RegistryChange) -> None:
        """Log what is different now, as each change alone would have been."""
        for account in change.accounts:
            policy = logging.log_account_policy(account.policy)
            given = account.name in plan.changed_keys
            _log.info(
                "account.updated", account=account.name, base_url=account.base_url, policy=policy, key_given=given
            )
        for tenant in change.tenants:
            about = msgspec.to_builtins(tenant)
            del about["id"], about["name"]
            about["policy"] = logging.log_tenant_policy(tenant.policy)
            url = tenant.webhook.url and tenants.strip_query(tenant.webhook.url)
            given = tenant.name in plan.changed_secrets
            about["webhook"] = {"url": url, "allow": tenant.webhook.allow, "key_given": given}
            _log.info("tenant.updated", tenant=tenant.name, **about)
        for token in change.tokens:
            owner = plan.after.tenant_name(token.tenant)
            _log.info("token.updated", tenant=owner, id=token.id, label=token.label, expires_at=token.expires_at)


def _require_remaining(after: Registry) -> None:
    """Raise Conflict if nothing would be left: that is what comes of the file of an export that failed."""
    if not after.accounts and not after.tenants:
        raise Conflict(
            "Nothing would be left: there is no account and no tenant in what was sent. Look why, or force it."
        )
