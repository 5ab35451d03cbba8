"""The stores of the chaos program, and the time in which a gateway's client finds a new primary."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service.domain.errors import LedgerUnavailable
from service.storage.connections import connect
from service.storage.redis import RedisScripts
from tests.chaos.stores import TOPOLOGIES, SingleStore, Store, run_store

_log = logging.getLogger(__name__)
MAX_OUTAGE_SECONDS = 5
KEY = "{gw}:count"


@asynccontextmanager
async def open_scripts(store: Store, command_seconds: float = 5) -> AsyncIterator[RedisScripts]:
    connections = connect(store.url, timeout=command_seconds)
    try:
        yield RedisScripts(connections.commands)
    finally:
        await connections.aclose()


async def increment(scripts: RedisScripts) -> int:
    (count,) = await scripts.read(("INCR", KEY))
    return int(count)


async def measure_outage(scripts: RedisScripts) -> float:
    """Increment as soon as the store accepts it; return after how many seconds."""
    started_at = time.monotonic()
    while True:
        try:
            await increment(scripts)
        except LedgerUnavailable:
            await asyncio.sleep(0.01)
        else:
            return time.monotonic() - started_at


async def fail_over(topology: str, folder: Path) -> None:
    folder.mkdir()
    async with run_store(topology, folder) as store, open_scripts(store) as scripts:
        assert await increment(scripts) == 1
        old = await store.find_primary()
        await store.kill_primary()
        seconds = await measure_outage(scripts)
        _log.info("%s: a write succeeded %.1f s after the primary was killed", topology, seconds)
        assert seconds < MAX_OUTAGE_SECONDS
        assert await store.execute("GET", KEY) == b"2"
        await store.restart()
        assert old
        assert await old.has_role("slave")
        assert await increment(scripts) == 3
        if topology == "cluster":
            async with open_scripts(store, 0.5) as impatient:
                await increment(impatient)
                await store.suspend()
                assert await measure_outage(impatient) < MAX_OUTAGE_SECONDS


async def test_failover(tmp_path: Path) -> None:
    """Another server becomes the primary with the same data, and the old one its replica when it is back."""
    topologies = set(TOPOLOGIES) - {"single"}
    await asyncio.gather(*(fail_over(topology, tmp_path / topology) for topology in topologies))


@pytest.fixture
async def single(tmp_path: Path) -> AsyncIterator[SingleStore]:
    async with run_store("single", tmp_path) as store:
        assert isinstance(store, SingleStore)
        yield store


async def fail_during(fault: Coroutine[Any, Any, None], scripts: RedisScripts) -> None:
    """Require that a command fails during a fault of the proxy, which is then ended."""
    task = asyncio.create_task(fault)
    await asyncio.sleep(0)
    with pytest.raises(LedgerUnavailable):
        await increment(scripts)
    task.cancel()
    await asyncio.wait([task])


async def test_proxy(single: SingleStore) -> None:
    """Requests on cut connections are not executed, those whose answers are lost are, and stalled ones are later."""

    async def read_count() -> int:
        return int(await single.execute("GET", KEY) or 0)

    async with open_scripts(single, 0.5) as scripts:
        await fail_during(single.proxy.cut(60), scripts)
        assert await read_count() == 0
        await fail_during(single.proxy.lose_answers(60), scripts)
        assert await read_count() == 1
        assert await increment(scripts) == 2
        await fail_during(single.proxy.stall(60), scripts)
        async with asyncio.timeout(10):
            while await read_count() < 3:
                pass
        assert await increment(scripts) == 4


async def test_killed_server_keeps_its_data(single: SingleStore) -> None:
    async with open_scripts(single, 0.5) as scripts:
        await increment(scripts)
        await single.suspend()
        with pytest.raises(LedgerUnavailable):
            await increment(scripts)
        await single.kill_all()
        with pytest.raises(LedgerUnavailable):
            await increment(scripts)
        await single.restart()
        assert await single.execute("GET", KEY) in {b"1", b"2"}
        await measure_outage(scripts)
