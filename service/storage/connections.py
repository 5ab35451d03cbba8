"""Redis connections for each topology, and the check of the server."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from enum import StrEnum
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from msgspec import Struct
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.client import PubSub
from redis.asyncio.cluster import ClusterNode, ClusterPipeline
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.exceptions import ClusterDownError, ReadOnlyError, RedisClusterException, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.storage.redis import Keys, version_error

_SCHEME = re.compile(r"redis(?P<tls>s)?(\+(?P<kind>sentinel|cluster))?|unix")


_HOST = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?")


_TLS_FILES = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})


_CERT_REQS = frozenset({"none", "optional", "required"})


_SENTINEL_PORT = 26379


_PORT = 6379


class InvalidRedisUrl(ValueError):
    """The URL can't be used; the message says what it must be, and never repeats it."""


class Topology(StrEnum):
    """What answers behind the address."""

    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Credentials(Struct, frozen=True):
    """Who connects; None leaves it to the server's default user, or to no password."""

    username: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return "Credentials(...)"


class Address(Struct, frozen=True, kw_only=True):
    """A store: its hosts, or the path of a socket; `tls` and `sentinel_tls` are None without TLS, else its options."""

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    database: int = 0
    credentials: Credentials = Credentials()
    sentinel_credentials: Credentials = Credentials()
    tls: Mapping[str, str | bool] | None = None
    sentinel_tls: Mapping[str, str | bool] | None = None


def parse_url(url: str) -> Address:
    """Read a Redis URL. Raises InvalidRedisUrl."""
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise InvalidRedisUrl("must be a URL; special characters in a password are written as %XX") from None
    scheme = _SCHEME.fullmatch(parts.scheme)
    if not scheme:
        raise InvalidRedisUrl(
            "must be a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    userinfo, _, hosts = parts.netloc.rpartition("@")
    topology = Topology(scheme["kind"] or "single")
    sentinel, sentinel_ssl = Credentials(), False
    service = ""
    if parts.scheme == "unix":
        if hosts or not parts.path:
            raise InvalidRedisUrl("must be like unix:///path/to/socket")
        database = query.pop("db", "")
    else:
        service, database = _path(parts, topology)
    if topology is Topology.SENTINEL:
        sentinel = Credentials(query.pop("sentinel_username", None), query.pop("sentinel_password", None))
        sentinel_ssl = _flag(query, "sentinel_ssl") or False
    if not re.fullmatch(r"\d{0,4}", database, re.ASCII):
        raise InvalidRedisUrl("must name its database by a number")
    tls = _tls(query) if scheme["tls"] or sentinel_ssl else None
    if query or parts.fragment:
        raise InvalidRedisUrl("must have no fragment and no options but those of TLS and Sentinel")
    return Address(
        topology=topology,
        hosts=() if parts.scheme == "unix" else _hosts(hosts, topology),
        path=unquote(parts.path) if parts.scheme == "unix" else "",
        service=service,
        database=int(database or 0),
        credentials=_credentials(userinfo),
        sentinel_credentials=sentinel,
        tls=tls if scheme["tls"] else None,
        sentinel_tls=tls if sentinel_ssl else None,
    )


def masked(url: str) -> str:
    """A URL that `parse_url` takes, for people to read: its secrets are left out."""
    parts = urlsplit(url)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    query = [f"{name}={'***' if 'password' in name else value}" for name, value in parse_qsl(parts.query)]
    place = f"***@{hosts}" if userinfo else hosts
    return f"{parts.scheme}://{place}{parts.path}{'?' if query else ''}{'&'.join(query)}"


def _credentials(userinfo: str) -> Credentials:
    username, _, password = userinfo.partition(":")
    return Credentials(unquote(username) or None, unquote(password) or None)


def _hosts(text: str, topology: Topology) -> tuple[tuple[str, int], ...]:
    found = [_HOST.fullmatch(each) for each in text.split(",")]
    default = _SENTINEL_PORT if topology is Topology.SENTINEL else _PORT
    hosts = tuple((each["host"].strip("[]"), int(each["port"] or default)) for each in found if each)
    if len(hosts) < len(found) or any(not 0 < port < 1 << 16 for _, port in hosts):
        raise InvalidRedisUrl("must name its hosts as host or host:port")
    if topology is Topology.SINGLE and len(hosts) > 1:
        raise InvalidRedisUrl("must name one host; several need redis+sentinel:// or redis+cluster://")
    return hosts


def _path(parts: SplitResult, topology: Topology) -> tuple[str, str]:
    """The service and the database that the path names."""
    first, _, rest = parts.path.removeprefix("/").partition("/")
    if topology is Topology.SENTINEL:
        if not first:
            raise InvalidRedisUrl("must name the service that Sentinel watches, as in redis+sentinel://host/service")
        return unquote(first), rest
    if rest or (first and topology is Topology.CLUSTER):
        raise InvalidRedisUrl("must have no path but the number of a database, which a Cluster does not have")
    return "", first


def _tls(query: dict[str, str]) -> Mapping[str, str | bool]:
    """Take the options of TLS out of the query."""
    options: dict[str, str | bool] = {name: query.pop(name) for name in sorted(_TLS_FILES & query.keys())}
    if "ssl_cert_reqs" in query:
        options["ssl_cert_reqs"] = query.pop("ssl_cert_reqs")
        if options["ssl_cert_reqs"] not in _CERT_REQS:
            raise InvalidRedisUrl("must have none, optional or required as ssl_cert_reqs")
    if (check := _flag(query, "ssl_check_hostname")) is not None:
        options["ssl_check_hostname"] = check
    return options


def _flag(query: dict[str, str], name: str) -> bool | None:
    """Take a boolean out of the query; None if it is not there."""
    value = query.pop(name, None)
    if value not in {None, "true", "false"}:
        raise InvalidRedisUrl(f"must have true or false as {name}")
    return None if value is None else value == "true"


AWAY: tuple[type[Exception], ...] = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, ClusterDownError)
"""What a client raises while the store can't be reached or can't be written to."""


