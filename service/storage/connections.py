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
from redis.cluster import get_node_name
from redis.exceptions import ClusterDownError, RedisClusterException, RedisError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.storage.redis import Keys, find_version_error, is_upgradable, read_data_version

_SCHEME_PATTERN = re.compile(r"redis(?P<tls>s)?(\+(?P<kind>sentinel|cluster))?|unix")
_HOST_PATTERN = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?")
_TLS_FILE_OPTIONS = frozenset({"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"})


class InvalidRedisUrl(ValueError):
    """The URL can't be used. The message describes what it must be, without repeating it."""


class Topology(StrEnum):
    SINGLE = "single"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


class Credentials(Struct, frozen=True):
    """Name and password; None for the server's default user, and for no password."""

    username: str | None = None
    password: str | None = None

    def __repr__(self) -> str:
        return "Credentials(...)"


class RedisAddress(Struct, frozen=True, kw_only=True):
    """The address of a store: its hosts, or the path of a socket. Options of TLS are None without TLS."""

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    sentinel_service: str = ""
    database: int = 0
    credentials: Credentials = Credentials()
    sentinel_credentials: Credentials = Credentials()
    tls_options: Mapping[str, str | bool] | None = None
    sentinel_tls_options: Mapping[str, str | bool] | None = None


def parse_redis_url(url: str) -> RedisAddress:
    """Parse the URL of a store. Raises InvalidRedisUrl.

    redis://[user:password@]host[:port][/db]                      one server
    unix:///path/to/socket[?db=N]                                 one server on this machine
    redis+sentinel://[user:password@]host[:port],.../service[/db] the primary that Sentinel names
    redis+cluster://[user:password@]host[:port],...               a Cluster, found through any of its nodes

    With `rediss` instead of `redis` it is TLS, with `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and
    `ssl_check_hostname` in the query. Sentinels have accounts of their own, `sentinel_username` and
    `sentinel_password`; with `sentinel_ssl=true` they use TLS with the same options.
    """
    try:
        parts = urlsplit(url)
        query = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    except ValueError:
        raise InvalidRedisUrl("must be a URL; special characters in a password are written as %XX") from None
    scheme = _SCHEME_PATTERN.fullmatch(parts.scheme)
    if not scheme:
        raise InvalidRedisUrl(
            "must be a URL that starts with redis://, rediss://, unix://, redis+sentinel:// or redis+cluster://"
        )
    userinfo, _, hosts = parts.netloc.rpartition("@")
    username, _, password = userinfo.partition(":")
    topology = Topology(scheme["kind"] or "single")
    sentinel, sentinel_ssl = Credentials(), False
    service = ""
    if parts.scheme == "unix":
        if hosts or not parts.path:
            raise InvalidRedisUrl("must be like unix:///path/to/socket")
        database = query.pop("db", "")
    else:
        service, database = _parse_path(parts, topology)
    if topology is Topology.SENTINEL:
        sentinel = Credentials(query.pop("sentinel_username", None), query.pop("sentinel_password", None))
        sentinel_ssl = _pop_bool(query, "sentinel_ssl") or False
    if not re.fullmatch(r"\d{0,4}", database, re.ASCII):
        raise InvalidRedisUrl("must name its database by a number")
    tls = _pop_tls_options(query) if scheme["tls"] or sentinel_ssl else None
    if query or parts.fragment:
        raise InvalidRedisUrl("must have no fragment and no options but those of TLS and Sentinel")
    return RedisAddress(
        topology=topology,
        hosts=() if parts.scheme == "unix" else _parse_hosts(hosts, topology),
        path=unquote(parts.path) if parts.scheme == "unix" else "",
        sentinel_service=service,
        database=int(database or 0),
        credentials=Credentials(unquote(username) or None, unquote(password) or None),
        sentinel_credentials=sentinel,
        tls_options=tls if scheme["tls"] else None,
        sentinel_tls_options=tls if sentinel_ssl else None,
    )


def redact_url(url: str) -> str:
    """Return a URL that `parse_redis_url` takes, without its secrets."""
    parts = urlsplit(url)
    userinfo, _, hosts = parts.netloc.rpartition("@")
    query = [f"{name}={'***' if 'password' in name else value}" for name, value in parse_qsl(parts.query)]
    authority = f"***@{hosts}" if userinfo else hosts
    return f"{parts.scheme}://{authority}{parts.path}{'?' if query else ''}{'&'.join(query)}"


