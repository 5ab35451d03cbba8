"""Types of settings, and their parsers.

Parsers raise ValueError with the expected format, never with the text, which may be a secret.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from pathlib import Path

from service.crypto import parse_secret_key
from service.domain.hosts import IpNetwork, parse_network
from service.domain.tenants import Operator, OperatorRole

_SIZE = re.compile(r"(\d{1,12}) ?(?:([KMG])iB)?")
_SIZE_SHIFTS = {None: 0, "K": 10, "M": 20, "G": 30}


class Environment(StrEnum):
    DEVELOPMENT = "development"
    PRODUCTION = "production"


class Role(StrEnum):
    ALL = "all"
    API = "api"
    WORKER = "worker"


class Switch(StrEnum):
    ON = "on"
    OFF = "off"


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Cleartext(StrEnum):
    """Whether production may call an upstream in another network without TLS."""

    REFUSE = "refuse"
    ALLOW = "allow"


def parse_choice(options: type[StrEnum]) -> Callable[[str], StrEnum]:
    def parse(text: str) -> StrEnum:
        try:
            return options(text)
        except ValueError:
            raise ValueError(f"must be {' or '.join(options)}") from None

    return parse


def parse_int(minimum: int, maximum: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not minimum <= int(text) <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def parse_float(minimum: float, maximum: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise ValueError(f"must be a number from {minimum:g} to {maximum:g}")
        return value

    return parse


def parse_size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    value = int(match[1]) << _SIZE_SHIFTS[match[2]] if match else 0
    if not 1 << 10 <= value <= 1 << 30:
        raise ValueError("must be a number of bytes, such as 33554432 or 32 MiB, from 1 KiB to 1 GiB")
    return value


def parse_folder(text: str) -> Path:
    if "\0" in text:
        raise ValueError("must be the path of a folder")
    return Path(text)


def parse_pattern(pattern: str, expected: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"must be {expected}")
        return text

    return parse


parse_host = parse_pattern(r"[A-Za-z0-9_.:-]+", "a host name or an IP address to listen on")
parse_key_prefix = parse_pattern(r"[A-Za-z0-9._-]{1,32}", "1 to 32 letters, digits, dots, dashes or underscores")
parse_printable = parse_pattern(r"[!-~]+", "printable ASCII without spaces")


def parse_secret_keys(text: str) -> tuple[bytes, ...]:
    keys = []
    for position, key in enumerate(re.findall(r"[^\s,]+", text), start=1):
        try:
            keys.append(parse_secret_key(key))
        except ValueError as error:
            raise ValueError(
                f"must be base64 of 32 bytes each, separated by commas: number {position} {error}"
            ) from None
    return tuple(keys)


ADMIN = "admin"
"""The name of the operator with the admin token."""
_OPERATOR = re.compile(rf"([a-z0-9][a-z0-9._-]{{0,62}}):({'|'.join(OperatorRole)}):([0-9A-Fa-f]{{64}})")


def parse_operators(text: str) -> tuple[Operator, ...]:
    operators: dict[bytes, Operator] = {}
    for position, entry in enumerate(text.split(","), start=1):
        match = _OPERATOR.fullmatch(entry.strip())
        digest = bytes.fromhex(match[3]) if match else b""
        if not match or match[1] == ADMIN or digest in operators:
            raise ValueError(
                "must be name:role:hash of each token, separated by commas, with the role admin or read-only and the "
                f"SHA-256 in hex: number {position} is wrong, repeats a token, or has the name {ADMIN}"
            )
        operators[digest] = Operator(match[1], OperatorRole(match[2]), digest)
    return tuple(operators.values())


def parse_networks(text: str) -> tuple[IpNetwork, ...]:
    networks = [parse_network(entry.strip()) for entry in text.split(",")]
    known = tuple(network for network in networks if network and network.prefixlen)
    if len(known) < len(networks):
        raise ValueError("must be addresses and networks such as 10.1.2.3,fd00::/8, and not all addresses")
    return known


def parse_domains(text: str) -> tuple[str, ...]:
    domains = tuple(domain.strip().lower() for domain in text.split(","))
    if not all(re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", domain) for domain in domains):
        raise ValueError("must be domains such as internal,corp.example")
    return domains


def parse_catalogue(text: str) -> Mapping[str, str]:
    catalogue: dict[str, str] = {}
    for pair in text.split(","):
        name, _, word = (part.strip() for part in pair.partition("="))
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or not word or name in catalogue:
            raise ValueError("must be pairs such as general=通用模型,anime=…, each name once and in lower case")
        catalogue[name] = word
    if "general" not in catalogue:
        raise ValueError("must have a pair for general, the default of a task")
    return catalogue
