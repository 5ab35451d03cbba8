"""A look at a store before anything is trusted to it: does it answer, is it new, does it keep what it is told."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct
from redis.asyncio import RedisCluster
from redis.asyncio.sentinel import MasterNotFoundError
from redis.exceptions import RedisError

from service.storage.connect import Connections, connect
from service.storage.data_version import version_error
from service.storage.keys import Keys

_OLDEST = (6, 2)
"""`ZRANGE` with `BYSCORE`, and scripts that may look at the clock before they write."""


class Checkup(Struct, frozen=True):
    """What came of it: `server` is its name and version, if it said so; for its `faults` it can't be used.

    For its `doubts` it can, but could lose what it acknowledged: in this ledger that is money.
    """

    server: str = ""
    faults: Sequence[str] = ()
    doubts: Sequence[str] = ()


async def examine(url: str, prefix: str, *, timeout: float) -> Checkup:  # noqa: ASYNC109 - for each connection too
    """Examine a store and the data under a prefix within `timeout` seconds, and change nothing.

    Raises InvalidRedisUrl.
    """
    connections = connect(url, timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            told = await _told(connections)
            other = version_error(await connections.commands.execute_command("GET", Keys(prefix).data_version))
    except TimeoutError:
        return Checkup(faults=[f"did not answer within {timeout:g} s"])
    except RedisError as error:
        return Checkup(faults=[_why(error)])
    finally:
        await connections.aclose()
    faults = [fault for each in told for fault in _faults(each)]
    return Checkup(
        _server(told[0]),
        list(dict.fromkeys(faults or ([f"can't be used: {other.reason}"] if other else []))),
        list(dict.fromkeys(doubt for each in told for doubt in _doubts(each))),
    )


def reason(error: OSError) -> str:
    """Why there is no connection, in the words that people know."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    # Asyncio and OpenSSL put words of their own in the place of the system's, and OpenSSL numbers too.
    known = type(error) is not ssl.SSLError and not isinstance(error, socket.gaierror) and error.errno
    return os.strerror(known) if known else error.strerror or str(error)


def _why(error: Exception) -> str:
    """What a client raised, or the error of the system that it hides in its own."""
    if isinstance(error, MasterNotFoundError):
        return "can't be reached: no Sentinel names a primary of the service"
    below: BaseException | None = error
    while below is not None and not isinstance(below, OSError):
        below = below.__cause__ or below.__context__
    if isinstance(below, OSError):
        return f"can't be reached: {reason(below)}"
    return f"can't be used: {str(error).rstrip('.') or type(error).__name__}"


async def _told(connections: Connections) -> Sequence[Mapping[str, Any]]:
    """What each server that holds data says of itself."""
    if isinstance(connections.commands, RedisCluster):
        found = await connections.commands.execute_command("INFO", "everything", target_nodes=RedisCluster.PRIMARIES)
        return [found] if "redis_version" in found else list(found.values())
    return [await connections.commands.info("everything")]


def _server(told: Mapping[str, Any]) -> str:
    if "valkey_version" in told:
        return f"Valkey {told['valkey_version']}"
    return f"Redis {told['redis_version']}" if "redis_version" in told else ""


def _faults(told: Mapping[str, Any]) -> Iterator[str]:
    version = tuple(map(int, re.findall(r"\d+", str(told.get("redis_version", "")))[:2]))
    if version and version < _OLDEST:
        yield f"must be Redis {'.'.join(map(str, _OLDEST))} or newer, or Valkey: it is {_server(told)}"
    if told.get("role") == "slave":
        yield "must be a primary: it is a replica, which takes no writes; redis+sentinel:// finds the primary"


def _doubts(told: Mapping[str, Any]) -> Iterator[str]:
    policy = told.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield f"drops what tenants spent when its memory is full: set maxmemory-policy noeviction, not {policy}"
    if told.get("aof_enabled") == 0:
        yield "keeps no append-only file, so that a crash loses what it acknowledged: set appendonly yes"