def _parse_hosts(text: str, topology: Topology) -> tuple[tuple[str, int], ...]:
    matches = [_HOST_PATTERN.fullmatch(entry) for entry in text.split(",")]
    default = 26379 if topology is Topology.SENTINEL else 6379
    hosts = tuple((match["host"].strip("[]"), int(match["port"] or default)) for match in matches if match)
    if len(hosts) < len(matches) or any(not 0 < port < 1 << 16 for _, port in hosts):
        raise InvalidRedisUrl("must name its hosts as host or host:port")
    if topology is Topology.SINGLE and len(hosts) > 1:
        raise InvalidRedisUrl("must name one host; several need redis+sentinel:// or redis+cluster://")
    return hosts


def _parse_path(parts: SplitResult, topology: Topology) -> tuple[str, str]:
    """Return the service and the database."""
    first, _, rest = parts.path.removeprefix("/").partition("/")
    if topology is Topology.SENTINEL:
        if not first:
            raise InvalidRedisUrl("must name the service that Sentinel watches, as in redis+sentinel://host/service")
        return unquote(first), rest
    if rest or (first and topology is Topology.CLUSTER):
        raise InvalidRedisUrl("must have no path but the number of a database, which a Cluster does not have")
    return "", first


def _pop_tls_options(query: dict[str, str]) -> Mapping[str, str | bool]:
    options: dict[str, str | bool] = {name: query.pop(name) for name in sorted(_TLS_FILE_OPTIONS & query.keys())}
    if "ssl_cert_reqs" in query:
        options["ssl_cert_reqs"] = query.pop("ssl_cert_reqs")
        if options["ssl_cert_reqs"] not in {"none", "optional", "required"}:
            raise InvalidRedisUrl("must have none, optional or required as ssl_cert_reqs")
    if (check := _pop_bool(query, "ssl_check_hostname")) is not None:
        options["ssl_check_hostname"] = check
    return options


def _pop_bool(query: dict[str, str], name: str) -> bool | None:
    value = query.pop(name, None)
    if value not in {None, "true", "false"}:
        raise InvalidRedisUrl(f"must have true or false as {name}")
    return None if value is None else value == "true"


POOL_SIZE = 64
POOL_WAIT_SECONDS = 1.0
"""Limit of the wait for a connection when all are in use; then a command raises a ConnectionError."""
_PUBSUB_OPTIONS: dict[str, Any] = {"socket_timeout": None, "health_check_interval": 15}
"""Subscriptions use pings (every so many seconds) instead of a timeout."""
_CLUSTER_OWN_CONNECTIONS = 4
"""Connections that a Cluster's client needs for itself, to discover the nodes."""
_FAILED_NODE = "last_failed_node_name"
"""The attribute of an error of the network that names the node; redis-py sets it for single commands only."""
_IO_METHODS = ("connect", "connect_check_health", "send_packed_command", "read_response", "can_read", "disconnect")


