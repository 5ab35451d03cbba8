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
from service.domain.errors import Conflict, Faults, LedgerUnavailable, Outdated, dotted, meant
from service.domain.tasks import Sealer
from service.domain.tenants import Account, Origin, Registry, Signing, Tenant, Token, Webhook
from service.telemetry import logging
from service.usecases.admin import Change, may_pay_again
from service.usecases.ports import Clock, Ledger, RegistryChange, RegistryView

_DAY_MS = 86_400_000


class WantedAccount(Struct, frozen=True):
    """An account as it is to be; its id is 0 if that does not matter. Without a `key` it keeps the one it has."""

    account: Account
    key: bytes | None = None


class WantedTenant(Struct, frozen=True):
    """A tenant as it is to be; its id is 0 if that does not matter, and so is the `created` of its tokens.

    Its webhooks are signed with `secret`; without one as they were, or with one that is made.
    """

    tenant: Tenant
    tokens: tuple[Token, ...] = ()
    secret: bytes | None = None
    origin: Origin | None = None


class Wanted(Struct, frozen=True):
    """The registry as it is to be. What is not named in it stays, unless `prune` is said."""

    accounts: tuple[WantedAccount, ...] = ()
    tenants: tuple[WantedTenant, ...] = ()
    prune: bool = False


class Plan(Struct, frozen=True):
    """What is to be done: `change`, None if there is nothing to do, which makes `after` of `before`.

    `rekeyed` has the accounts that get another key, `resigned` the tenants whose webhooks get another secret, `made`
    the secrets that are made for tenants that have none, `fresh` the ids that are. `kept` says where there is what is
    not wanted, and stays.
    """

    before: Registry
    after: Registry
    change: RegistryChange | None
    rekeyed: frozenset[str]
    resigned: frozenset[str]
    made: Mapping[str, str]
    fresh: frozenset[int]
    kept: tuple[str, ...]


