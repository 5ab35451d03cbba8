"""Stores of real servers for the chaos program, in each topology, and the harm it does to them.

All servers write each command to their append-only file before they answer it, so that a killed one that is started
again has every write it acknowledged. Replication is asynchronous, and a failover can lose acknowledged writes:

- A primary that is killed has sent each write to its replicas about when it answered. A write is lost if the process
  ends between the two, within microseconds.
- A primary that is suspended until another one is promoted executes the commands that it had received before it notices
  its demotion. It acknowledges those writes, and drops them. Suspend it for less than DOWN_AFTER_MS where nothing may
  be lost.
- A primary that is started again while another one is promoted does the same. Wait until the store is writable first.

`min-replicas-to-write 1` narrows both under Sentinel, as OPERATIONS.md recommends: without a connected replica no
write is accepted. It waits for no replica. A master of the Cluster has one replica, and after its failover none until
the old master is back: with the option it would accept no writes for that time, so it is not set there.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from redis.crc import key_slot
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.chaos.servers import PASSWORD, SENTINEL_PASSWORD, UNREADY_ERRORS, Server, wait_for
from tests.support.network import create_certificate, reserve_port
from tests.support.proxy import Proxy

TOPOLOGIES = ("single", "sentinel", "sentinel-tls", "cluster")
DOWN_AFTER_MS = 1000
"""A server without an answer for so long is replaced."""
_KEY_PREFIX = "gw"
_SERVICE = "main"
_DURABLE = ('save ""', "appendonly yes", "appendfsync always", "repl-diskless-sync-delay 0")


class Store(ABC):
    """The servers of a topology. `url` is the value of GATEWAY_REDIS_URL."""

    url: str

    def __init__(self, servers: Sequence[Server]) -> None:
        self.servers = servers
        self.processes = list(servers)
        self._killed: list[Server] = []

    @property
    def settings(self) -> Mapping[str, str]:
        """The settings of a gateway that uses it; the URL names the file to trust."""
        return {"GATEWAY_REDIS_URL": self.url}

    @abstractmethod
    async def find_primary(self) -> Server | None:
        """Return the running server that accepts the gateways' writes; None during a failover."""

    @abstractmethod
    async def is_complete(self) -> bool:
        """Return whether all servers run, agree on the primary and have its data. May raise a RedisError."""

    async def start(self) -> None:
        await asyncio.gather(*(server.start() for server in self.servers))

    async def kill_primary(self) -> None:
        """Kill the primary, after the end of a failover in progress."""
        self._kill(await self._wait_for_primary())

    async def kill_all(self) -> None:
        """Kill all servers with data, the primaries first."""
        are_primaries = await asyncio.gather(*(server.has_role("master") for server in self.servers))
        for server, _ in sorted(zip(self.servers, are_primaries, strict=True), key=lambda pair: not pair[1]):
            self._kill(server)

    async def suspend(self) -> None:
        (await self._wait_for_primary()).suspend()

    async def resume(self) -> None:
        for server in self.servers:
            server.resume()

    async def restart(self) -> None:
        """Start all dead servers on their data; wait until the store is complete and accepts writes.

        They start in the order in which they were killed, so that a primary is there before a replica of it, which may
        lack its last writes, could be promoted.
        """
        await self.resume()
        while self._killed:
            await self._killed[0].start()
            del self._killed[0]
        await self.wait_complete()

    async def wait_complete(self) -> None:
        await wait_for(self.is_complete, "a complete store")
        await self.wait_writable()

    async def wait_writable(self) -> None:
        async def is_writable() -> bool:
            return bool(await self.execute("SET", f"{{{_KEY_PREFIX}}}/writable", "1", "PX", "1"))

        await wait_for(is_writable, "a write")

    async def execute(self, *command: str | bytes | int) -> Any:
        """Run a command on the primary. Raises RedisError."""
        if (primary := await self.find_primary()) is None:
            raise RedisConnectionError("There is no primary.")
        return await primary.execute(*command)

    async def _wait_for_primary(self) -> Server:
        primary: Server | None = None

        async def has_primary() -> bool:
            nonlocal primary
            primary = await self.find_primary()
            return primary is not None

        await wait_for(has_primary, "a primary")
        assert primary
        return primary

    def close(self) -> None:
        """End all processes."""
        for server in self.processes:
            server.kill()

    def _kill(self, server: Server) -> None:
        server.kill()
        if server not in self._killed:
            self._killed.append(server)