def _with_translated_errors(kind: type[AbstractConnection]) -> type[AbstractConnection]:
    """Return a class of connections that raises a RedisError whatever the event loop raises.

    A connection that was reset raises RuntimeError on uvloop (MagicStack/uvloop#506), and EOFError or others elsewhere.
    Commands were packed before, so that no error of the gateway's own is taken for one of the network.
    """

    def translated(method: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def call(connection: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                try:
                    return await method(connection, *args, **kwargs)
                except RedisError:
                    raise
                except Exception as error:
                    raise RedisConnectionError(f"{type(error).__name__}: {error}") from error
            except (RedisConnectionError, RedisTimeoutError) as error:
                if not isinstance(connection, UnixDomainSocketConnection):
                    vars(error)[_FAILED_NODE] = get_node_name(connection.host, connection.port)
                raise

        return call

    return type(kind.__name__, (kind,), {name: translated(getattr(kind, name)) for name in _IO_METHODS})


_PLAIN, _TLS, _UNIX, _SENTINEL_PLAIN, _SENTINEL_TLS = map(
    _with_translated_errors,
    (Connection, SSLConnection, UnixDomainSocketConnection, SentinelManagedConnection, SentinelManagedSSLConnection),
)


class Connections(ABC):
    """The open clients of one store; the owner closes them.

    `commands` sends each command at most once: one without an answer may have been carried out, and only the caller
    knows whether sending it again is harmless. redis-py by default sends it up to eleven times. Answers are bytes.
    """

    commands: Redis | RedisCluster

    @abstractmethod
    async def open_pubsub(self) -> PubSub:
        """Open a subscription, which the caller closes. It waits for messages without a time limit.

        A broken connection raises a RedisError instead of reconnecting silently: messages were missed, and only the
        caller can read what they were about. It then opens another subscription.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections, including those of subscriptions."""


def connect(url: str, *, timeout: float) -> Connections:
    """Create clients for the store at a URL, which connect when they are first used.

    `timeout` (seconds) bounds connecting and the answer to each command. Raises InvalidRedisUrl.
    """
    address = parse_redis_url(url)
    kind = _ClusterConnections if address.topology is Topology.CLUSTER else _PrimaryConnections
    return kind(address, timeout)


class _PrimaryConnections(Connections):
    """Clients of one server, found by its address or by Sentinel."""

    def __init__(self, address: RedisAddress, timeout: float) -> None:
        self._sentinel: Sentinel | None = None
        options = _connection_options(address.credentials, address.tls_options, timeout) | {"db": address.database}
        bounds = {"max_connections": POOL_SIZE, "timeout": POOL_WAIT_SECONDS}
        pool: ConnectionPool
        pubsub_pool: ConnectionPool
        if address.topology is Topology.SENTINEL:
            options["connection_class"] = _SENTINEL_PLAIN if address.tls_options is None else _SENTINEL_TLS
            self._sentinel = _create_sentinel(address, timeout)
            source = address.sentinel_service, self._sentinel
            pool = _BlockingSentinelPool(*source, **options | bounds)  # type: ignore[no-untyped-call] # redis-py's own
            pubsub_pool = SentinelConnectionPool(*source, **options | _PUBSUB_OPTIONS)  # type: ignore[no-untyped-call]
        else:
            if address.path:
                options |= {"path": address.path, "connection_class": _UNIX}
            else:
                options["host"], options["port"] = address.hosts[0]
            pool = BlockingConnectionPool(**options | bounds)
            pubsub_pool = ConnectionPool(**options | _PUBSUB_OPTIONS)
        self.commands = Redis.from_pool(pool)
        self._pubsub_client = Redis.from_pool(pubsub_pool)

    async def open_pubsub(self) -> PubSub:
        return self._pubsub_client.pubsub()

    async def aclose(self) -> None:
        await self.commands.aclose()
        await self._pubsub_client.aclose()
        if self._sentinel:
            await self._sentinel.aclose()


def _create_sentinel(address: RedisAddress, timeout: float) -> Sentinel:
    options = _connection_options(address.sentinel_credentials, address.sentinel_tls_options, timeout)
    sentinel = Sentinel(())  # type: ignore[no-untyped-call] # redis-py's own
    sentinel.sentinels = [
        Redis.from_pool(ConnectionPool(host=host, port=port, **options)) for host, port in address.hosts
    ]
    return sentinel


class _BlockingSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """Connections to the primary that Sentinel names; a command waits for one when all are in use."""


class _ClusterConnections(Connections):
    """Clients of a Cluster. A published message arrives on all nodes, so that one subscription is enough."""

    commands: _BoundedCluster

    def __init__(self, address: RedisAddress, timeout: float) -> None:
        self._options = _connection_options(address.credentials, address.tls_options, timeout)
        self.commands = _BoundedCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in address.hosts],
            max_connections=POOL_SIZE + _CLUSTER_OWN_CONNECTIONS,
            ssl=address.tls_options is not None,
            **self._options,
        )
        self._pubsub_clients: dict[str, Redis] = {}

    async def open_pubsub(self) -> PubSub:
        await self.commands.initialize()
        node = self.commands.get_random_primary_node()
        if node.name not in self._pubsub_clients:
            pool = ConnectionPool(host=node.host, port=node.port, **self._options | _PUBSUB_OPTIONS)
            self._pubsub_clients[node.name] = Redis.from_pool(pool)
        return self._pubsub_clients[node.name].pubsub()

    async def aclose(self) -> None:
        await self.commands.aclose()
        for node in self._pubsub_clients.values():
            await node.aclose()


_holds_slot: ContextVar[bool] = ContextVar("holds_slot", default=False)


