"""The settings: read from the environment, checked, described."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints
from urllib.parse import urlsplit

from msgspec import Struct

from service.crypto import parse_secret_key
from service.domain.tasks import DEFAULT_CATALOGUE, Catalogue
from service.storage.connections import RedisAddress, parse_redis_url
from service.telemetry import tracing

FILE_SUFFIX = "_FILE"


_MAX_FILE_BYTES = 65_536


_INVALID_TEXT = "\0"


_SERVICE_LINK = re.compile(r"SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+")


_SIZE = re.compile(r"(\d{1,12}) ?(?:([KMG])iB)?")


_SIZE_SHIFTS = {None: 0, "K": 10, "M": 20, "G": 30}


def read_variable(environ: Mapping[str, str], name: str) -> str | None:
    """The text of a variable, from itself or from the file it names; None if it is not given or empty.

    Raises ValueError that says what is wrong.
    """
    direct, file = environ.get(name, ""), environ.get(name + FILE_SUFFIX, "")
    if direct and file:
        raise ValueError(f"and {name}{FILE_SUFFIX} are both given: keep one")
    if not file:
        return direct or None
    try:
        with Path(file).open("rb") as opened:
            text = opened.read(_MAX_FILE_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"can't be read from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"can't be read from {file}: it is not UTF-8 text") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"can't be read from {file}: it is larger than {_MAX_FILE_BYTES} bytes")
    return text.strip() or None


def variable_source(environ: Mapping[str, str], name: str) -> str | None:
    """Where the text of a variable that can be read comes from: the name of its file, or "" for itself; None if it is
    not given or empty.
    """
    return environ.get(name + FILE_SUFFIX, "") if read_variable(environ, name) else None


def unknown_variables(environ: Mapping[str, str], prefix: str, names: Sequence[str]) -> Iterator[str]:
    """A fault for each variable with the prefix that is none of `names`, with the one that was probably meant."""
    known = [
        suffix for name in names for suffix in (name.removeprefix(prefix), name.removeprefix(prefix) + FILE_SUFFIX)
    ]
    for name in sorted(environ):
        own = name.removeprefix(prefix)
        if own == name or own in known:
            continue
        near = difflib.get_close_matches(own, known, n=1)
        if _SERVICE_LINK.fullmatch(own):
            hint = ": Kubernetes sets it for a service of that name; set enableServiceLinks to false"
        elif near:
            hint = f": did you mean {prefix}{near[0]}?"
        else:
            hint = ""
        yield f"{name} is not a setting{hint}"


def parse_choice(options: type[StrEnum]) -> Callable[[str], StrEnum]:
    """One of the values of an enumeration."""

    def parse(text: str) -> StrEnum:
        try:
            return options(text)
        except ValueError:
            raise ValueError(f"must be {' or '.join(options)}") from None

    return parse


def parse_int(minimum: int, maximum: int) -> Callable[[str], int]:
    """A whole number in a range."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not minimum <= int(text) <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return int(text)

    return parse


def parse_float(minimum: float, maximum: float) -> Callable[[str], float]:
    """A number in a range."""

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
    """A number of bytes, as such or in KiB, MiB or GiB."""
    found = _SIZE.fullmatch(text)
    value = int(found[1]) << _SIZE_SHIFTS[found[2]] if found else 0
    if not 1 << 10 <= value <= 1 << 30:
        raise ValueError("must be a number of bytes, such as 33554432 or 32 MiB, from 1 KiB to 1 GiB")
    return value


def parse_folder(text: str) -> Path:
    """The path of a folder, which need not be there."""
    if "\0" in text:
        raise ValueError("must be the path of a folder")
    return Path(text)


def parse_host(text: str) -> str:
    """A host name or an IP address to listen on."""
    if not re.fullmatch(r"[A-Za-z0-9_.:-]+", text):
        raise ValueError("must be a host name or an IP address to listen on")
    return text


def parse_key_prefix(text: str) -> str:
    """A prefix of Redis keys, which stands in braces there."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,32}", text):
        raise ValueError("must be 1 to 32 letters, digits, dots, dashes or underscores")
    return text


def parse_http_url(text: str) -> str:
    """The base address of an HTTP service, without a slash at its end."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise ValueError("must be a URL with a valid host and port") from None
    if parts.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be a URL such as http://host or https://host/path")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("must be a URL without credentials, query or fragment")
    return text.rstrip("/")