class Planner:
    """Plans for one version of a registry, `now`, at a time `at` in seconds since the epoch."""

    def __init__(self, now: Registry, at: float, *, user_keys: Sealer, webhook_secrets: Sealer) -> None:
        self._now = now
        self._at = at
        self._user_keys = user_keys
        self._webhook_secrets = webhook_secrets
        self._faults = Faults()
        self._rekeyed: set[str] = set()
        self._resigned: set[str] = set()
        self._made: dict[str, str] = {}
        self._given: set[int] = set()
        self._said: Counter[int] = Counter()
        self._fresh = max(now.next_id, int(at * 1000))

    def plan(self, wanted: Wanted) -> Plan:
        """The way to what is wanted. Raises InvalidOptions, with all that is wrong with it. Plans once."""
        now = self._now
        said = [*(each.account.id for each in wanted.accounts), *(each.tenant.id for each in wanted.tenants)]
        self._said = Counter(said)
        self._fresh = max([self._fresh, *(each + 1 for each in said if self._credible(each))])
        accounts = {each.account.name: self._account(each) for each in wanted.accounts}
        tenants = {each.tenant.name: self._tenant(each) for each in wanted.tenants}
        self._check_accounts(wanted, {**({} if wanted.prune else now.accounts), **accounts})
        tokens = self._tokens(wanted, tenants)
        others = RegistryChange(
            version=now.version,
            next_id=now.next_id,
            drop_accounts=tuple(each for name, each in now.accounts.items() if name not in accounts),
            drop_tenants=tuple(each for name, each in now.tenants.items() if name not in tenants),
            drop_tokens=self._unwanted(tenants, tokens),
        )
        unchanged = others if wanted.prune else RegistryChange(version=now.version, next_id=now.next_id)
        change = replace(
            unchanged,
            next_id=max(
                [now.next_id, *(each.id + 1 for each in accounts.values()), *(each.id + 1 for each in tenants.values())]
            ),
            accounts=tuple(each for name, each in accounts.items() if each != now.accounts.get(name)),
            tenants=tuple(each for name, each in tenants.items() if each != now.tenants.get(name)),
            tokens=tuple(each for name, each in tokens.items() if each != now.tokens.get(name)),
        )
        after = _after(now, change)
        self._check_digests(after)
        self._faults.check()
        return Plan(
            before=now,
            after=after,
            change=None if change == RegistryChange(version=now.version, next_id=now.next_id) else change,
            rekeyed=frozenset(self._rekeyed),
            resigned=frozenset(self._resigned),
            made=self._made,
            fresh=frozenset(self._given),
            kept=() if wanted.prune else _paths(now, others),
        )

    def _account(self, wanted: WantedAccount) -> Account:
        name, path = wanted.account.name, dotted("accounts", wanted.account.name)
        known = self._now.accounts.get(name)
        made = replace(wanted.account, id=self._id(path, wanted.account, known))
        if known and wanted.key in {None, self._user_keys.open(known.user_key)}:
            return replace(made, user_key=known.user_key)
        if wanted.key is None:
            self._faults.add(f"{path}.user_key", "is required for a new account, which has none to keep")
            return made
        self._rekeyed.add(name)
        return replace(made, user_key=self._user_keys.seal(wanted.key))

    def _tenant(self, wanted: WantedTenant) -> Tenant:
        tenant, path = wanted.tenant, dotted("tenants", wanted.tenant.name)
        known = self._now.tenants.get(tenant.name)
        before = known.webhook if known else Webhook()
        signed = replace(tenant.webhook, signing=self._signing(path, wanted, before.signing))
        if signed == replace(before, off=()):
            # What has said that it is gone stays switched off, until its tenant's webhook is another one.
            signed = before
        return replace(tenant, id=self._id(path, tenant, known), webhook=signed)

    def _signing(self, path: str, wanted: WantedTenant, before: Signing | None) -> Signing | None:
        name = wanted.tenant.name
        if wanted.tenant.webhook.url is None:
            return before  # for the day when it has an address again
        if wanted.secret is not None:
            if before and wanted.secret == self._webhook_secrets.open(before.secret):
                return replace(before, origin=wanted.origin)
            self._resigned.add(name)
            return Signing(self._webhook_secrets.seal(wanted.secret), origin=wanted.origin)
        if before:
            return replace(before, origin=wanted.origin)
        if wanted.origin:
            self._faults.add(f"{path}.webhook.secret", "is required for a new webhook, which has none to keep")
        self._made[name] = webhooks.new_secret()
        return Signing(self._webhook_secrets.seal(webhooks.parse_secret(self._made[name])))

    def _tokens(self, wanted: Wanted, tenants: Mapping[str, Tenant]) -> dict[str, Token]:
        """The tokens that are wanted, by id, without those that have ended and are not there."""
        tokens: dict[str, Token] = {}
        for each in wanted.tenants:
            owner = tenants[each.tenant.name]
            for token in each.tokens:
                held = self._now.tokens.get(token.id)
                if token.id in tokens or (held and held.tenant != owner.id):
                    path = dotted("tenants", owner.name, "tokens", token.id)
                    self._faults.add(path, "has the id of another tenant's token")
                created = token.created or (held.created if held else self._at)
                made = replace(token, tenant=owner.id, created=created)
                if held and (_rounded(held) == _rounded(made) or not (self._valid(held) or self._valid(made))):
                    tokens[token.id] = held
                elif held or self._valid(made):
                    tokens[token.id] = made
        return tokens

    def _unwanted(self, tenants: Mapping[str, Tenant], tokens: Mapping[str, Token]) -> tuple[Token, ...]:
        """The tokens that are not wanted: all of a tenant that is not, else those that have not ended by themselves."""
        kept = {each.id for each in tenants.values()}
        return tuple(
            each
            for each in self._now.tokens.values()
            if each.tenant not in kept or (each.id not in tokens and self._valid(each))
        )

    def _id(self, path: str, wanted: Account | Tenant, known: Account | Tenant | None) -> int:
        """The id of what is known; else the one that is wanted, if nothing else ever had it; else a fresh one."""
        if known:
            if wanted.id not in {0, known.id}:
                wanting = (
                    f"must be {known.id}: what has this name was made anew. Leave the id out, or delete that first"
                )
                self._faults.add(f"{path}.id", wanting)
            return known.id
        if not wanted.id:
            self._given.add(self._fresh)
            self._fresh += 1
            return self._fresh - 1
        if fault := self._taken(wanted):
            self._faults.add(f"{path}.id", fault)
        return wanted.id

    def _taken(self, wanted: Account | Tenant) -> str | None:
        """Why an id can't be given to what is missing."""
        now = self._now
        if not self._credible(wanted.id):
            return "is no id that was ever given: leave it out"
        if self._said[wanted.id] > 1:
            return "is given more than once"
        if holder := now.tenant(wanted.id) or now.account(wanted.id):
            return f"is the id of {holder.name}. A name can't be changed: leave the id out for another one"
        former = now.former.get(wanted.id)
        if former is not None and (isinstance(wanted, Account) or former != wanted.name):
            return f"was the id of the tenant {former}, and is not given to another: leave it out"
        return None

    def _credible(self, number: int) -> bool:
        """Whether an id can have been given by now, by whichever clock."""
        return number < max(self._now.next_id, int(self._at * 1000) + _DAY_MS)

    def _valid(self, token: Token) -> bool:
        return token.valid_at(self._at)

    def _check_accounts(self, wanted: Wanted, accounts: Mapping[str, Account]) -> None:
        for each in wanted.tenants:
            for place, name in enumerate(each.tenant.accounts):
                if name not in accounts:
                    path = dotted("tenants", each.tenant.name, "accounts")
                    self._faults.add(f"{path}[{place}]", f"there is no account {name}{meant(name, accounts)}")

    def _check_digests(self, after: Registry) -> None:
        often = Counter(each.digest for each in after.tokens.values())
        for each in after.tokens.values():
            if often[each.digest] > 1:
                path = dotted("tenants", after.tenant_name(each.tenant) or "", "tokens", each.id, "sha256")
                self._faults.add(path, "is the hash of another token too")


