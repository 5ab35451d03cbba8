"""Checks of settings for production: what is unfit, and what is questionable."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from service.domain.hosts import DEFAULT_PRIVATE_DOMAINS, is_cleartext, is_private_host, is_public, parse_ip
from service.domain.tenants import OperatorRole
from service.setting_types import Cleartext, Role
from service.storage.connections import RedisAddress, parse_redis_url

MIN_TOKEN_LENGTH = 32
_MIN_GUESSES = 10**26
"""The least estimate of 4,400 for 32 random hexadecimal digits was 10^26.5; that for phrases is mostly below 10^26."""
_MAX_ESTIMATED_CHARACTERS = 72
_LIKELY_WORDS = ("imaging", "gateway", "admin", "operator", "production", "secret", "token")
_REQUIRED_IN_PRODUCTION = {
    "redis_url": "the embedded server is for development",
    "upstream_url": "the sandbox is for development",
    "secret_keys": "generated keys are for development",
}
_WILDCARDS = frozenset({"0.0.0.0", "::", "0"})
_CLEARTEXT_HINT = "if the upstream has no TLS, GATEWAY_UPSTREAM_CLEARTEXT=allow takes the risk"
_NEW_KEY_HINT = "`openssl rand -base64 32` makes one"
_NEW_TOKEN_HINT = "`openssl rand -hex 32` makes one"  # noqa: S105 - a command, not a token


def production_errors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the fields that are unfit for production, each with an error without any secret.

    An invalid field is absent from `values`, a missing one is None.
    """
    for field, reason in _REQUIRED_IN_PRODUCTION.items():
        if values.get(field, "faulty") is None:
            yield field, f"must be given in production: {reason}"
    if not has_admin(values):
        yield "admin_token", "must be given in production, or an admin in GATEWAY_OPERATORS"
    for field in ("admin_token", "metrics_token"):
        if token := values.get(field):
            yield from ((field, error) for error in _token_errors(token))
    for position, key in enumerate(values.get("secret_keys") or (), start=1):
        if _is_text(key) or _is_guessable(key.decode("latin-1")):
            yield "secret_keys", f"must be random bytes in production, which number {position} is not: {_NEW_KEY_HINT}"
    if (url := values.get("upstream_url")) and (error := cleartext_error(values, url)):
        yield "upstream_url", error
    if url := values.get("redis_url"):
        yield from _redis_errors(parse_redis_url(url))


def production_warnings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield fields with questionable values, each with a warning."""
    if values["log_level"] == "debug":
        yield "log_level", "is debug: many lines per request, useful only while debugging"
    if warning := cleartext_warning(values, values["upstream_url"]):
        yield "upstream_url", warning
    address = parse_redis_url(values["redis_url"])
    if not address.path and not all(is_private_host(host, values["private_domains"]) for host, _ in address.hosts):
        if address.tls_options is None:
            yield "redis_url", "has no TLS, which is acceptable only in a private network: use rediss://"
        if _has_no_authentication(address):
            yield "redis_url", "has no password, which is acceptable only in a private network"
    if address.tls_options and address.tls_options.get("ssl_cert_reqs") in {"none", "optional"}:
        yield "redis_url", "does not check the server's certificate: leave ssl_cert_reqs out"
    if (url := values["traces_url"]) and _is_cleartext(values, url):
        yield "traces_url", "has no TLS: anyone on the network path can read the traces and the collector's credentials"
    yield from _listener_warnings(values)


def _listener_warnings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values["role"] is Role.WORKER:  # which takes no tokens
        return
    if {values["host"], values["ops_host"]} <= _WILDCARDS:
        yield "ops_host", "is every address, as GATEWAY_HOST: only a firewall can keep tenants off the operators' port"
    if values.get("trusted_proxies"):
        return
    for field in ("host", "ops_host"):
        if not _is_loopback(values[field]):
            yield (
                field,
                "is open to the network without TLS: let a proxy end TLS, and name it in GATEWAY_TRUSTED_PROXIES",
            )
            return


def _is_loopback(host: str) -> bool:
    ip = parse_ip(host)
    return host == "localhost" or (ip is not None and ip.is_loopback)


def has_admin(values: Mapping[str, Any]) -> bool:
    """Return whether an operator can make changes, none is needed, or a setting that may name one is invalid."""
    if values.get("role") is Role.WORKER or values.get("admin_token", "faulty") or "operators" not in values:
        return True
    return any(operator.role is OperatorRole.ADMIN for operator in values["operators"] or ())


def _is_cleartext(values: Mapping[str, Any], url: str) -> bool:
    return is_cleartext(url, values.get("private_domains", DEFAULT_PRIVATE_DOMAINS))


def cleartext_error(values: Mapping[str, Any], url: str) -> str | None:
    """Return why production does not call an upstream at a base URL, None if it does."""
    if values.get("upstream_cleartext") is not Cleartext.REFUSE or not _is_cleartext(values, url):
        return None
    return f"must be https:// in production, since every call carries a user_key: {_CLEARTEXT_HINT}"


def cleartext_warning(values: Mapping[str, Any], url: str) -> str | None:
    """Return what production risks with a base URL that is called without TLS, None if it is not."""
    if values["upstream_cleartext"] is not Cleartext.ALLOW or not _is_cleartext(values, url):
        return None
    return "has no TLS: anyone on the network path can read the user_keys and spend with them"


def _token_errors(token: str) -> Iterator[str]:
    if len(token) < MIN_TOKEN_LENGTH:
        yield f"must have at least {MIN_TOKEN_LENGTH} characters in production"
    elif _is_guessable(token):
        yield f"must not be one that can be guessed in production: {_NEW_TOKEN_HINT}"


def _redis_errors(address: RedisAddress) -> Iterator[tuple[str, str]]:
    # Only for literal addresses: the public name of a managed store often has a private address.
    if any(ip is not None and is_public(ip) for ip in (parse_ip(host) for host, _ in address.hosts)):
        if address.tls_options is None:
            yield "redis_url", "must be rediss:// in production, since its address is public"
        if _has_no_authentication(address):
            yield "redis_url", "must have a password in production, since its address is public"


def _has_no_authentication(address: RedisAddress) -> bool:
    return not address.credentials.password and not (address.tls_options and "ssl_certfile" in address.tls_options)


def _is_text(key: bytes) -> bool:
    """Return whether a key is text, which random bytes never are."""
    return key.isascii() and key.decode().isprintable()


def _is_guessable(secret: str) -> bool:
    """Return whether a secret is found with fewer guesses of words, patterns and characters than the minimum."""
    from zxcvbn import zxcvbn  # noqa: PLC0415 - loading its lists of words takes 0.1 s, in production only

    estimate = zxcvbn(secret[:_MAX_ESTIMATED_CHARACTERS], user_inputs=_LIKELY_WORDS)
    return bool(estimate["guesses"] < _MIN_GUESSES)