def parse_printable(text: str) -> str:
    """A secret that goes into a header or a form field."""
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("must be printable ASCII without spaces")
    return text


def parse_secret_keys(text: str) -> tuple[bytes, ...]:
    """Secret keys, separated by commas or blanks."""
    keys = []
    for place, each in enumerate(re.findall(r"[^\s,]+", text), start=1):
        try:
            keys.append(parse_secret_key(each))
        except ValueError as error:
            raise ValueError(f"must be base64 of 32 bytes each, separated by commas: number {place} {error}") from None
    return tuple(keys)


def parse_catalogue(text: str) -> Mapping[str, str]:
    """Names with the upstream's words for them."""
    found: dict[str, str] = {}
    for pair in text.split(","):
        name, _, word = (part.strip() for part in pair.partition("="))
        if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) or not word or name in found:
            raise ValueError("must be pairs such as general=通用模型,anime=…, each name once and in lower case")
        found[name] = word
    if "general" not in found:
        raise ValueError("must have a pair for general, the default of a task")
    return found


def expected_format(parse: Callable[[str], object]) -> str:
    """What a parser accepts, in the words that follow "must be" in its own complaint."""
    try:
        parse(_INVALID_TEXT)
    except ValueError as error:
        return str(error).removeprefix("must be ").partition(": ")[0]
    raise TypeError(f"{parse} accepts anything")


class Scope(StrEnum):
    """Where a setting matters; elsewhere it may be given, and does nothing."""

    ANYWHERE = "anywhere"
    API = "where requests are answered"
    DEVELOPMENT = "in development"


class Variable(Struct, frozen=True):
    """How a field is read: `default` is text like any other, `otherwise` says what happens without one."""

    parse: Callable[[str], object]
    default: str | None
    description: str
    default_note: str = "none"
    is_secret: bool = False
    scope: Scope = Scope.ANYWHERE


class Setting(Struct, frozen=True, kw_only=True):
    """A setting as it is told to people.

    `default` could be given as it is if it is `literal`, else it says what happens without one; `accepts` goes on from
    "must be".
    """

    name: str
    field: str
    default: str
    is_literal: bool
    description: str
    expected_format: str
    is_secret: bool
    scope: Scope


def describe_settings(prefix: str, variables: Mapping[str, Variable]) -> Sequence[Setting]:
    """The settings that fields are filled from, in their order."""
    return tuple(
        Setting(
            name=prefix + field.upper(),
            field=field,
            default=variable.default or variable.default_note,
            is_literal=variable.default is not None,
            description=variable.description,
            expected_format=expected_format(variable.parse),
            is_secret=variable.is_secret,
            scope=variable.scope,
        )
        for field, variable in variables.items()
    )


MIN_ADMIN_TOKEN_LENGTH = 32


_MIN_DISTINCT_CHARACTERS = 6


_MIN_DISTINCT_BYTES = 16
"""Of 32 random bytes, about 30 differ: fewer than 16 do not come about by chance."""


_PRIVATE_DOMAINS = ("localhost", "local", "internal", "svc", "home.arpa")


_REQUIRED_IN_PRODUCTION = {
    "redis_url": "the embedded server is for development",
    "upstream_url": "the sandbox is for development",
    "secret_keys": "generated keys are for development",
    "admin_token": "a generated token is for development",
}


_CLEARTEXT_HINT = "if the upstream has no TLS, GATEWAY_UPSTREAM_CLEARTEXT=allow takes the risk"


_NEW_KEY_HINT = "`openssl rand -base64 32` makes one"


_NEW_TOKEN_HINT = "`openssl rand -hex 32` makes one"  # noqa: S105 - says how one is made


class Cleartext(StrEnum):
    """Whether production may call an upstream in another network without TLS."""

    REFUSE = "refuse"
    ALLOW = "allow"


