"""Rules for hosts and addresses: which are public, which private, and which are never called."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from urllib.parse import urlsplit

from msgspec import Struct

IpAddress = IPv4Address | IPv6Address
IpNetwork = IPv4Network | IPv6Network
DEFAULT_PRIVATE_DOMAINS = ("home.arpa", "internal", "local", "localhost", "svc")
_PRIVATE = tuple(
    ip_network(network)
    for network in (
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind carrier-grade NAT
        "127.0.0.0/8",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "::1/128",
        "fc00::/7",
    )
)
"""Addresses of this machine and of private networks; most other addresses that are not public lead nowhere."""
HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9._-]*[a-z0-9])?")
_DESTINATION = re.compile(r"(?:\[(?P<ip>[^]]*:[^]]*)\]|(?P<place>[^:/]+|[^/]+/[0-9]+))(?::(?P<port>[1-9][0-9]{0,4}))?")
_BASE_URL_RULE = "must be a URL such as http://host or https://host/path, without credentials, query or fragment"
_MAX_PORT = 65_535
_WIDEST_PRIVATE_PREFIX = 7  # of fc00::/7
WEB_PORT, WEB_PORT_TLS = 80, 443
WEB_PORTS = frozenset({WEB_PORT, WEB_PORT_TLS})
_NON_PUBLIC_IPV4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # behind carrier-grade NAT; also the metadata service of one cloud
        "127.0.0.0/8",
        "168.63.129.16/32",  # public range, but the host agent of another cloud
        "169.254.0.0/16",  # link-local, with the metadata services of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",  # for documentation, as the two further down
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
_GLOBAL_IPV6 = IPv6Network("2000::/3")
"""All allocated addresses. Loopback, mapped, unique local, link-local, site-local and multicast lie outside."""
_NON_PUBLIC_IPV6 = tuple(
    IPv6Network(network)
    for network in (
        "2001::/23",  # for protocols, with Teredo among them
        "2001:db8::/32",  # for documentation, as the last
        "2002::/16",  # 6to4: leads to an IPv4 address
        "3fff::/20",
    )
)
_NAT64 = IPv6Network("64:ff9b::/96")
"""Embeds an IPv4 address in the last 32 bits; common in networks without IPv4."""
_METADATA = tuple(
    ip_network(network)
    for network in (
        "169.254.0.0/16",  # link-local: the metadata services of most clouds, and of their containers
        "100.100.100.200/32",  # Alibaba
        "168.63.129.16/32",  # the host agent of Azure
        "192.0.0.192/32",  # Oracle, formerly
        "fd00:ec2::/32",  # Amazon
        "fd20:ce::254/128",  # Google
        "fd00:c1::a9fe:a9fe/128",  # Oracle
        "fd00:42::42/128",  # Scaleway
        "fd00:a9fe:a9fe::1/128",  # Akamai
        "fe80::/10",  # link-local, with OpenStack's
    )
)
"""Services that give credentials of this machine to every client on it."""
_EMBEDDING = (_NAT64, IPv6Network("64:ff9b:1::/48"), IPv6Network("::/96"), IPv6Network("::ffff:0:0/96"))
"""Networks with an IPv4 address in the last 32 bits; the second is for translators of one's own."""


def is_public(ip: IpAddress) -> bool:
    """Return whether an address is public and does not embed or tunnel to a private one."""
    if isinstance(ip, IPv4Address):
        return not any(ip in network for network in _NON_PUBLIC_IPV4)
    if ip in _NAT64:
        return is_public(IPv4Address(ip.packed[-4:]))
    return ip in _GLOBAL_IPV6 and not any(ip in network for network in _NON_PUBLIC_IPV6)


def is_metadata(ip: IpAddress) -> bool:
    """Return whether an address belongs to a cloud's metadata service, also if an IPv6 address embeds it."""
    if isinstance(ip, IPv6Address):
        embedded = IPv4Address(ip.packed[-4:]) if any(ip in network for network in _EMBEDDING) else ip.sixtofour
        if embedded is not None and is_metadata(embedded):
            return True
    return any(ip in network for network in _METADATA)


def is_cleartext(url: str, private_domains: Sequence[str]) -> bool:
    """Return whether calls of a URL are readable in other networks."""
    return urlsplit(url).scheme == "http" and not is_private_host(url_address(url)[0], private_domains)


