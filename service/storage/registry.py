"""The registry in Redis: one hash, written by compare-and-set. Every change is published to all processes."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import structlog
from msgspec.structs import replace

from service.domain.errors import field_path
from service.domain.tenants import Account, Registry, Tenant, Token
from service.storage.redis import DATA_VERSION, UPGRADABLE_VERSION, Keys, RedisScripts, UpgradeRefused
from service.usecases.caches import no_change
from service.usecases.ports import RegistryChange

_log = structlog.get_logger(__name__)


class RedisRegistry:
    def __init__(self, scripts: RedisScripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def load(self) -> Registry:
        (fields,) = await self._scripts.read(("HGETALL", self._keys.registry))
        tenants, accounts, tokens, deleted = {}, {}, {}, {}
        for field, packed in fields.items():
            kind, _, name = str(field, "utf-8").partition(":")
            if kind == "tenant":
                tenants[name] = msgspec.msgpack.decode(packed, type=Tenant)
            elif kind == "account":
                accounts[name] = msgspec.msgpack.decode(packed, type=Account)
            elif kind == "token":
                tokens[name] = msgspec.msgpack.decode(packed, type=Token)
            elif kind == "deleted":
                deleted[int(name)] = str(packed, "utf-8")
        version, next_id = int(fields.get(b"version", 0)), int(fields.get(b"next_id", 1))
        return Registry(version, next_id, tenants, accounts, tokens, deleted)

    async def read_version(self) -> int:
        """Return the version of the registry. Raises DataVersionError."""
        version, data_version = await self._scripts.read(
            ("HGET", self._keys.registry, "version"), ("GET", self._keys.data_version)
        )
        self._scripts.compare_version(data_version)
        return int(version or 0)

    async def upgrade(self, bind_user_key: Callable[[Account], Account | None]) -> None:
        """Bind the keys of all accounts of the former data version, and mark the data as of this version, in one step.

        The scripts are those for the former version. `bind_user_key` returns None for a key that can't be decrypted.
        Raises UpgradeRefused then, and DataVersionError if another process was faster.
        """
        while True:
            registry = await self.load()
            bound = {name: bind_user_key(account) for name, account in registry.accounts.items()}
            if lost := [field_path("accounts", name, "user_key") for name, account in bound.items() if not account]:
                raise UpgradeRefused(
                    f"the data in Redis has version {UPGRADABLE_VERSION} and can't be converted: none of the keys in "
                    f"GATEWAY_SECRET_KEYS decrypts {', '.join(lost)}; add the missing one, or use the former gateway"
                )
            change = replace(no_change(registry), accounts=tuple(filter(None, bound.values())))
            if await self.write(change, new_data_version=DATA_VERSION):
                version, names = change.version + 1, sorted(bound)
                _log.warning("registry.upgraded", version=version, data_version=DATA_VERSION, accounts=names)
                return

    async def write(self, change: RegistryChange, *, new_data_version: int | None = None) -> bool:
        """Write a change. Returns False if the registry is not the version that the change was made from."""
        keys, fields, policies = self._keys, {}, {}
        for tenant in change.tenants:
            fields[f"tenant:{tenant.name}"] = msgspec.msgpack.encode(tenant)
            policies[keys.tenant(tenant.id)] = msgspec.msgpack.encode(tenant.policy)
        for account in change.accounts:
            fields[f"account:{account.name}"] = msgspec.msgpack.encode(account)
            policies[keys.account(account.id)] = msgspec.msgpack.encode(account.policy)
        for token in change.tokens:
            fields[f"token:{token.id}"] = msgspec.msgpack.encode(token)
        deleted_names = dict(change.deleted_tenant_names) | {tenant.id: tenant.name for tenant in change.drop_tenants}
        fields |= {f"deleted:{tenant_id}": name.encode() for tenant_id, name in deleted_names.items()}
        fields["next_id"] = str(change.next_id).encode()
        deleted_fields = [f"tenant:{tenant.name}" for tenant in change.drop_tenants]
        deleted_fields += [f"account:{account.name}" for account in change.drop_accounts]
        deleted_fields += [f"token:{token.id}" for token in change.drop_tokens]
        deleted_owners = [keys.tenant(tenant.id) for tenant in change.drop_tenants]
        deleted_owners += [keys.account(account.id) for account in change.drop_accounts]
        answer = await self._scripts.call(
            "write_registry",
            [keys.registry, *policies, *deleted_owners],
            *(value for field in fields.items() for value in field),
            *policies.values(),
            version=change.version,
            new_data_version=new_data_version,
            newer_than=change.newer_than,
            channel=keys.registry_channel,
            deleted_fields=deleted_fields,
            field_count=len(fields),
            policy_count=len(policies),
            deleted_count=len(deleted_owners),
        )
        return bool(answer[0] == b"written")