def production_errors(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What makes settings unfit for production: the field, and what is wrong with it, without any secret.

    A field that is absent was faulty by itself, and one that is None was left out.
    """
    for field, why in _REQUIRED_IN_PRODUCTION.items():
        if values.get(field, "faulty") is None:
            yield field, f"must be given in production: {why}"
    if token := values.get("admin_token"):
        yield from _admin_token_errors(token)
    for place, key in enumerate(values.get("secret_keys") or (), start=1):
        if _looks_guessable(key):
            yield "secret_keys", f"must be random bytes in production, which number {place} is not: {_NEW_KEY_HINT}"
    if url := values.get("upstream_url"):
        yield from _upstream_errors(url, values.get("upstream_cleartext"))
    if url := values.get("redis_url"):
        yield from _redis_errors(parse_redis_url(url))


def production_warnings(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What production takes, and somebody should think about: the field, and why."""
    if values["log_level"] == "debug":
        yield "log_level", "is debug: many lines for each request, and of use only while somebody reads them"
    if values["upstream_cleartext"] is Cleartext.ALLOW and _is_cleartext(values["upstream_url"]):
        yield "upstream_url", "is called without TLS: whoever is on the way can read the user_keys and spend with them"
    address = parse_redis_url(values["redis_url"])
    if not address.path and not all(_is_private_host(host) for host, _ in address.hosts):
        if address.tls_options is None:
            yield "redis_url", "has no TLS, which is well only in a private network: rediss:// has it"
        if _has_no_authentication(address):
            yield "redis_url", "has no password, which is well only in a private network"
    if address.tls_options and address.tls_options.get("ssl_cert_reqs") in {"none", "optional"}:
        yield "redis_url", "does not check the server's certificate: leave ssl_cert_reqs out"


def _admin_token_errors(token: str) -> Iterator[tuple[str, str]]:
    if len(token) < MIN_ADMIN_TOKEN_LENGTH:
        yield "admin_token", f"must have at least {MIN_ADMIN_TOKEN_LENGTH} characters in production"
    elif len(set(token)) < _MIN_DISTINCT_CHARACTERS or _is_repetition(token.encode()):
        yield "admin_token", f"must not be one that can be guessed in production: {_NEW_TOKEN_HINT}"


def _upstream_errors(url: str, cleartext: Cleartext | None) -> Iterator[tuple[str, str]]:
    if cleartext is Cleartext.REFUSE and _is_cleartext(url):
        yield "upstream_url", f"must be https:// in production, since every call carries a user_key: {_CLEARTEXT_HINT}"


def _redis_errors(address: RedisAddress) -> Iterator[tuple[str, str]]:
    """Only of addresses that are surely public: behind the public name of a managed store is often a private one."""
    if any(ip is not None and ip.is_global for ip in (_parse_ip(host) for host, _ in address.hosts)):
        if address.tls_options is None:
            yield "redis_url", "must be rediss:// in production, since its address is public"
        if _has_no_authentication(address):
            yield "redis_url", "must have a password in production, since its address is public"


def _has_no_authentication(address: RedisAddress) -> bool:
    return not address.credentials.password and not (address.tls_options and "ssl_certfile" in address.tls_options)


def _is_cleartext(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "http" and not _is_private_host(parts.hostname or "")


def _is_private_host(host: str) -> bool:
    """Whether a host is this machine or in a private network, as far as its name tells: `10.0.0.1`, `store`."""
    ip = _parse_ip(host)
    if ip is not None:
        return not ip.is_global
    name = host.rstrip(".").lower()
    return "." not in name or name.endswith(tuple(f".{domain}" for domain in _PRIVATE_DOMAINS))


def _parse_ip(host: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _looks_guessable(key: bytes) -> bool:
    """Whether a key was made up by somebody: a text, or a pattern. Chance makes no key a text."""
    return len(set(key)) < _MIN_DISTINCT_BYTES or (key.isascii() and key.decode().isprintable())


def _is_repetition(text: bytes) -> bool:
    """Whether it is some shorter text several times over."""
    return text in (text + text)[1:-1]


PREFIX = "GATEWAY_"


class SettingsError(Exception):
    """The environment can't be used; `faults` names everything that is wrong with it, without any secret."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


class Environment(StrEnum):
    """Where the gateway runs: `production` refuses whatever is only fit for a machine of one's own."""

    DEVELOPMENT = "development"
    PRODUCTION = "production"


class Role(StrEnum):
    """What this process does: answer requests, watch tasks and deliver webhooks, or all of it."""

    ALL = "all"
    API = "api"
    WORKER = "worker"


class LogLevel(StrEnum):
    """The least that is logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def _parse_redis_url(url: str) -> str:
    parse_redis_url(url)
    return url


def _format_pairs(words: Mapping[str, str]) -> str:
    return ",".join(f"{name}={word}" for name, word in words.items())


_parse_port = parse_int(0, 65_535)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All settings, checked; `load` makes them."""

    env: Annotated[
        Environment,
        Variable(
            parse_choice(Environment),
            "development",
            "`production` refuses the embedded server, the sandbox, and secrets that are generated or can be guessed.",
        ),
    ]
    host: Annotated[str, Variable(parse_host, "127.0.0.1", "Where tenants are listened to.", scope=Scope.API)]
    port: Annotated[int, Variable(_parse_port, "8080", "The tenants' port; 0 takes a free one.", scope=Scope.API)]
    ops_host: Annotated[
        str,
        Variable(parse_host, None, "Where operators are listened to.", default_note="as `GATEWAY_HOST`"),
    ]
    ops_port: Annotated[int, Variable(_parse_port, "8081", "The operators' port; 0 takes a free one.")]
    data_dir: Annotated[
        Path,
        Variable(
            parse_folder, ".gateway", "What the gateway keeps on this machine in development.", scope=Scope.DEVELOPMENT
        ),
    ]
    redis_url: Annotated[
        str | None,
        Variable(
            _parse_redis_url,
            None,
            "`redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`. `rediss+sentinel://` is "
            "TLS to the primary, and `?sentinel_ssl=true` to the Sentinels.",
            default_note="an embedded Valkey server that keeps its data in the data folder",
            is_secret=True,
        ),
    ]
    key_prefix: Annotated[
        str,
        Variable(parse_key_prefix, "gw", "Every key is `{gw}:...`, so that one Redis can serve several gateways."),
    ]
    upstream_url: Annotated[
        str | None,
        Variable(parse_http_url, None, "The base address of the upstream.", default_note="the built-in sandbox"),
    ]
    upstream_user_key: Annotated[
        str | None,
        Variable(
            parse_printable,
            None,
            "The `user_key` of the account that is made in development.",
            is_secret=True,
            scope=Scope.DEVELOPMENT,
        ),
    ]
    upstream_cleartext: Annotated[
        Cleartext,
        Variable(
            parse_choice(Cleartext),
            "refuse",
            "`allow` lets production call an upstream in another network by `http://`, for all to read.",
        ),
    ]
    secret_keys: Annotated[
        tuple[bytes, ...],
        Variable(
            parse_secret_keys,
            None,
            "Keys of 32 bytes in base64, separated by commas: the first encrypts, all decrypt.",
            default_note="generated into the data folder",
            is_secret=True,
        ),
    ]
    admin_token: Annotated[
        str | None,
        Variable(
            parse_printable,
            None,
            f"The operators' bearer token, in production of at least {MIN_ADMIN_TOKEN_LENGTH} characters.",
            default_note="generated into the data folder",
            is_secret=True,
        ),
    ]
    max_image_bytes: Annotated[int, Variable(parse_size, "32 MiB", "The largest image that is taken.", scope=Scope.API)]
    max_image_pixels: Annotated[
        int,
        Variable(parse_int(1, 1_000_000_000), "25000000", "The most pixels an image may have.", scope=Scope.API),
    ]
    max_artifact_bytes: Annotated[
        int,
        Variable(parse_size, "256 MiB", "The largest result that is passed on to a tenant.", scope=Scope.API),
    ]
    poll_seconds: Annotated[
        float, Variable(parse_float(0.05, 60), "2.5", "How long at least between two checks of one task.")
    ]
    lease_seconds: Annotated[
        int,
        Variable(
            parse_int(90, 3_600), "180", "How long a submission may take; sending ends 60 s before that runs out."
        ),
    ]
    task_retention_days: Annotated[int, Variable(parse_int(1, 365), "30", "How long a task is kept after its end.")]
    role: Annotated[Role, Variable(parse_choice(Role), "all", "`api` or `worker` to scale them apart.")]
    models: Annotated[
        Mapping[str, str],
        Variable(
            parse_catalogue, _format_pairs(DEFAULT_CATALOGUE.models), "Names of models, each with the upstream's own."
        ),
    ]
    styles: Annotated[
        Mapping[str, str],
        Variable(
            parse_catalogue, _format_pairs(DEFAULT_CATALOGUE.styles), "Names of styles, each with the upstream's own."
        ),
    ]
    metrics_tenants: Annotated[
        int,
        Variable(
            parse_int(1, 10_000), "200", "So many tenants have metrics of their own; the rest is counted as `other`."
        ),
    ]
    sandbox_port: Annotated[
        int,
        Variable(_parse_port, "8082", "The port of the built-in sandbox; 0 takes a free one.", scope=Scope.DEVELOPMENT),
    ]
    log_level: Annotated[LogLevel, Variable(parse_choice(LogLevel), "info", "The least that is logged.")]
    traces_url: Annotated[
        str | None,
        Variable(
            parse_http_url,
            None,
            "The collector that traces are sent to, by OTLP over HTTP, at `/v1/traces` unless it has another path.",
        ),
    ]
    traces_share: Annotated[
        float,
        Variable(parse_float(0, 1), "1", "The share of requests to trace; those that their clients trace always are."),
    ]

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings from environment variables. Raises SettingsError that names every fault."""
        faults = list(unknown_variables(environ, PREFIX, [_variable_name(field) for field in _VARIABLES]))
        values: dict[str, Any] = {}
        for field, variable in _VARIABLES.items():
            try:
                found = read_variable(environ, _variable_name(field)) or variable.default
                values[field] = None if found is None else variable.parse(found)
            except ValueError as error:
                faults.append(f"{_variable_name(field)} {error}")
        if "ops_host" in values and "host" in values:
            values["ops_host"] = values["ops_host"] or values["host"]
        faults.extend(_find_conflicts(values))
        if faults:
            raise SettingsError(faults)
        return cls(**values | {"secret_keys": values["secret_keys"] or ()})

    @property
    def catalogue(self) -> Catalogue:
        """The names of models and styles that a task may give."""
        return Catalogue(models=self.models, styles=self.styles)

    @property
    def is_production(self) -> bool:
        """Whether nothing may be used that is only fit for a machine of one's own."""
        return self.env is Environment.PRODUCTION

    def __repr__(self) -> str:
        shown = {field: getattr(self, field) for field in _VARIABLES}
        hidden = {field: "***" for field, variable in _VARIABLES.items() if variable.is_secret and shown[field]}
        return f"Settings({', '.join(f'{field}={value!r}' for field, value in (shown | hidden).items())})"


def _variable_name(field: str) -> str:
    return PREFIX + field.upper()


_VARIABLES: Mapping[str, Variable] = {
    field: hint.__metadata__[0] for field, hint in get_type_hints(Settings, include_extras=True).items()
}


SETTINGS = describe_settings(PREFIX, _VARIABLES)
"""All settings, in the order in which they are best read."""


def _find_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together. A field whose own text was faulty is absent, and not blamed twice."""
    if values.get("env") is Environment.PRODUCTION:
        yield from (f"{_variable_name(field)} {fault}" for field, fault in production_errors(values))
    if values.get("role") in {Role.API, Role.WORKER} and _is_missing(values, "redis_url"):
        yield f"GATEWAY_ROLE={values['role']} needs GATEWAY_REDIS_URL: the embedded server belongs to one process"
    if values.get("upstream_user_key") and _is_missing(values, "upstream_url"):
        yield "GATEWAY_UPSTREAM_USER_KEY needs GATEWAY_UPSTREAM_URL: the sandbox has an account of its own"
    if values.get("host") == values.get("ops_host") and _has_same_port(values, "ops_port", "port"):
        yield "GATEWAY_OPS_PORT must differ from GATEWAY_PORT"
    if values.get("traces_url") and not tracing.is_exporter_installed():
        yield "GATEWAY_TRACES_URL needs what sends traces: pip install 'imaging-gateway[otel]'"
    for other in ("port", "ops_port"):
        if _is_missing(values, "upstream_url") and _has_same_port(values, "sandbox_port", other):
            yield f"GATEWAY_SANDBOX_PORT must differ from {_variable_name(other)}"


def _is_missing(values: Mapping[str, Any], field: str) -> bool:
    return values.get(field, "faulty") is None


def _has_same_port(values: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether two ports are the same one; 0 never is, since it takes a free one each time."""
    return bool(values.get(one)) and values[one] == values.get(other)
