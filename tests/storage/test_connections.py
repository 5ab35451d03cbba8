"""Connections to every topology: commands are sent once, and subscriptions wait."""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop
from redis.asyncio.cluster import ClusterNode
from redis.crc import key_slot
from redis.exceptions import DataError, MovedError, ResponseError

from service.domain.errors import LedgerUnavailable
from service.domain.ledger import NoAccount, ReservationState
from service.domain.tasks import Kind, State
from service.domain.tenants import Window
from service.storage import connections as connections_module
from service.storage.connections import Connections, connect
from service.storage.redis import RedisScripts
from service.usecases.ports import CheckOutcome, CheckResult, ReserveRequest
from tests.storage.seeded_store import FIRST, RETENTION, TENANT, open_seeded_store
from tests.support.network import create_certificate, reserve_port
from tests.support.proxy import Proxy, run_thread_proxy
from tests.support.valkey import UNAVAILABLE_ERRORS, RunningStore, Valkey, pause_unless, run_sentinel, run_valkey

INCREMENT = "return redis.call('INCR', KEYS[1])"


@asynccontextmanager
async def run_proxy(
    server: Valkey, port: int, tls: ssl.SSLContext | None = None, *, dropped: bytes = b"\xff"
) -> AsyncIterator[list[bytes]]:
    """Run a TCP proxy to a server; yields the requests that it dropped, those with the given bytes."""
    requests: list[bytes] = []
    forwarding: list[asyncio.Task[None]] = []

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                if dropped in data:
                    requests.append(data)
                else:
                    target.write(data)
        target.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner_reader, inner_writer = await asyncio.open_unix_connection(server.socket_path)
        try:
            await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        finally:
            writer.close()
            inner_writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        forwarding.append(asyncio.create_task(forward(reader, writer)))

    async with await asyncio.start_server(accept, "127.0.0.1", port, ssl=tls):
        try:
            yield requests
        finally:  # before the server waits for its connections
            for item in forwarding:
                item.cancel()
            await asyncio.gather(*forwarding, return_exceptions=True)


@contextmanager
def announce_port(topology: RunningStore, port: int) -> Iterator[str]:
    """Let a topology name this port as that of its server; yields the URL to connect to."""
    scheme = topology.url.partition("://")[0]
    with ExitStack() as servers:
        if scheme == "redis+sentinel":
            sentinel = servers.enter_context(run_sentinel(port))
            yield f"{scheme}://127.0.0.1:{sentinel.port}/main"
        elif scheme == "redis+cluster":
            topology.execute("CONFIG", "SET", "cluster-announce-port", str(port))
            servers.callback(topology.execute, "CONFIG", "SET", "cluster-announce-port", "0")
            yield f"{scheme}://127.0.0.1:{port}"
        else:
            yield f"{scheme}://127.0.0.1:{port}"


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


async def test_submissions(topology: RunningStore) -> None:
    """Registry, ledger and tasks work from the reservation to the end."""
    async with open_seeded_store(topology.url) as store:
        await store.accept("accepted")
        await store.reserve("expired")
        moved = ReserveRequest("expired", TENANT, (), Kind.UPSCALE)
        assert isinstance(await store.ledger.change_account(moved, FIRST, None), NoAccount)
        ended = await store.record_check(CheckResult(outcome=CheckOutcome.SUCCEEDED))
        page = await store.tasks.list_page(TENANT, state=State.SUCCEEDED, kind=None, limit=5, cursor=None)
        assert (page.tasks, page.next_cursor) == ((ended,), None)
        await store.advance_clock(RETENTION.lease_ms)
        assert [item.reservation for item in await store.ledger.settle_expired(5)] == ["expired"]
        assert (await store.ledger.tenant_snapshot(TENANT)).state.windows[Window.TOTAL].tasks == 2
        assert (await store.ledger.account_states([FIRST]))[FIRST].unknown_outcomes == 1
        assert (await store.registry.load()).version == 1


