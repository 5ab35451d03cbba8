"""What production refuses of settings that could be used, and what it takes with doubts.

Elsewhere than on a machine of one's own, whoever guesses or overhears a secret can spend the company's money.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any
from urllib.parse import urlsplit

from service.storage.connections import Address, parse_url

SHORTEST_ADMIN_TOKEN = 32
_FEWEST_CHARACTERS = 6
_FEWEST_BYTES = 16
"""Of 32 random bytes, about 30 differ: fewer than 16 do not come about by chance."""
_PRIVATE_DOMAINS = ("localhost", "local", "internal", "svc", "home.arpa")
_NEEDED = {
    "redis_url": "the embedded server is for development",
    "upstream_url": "the sandbox is for development",
    "secret_keys": "generated keys are for development",
    "admin_token": "a generated token is for development",
}
_TAKE_THE_RISK = "if the upstream has no TLS, GATEWAY_UPSTREAM_CLEARTEXT=allow takes the risk"
_NEW_KEY = "`openssl rand -base64 32` makes one"
_NEW_TOKEN = "`openssl rand -hex 32` makes one"  # noqa: S105 - says how one is made


class Cleartext(StrEnum):
    """Whether production may call an upstream in another network without TLS."""

    REFUSE = "refuse"
    ALLOW = "allow"


def refusals(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What makes settings unfit for production: the field, and what is wrong with it, without any secret.

    A field that is absent was faulty by itself, and one that is None was left out.
    """
    for field, why in _NEEDED.items():
        if values.get(field, "faulty") is None:
            yield field, f"must be given in production: {why}"
    if token := values.get("admin_token"):
        yield from _token(token)
    for place, key in enumerate(values.get("secret_keys") or (), start=1):
        if _is_typed(key):
            yield "secret_keys", f"must be random bytes in production, which number {place} is not: {_NEW_KEY}"
    if url := values.get("upstream_url"):
        yield from _upstream(url, values.get("upstream_cleartext"))
    if url := values.get("redis_url"):
        yield from _store(parse_url(url))


def doubts(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What production takes, and somebody should think about: the field, and why."""
    if values["log_level"] == "debug":
        yield "log_level", "is debug: many lines for each request, and of use only while somebody reads them"
    if values["upstream_cleartext"] is Cleartext.ALLOW and _in_clear(values["upstream_url"]):
        yield "upstream_url", "is called without TLS: whoever is on the way can read the user_keys and spend with them"
    address = parse_url(values["redis_url"])
    if not address.path and not all(_is_near(host) for host, _ in address.hosts):
        if address.tls is None:
            yield "redis_url", "has no TLS, which is well only in a private network: rediss:// has it"
        if _is_open(address):
            yield "redis_url", "has no password, which is well only in a private network"
    if address.tls and address.tls.get("ssl_cert_reqs") in {"none", "optional"}:
        yield "redis_url", "does not check the server's certificate: leave ssl_cert_reqs out"


def _token(token: str) -> Iterator[tuple[str, str]]:
    if len(token) < SHORTEST_ADMIN_TOKEN:
        yield "admin_token", f"must have at least {SHORTEST_ADMIN_TOKEN} characters in production"
    elif len(set(token)) < _FEWEST_CHARACTERS or _is_repeated(token.encode()):
        yield "admin_token", f"must not be one that can be guessed in production: {_NEW_TOKEN}"


def _upstream(url: str, cleartext: Cleartext | None) -> Iterator[tuple[str, str]]:
    if cleartext is Cleartext.REFUSE and _in_clear(url):
        yield "upstream_url", f"must be https:// in production, since every call carries a user_key: {_TAKE_THE_RISK}"


def _store(address: Address) -> Iterator[tuple[str, str]]:
    """Only of addresses that are surely public: behind the public name of a managed store is often a private one."""
    if any(ip is not None and ip.is_global for ip in (_ip(host) for host, _ in address.hosts)):
        if address.tls is None:
            yield "redis_url", "must be rediss:// in production, since its address is public"
        if _is_open(address):
            yield "redis_url", "must have a password in production, since its address is public"


def _is_open(address: Address) -> bool:
    return not address.credentials.password and not (address.tls and "ssl_certfile" in address.tls)


def _in_clear(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_near(parts.hostname or "")


def _is_near(host: str) -> bool:
    """Whether a host is this machine or in a private network, as far as its name tells: `10.0.0.1`, `store`."""
    ip = _ip(host)
    if ip is not None:
        return not ip.is_global
    name = host.rstrip(".").lower()
    return "." not in name or name.endswith(tuple(f".{domain}" for domain in _PRIVATE_DOMAINS))


def _ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _is_typed(key: bytes) -> bool:
    """Whether a key was made up by somebody: a text, or a pattern. Chance makes no key a text."""
    return len(set(key)) < _FEWEST_BYTES or (key.isascii() and key.decode().isprintable())


def _is_repeated(text: bytes) -> bool:
    """Whether it is some shorter text several times over."""
    return text in (text + text)[1:-1]
