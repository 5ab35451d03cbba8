"""The Lua scripts as functions: each is loaded once, called by its hash, and its first answer names what happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import msgspec
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import NoScriptError, RedisError, ResponseError

from service.domain.errors import LedgerUnavailable
from service.telemetry.tracing import UNTRACED, Tracer

Client = Redis | RedisCluster

RETRY_AFTER = 2.0
_SHARED = ("state", "charges", "balance", "booking", "quota", "agenda")


class Scripts:
    """Calls the scripts over a client that never retries: an unanswered call may have moved money."""

    def __init__(self, client: Client, tracer: Tracer = UNTRACED) -> None:
        self._client = client
        self._tracer = tracer
        self._sources: dict[str, str] = {}
        self._hashes: dict[str, str] = {}

    async def call(self, name: str, keys: Sequence[str], arguments: Mapping[str, Any], *more: bytes | str) -> list[Any]:
        """Run the script `name`; `more` are arguments that MessagePack in Lua can't hold.

        Raises LedgerUnavailable if Redis did not answer: it may have run or not.
        """
        values = (msgspec.msgpack.encode(arguments), *more)
        try:
            with self._tracer.script(name):
                return await self._call(name, keys, values)
        except (RedisError, OSError) as error:
            if type(error) is ResponseError and str(error).startswith("user_script"):
                raise  # a fault of ours, not Redis being away
            raise unavailable() from error

    async def _call(self, name: str, keys: Sequence[str], values: Sequence[bytes | str]) -> list[Any]:
        if name not in self._hashes:
            await self._load(name)
        try:
            return await self._run(name, keys, values)
        except NoScriptError:  # Redis was restarted, and ran nothing
            await self._load(name)
            return await self._run(name, keys, values)

    async def _run(self, name: str, keys: Sequence[str], values: Sequence[bytes | str]) -> list[Any]:
        result = await self._client.evalsha(self._hashes[name], len(keys), *keys, *values)
        return list(result)

    async def _load(self, name: str) -> None:
        if name not in self._sources:
            folder = resources.files("service.storage") / "lua"
            parts = [*(folder / "shared" / f"{part}.lua" for part in _SHARED), folder / f"{name}.lua"]
            self._sources[name] = "\n".join(part.read_text(encoding="utf-8") for part in parts)
        self._hashes[name] = await self._client.script_load(self._sources[name])


async def read(client: Client, *commands: tuple[Any, ...]) -> list[Any]:
    """The answers to some plain commands, in one round trip. Raises LedgerUnavailable if Redis does not answer."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    try:
        return await pipeline.execute()
    except (RedisError, OSError) as error:
        raise unavailable() from error


def given(**values: Any) -> dict[str, Any]:
    """Arguments of a script, in which what is not known is not there."""
    return {name: value for name, value in values.items() if value is not None}


def scored(rows: Sequence[bytes]) -> list[tuple[str, int]]:
    """The members of a sorted set with their scores, out of an answer WITHSCORES."""
    return [(str(member, "ascii"), int(float(score))) for member, score in zip(rows[::2], rows[1::2], strict=True)]


def ledger_time(seen: bytes | None, time: tuple[int, int]) -> int:
    """The ledger's time in milliseconds, out of what the scripts saw last and the answer to TIME."""
    seconds, micros = time
    return max(int(seen or 0), seconds * 1000 + micros // 1000)


def unavailable() -> LedgerUnavailable:
    """What a caller is told when Redis does not answer."""
    return LedgerUnavailable(
        "The gateway can't reach its store just now. Nothing was sent; try again in a moment.",
        retry_after=RETRY_AFTER,
    )