class SingleStore(Store):
    """One server, behind a proxy in the event loop."""

    def __init__(self, server: Server, proxy: Proxy) -> None:
        super().__init__([server])
        self.proxy = proxy
        self.url = f"redis://127.0.0.1:{proxy.port}"

    async def find_primary(self) -> Server | None:
        (server,) = self.servers
        return server if server.is_running else None

    async def is_complete(self) -> bool:
        return self.servers[0].is_running


class SentinelStore(Store):
    """A primary and two replicas, watched by three sentinels, which are not harmed."""

    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Server], *, trusted: Path | None) -> None:
        super().__init__(servers)
        self.sentinels = sentinels
        self.processes += sentinels
        addresses = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in sentinels)
        self.url = f"redis+sentinel://{addresses}/{_SERVICE}"
        if trusted:
            options = f"sentinel_password={SENTINEL_PASSWORD}&sentinel_ssl=true&ssl_ca_certs={trusted}"
            self.url = f"rediss+sentinel://:{PASSWORD}@{addresses}/{_SERVICE}?{options}"

    async def start(self) -> None:
        await super().start()
        for sentinel in self.sentinels:
            await sentinel.start()
            # Shortens the time until it discovers the others and corrects the role of a restarted server.
            await sentinel.execute("SENTINEL", "DEBUG", "info-period", "1000", "publish-period", "500")

    async def find_primary(self) -> Server | None:
        states = await asyncio.gather(*map(self._read_state, self.sentinels), return_exceptions=True)
        named = Counter(state["port"] for state in states if isinstance(state, dict))
        by_port = {server.port: server for server in self.servers}
        for port, _ in named.most_common():
            if await by_port[port].has_role("master"):
                return by_port[port]
        return None

    async def is_complete(self) -> bool:
        primary = await self.find_primary()
        for server in self.servers:
            if server is not primary and not await server.has_role("slave"):
                return False
        for sentinel in self.sentinels:
            state = await self._read_state(sentinel)
            replicas = await sentinel.execute("SENTINEL SLAVES", _SERVICE)
            if {replica["flags"] for replica in replicas} != {"slave"} or len(replicas) != len(self.servers) - 1:
                return False
            if state["flags"] != "master" or state["num-other-sentinels"] != len(self.sentinels) - 1:
                return False
        return primary is not None

    async def _read_state(self, sentinel: Server) -> Any:
        return await sentinel.execute("SENTINEL MASTER", _SERVICE)