POOL_SIZE = 64


POOL_WAIT = 1.0
"""Seconds that a command waits for a connection when all are in use, before it raises one of AWAY."""


_LISTENING_PING = 15


_CLUSTER_OWN = 4
"""Connections that a Cluster's client needs for itself, to learn which node holds what."""


_IO = ("connect", "connect_check_health", "send_packed_command", "read_response", "can_read", "disconnect")


def _translating(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """A class of connections that raises a RedisError whatever the event loop raises.

    A connection that was reset raises RuntimeError on uvloop (MagicStack/uvloop#506), and EOFError or others elsewhere.
    Commands are packed before they come here, so that no fault of the gateway's own is taken for one of the network.
    """

    def translated(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return await method(*args, **kwargs)
            except RedisError:
                raise
            except Exception as error:
                raise RedisConnectionError(f"{type(error).__name__}: {error}") from error

        return call

    return type(kind.__name__, (kind,), {name: translated(getattr(kind, name)) for name in _IO})


_PLAIN, _TLS, _UNIX = (_translating(each) for each in (Connection, SSLConnection, UnixDomainSocketConnection))


_WATCHED, _WATCHED_TLS = (_translating(each) for each in (SentinelManagedConnection, SentinelManagedSSLConnection))


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
            self._sentinel = _sentinels(address, timeout)
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
            return place | {"connection_class": _WATCHED if address.tls is None else _WATCHED_TLS}
        if address.path:
            return place | {"path": address.path, "connection_class": _UNIX}
        host, port = address.hosts[0]
        return place | {"host": host, "port": port, "connection_class": _PLAIN if address.tls is None else _TLS}


def _sentinels(address: Address, timeout: float) -> Sentinel:
    """Clients of the Sentinels."""
    options = _options(address.sentinel_credentials, address.sentinel_tls, timeout) | {"socket_timeout": timeout}
    options["connection_class"] = _PLAIN if address.sentinel_tls is None else _TLS
    sentinel = Sentinel(())  # type: ignore[no-untyped-call] # redis-py's own
    sentinel.sentinels = [
        Redis.from_pool(ConnectionPool(host=host, port=port, **options)) for host, port in address.hosts
    ]
    return sentinel


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
        self._listening["connection_class"] = _PLAIN if address.tls is None else _TLS
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


_placed: ContextVar[bool] = ContextVar("placed", default=False)


class _BoundedCluster(RedisCluster):
    """A Cluster's client that waits for a connection when all are in use, where redis-py's own refuses at once."""

    def __init__(self, *, startup_nodes: list[ClusterNode], ssl: bool, socket_timeout: float, **options: Any) -> None:
        super().__init__(startup_nodes=startup_nodes, ssl=ssl, socket_timeout=socket_timeout, **options)
        secured: Any = _TLS if ssl else _PLAIN
        self.connection_kwargs["connection_class"] = secured  # of the nodes that are found
        for node in self.startup_nodes:
            node.connection_class = secured
        self._timeout = socket_timeout
        self._free = asyncio.Semaphore(POOL_SIZE)
        self._finding: asyncio.Task[RedisCluster] | None = None

    async def initialize(self, *args: Any, **kwargs: Any) -> RedisCluster:
        """Find the nodes, if that is due: in one attempt that all commands share, each for as long as its timeout.

        Else each would make an attempt of its own, one after the other, while a Cluster is away.
        """
        if not self._initialize:
            return self
        if self._finding is None or self._finding.done():
            self._finding = asyncio.create_task(super().initialize(*args, **kwargs))
            self._finding.add_done_callback(lambda found: found.cancelled() or found.exception())
        try:
            async with asyncio.timeout(2 * self._timeout):  # to connect, and to be answered
                return await asyncio.shield(self._finding)
        except TimeoutError:
            raise RedisTimeoutError("The nodes of the Cluster were not found in time.") from None
        except RedisError:
            raise
        except Exception as error:  # it takes nothing of the gateway's that could be wrong
            raise ClusterDownError(str(error)) from error

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        async with self.place():
            return await super().execute_command(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> _BoundedPipeline:
        del shard_hint
        return _BoundedPipeline(self, transaction)  # type: ignore[abstract] # redis-py's own

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A connection to use within the block, where what redis-py raises of a Cluster becomes a RedisError."""
        if _placed.get():  # a command of a pipeline that another node has to answer
            yield
            return
        try:
            async with asyncio.timeout(POOL_WAIT):
                await self._free.acquire()
        except TimeoutError:
            raise RedisConnectionError("No connection available.") from None
        within = _placed.set(True)
        try:
            await self._renew_closed()
            yield
        except RedisClusterException as error:
            raise ClusterDownError(str(error)) from error
        finally:
            _placed.reset(within)
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
        if self._finding:
            self._finding.cancel()
            await asyncio.wait([self._finding])
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


class _BoundedPipeline(ClusterPipeline):
    """Commands that are sent together, and wait for a connection as one."""

    cluster_client: _BoundedCluster

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        async with self.cluster_client.place():
            return await super().execute(raise_on_error, allow_redirections)


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
