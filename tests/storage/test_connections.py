"""Connections to every topology: commands are sent once, and subscriptions wait."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.asyncio.cluster import ClusterNode
from redis.crc import key_slot
from redis.exceptions import DataError, MovedError
from redis.utils import HIREDIS_AVAILABLE

from service.domain.errors import LedgerUnavailable
from service.storage import connections as connections_module
from service.storage.connections import Connections, connect
from service.storage.redis import RedisScripts
from tests.support.certificates import create_certificate
from tests.support.resetting_proxy import ResettingProxy, run_resetting_proxy
from tests.support.stores import (
    RunningStore,
    pause_unless,
    run_cluster,
    run_on_socket,
    run_sentinel,
    run_single,
    run_with_sentinel,
)
from tests.support.valkey import UNAVAILABLE_ERRORS, Valkey, reserve_port, run_valkey

INCREMENT = "return redis.call('INCR', KEYS[1])"


@dataclass
class Proxy:
    """Counters of a proxy."""

    dropped_requests: int = 0


@asynccontextmanager
async def run_proxy(
    server: Valkey, port: int, *, dropped: bytes = b"\xff", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Proxy]:
    """Run a TCP proxy to a server that drops requests containing the given bytes."""
    proxy = Proxy()

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                if dropped in data:
                    proxy.dropped_requests += 1
                else:
                    target.write(data)
        target.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket_path)
        try:
            async with asyncio.TaskGroup() as copying:
                copying.create_task(copy(reader, inner_writer))
                copying.create_task(copy(inner_reader, writer))
        finally:
            writer.close()
            inner_writer.close()

    forwarding: list[asyncio.Task[None]] = []

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarding.append(asyncio.create_task(forward(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", port, ssl=tls):
        try:
            yield proxy
        finally:  # before the server waits for its connections
            for item in forwarding:
                item.cancel()
            await asyncio.gather(*forwarding, return_exceptions=True)


@pytest.fixture(
    scope="module", params=[run_single, run_on_socket, run_with_sentinel, run_cluster], ids=lambda made: made.__name__
)
def store(request: pytest.FixtureRequest) -> Iterator[RunningStore]:
    """Yield a store of each topology."""
    with request.param() as running:
        yield running


@asynccontextmanager
async def open_connections(url: str, *, timeout: float = 5) -> AsyncIterator[Connections]:
    connections = connect(url, timeout=timeout)
    try:
        yield connections
    finally:
        await connections.aclose()


async def ping(connections: Connections) -> Any:
    return await connections.commands.execute_command("GET", "{gw}:ping")


async def block_on_pop(connections: Connections) -> Any:
    return await connections.commands.execute_command("BLPOP", "{gw}:list", "0")


async def test_scripts_return_bytes(store: RunningStore) -> None:
    store.execute("DEL", "{gw}:count")
    async with open_connections(store.url) as connections:
        assert await connections.commands.eval(INCREMENT, 1, "{gw}:count") == 1
        assert await connections.commands.get("{gw}:count") == b"1"


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
async def test_unanswered_command_is_sent_once(scheme: str) -> None:
    """Without an answer in time, a command is not retried on any topology."""
    port = reserve_port()
    with ExitStack() as servers:
        if scheme == "redis+cluster":
            server = servers.enter_context(run_cluster("--cluster-announce-port", str(port))).server
        else:
            server = servers.enter_context(run_valkey())
        hosts = f"127.0.0.1:{port}"
        async with run_proxy(server, port, dropped=b"EVAL") as proxy:
            if scheme == "redis+sentinel":
                hosts = f"127.0.0.1:{servers.enter_context(run_sentinel(port)).port}/main"
            async with open_connections(f"{scheme}://{hosts}", timeout=0.5) as connections:
                await ping(connections)
                with pytest.raises(UNAVAILABLE_ERRORS):
                    await connections.commands.eval(INCREMENT, 1, "{gw}:count")
                await ping(connections)
        assert proxy.dropped_requests == 1


async def test_broken_connections_are_replaced(store: RunningStore) -> None:
    """Commands succeed on connections that the server has closed since their last use."""
    async with open_connections(store.url) as connections:
        await asyncio.gather(*(ping(connections) for _ in range(5)))
        store.execute("CLIENT", "KILL", "TYPE", "normal")
        async with open_connections(store.url) as others:
            await ping(others)
        await ping(connections)


async def test_pool_is_bounded(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """More commands than connections fail after the pool's wait time."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 2)
    monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", 0.1)
    async with open_connections(store.url) as connections:
        blocked = [asyncio.create_task(block_on_pop(connections)) for _ in range(2)]
        while pause_unless(store.execute("INFO", "clients")["blocked_clients"] == 2):
            await asyncio.sleep(0)
        with pytest.raises(UNAVAILABLE_ERRORS, match="No connection available"):
            await ping(connections)
        monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", 5)
        store.execute("RPUSH", "{gw}:list", "a", "b")
        await asyncio.gather(*blocked)