class _BoundedCluster(RedisCluster):
    """A Cluster's client that waits for a connection when all are in use; redis-py's own refuses at once."""

    def __init__(
        self, *, startup_nodes: list[ClusterNode], connection_class: Any, socket_timeout: float, **options: Any
    ) -> None:
        super().__init__(startup_nodes=startup_nodes, socket_timeout=socket_timeout, **options)
        self.connection_kwargs["connection_class"] = connection_class  # of the nodes that are discovered
        for node in self.startup_nodes:
            node.connection_class = connection_class
        self._timeout = socket_timeout
        self._slots = asyncio.Semaphore(POOL_SIZE)
        self._initialization: asyncio.Task[RedisCluster] | None = None
        self._failed_node: str | None = None

    async def initialize(self, *args: Any, **kwargs: Any) -> RedisCluster:
        """Discover the nodes if that is due, in one attempt that all commands share within their own timeouts.

        Otherwise each command would make its own attempt, one after the other, while a Cluster is away. The node that
        failed last is tried last: while it is frozen, it would cost the whole timeout.
        """
        if not self._initialize:
            return self
        if self._initialization is None or self._initialization.done():
            kwargs["last_failed_node_name"] = self._failed_node
            self._initialization = asyncio.create_task(super().initialize(*args, **kwargs))
            self._initialization.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            async with asyncio.timeout(2 * self._timeout):  # to connect, and to be answered
                return await asyncio.shield(self._initialization)
        except TimeoutError:
            raise RedisTimeoutError("The nodes of the Cluster were not found in time.") from None
        except RedisError:
            raise
        except Exception as error:  # no input of the gateway can cause it
            raise ClusterDownError(str(error)) from error

    async def execute_command(self, *args: Any, **kwargs: Any) -> Any:
        async with self.acquire_slot():
            return await super().execute_command(*args, **kwargs)

    def pipeline(self, transaction: Any = None, shard_hint: Any = None) -> _BoundedPipeline:
        del shard_hint
        return _BoundedPipeline(self, transaction)  # type: ignore[abstract] # redis-py's own

    @asynccontextmanager
    async def acquire_slot(self) -> AsyncIterator[None]:
        """Hold a connection within the block; redis-py's exceptions of a Cluster become RedisErrors."""
        if _holds_slot.get():  # a command of a pipeline that was redirected to another node
            yield
            return
        try:
            async with asyncio.timeout(POOL_WAIT_SECONDS):
                await self._slots.acquire()
        except TimeoutError:
            raise RedisConnectionError("No connection available.") from None
        token = _holds_slot.set(True)
        try:
            await self._renew_closed_connections()
            yield
        except RedisClusterException as error:
            raise ClusterDownError(str(error)) from error
        except (RedisConnectionError, RedisTimeoutError) as error:
            self._forget_node(vars(error).get(_FAILED_NODE))
            raise
        finally:
            _holds_slot.reset(token)
            self._slots.release()

    def _forget_node(self, name: str | None) -> None:
        """Let the nodes be discovered again, which redis-py does not do for pipelines (redis/redis-py#3130)."""
        if name:
            self.nodes_manager.move_node_to_end_of_cached_nodes(name)
            self._failed_node = name
            self._initialize = True

    async def _renew_closed_connections(self) -> None:
        """Renew idle connections that the server has closed, which redis-py's other pools check before use."""
        for node in self.get_nodes():
            for connection in tuple(node._free):  # noqa: SLF001 - redis-py does not offer its idle connections
                if connection.is_connected and await connection.can_read():
                    connection.mark_for_reconnect()  # type: ignore[no-untyped-call] # redis-py's own

    async def aclose(self) -> None:
        """Close the connections to all nodes, which redis-py leaves open if a new discovery was due."""
        if self._initialization:
            self._initialization.cancel()
            await asyncio.wait([self._initialization])
        await super().aclose()
        await self.nodes_manager.aclose()
        await self.nodes_manager.aclose("startup_nodes")


class _BoundedPipeline(ClusterPipeline):
    """A pipeline that waits for a connection once."""

    cluster_client: _BoundedCluster

    async def execute(self, raise_on_error: bool = True, allow_redirections: bool = True) -> list[Any]:
        async with self.cluster_client.acquire_slot():
            return await super().execute(raise_on_error, allow_redirections)


