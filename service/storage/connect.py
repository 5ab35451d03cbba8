"""Open clients of the store, whatever is behind its URL: one server, Sentinel or a Cluster.

redis-py sends a command up to eleven times by default, even after a timeout, when it may have been carried out already.
These clients send it once.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelConnectionPool
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, ReadOnlyError, RedisClusterException
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.storage.address import Address, Credentials, Topology, parse_url

AWAY: tuple[type[Exception], ...] = (
    RedisConnectionError,
    RedisTimeoutError,
    ReadOnlyError,
    ClusterDownError,
    RedisClusterException,
)
"""What a client raises while the store can't be reached or can't be written to."""

POOL_SIZE = 64
POOL_WAIT = 1.0
"""Seconds that a command waits for a connection when all are in use, before it raises one of AWAY."""
_LISTENING_PING = 15
_CLUSTER_OWN = 4
"""Connections that a Cluster's client needs for itself, to learn which node holds what."""


class Connections(ABC):
    """The open clients of one store, for their owner to close.

    `commands` is for scripts and reads. It sends each command at most once: one that was not answered may have been
    carried out, and only the caller knows whether sending it again is harmless. Answers are bytes.
    """

    commands: Redis | RedisCluster

    @abstractmethod
    async def subscriber(self) -> PubSub:
        """A new subscription, for the caller to close; it waits for messages as long as it takes.

        A connection that breaks raises one of AWAY instead of being mended silently: messages were missed, and only
        the caller can look at what they would have told. Then ask for another subscription.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections, those of subscriptions too."""


def connect(url: str, *, timeout: float) -> Connections:
    """Clients for the store at a URL; they connect when they are first used.

    `timeout`, in seconds, bounds connecting, and the answer to each command. Raises InvalidRedisUrl.
    """
    address = parse_url(url)
    return _Cluster(address, timeout) if address.topology is Topology.CLUSTER else _Primary(address, timeout)


class _Primary(Connections):
    """One server, named by its address or by Sentinel."""

    def __init__(self, address: Address, timeout: float) -> None:
        self._sentinel: Sentinel | None = None
        if address.topology is Topology.SENTINEL:
            own = _options(address.sentinel_credentials, None, timeout) | {"socket_timeout": timeout}
            self._sentinel = Sentinel(address.hosts, sentinel_kwargs=own)  # type: ignore[no-untyped-call] # redis-py's own
        commands = self._place(address) | _options(address.credentials, address.tls, timeout)
        commands |= {"socket_timeout": timeout, "max_connections": POOL_SIZE, "timeout": POOL_WAIT}
        listening = self._place(address) | _listening(address, timeout)
        if self._sentinel:
            self.commands = Redis.from_pool(_BlockingSentinelPool(address.service, self._sentinel, **commands))
            self._listening = Redis.from_pool(_SentinelPool(address.service, self._sentinel, **listening))
        else:
            self.commands = Redis.from_pool(BlockingConnectionPool(**commands))
            self._listening = Redis.from_pool(ConnectionPool(**listening))

    async def subscriber(self) -> PubSub:
        return self._listening.pubsub()

    async def aclose(self) -> None:
        await self.commands.aclose()
        await self._listening.aclose()
        if self._sentinel:
            await self._sentinel.aclose()

    @staticmethod
    def _place(address: Address) -> dict[str, Any]:
        """What the pool needs to know of the server's whereabouts."""
        place: dict[str, Any] = {"db": address.database}
        if address.topology is Topology.SENTINEL:
            return place | {"ssl": address.tls is not None}
        if address.path:
            return place | {"path": address.path, "connection_class": UnixDomainSocketConnection}
        host, port = address.hosts[0]
        secured = SSLConnection if address.tls is not None else Connection
        return place | {"host": host, "port": port, "connection_class": secured}


class _SentinelPool(SentinelConnectionPool):
    """Connections to the primary that Sentinel names."""

    def __init__(self, service: str, sentinel: Sentinel, **options: Any) -> None:
        super().__init__(service, sentinel, **options)  # type: ignore[no-untyped-call] # redis-py's own


class _BlockingSentinelPool(_SentinelPool, BlockingConnectionPool):
    """Connections to the primary that Sentinel names, waited for when all are in use."""


class _Cluster(Connections):
    """A Cluster. A published message arrives on all of its nodes, so that one of them is enough to listen to."""

    commands: _BoundedCluster

    def __init__(self, address: Address, timeout: float) -> None:
        self.commands = _BoundedCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            max_connections=POOL_SIZE + _CLUSTER_OWN,
            socket_timeout=timeout,
            ssl=address.tls is not None,
            **_options(address.credentials, address.tls, timeout),
        )
        self._listening = _listening(address, timeout)
        self._listening["connection_class"] = SSLConnection if address.tls is not None else Connection
        self._nodes: dict[str, Redis] = {}

    async def subscriber(self) -> PubSub:
        await self.commands.initialize()
        node = self.commands.get_random_primary_node()
        if node.name not in self._nodes:
            pool = ConnectionPool(host=node.host, port=node.port, **self._listening)
            self._nodes[node.name] = Redis.from_pool(pool)
        return self._nodes[node.name].pubsub()

    async def aclose(self) -> None:
        await self.commands.aclose()
        for node in self._nodes.values():
            await node.aclose()


class _BoundedCluster(RedisCluster):
    """A Cluster's client that waits for a connection when all are in use, where redis-py's own refuses at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._free = asyncio.Semaphore(POOL_SIZE)

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        try:
            async with asyncio.timeout(POOL_WAIT):
                await self._free.acquire()
        except TimeoutError:
            raise RedisConnectionError("No connection available.") from None
        try:
            await self._renew_closed()
            return await super().execute_command(*args, **kwargs)
        finally:
            self._free.release()

    async def _renew_closed(self) -> None:
        """Have idle connections renewed that the other side has closed.

        The pools of other clients look before they lend one. Here a command would be sent into it, and fail.
        """
        for node in self.get_nodes():
            for connection in tuple(node._free):  # noqa: SLF001 - redis-py does not offer its idle connections
                if connection.is_connected and await connection.can_read():
                    connection.mark_for_reconnect()  # type: ignore[no-untyped-call] # redis-py's own

    async def aclose(self) -> None:
        """Close the connections to all nodes, which redis-py leaves open if it was about to look for the nodes anew."""
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


def _options(credentials: Credentials, tls: Mapping[str, str | bool] | None, timeout: float) -> dict[str, Any]:
    """What all connections have in common.

    RESP2, since with RESP3 redis-py begins each connection with a handshake that only its own vendor's server answers.
    """
    return {
        "username": credentials.username,
        "password": credentials.password,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        **(tls or {}),
    }


def _listening(address: Address, timeout: float) -> dict[str, Any]:
    """What connections have that wait for messages; a ping now and then tells whether somebody is still there."""
    options = _options(address.credentials, address.tls, timeout)
    return options | {"socket_timeout": None, "health_check_interval": _LISTENING_PING}