async def test_waiting_for_a_connection(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    async with open_connections(store.url) as connections:
        blocked = asyncio.create_task(block_on_pop(connections))
        while pause_unless(store.execute("INFO", "clients")["blocked_clients"] == 1):
            await asyncio.sleep(0)
        waiting = asyncio.create_task(connections.commands.execute_command("SET", "{gw}:waited", "1"))
        await asyncio.sleep(0)
        store.execute("RPUSH", "{gw}:list", "a")
        await asyncio.gather(blocked, waiting)
    assert store.execute("GET", "{gw}:waited") == b"1"


async def test_subscription(store: RunningStore) -> None:
    """A subscription outlasts the command timeout and receives what any node publishes."""
    async with open_connections(store.url, timeout=0.1) as connections, await connections.open_pubsub() as subscription:
        await subscription.subscribe("{gw}:news")
        assert (await subscription.get_message(timeout=5) or {})["type"] == "subscribe"
        reading = asyncio.create_task(subscription.get_message(timeout=10))
        assert not (await asyncio.wait({reading}, timeout=0.2))[0]
        await connections.commands.execute_command("PUBLISH", "{gw}:news", "hello")
        assert (await reading or {})["data"] == b"hello"


async def test_broken_subscription(store: RunningStore) -> None:
    """A broken subscription raises, since messages may be lost, and can be reopened."""
    async with open_connections(store.url) as connections:
        async with await connections.open_pubsub() as subscription:
            await subscription.subscribe("{gw}:news")
            await subscription.get_message(timeout=5)
            store.execute("CLIENT", "KILL", "TYPE", "pubsub")
            with pytest.raises(UNAVAILABLE_ERRORS):
                await subscription.get_message(timeout=5)
        async with await connections.open_pubsub() as subscription:
            await subscription.subscribe("{gw}:news")
            assert (await subscription.get_message(timeout=5) or {})["type"] == "subscribe"


@pytest.mark.parametrize("error", [run_single, run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_reset_connections(error: Any) -> None:
    """Every error that uvloop raises for reset connections is in UNAVAILABLE_ERRORS, and leaves nothing behind."""

    async def calls(connections: Connections, proxy: ResettingProxy, counts: Counter[str]) -> None:
        while proxy.resets < 100:
            with suppress(*UNAVAILABLE_ERRORS):
                await connections.commands.eval(INCREMENT, 1, "{gw}:count")
                counts["done"] += 1
            with suppress(*UNAVAILABLE_ERRORS):
                pipeline = connections.commands.pipeline(transaction=False)
                pipeline.execute_command("GET", "{gw}:count")
                await pipeline.execute()

    async def run(url: str, proxy: ResettingProxy) -> None:
        counts: Counter[str] = Counter()
        async with open_connections(url) as connections:
            await ping(connections)
            proxy.reset_probability = 0.05
            await asyncio.gather(*(calls(connections, proxy, counts) for _ in range(80)))
            proxy.reset_probability = 0
            await asyncio.gather(*(ping(connections) for _ in range(80)), return_exceptions=True)
            assert int(await ping(connections) or 0) == 0
            assert int(await connections.commands.execute_command("GET", "{gw}:count")) >= counts["done"] > 0

    port = reserve_port()
    with ExitStack() as servers, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if error is run_cluster:
            server = servers.enter_context(run_cluster("--cluster-announce-port", str(port))).server
        else:
            server = servers.enter_context(run_valkey(port=reserve_port()))
        proxy = servers.enter_context(run_resetting_proxy(server.port, seed=12, port=port))
        url = f"redis://127.0.0.1:{port}"
        if error is run_cluster:
            url = f"redis+cluster://127.0.0.1:{port}"
        elif error is run_with_sentinel:
            url = f"redis+sentinel://127.0.0.1:{servers.enter_context(run_sentinel(port)).port}/main"
        runner.run(run(url, proxy))


@pytest.mark.parametrize("method", ["write", "writelines", "drain", "close"])
@pytest.mark.parametrize(
    "error", [RuntimeError("closed"), asyncio.IncompleteReadError(b"", 1), KeyError("of a library")]
)
async def test_errors_while_sending(
    store: RunningStore, method: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every error of the event loop while sending is in UNAVAILABLE_ERRORS, and the next command succeeds."""
    async with open_connections(store.url) as connections:
        await ping(connections)

        def failing(*_: Any) -> Any:
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(asyncio.StreamWriter, method, failing)
            with suppress(*UNAVAILABLE_ERRORS):
                await ping(connections)
        await asyncio.gather(*(ping(connections) for _ in range(2)), return_exceptions=True)
        await ping(connections)


async def test_invalid_argument(store: RunningStore) -> None:
    """An argument that cannot be encoded is not reported as an outage."""
    async with open_connections(store.url) as connections:
        scripts = RedisScripts(connections.commands)
        with pytest.raises(DataError):
            await scripts.read(("GET", "{gw}:x", object()))
        with pytest.raises(LedgerUnavailable):
            await RedisScripts(connect("redis://127.0.0.1:1", timeout=1).commands).read(("GET", "{gw}:x"))


async def test_frozen_cluster() -> None:
    """All commands to a frozen Cluster fail after one timeout, not one after the other."""
    with run_cluster() as store:
        async with open_connections(store.url, timeout=0.5) as connections:
            await ping(connections)
            store.server.suspend()
            try:
                async with asyncio.timeout(8):
                    for _ in range(2):
                        failed = await asyncio.gather(*(ping(connections) for _ in range(40)), return_exceptions=True)
                        assert all(isinstance(item, UNAVAILABLE_ERRORS) for item in failed)
            finally:
                store.server.resume()
            while pause_unless(
                not isinstance(*await asyncio.gather(ping(connections), return_exceptions=True), Exception)
            ):
                pass


async def test_pipelines_wait_for_a_connection(store: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    async with open_connections(store.url) as connections:
        result = await asyncio.gather(*(RedisScripts(connections.commands).read(("GET", "{gw}:x")) for _ in range(20)))
    assert result == [[None]] * 20


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1:1", "unix:///nowhere", "redis+sentinel://127.0.0.1:1/main", "redis+cluster://127.0.0.1:1"],
)
async def test_unreachable(url: str) -> None:
    async with open_connections(url) as connections:
        with pytest.raises(UNAVAILABLE_ERRORS):
            await ping(connections)
        with pytest.raises(UNAVAILABLE_ERRORS):
            async with await connections.open_pubsub() as subscription:
                await subscription.subscribe("x")


async def test_unknown_sentinel_service() -> None:
    with run_with_sentinel() as store:
        async with open_connections(store.url.replace("main", "other")) as connections:
            with pytest.raises(UNAVAILABLE_ERRORS):
                await ping(connections)


async def test_password() -> None:
    """A password is used in any spelling; a wrong one raises an error in UNAVAILABLE_ERRORS."""
    with run_valkey("--requirepass", "a b/c@d:e", port=reserve_port()) as server:
        async with open_connections(f"redis://:a%20b%2Fc%40d%3Ae@127.0.0.1:{server.port}/2") as connections:
            assert await connections.commands.client_info()
        async with open_connections(f"redis://:wrong@127.0.0.1:{server.port}") as connections:
            with pytest.raises(UNAVAILABLE_ERRORS):
                await ping(connections)


async def test_sentinel_password() -> None:
    with run_valkey(port=reserve_port()) as server, run_sentinel(server.port, "--requirepass", "own") as watching:
        address = f"redis+sentinel://127.0.0.1:{watching.port}/main/1"
        async with open_connections(f"{address}?sentinel_password=own") as connections:
            await connections.commands.set("k", "v")
        async with open_connections(address) as connections:
            with pytest.raises(UNAVAILABLE_ERRORS):
                await ping(connections)
        assert RunningStore("", server).execute("INFO", "keyspace")["db1"]["keys"] == 1


async def test_failover() -> None:
    """After the primary fails, commands go to the replica that Sentinel promotes."""
    with (
        run_valkey("--repl-diskless-sync-delay", "0", port=reserve_port()) as old,
        run_valkey("--replicaof", "127.0.0.1", str(old.port), port=reserve_port()) as new,
        run_sentinel(old.port) as watching,
    ):
        replica, sentinel = RunningStore("", new), RunningStore("", watching)
        sentinel.execute("SENTINEL", "DEBUG", "info-period", "50", "ping-period", "50")
        sentinel.execute("SENTINEL", "SET", "main", "down-after-milliseconds", "200")
        while pause_unless(replica.execute("INFO", "replication")["master_link_status"] == "up"):
            pass
        while pause_unless(sentinel.execute("INFO", "sentinel")["master0"]["slaves"] == 1):
            pass
        async with open_connections(f"redis+sentinel://127.0.0.1:{watching.port}/main") as connections:
            await connections.commands.set("k", "before")
            old.kill()
            while pause_unless(replica.execute("GET", "k") == b"after"):
                with suppress(*UNAVAILABLE_ERRORS):
                    await connections.commands.set("k", "after")


async def test_tls(tmp_path: Path) -> None:
    """Over TLS the server must present a trusted certificate."""
    trusted, context = create_certificate(tmp_path)
    port = reserve_port()
    with run_valkey() as server:
        async with run_proxy(server, port, tls=context):
            async with open_connections(f"rediss://127.0.0.1:{port}?ssl_ca_certs={trusted}") as connections:
                await connections.commands.set("k", "v")
                assert await connections.commands.get("k") == b"v"
            async with open_connections(f"rediss://127.0.0.1:{port}") as connections:
                with pytest.raises(UNAVAILABLE_ERRORS):
                    await ping(connections)


async def test_redirected_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirected pipeline needs no second connection."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", 0.1)
    moved = [MovedError(f"{key_slot(b'gw')} 127.0.0.1:1")]

    with run_cluster() as store:
        async with open_connections(store.url) as connections:
            await connections.commands.execute_command("SET", "{gw}:x", "1")
            parse = ClusterNode.parse_response

            async def parsed(node: ClusterNode, connection: Any, command: str, **kwargs: Any) -> Any:
                answer = await parse(node, connection, command, **kwargs)
                if moved:
                    raise moved.pop()
                return answer

            monkeypatch.setattr(ClusterNode, "parse_response", parsed)
            assert await RedisScripts(connections.commands).read(("GET", "{gw}:x")) == [b"1"]
    assert moved == []


@pytest.mark.parametrize("scheme", ["redis+sentinel", "rediss+sentinel"])
async def test_sentinel_over_tls(tmp_path: Path, scheme: str) -> None:
    """Sentinels over TLS name the primary, with or without TLS on it."""
    trusted, context = create_certificate(tmp_path)
    outer, announced = reserve_port(), reserve_port()
    with run_valkey(port=reserve_port()) as server, run_sentinel(announced) as watching:
        async with (
            run_proxy(watching, outer, tls=context),
            run_proxy(server, announced, tls=context if scheme == "rediss+sentinel" else None),
        ):
            address = f"{scheme}://127.0.0.1:{outer}/main?"
            async with open_connections(f"{address}sentinel_ssl=true&ssl_ca_certs={trusted}") as connections:
                await connections.commands.set("k", "v")
                assert await connections.commands.get("k") == b"v"
            async with open_connections(f"{address}sentinel_ssl=true") as connections:
                with pytest.raises(UNAVAILABLE_ERRORS):
                    await ping(connections)


def test_hiredis_is_used() -> None:
    assert HIREDIS_AVAILABLE