def _connection_options(
    credentials: Credentials, tls: Mapping[str, str | bool] | None, timeout: float
) -> dict[str, Any]:
    """Return the options of every connection.

    RESP2, since with RESP3 redis-py begins each connection with a handshake that only its own vendor's server answers.
    """
    return {
        "username": credentials.username,
        "password": credentials.password,
        "connection_class": _PLAIN if tls is None else _TLS,
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "protocol": 2,
        **(tls or {}),
    }


_MIN_REDIS_VERSION = (6, 2)
"""Has `ZRANGE` with `BYSCORE`, and scripts that read the clock before they write."""


class ServerCheck(Struct, frozen=True):
    """The result of a check. With `errors` the store can't be used; with `warnings` it may lose acknowledged data.

    `server` is its name and version, empty if it did not report them. `is_upgradable`: the first process converts it.
    """

    server: str = ""
    is_upgradable: bool = False
    errors: Sequence[str] = ()
    warnings: Sequence[str] = ()


async def check_server(url: str, prefix: str, *, timeout: float) -> ServerCheck:  # noqa: ASYNC109 - for each connection too
    """Check a store and the data under a prefix within `timeout` seconds, without writing. Raises InvalidRedisUrl."""
    connections = connect(url, timeout=timeout)
    try:
        async with asyncio.timeout(timeout):
            infos = await _read_server_info(connections)
            data_version = await read_data_version(connections.commands, Keys(prefix))
    except TimeoutError:
        return ServerCheck(errors=[f"did not answer within {timeout:g} s"])
    except RedisError as error:
        return ServerCheck(errors=[_describe_error(error)])
    finally:
        await connections.aclose()
    errors = [error for info in infos for error in _find_errors(info)]
    warnings = [warning for info in infos for warning in _find_warnings(info)]
    if is_upgradable(data_version):
        warnings.append("has data of the former version, which the first process converts: stop all others before")
    elif (version_error := find_version_error(data_version)) and not errors:
        errors = [f"can't be used: {version_error.reason}"]
    return ServerCheck(
        _server_name(infos[0]), is_upgradable(data_version), list(dict.fromkeys(errors)), list(dict.fromkeys(warnings))
    )


def describe_os_error(error: OSError) -> str:
    """Return why a connection failed, in the operating system's words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message}"
    # Asyncio and OpenSSL replace the system's words by their own, and OpenSSL its numbers too.
    number = type(error) is not ssl.SSLError and not isinstance(error, socket.gaierror) and error.errno
    return os.strerror(number) if number else error.strerror or str(error)


def _describe_error(error: Exception) -> str:
    if isinstance(error, MasterNotFoundError):
        return "can't be reached: no Sentinel names a primary of the service"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, OSError):
        return f"can't be reached: {describe_os_error(cause)}"
    return f"can't be used: {str(error).rstrip('.') or type(error).__name__}"


async def _read_server_info(connections: Connections) -> Sequence[Mapping[str, Any]]:
    """Return the INFO of each primary."""
    if isinstance(connections.commands, RedisCluster):
        infos = await connections.commands.execute_command("INFO", "everything", target_nodes=RedisCluster.PRIMARIES)
        return [infos] if "redis_version" in infos else list(infos.values())
    return [await connections.commands.info("everything")]


def _server_name(info: Mapping[str, Any]) -> str:
    if "valkey_version" in info:
        return f"Valkey {info['valkey_version']}"
    return f"Redis {info['redis_version']}" if "redis_version" in info else ""


def _find_errors(info: Mapping[str, Any]) -> Iterator[str]:
    version = tuple(map(int, re.findall(r"\d+", str(info.get("redis_version", "")))[:2]))
    if version and version < _MIN_REDIS_VERSION:
        yield f"must be Redis {'.'.join(map(str, _MIN_REDIS_VERSION))} or newer, or Valkey: it is {_server_name(info)}"
    if info.get("role") == "slave":
        yield "must be a primary: it is a replica, which takes no writes; redis+sentinel:// finds the primary"


def _find_warnings(info: Mapping[str, Any]) -> Iterator[str]:
    policy = info.get("maxmemory_policy", "noeviction")
    if policy != "noeviction":
        yield f"drops what tenants spent when its memory is full: set maxmemory-policy noeviction, not {policy}"
    if info.get("aof_enabled") == 0:
        yield "keeps no append-only file, so that a crash loses what it acknowledged: set appendonly yes"
