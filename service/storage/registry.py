"""The registry in Redis: one hash, written by compare-and-set. Every change is published to all processes."""

from __future__ import annotations

import msgspec

from service.domain.tenants import Account, Registry, Tenant, Token
from service.storage.redis import Keys, RedisScripts
from service.usecases.ports import RegistryChange


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

    async def write(self, change: RegistryChange) -> bool:
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
            newer_than=change.newer_than,
            channel=keys.registry_channel,
            deleted_fields=deleted_fields,
            field_count=len(fields),
            policy_count=len(policies),
            deleted_count=len(deleted_owners),
        )
        return bool(answer[0] == b"written")
