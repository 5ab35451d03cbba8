"""The registry as a whole: read, and made what it is wanted to be, in one change."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import msgspec
import structlog

from service.domain import tenants
from service.domain.errors import Conflict, LedgerUnavailable, Outdated, dotted
from service.domain.tasks import Sealer
from service.domain.tenants import Registry
from service.telemetry import told
from service.usecases.change import Change
from service.usecases.planning import Plan, Planner, Wanted
from service.usecases.ports import Clock, Ledger, RegistryChange, RegistryView
from service.usecases.registry import may_pay_again

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
            policy = told.account_policy(account.policy)
            given = account.name in plan.rekeyed
            _log.info("account.put", account=account.name, base_url=account.base_url, policy=policy, key_given=given)
        for tenant in change.tenants:
            about = msgspec.to_builtins(tenant)
            del about["id"], about["name"]
            about["policy"] = told.tenant_policy(tenant.policy)
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