def _after(now: Registry, change: RegistryChange) -> Registry:
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
        {**now.former, **gone},
    )


def _rounded(token: Token) -> Token:
    """A token with its times as precise as they can be written."""
    return replace(token, created=round(token.created, 6), expires=token.expires and round(token.expires, 6))


def _paths(now: Registry, others: RegistryChange) -> tuple[str, ...]:
    """Where what is not wanted stands; what a tenant has goes without saying."""
    gone = {each.id for each in others.drop_tenants}
    tokens = [each for each in others.drop_tokens if each.tenant not in gone]
    return (
        *(dotted("accounts", each.name) for each in others.drop_accounts),
        *(dotted("tenants", each.name) for each in others.drop_tenants),
        *(dotted("tenants", now.tenant_name(each.tenant) or "", "tokens", each.id) for each in tokens),
    )


_log = structlog.get_logger(__name__)


class Apply:
    """Everything raises LedgerUnavailable while Redis is away."""

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

    def now(self) -> float:
        """The time, in seconds since the epoch."""
        return self._clock.now()

    async def current(self) -> Registry:
        """The newest version."""
        await self._registry.refresh()
        return self._registry.current

    async def __call__(self, wanted: Wanted, *, force: bool, dry_run: bool, fits: Callable[[int], bool]) -> Plan:
        """Make the registry what is wanted, all of it or nothing; a dry run only says what that would be.

        Unless forced, nothing is removed that has tasks running, and never all there is. `fits` says whether a version
        is the one that was thought of. Raises InvalidOptions with all faults, Conflict, Outdated or Overloaded.
        """
        now = await self.current()
        if not fits(now.version):
            raise Outdated("The registry was changed since you read it. Read it again, and see what is different now.")
        planner = Planner(now, self._clock.now(), user_keys=self._user_keys, webhook_secrets=self._webhook_secrets)
        plan = planner.plan(wanted)
        if plan.change is None:
            return plan
        if not force:
            await self._check_idle(plan.change)
            _check_left(plan.after)
        if not dry_run:
            await self._carry_out(plan, plan.change, force=force)
        return plan

    async def _check_idle(self, change: RegistryChange) -> None:
        """Raise Conflict if something is to be removed under tasks that run."""
        states = await self._ledger.accounts([each.id for each in change.drop_accounts])
        busy = [
            f"{states[each.id].open} submissions of {dotted('accounts', each.name)} have not ended"
            for each in change.drop_accounts
            if states[each.id].open
        ]
        for tenant in change.drop_tenants:
            active = (await self._ledger.counters(tenant.id)).state.active
            if active:
                busy.append(f"{active} tasks of {dotted('tenants', tenant.name)} are active")
        if busy:
            raise Conflict(f"{'; '.join(busy)}. Wait for them, or force it.")

    async def _carry_out(self, plan: Plan, change: RegistryChange, *, force: bool) -> None:
        def make(now: Registry) -> tuple[RegistryChange, None]:
            if now.version != plan.before.version:
                raise Outdated("The registry was changed meanwhile. Read it again, and see what is different now.")
            return change, None

        removed = {
            "removed_accounts": [each.name for each in change.drop_accounts],
            "removed_tenants": [each.name for each in change.drop_tenants],
            "removed": [each.id for each in change.drop_tokens],
        }
        await self._change("registry.applied", make, force=force, **removed)
        self._log(plan, change)
        for account in change.accounts:
            known = plan.before.accounts.get(account.name)
            if known and may_pay_again(known, account):
                with suppress(LedgerUnavailable):  # what was made has to be shown; it is looked at by itself, later
                    await self._ledger.reopen(account.id)

    @staticmethod
    def _log(plan: Plan, change: RegistryChange) -> None:
        """Log what is different now, as each change alone would have been."""
        for account in change.accounts:
            policy = logging.account_policy(account.policy)
            given = account.name in plan.rekeyed
            _log.info("account.put", account=account.name, base_url=account.base_url, policy=policy, key_given=given)
        for tenant in change.tenants:
            about = msgspec.to_builtins(tenant)
            del about["id"], about["name"]
            about["policy"] = logging.tenant_policy(tenant.policy)
            url = tenant.webhook.url and tenants.without_query(tenant.webhook.url)
            given = tenant.name in plan.resigned
            about["webhook"] = {"url": url, "allow": tenant.webhook.allow, "key_given": given}
            _log.info("tenant.put", tenant=tenant.name, **about)
        for token in change.tokens:
            owner = plan.after.tenant_name(token.tenant)
            _log.info("token.put", tenant=owner, id=token.id, label=token.label, expires=token.expires)


def _check_left(after: Registry) -> None:
    """Raise Conflict if nothing would be left: that is what comes of the file of an export that failed."""
    if not after.accounts and not after.tenants:
        raise Conflict(
            "Nothing would be left: there is no account and no tenant in what was sent. Look why, or force it."
        )