class ClusterStore(Store):
    """A Cluster of three masters with a replica each."""

    _MASTERS = 3

    def __init__(self, servers: Sequence[Server], bus_ports: Sequence[int]) -> None:
        super().__init__(servers)
        self._bus_ports = bus_ports
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{server.port}" for server in servers)

    async def start(self) -> None:
        await super().start()
        addresses = list(zip(self.servers, self._bus_ports, strict=True))
        for number, (server, _) in enumerate(addresses):
            if number < self._MASTERS:
                first, end = (16_384 * index // self._MASTERS for index in (number, number + 1))
                await server.execute("CLUSTER", "ADDSLOTSRANGE", first, end - 1)
            await server.execute("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            for other, bus_port in addresses[:number]:
                await server.execute("CLUSTER", "MEET", "127.0.0.1", other.port, bus_port)
        for master, replica in zip(self.servers, self.servers[self._MASTERS :], strict=False):
            await self._attach(replica, await master.execute("CLUSTER", "MYID"))

    async def _attach(self, replica: Server, master_id: bytes) -> None:
        async def is_attached() -> bool:
            return bool(await replica.execute("CLUSTER", "REPLICATE", master_id))

        await wait_for(is_attached, "the replica of a master")

    async def find_primary(self) -> Server | None:
        """Return the newest of the masters that claim the slot of the gateways' keys."""
        slot = key_slot(_KEY_PREFIX.encode())
        nodes = await asyncio.gather(*map(self._read_node, self.servers))
        claims = [
            (int(node["epoch"]), index)
            for index, node in enumerate(nodes)
            if node and any(int(first) <= slot <= int(last) for first, last in node["slots"])
        ]
        return self.servers[max(claims)[1]] if claims else None

    async def is_complete(self) -> bool:
        has_replica = 0
        for server in self.servers:
            state = await server.execute("CLUSTER INFO")
            nodes = (await server.execute("CLUSTER NODES")).values()
            if state["cluster_state"] != "ok" or any("fail" in node["flags"] for node in nodes):
                return False
            if int(state["cluster_known_nodes"]) != len(self.servers):
                return False
            if await server.has_role("master"):
                has_replica += (await server.execute("INFO", "replication"))["connected_slaves"] > 0
            elif not await server.has_role("slave"):
                return False
        return has_replica == self._MASTERS

    async def _read_node(self, server: Server) -> Any:
        """Return the entry of a server for itself; None if it does not run."""
        with suppress(*UNREADY_ERRORS):
            nodes = (await server.execute("CLUSTER NODES")).values()
            return next(node for node in nodes if "myself" in node["flags"])
        return None


def _create_sentinel_store(folder: Path, *, has_tls: bool) -> SentinelStore:
    trusted = create_certificate(folder)[0] if has_tls else None
    config = [*_DURABLE, "min-replicas-to-write 1", *([f"masterauth {PASSWORD}"] if has_tls else [])]
    primary = Server(folder / "server-0", config, has_tls=has_tls)
    config.append(f"replicaof 127.0.0.1 {primary.port}")
    replicas = [Server(folder / f"server-{number}", config, has_tls=has_tls) for number in (1, 2)]
    watch = [
        f"sentinel monitor {_SERVICE} 127.0.0.1 {primary.port} 2",
        f"sentinel down-after-milliseconds {_SERVICE} {DOWN_AFTER_MS}",
        f"sentinel failover-timeout {_SERVICE} 2000",
        f"sentinel parallel-syncs {_SERVICE} 2",
    ]
    if has_tls:
        watch += [f"sentinel auth-pass {_SERVICE} {PASSWORD}", f"sentinel sentinel-pass {SENTINEL_PASSWORD}"]
    names = [folder / f"sentinel-{number}" for number in range(3)]
    sentinels = [Server(name, watch, is_sentinel=True, has_tls=has_tls) for name in names]
    return SentinelStore([primary, *replicas], sentinels, trusted=trusted)


def _create_cluster_store(folder: Path) -> ClusterStore:
    config = [*_DURABLE, "cluster-enabled yes", f"cluster-node-timeout {DOWN_AFTER_MS}"]
    bus_ports = [reserve_port() for _ in range(6)]
    servers = [
        Server(folder / f"node-{number}", [*config, f"cluster-port {port}"]) for number, port in enumerate(bus_ports)
    ]
    return ClusterStore(servers, bus_ports)


@asynccontextmanager
async def run_store(topology: str, folder: Path) -> AsyncIterator[Store]:
    """Run the servers of one of TOPOLOGIES until the block ends, with their data and logs in an existing folder."""
    async with AsyncExitStack() as opened:
        store: Store
        if topology == "cluster":
            store = _create_cluster_store(folder)
        elif topology == "single":
            server = Server(folder / "server", _DURABLE)
            proxy = Proxy(server.port)
            await opened.enter_async_context(proxy.serve())
            store = SingleStore(server, proxy)
        else:
            store = _create_sentinel_store(folder, has_tls=topology == "sentinel-tls")
        opened.callback(store.close)
        await store.start()
        await store.wait_complete()
        yield store