def is_private_host(host: str, private_domains: Sequence[str]) -> bool:
    """Return whether a host is this machine or in a private network, judged by its address or name."""
    ip = parse_ip(host)
    if ip is not None:
        return any(ip in network for network in _PRIVATE)
    name = host.rstrip(".").lower()
    return "." not in name or f".{name}".endswith(tuple(f".{domain}" for domain in private_domains))


def url_address(url: str) -> tuple[str, int]:
    """Return the host, in lower case and without brackets, and the port of a valid HTTP URL."""
    parts = urlsplit(url)
    default_port = WEB_PORT_TLS if parts.scheme == "https" else WEB_PORT
    return parts.hostname or "", default_port if parts.port is None else parts.port


def url_origin(url: str) -> str:
    """Return scheme, host and port of a valid HTTP URL: two of one origin lead to the same server."""
    host, port = url_address(url)
    return f"{urlsplit(url).scheme}://{host}:{port}"


def parse_base_url(text: str) -> str:
    """Return a base URL without a trailing slash. Raises ValueError, which does not repeat the text."""
    try:
        parts = urlsplit(text)
        host, _ = (parts.hostname or "").removesuffix("."), parts.port  # reading the port validates it
        if not HOST_NAME.fullmatch(host):
            IPv6Address(host)  # raises ValueError
    except ValueError:
        raise ValueError(_BASE_URL_RULE) from None
    is_plain = re.fullmatch(r"[!-~]+", text) and "@" not in parts.netloc and "?" not in text and "#" not in text
    if not is_plain or parts.scheme not in {"http", "https"}:
        raise ValueError(_BASE_URL_RULE)
    ip = parse_ip(host)
    if ip and is_metadata(ip):
        raise ValueError("must not be the address of a metadata service")
    return text.rstrip("/")


def parse_ip(host: str) -> IpAddress | None:
    """Return the address that a host is, in every spelling that resolvers accept; None for a name.

    0x7f000001, 2130706433, 127.1 and ::ffff:127.0.0.1 are 127.0.0.1.
    """
    text = host.removesuffix(".")
    with suppress(ValueError):
        ip = ip_address(text)
        return (isinstance(ip, IPv6Address) and ip.ipv4_mapped) or ip
    with suppress(OSError, ValueError):
        return IPv4Address(socket.inet_aton(text))
    return None


class Destination(Struct, frozen=True):
    """A host or the addresses of a network, at one port, or without it at those of HTTP and HTTPS."""

    place: str | IpNetwork
    port: int | None = None

    def __str__(self) -> str:
        return str(self.place) if self.port is None else f"{self.place}:{self.port}"

    def has_port(self, port: int) -> bool:
        return port in WEB_PORTS if self.port is None else port == self.port

    @property
    def network(self) -> IpNetwork | None:
        return None if isinstance(self.place, str) else self.place

    def has_address(self, ip: IpAddress) -> bool:
        return self.network is not None and ip in self.network


def allows_url(destinations: Iterable[Destination], url: str) -> bool:
    """Return whether host and port of a valid HTTP URL are among the destinations."""
    host, port = url_address(url)
    ip = parse_ip(host)
    return any(
        entry.has_port(port) and (entry.place == host or (ip is not None and entry.has_address(ip)))
        for entry in destinations
    )


def allows_address(destinations: Iterable[Destination], ip: IpAddress, port: int) -> bool:
    """Return whether an address that is not public may be called: only a network among the destinations permits it."""
    return any(entry.has_address(ip) and entry.has_port(port) for entry in destinations)


def parse_destination(entry: str) -> Destination | None:
    """Return the destination of a text such as hooks.example:8443, 10.0.0.0/8 or [fd00::1]:8080, None if invalid."""
    match = _DESTINATION.fullmatch(entry)
    text = (match["ip"] or match["place"]) if match else entry
    port = int(match["port"]) if match and match["port"] else None
    place = parse_network(text) or text.lower()
    is_valid = (port or 0) <= _MAX_PORT and (not isinstance(place, str) or HOST_NAME.fullmatch(place))
    return Destination(place, port) if is_valid else None


def wide_network_warnings(entries: Iterable[str]) -> Iterator[str]:
    """Yield a warning for each destination that is wider than any private network."""
    for destination in map(parse_destination, entries):
        if destination and (network := destination.network) and network.prefixlen < _WIDEST_PRIVATE_PREFIX:
            yield f"has {network}, which is wider than any private network: name the networks that are meant"


def parse_network(text: str) -> IpNetwork | None:
    with suppress(ValueError):
        return ip_network(text)
    ip = parse_ip(text)
    return ip_network(ip) if ip else None