async def test_unanswered_command_is_sent_once(topology: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer in time, a command is not retried. Its connection is closed, and the pool opens another."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    port = reserve_port()
    with announce_port(topology, port) as url:
        async with (
            run_proxy(topology.server, port, dropped=b"EVAL") as requests,
            open_connections(url, timeout=0.3) as connections,
        ):
            await ping(connections)
            with pytest.raises(UNAVAILABLE_ERRORS):
                await connections.commands.eval(INCREMENT, 1, "{gw}:count")
            await ping(connections)
            with pytest.raises(LedgerUnavailable):
                await RedisScripts(connections.commands).read(("EVAL", INCREMENT, 1, "{gw}:count"))
            await ping(connections)
    assert len(requests) == 2


async def test_answers_of_one_connection(topology: RunningStore) -> None:
    """Each request gets its own answer, also beside requests that were cancelled."""
    for name in "abc":
        topology.execute("SET", f"{{gw}}:{name}", name)
    async with open_connections(topology.url) as connections:
        scripts = RedisScripts(connections.commands)
        for _ in range(2):  # before and after the connection was opened
            reads = [asyncio.create_task(scripts.read(("GET", f"{{gw}}:{name}"), ("GET", "-"))) for name in "abc" * 60]
            await asyncio.sleep(0)
            assert all(read.cancel() for read in reads[::7])
            answers = await asyncio.gather(*reads, return_exceptions=True)
            assert [isinstance(answer, asyncio.CancelledError) for answer in answers[::7]] == [True] * len(reads[::7])
            for index, answer in enumerate(answers):
                assert index % 7 == 0 or answer == ["abc"[index % 3].encode(), None]


async def test_time_out_of_one_request(single: RunningStore) -> None:
    """A request that waited too long does not take the time of the next one, nor its answer."""
    async with open_connections(single.url, timeout=2) as connections:
        scripts = RedisScripts(connections.commands)
        await scripts.read(("SET", "{gw}:a", "1"))
        single.server.suspend()
        try:
            first = asyncio.create_task(scripts.read(("INCR", "{gw}:a")))
            await asyncio.wait({first}, timeout=1.5)
            second = asyncio.create_task(scripts.read(("GET", "{gw}:a")))
            await asyncio.wait({first})
        finally:
            single.server.resume()
        assert isinstance(first.exception(), LedgerUnavailable)
        assert await second == [b"2"]


@pytest.mark.parametrize(
    ("cause", "size"), [("demoted", 1), ("frozen", 1), ("frozen", 32_000_000)], ids=["demoted", "unanswered", "unread"]
)
async def test_connection_is_not_used_again(single: RunningStore, cause: str, size: int) -> None:
    """After a time-out, or the answer that the server is no primary, another connection is opened."""
    async with open_connections(single.url, timeout=0.3) as connections:
        scripts = RedisScripts(connections.commands)
        before = await scripts.read(("CLIENT", "ID"))
        if cause == "frozen":
            single.server.suspend()
        else:
            single.execute("REPLICAOF", "127.0.0.1", "1")
        try:
            with pytest.raises(LedgerUnavailable):
                await scripts.read(("SET", "{gw}:x", b"1" * size))
        finally:
            single.server.resume()
            single.execute("REPLICAOF", "NO", "ONE")
        assert await scripts.read(("CLIENT", "ID")) != before
        while pause_unless(before[0] not in {int(client["id"]) for client in single.execute("CLIENT LIST")}):
            await asyncio.sleep(0)


async def test_calls_whose_answers_were_lost(single: RunningStore) -> None:
    """A connection that breaks leaves the outcome of all calls on it unknown. They are repeated, and count once."""
    proxy = Proxy(single.server.port)
    async with proxy.serve(), open_seeded_store(f"redis://127.0.0.1:{proxy.port}") as store:
        await store.accept(*"abc")
        for name in "def":
            await store.reserve(name)
        await store.advance_clock(RETENTION.claim_lease_ms)
        claimed, ended = await store.tasks.claim_checks(3), CheckResult(outcome=CheckOutcome.SUCCEEDED)

        def end_settle_and_reserve() -> Iterator[Awaitable[Any]]:
            yield from (store.tasks.record_check(check, ended) for check in claimed)
            yield from (store.settle(name, ReservationState.ACCEPTED) for name in "def")
            yield from (store.reserve(name) for name in "ghi")

        losing = asyncio.create_task(proxy.lose_answers(60))
        failed = await asyncio.gather(*end_settle_and_reserve(), return_exceptions=True)
        assert {type(item) for item in failed} == {LedgerUnavailable}
        losing.cancel()
        await asyncio.gather(*end_settle_and_reserve(), return_exceptions=True)
        state = (await store.ledger.tenant_snapshot(TENANT)).state
        total = state.windows[Window.TOTAL]
        assert (total.tasks, total.tasks_reserved, state.active_tasks) == (6, 3, 6)
        account = (await store.ledger.account_states([FIRST]))[FIRST]
        assert (account.open_submissions, account.unsettled, account.unknown_outcomes) == (6, 3, 0)


async def test_scripts_that_the_server_lost(topology: RunningStore) -> None:
    """A script is sent again to a server that does not have it any more."""
    async with open_connections(topology.url) as connections:
        scripts = RedisScripts(connections.commands)
        for _ in range(2):
            await scripts.call("reopen", ["{gw}:clock", "{gw}:account"], account=1)
            topology.execute("SCRIPT", "FLUSH")


async def test_own_error_is_no_outage(single: RunningStore) -> None:
    """A fault in a script or an argument is not reported as an unavailable store."""
    single.execute("HSET", "{gw}:account", "state", "no MessagePack")
    async with open_connections(single.url) as connections:
        scripts = RedisScripts(connections.commands)
        with pytest.raises(DataError):
            await scripts.read(("GET", "{gw}:x", object()))
        with pytest.raises(ResponseError, match="user_script"):
            await scripts.call("reopen", ["{gw}:clock", "{gw}:account"], account=1)


async def test_broken_connections_are_replaced(topology: RunningStore) -> None:
    """Commands succeed on connections that the server has closed since their last use."""
    async with open_connections(topology.url) as connections:
        await asyncio.gather(*(ping(connections) for _ in range(5)))
        topology.execute("CLIENT", "KILL", "TYPE", "normal")
        async with open_connections(topology.url) as others:
            await ping(others)
        await ping(connections)


async def test_broken_connection_of_scripts_is_replaced(
    topology: RunningStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broken connection goes back to the pool."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    async with open_connections(topology.url) as connections:
        scripts = RedisScripts(connections.commands)
        for _ in range(2):
            assert await scripts.read(("GET", "{gw}:x")) == [None]
            topology.execute("CLIENT", "KILL", "TYPE", "normal")
            async with open_connections(topology.url) as others:
                await ping(others)


async def test_pool_is_bounded(topology: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command waits for a connection, and fails after the pool's wait time."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    for seconds in (0.05, 20):
        monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", seconds)
        async with open_connections(topology.url) as connections:
            blocked = asyncio.create_task(block_on_pop(connections))
            while pause_unless(topology.execute("INFO", "clients")["blocked_clients"] == 1):
                await asyncio.sleep(0)
            scripts = RedisScripts(connections.commands)
            waiting = [asyncio.create_task(scripts.read(("GET", "{gw}:x"))) for _ in range(20)]
            if seconds < 1:
                failed = await asyncio.gather(*waiting, return_exceptions=True)
                assert {type(item) for item in failed} == {LedgerUnavailable}
            topology.execute("RPUSH", "{gw}:list", "a")
            await blocked
            if seconds > 1:
                assert await asyncio.gather(*waiting) == [[None]] * 20


async def test_waits_for_frozen_server_are_bounded(topology: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many requests as the pool has connections wait for their answers; others fail after the pool's wait time."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", 0.05)
    async with open_connections(topology.url) as connections:
        scripts = RedisScripts(connections.commands)
        await scripts.read(("GET", "{gw}:x"))
        topology.server.suspend()
        try:
            first = asyncio.create_task(scripts.read(("GET", "{gw}:x")))
            with pytest.raises(LedgerUnavailable):
                await asyncio.gather(*(scripts.read(("GET", "{gw}:x")) for _ in range(3)))
            assert not first.done()
        finally:
            topology.server.resume()
        assert await first == [None]


async def test_subscription(topology: RunningStore) -> None:
    """A subscription outlasts the command timeout, raises once it is broken, and can be opened again."""
    async with open_connections(topology.url, timeout=0.5) as connections:
        for seconds in (0.6, 0):
            async with await connections.open_pubsub() as subscription:
                await subscription.subscribe("{gw}:news")
                assert (await subscription.get_message(timeout=5) or {})["type"] == "subscribe"
                reading = asyncio.create_task(subscription.get_message(timeout=10))
                assert not (await asyncio.wait({reading}, timeout=seconds))[0]
                await connections.commands.execute_command("PUBLISH", "{gw}:news", "hello")
                assert (await reading or {})["data"] == b"hello"
                topology.execute("CLIENT", "KILL", "TYPE", "pubsub")
                with pytest.raises(UNAVAILABLE_ERRORS):
                    await subscription.get_message(timeout=5)


def test_reset_connections(topology: RunningStore) -> None:
    """Every error that uvloop raises for reset connections is in UNAVAILABLE_ERRORS, and leaves nothing behind."""

    async def call(connections: Connections, scripts: RedisScripts, proxy: Proxy, counts: Counter[str]) -> None:
        while proxy.resets < 50:
            with suppress(LedgerUnavailable):
                await scripts.read(("EVAL", INCREMENT, 1, "{gw}:count"), ("GET", "{gw}:count"))
                counts["done"] += 1
            with suppress(*UNAVAILABLE_ERRORS):
                await connections.commands.eval(INCREMENT, 1, "{gw}:count")
                counts["done"] += 1
            with suppress(*UNAVAILABLE_ERRORS):
                pipeline = connections.commands.pipeline(transaction=False)
                pipeline.execute_command("GET", "{gw}:count")
                await pipeline.execute()

    async def run(url: str, proxy: Proxy) -> None:
        counts: Counter[str] = Counter()
        async with open_connections(url) as connections:
            await ping(connections)
            proxy.reset_probability = 0.05
            scripts = RedisScripts(connections.commands)
            await asyncio.gather(*(call(connections, scripts, proxy, counts) for _ in range(40)))
            proxy.reset_probability = 0
            await asyncio.gather(*(ping(connections) for _ in range(80)), return_exceptions=True)
            assert await ping(connections) is None
            assert int(await connections.commands.execute_command("GET", "{gw}:count")) >= counts["done"] > 0

    with (
        run_thread_proxy(topology.server.port, seed=12) as proxy,
        announce_port(topology, proxy.port) as url,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(run(url, proxy))


async def test_frozen_cluster(cluster: RunningStore) -> None:
    """All commands to a frozen Cluster fail after one timeout, not one after the other."""
    async with open_connections(cluster.url, timeout=0.5) as connections:
        await ping(connections)
        cluster.server.suspend()
        try:
            async with asyncio.timeout(8):
                for _ in range(2):
                    failed = await asyncio.gather(*(ping(connections) for _ in range(40)), return_exceptions=True)
                    assert all(isinstance(item, UNAVAILABLE_ERRORS) for item in failed)
        finally:
            cluster.server.resume()
        while pause_unless(not isinstance(*await asyncio.gather(ping(connections), return_exceptions=True), Exception)):
            pass


async def test_redirected_pipeline(cluster: RunningStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A redirected pipeline needs no second connection."""
    monkeypatch.setattr(connections_module, "POOL_SIZE", 1)
    monkeypatch.setattr(connections_module, "POOL_WAIT_SECONDS", 0.1)
    moved = [MovedError(f"{key_slot(b'gw')} 127.0.0.1:1")]
    async with open_connections(cluster.url) as connections:
        await connections.commands.execute_command("SET", "{gw}:x", "1")
        parse = ClusterNode.parse_response

        async def parse_or_redirect(node: ClusterNode, connection: Any, command: str, **kwargs: Any) -> Any:
            answer = await parse(node, connection, command, **kwargs)
            if moved:
                raise moved.pop()
            return answer

        monkeypatch.setattr(ClusterNode, "parse_response", parse_or_redirect)
        assert await RedisScripts(connections.commands).read(("GET", "{gw}:x")) == [b"1"]
    assert moved == []


async def test_replaced_node(cluster: RunningStore) -> None:
    """After a pipeline has failed, the nodes are discovered again."""
    port = reserve_port()
    async with open_connections(cluster.url, timeout=0.5) as connections:
        scripts = RedisScripts(connections.commands)
        with announce_port(cluster, port):
            async with run_proxy(cluster.server, port):
                assert await scripts.read(("GET", "{gw}:replaced")) == [None]
        async with run_proxy(cluster.server, port, dropped=b"{gw}"):
            with pytest.raises(LedgerUnavailable):
                await scripts.read(("GET", "{gw}:replaced"))
            assert await scripts.read(("GET", "{gw}:replaced")) == [None]


async def expect_unavailable(url: str) -> None:
    async with open_connections(url) as connections:
        with pytest.raises(UNAVAILABLE_ERRORS):
            await ping(connections)
        with pytest.raises(LedgerUnavailable):
            await RedisScripts(connections.commands).read(("GET", "{gw}:x"))
        with pytest.raises(UNAVAILABLE_ERRORS):
            async with await connections.open_pubsub() as subscription:
                await subscription.subscribe("x")


async def expect_writable(url: str) -> None:
    async with open_connections(url) as connections:
        await connections.commands.set("k", "v")
        assert await connections.commands.get("k") == b"v"
        assert await RedisScripts(connections.commands).read(("GET", "k")) == [b"v"]


@pytest.mark.parametrize(
    "url",
    ["redis://127.0.0.1:1", "unix:///nowhere", "redis+sentinel://127.0.0.1:1/main", "redis+cluster://127.0.0.1:1"],
)
async def test_unreachable(url: str) -> None:
    await expect_unavailable(url)


async def test_passwords() -> None:
    """Passwords of the server and of Sentinel are used in any spelling; without the right one no command succeeds."""
    with (
        run_valkey("--requirepass", "a b/c@d:e", port=reserve_port()) as server,
        run_valkey(port=reserve_port()) as other,
        run_sentinel(other.port, "--requirepass", "own") as watching,
    ):
        await expect_writable(f"redis://:a%20b%2Fc%40d%3Ae@127.0.0.1:{server.port}/2")
        await expect_unavailable(f"redis://:wrong@127.0.0.1:{server.port}")
        address = f"redis+sentinel://127.0.0.1:{watching.port}/main/1"
        await expect_writable(f"{address}?sentinel_password=own")
        await expect_unavailable(address)
        await expect_unavailable(f"{address.replace('main', 'other')}?sentinel_password=own")
        assert RunningStore("", other).execute("INFO", "keyspace")["db1"]["keys"] == 1


async def test_failover() -> None:
    """After the primary fails, commands go to the replica that Sentinel promotes."""
    with (
        run_valkey("--repl-diskless-sync-delay", "0", port=reserve_port()) as old,
        run_valkey("--replicaof", "127.0.0.1", str(old.port), port=reserve_port()) as new,
        run_sentinel(old.port) as watching,
    ):
        replica, sentinel = RunningStore("", new), RunningStore("", watching)
        # A replica whose last answer is older than five periods of pings is not promoted.
        sentinel.execute("SENTINEL", "DEBUG", "info-period", "100", "ping-period", "500")
        sentinel.execute("SENTINEL", "SET", "main", "down-after-milliseconds", "200", "failover-timeout", "1000")
        while pause_unless(replica.execute("INFO", "replication")["master_link_status"] == "up"):
            pass
        while pause_unless(sentinel.execute("INFO", "sentinel")["master0"]["slaves"] == 1):
            pass
        async with open_connections(f"redis+sentinel://127.0.0.1:{watching.port}/main") as connections:
            scripts = RedisScripts(connections.commands)
            await connections.commands.set("k", "before")
            await scripts.read(("SET", "m", "before"))
            old.kill()
            while pause_unless(replica.execute("MGET", "k", "m") == [b"after", b"after"]):
                with suppress(*UNAVAILABLE_ERRORS):
                    await connections.commands.set("k", "after")
                with suppress(LedgerUnavailable):
                    await scripts.read(("SET", "m", "after"))


async def test_tls(tmp_path: Path, single: RunningStore) -> None:
    """Over TLS the server must present a trusted certificate; Sentinels name a primary with or without TLS."""
    trusted, context = create_certificate(tmp_path)
    port, sentinel_port = reserve_port(), reserve_port()
    with run_sentinel(port) as watching:
        async with run_proxy(watching, sentinel_port, context):
            for tls, scheme in ((context, "rediss"), (None, "redis")):
                async with run_proxy(single.server, port, tls):
                    address = f"{scheme}+sentinel://127.0.0.1:{sentinel_port}/main?sentinel_ssl=true"
                    await expect_writable(f"{address}&ssl_ca_certs={trusted}")
                    await expect_unavailable(address)
                    if tls:
                        await expect_writable(f"rediss://127.0.0.1:{port}?ssl_ca_certs={trusted}")
                        await expect_unavailable(f"rediss://127.0.0.1:{port}")
