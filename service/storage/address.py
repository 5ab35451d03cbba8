"""Where the store is, from a URL.

    redis://[user:password@]host[:port][/db]                      one server
    unix:///path/to/socket[?db=N]                                 one server on this machine
    redis+sentinel://[user:password@]host[:port],.../service[/db] the primary that Sentinel names
    redis+cluster://[user:password@]host[:port],...               a Cluster, found through any of its nodes

With `rediss` in the place of `redis` it is TLS, with `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`, `ssl_cert_reqs` and
`ssl_check_hostname` in the query. Sentinels have accounts of their own: `sentinel_username`, `sentinel_password`. With
`sentinel_ssl=true` they are reached over TLS too, by the same options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from msgspec import Struct

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
