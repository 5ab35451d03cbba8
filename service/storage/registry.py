"""The registry on Redis: one hash, written by compare-and-set and announced to every process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import structlog
from redis.asyncio.client import PubSub
from redis.exceptions import RedisError

from service.domain.errors import LedgerUnavailable
from service.domain.tenants import Account, Registry, Tenant, Token
from service.storage.redis import Keys, OnError, RedisScripts, classify_error
from service.usecases.ports import RegistryChange

_log = structlog.get_logger(__name__)
REFRESH_SECONDS = 5.0
"""A change that was announced while a process was not listening is seen after at most this long."""
RECONNECT_SECONDS = 1.0


class RedisRegistry:
    """Reads the whole registry, and writes changes that were made from the newest version."""

    def __init__(self, scripts: RedisScripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def load(self) -> Registry:
        """The registry as it is now."""
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
        """The number of the newest version. Raises DataVersionError where the data is of another data version."""
        version, data_version = await self._scripts.read(
            ("HGET", self._keys.registry, "version"), ("GET", self._keys.data_version)
        )
        self._scripts.compare_version(data_version)
        return int(version or 0)

    async def write(self, change: RegistryChange) -> bool:
        """Carry out a change; False if the registry is no longer the version it was made from."""
        keys, put, policies = self._keys, {}, {}
        for tenant in change.tenants:
            put[f"tenant:{tenant.name}"] = msgspec.msgpack.encode(tenant)
            policies[keys.tenant(tenant.id)] = _pack_policy(tenant)
        for account in change.accounts:
            put[f"account:{account.name}"] = msgspec.msgpack.encode(account)
            policies[keys.account(account.id)] = _pack_policy(account)
        for token in change.tokens:
            put[f"token:{token.id}"] = msgspec.msgpack.encode(token)
        gone = dict(change.deleted_tenant_names) | {each.id: each.name for each in change.drop_tenants}
        put |= {f"deleted:{tenant_id}": name.encode() for tenant_id, name in gone.items()}
        put["next_id"] = str(change.next_id).encode()
        drop = [f"tenant:{each.name}" for each in change.drop_tenants]
        drop += [f"account:{each.name}" for each in change.drop_accounts]
        drop += [f"token:{each.id}" for each in change.drop_tokens]
        forget = [keys.tenant(each.id) for each in change.drop_tenants]
        forget += [keys.account(each.id) for each in change.drop_accounts]
        answer = await self._scripts.call(
            "write_registry",
            [keys.registry, *policies, *forget],
            {
                "version": change.version,
                "newer_than": change.newer_than,
                "channel": keys.registry_channel,
                "deleted_fields": drop,
                "field_count": len(put),
                "policy_count": len(policies),
                "deleted_count": len(forget),
            },
            *(each for pair in put.items() for each in pair),
            *policies.values(),
        )
        return bool(answer[0] == b"written")


def _pack_policy(owner: Tenant | Account) -> bytes:
    """The policy of a tenant or account as the scripts read it: what is not limited is not there."""
    plain = msgspec.to_builtins(owner.policy)
    if isinstance(owner, Tenant):
        plain["limits"] = [{k: v for k, v in each.items() if v is not None} for each in plain["limits"]]
    return msgspec.msgpack.encode({key: value for key, value in plain.items() if value is not None})


class CachedRegistry:
    """The registry of this process, kept up to date in the background.

    Reading it never waits. Until `refresh` succeeded once it is empty and not `ready`; after that it stays what it was
    for as long as Redis is away, and is given back to a Redis that has lost it.
    """

    def __init__(
        self,
        store: RedisRegistry,
        open_pubsub: Callable[[], Awaitable[PubSub]],
        channel: str,
        *,
        on_error: OnError | None = None,
    ) -> None:
        self._on_error = on_error
        self._store = store
        self._open_pubsub = open_pubsub
        self._channel = channel
        self.is_ready = False
        self.current = Registry()

    async def refresh(self) -> None:
        """Take over the newest version. Raises LedgerUnavailable."""
        if self.is_ready:
            held, version = self.current, await self._store.read_version()
            if version == held.version:
                return
            if version < held.version:
                await self._restore(held)
        self.current = await self._store.load()
        self.is_ready = True

    async def _restore(self, held: Registry) -> None:
        """Give back what the store has lost: tokens stay valid, limits in force, and what was revoked stays revoked.

        Only a loss makes versions go back; of several processes that notice it, the first one does this.
        """
        stored = await self._store.load()
        replaced = {each.id: name for name, each in stored.tenants.items() if held.tenant_by_id(each.id) is None}
        change = RegistryChange(
            version=stored.version,
            next_id=held.next_id,
            newer_than=held.version,
            tenants=tuple(held.tenants.values()),
            accounts=tuple(held.accounts.values()),
            tokens=tuple(held.tokens.values()),
            drop_tenants=tuple(each for name, each in stored.tenants.items() if name not in held.tenants),
            drop_accounts=tuple(each for name, each in stored.accounts.items() if name not in held.accounts),
            drop_tokens=tuple(each for name, each in stored.tokens.items() if name not in held.tokens),
            deleted_tenant_names={**replaced, **held.deleted_tenant_names},
        )
        restored = await self._store.write(change)
        _log.error("registry.restored_from_memory", stored=stored.version, held=held.version, restored=restored)

    async def run(self) -> None:
        """Keep up with announced changes for ever, through any loss of the connection."""
        while True:
            try:
                await self._listen()
            except (RedisError, LedgerUnavailable) as error:
                if self._on_error and isinstance(error, RedisError):  # the other one was counted where it came up
                    self._on_error(classify_error(error))
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _listen(self) -> None:
        async with await self._open_pubsub() as channel:
            await channel.subscribe(self._channel)
            while True:
                await self.refresh()
                await channel.get_message(ignore_subscribe_messages=True, timeout=REFRESH_SECONDS)
