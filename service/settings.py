"""The settings, each declared once, with parser and description.

The field `port` is the variable `GATEWAY_PORT`, or `GATEWAY_PORT_FILE` with the name of a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from msgspec import Struct

from service.domain.hosts import (
    DEFAULT_PRIVATE_DOMAINS,
    IpNetwork,
    parse_base_url,
)
from service.domain.tasks import DEFAULT_CATALOGUE, Catalogue
from service.domain.tenants import Operator, OperatorRole, hash_token
from service.production_checks import MIN_TOKEN_LENGTH, cleartext_error, cleartext_warning, has_admin, production_errors
from service.setting_types import (
    ADMIN,
    Cleartext,
    Environment,
    LogLevel,
    Role,
    Switch,
    parse_catalogue,
    parse_choice,
    parse_domains,
    parse_float,
    parse_folder,
    parse_host,
    parse_int,
    parse_key_prefix,
    parse_networks,
    parse_operators,
    parse_printable,
    parse_secret_keys,
    parse_size,
)
from service.storage.connections import parse_redis_url

PREFIX, FILE_SUFFIX = "GATEWAY_", "_FILE"
_CALLER_VARIABLES = ("URL", "TOKEN", "TOKEN_FILE")
"""Of the callers' commands, which may share a shell with those of operators."""
_MAX_FILE_BYTES = 65_536
_SERVICE_LINK = re.compile(r"SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+")


def read_variable(environ: Mapping[str, str], name: str) -> str | None:
    """Return the text of a variable or of its file; None if unset or empty. Raises ValueError."""
    direct, file = environ.get(name, ""), environ.get(name + FILE_SUFFIX, "")
    if direct and file:
        raise ValueError(f"and {name}{FILE_SUFFIX} are both set: keep one")
    if not file:
        return direct or None
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(_MAX_FILE_BYTES + 1).decode()
    except OSError as error:
        raise ValueError(f"can't be read from {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"can't be read from {file}: it is not UTF-8 text") from None
    if len(text) > _MAX_FILE_BYTES:
        raise ValueError(f"can't be read from {file}: it is larger than {_MAX_FILE_BYTES} bytes")
    return text.strip() or None


def variable_source(environ: Mapping[str, str], name: str) -> str | None:
    """Return the file of a variable, "" if it is set directly, None if unset or empty."""
    return environ.get(name + FILE_SUFFIX, "") if read_variable(environ, name) else None


def _find_unknown_variables(environ: Mapping[str, str]) -> Iterator[str]:
    known = [setting.field.upper() + suffix for setting in SETTINGS for suffix in ("", FILE_SUFFIX)]
    for name in sorted(environ):
        suffix = name.removeprefix(PREFIX)
        if suffix == name or suffix in known or suffix in _CALLER_VARIABLES:
            continue
        matches = difflib.get_close_matches(suffix, known, n=1)
        if _SERVICE_LINK.fullmatch(suffix):
            hint = ": Kubernetes sets it for a service of that name; set enableServiceLinks to false"
        elif matches:
            hint = f": did you mean {PREFIX}{matches[0]}?"
        else:
            hint = ""
        yield f"{name} is not a setting{hint}"


class Scope(StrEnum):
    """Where a setting has an effect; it may be set anywhere."""

    ANYWHERE = "anywhere"
    API = "where requests are served"
    DEVELOPMENT = "in development"


class Setting(Struct, frozen=True, kw_only=True):
    """A setting; `default` is text like any other, `default_note` describes a missing default."""

    field: str
    parse: Callable[[str], object]
    default: str | None
    description: str
    default_note: str = "none"
    is_secret: bool = False
    scope: Scope = Scope.ANYWHERE

    @property
    def name(self) -> str:
        return PREFIX + self.field.upper()

    @property
    def expected_format(self) -> str:
        """Return the "..." of the parser's own error, which is "must be ..."."""
        try:
            self.parse("\0")
        except ValueError as error:
            return str(error).removeprefix("must be ").partition(": ")[0]
        raise TypeError(f"{self.name} accepts anything")


class SettingsError(Exception):
    """The settings are invalid; `errors` lists every error, without any secret."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = tuple(errors)


def _parse_redis_url(url: str) -> str:
    parse_redis_url(url)
    return url


def _format_pairs(words: Mapping[str, str]) -> str:
    return ",".join(f"{name}={word}" for name, word in words.items())


_parse_port = parse_int(0, 65_535)


def _declare(parse: Callable[[str], object], default: str | None, description: str, **details: Any) -> Any:
    """Declare a field of Settings; `details` are further fields of its Setting."""
    return dataclasses.field(metadata={"parse": parse, "default": default, "description": description, **details})


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All settings, validated by `load`."""

    env: Environment = _declare(
        parse_choice(Environment),
        "development",
        "`production` refuses the embedded server, the sandbox, and secrets that are generated or can be guessed.",
    )
    host: str = _declare(parse_host, "127.0.0.1", "The address of the tenants' port.", scope=Scope.API)
    port: int = _declare(_parse_port, "8080", "The tenants' port; 0 selects a free one.", scope=Scope.API)
    ops_host: str = _declare(parse_host, None, "The address of the operators' port.", default_note="as `GATEWAY_HOST`")
    ops_port: int = _declare(_parse_port, "8081", "The operators' port; 0 selects a free one.")
    trusted_proxies: tuple[IpNetwork, ...] = _declare(
        parse_networks,
        None,
        "The addresses and networks of the proxies in front of both ports, separated by commas. The client of their "
        "requests is the last address in `X-Forwarded-For` that is none of them.",
    )
    data_dir: Path = _declare(
        parse_folder, ".gateway", "The folder for local data in development.", scope=Scope.DEVELOPMENT
    )
    redis_url: str | None = _declare(
        _parse_redis_url,
        None,
        "`redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`. `rediss+sentinel://` is TLS to "
        "the primary, and `?sentinel_ssl=true` to the Sentinels.",
        default_note="an embedded Valkey server that keeps its data in the data folder",
        is_secret=True,
    )
    key_prefix: str = _declare(
        parse_key_prefix, "gw", "Every key is `{gw}:...`, so that one Redis can serve several gateways."
    )
    upstream_url: str | None = _declare(
        parse_base_url,
        None,
        "The base address of the upstream. Keys of accounts without a base URL are bound to its scheme, host and port.",
        default_note="the built-in sandbox",
    )
    upstream_user_key: str | None = _declare(
        parse_printable,
        None,
        "The `user_key` of the account that is created in development.",
        is_secret=True,
        scope=Scope.DEVELOPMENT,
    )
    upstream_cleartext: Cleartext = _declare(
        parse_choice(Cleartext),
        "refuse",
        "`allow` lets production call an upstream in another network by unencrypted `http://`.",
    )
    private_domains: tuple[str, ...] = _declare(
        parse_domains,
        ",".join(DEFAULT_PRIVATE_DOMAINS),
        "Domains whose hosts count as private, as private addresses and names without a dot do: production may call "
        "them by `http://`, and an upstream there may have its results at a private address.",
    )
    secret_keys: tuple[bytes, ...] = _declare(
        parse_secret_keys,
        None,
        "Keys of 32 bytes in base64, separated by commas: the first encrypts, all decrypt.",
        default_note="generated into the data folder",
        is_secret=True,
    )
    admin_token: str | None = _declare(
        parse_printable,
        None,
        f"The token of the operator `admin`, in production random and of at least {MIN_TOKEN_LENGTH} characters. "
        "Commands send it: for them it can be the token of any operator. A worker has none.",
        default_note="none if `GATEWAY_OPERATORS` has an admin, else generated into the data folder",
        is_secret=True,
    )
    operators: tuple[Operator, ...] = _declare(
        parse_operators,
        None,
        "The other operators, each as `name:role:hash`: `admin` or `read-only`, and the SHA-256 of the token.",
    )
    metrics_token: str | None = _declare(
        parse_printable, None, "The bearer token that `/metrics` asks for; none: it needs no token.", is_secret=True
    )
    max_image_bytes: int = _declare(parse_size, "32 MiB", "The largest image that is accepted.", scope=Scope.API)
    max_image_pixels: int = _declare(
        parse_int(1, 1_000_000_000), "25000000", "The most pixels an image may have.", scope=Scope.API
    )
    image_url_seconds: int = _declare(
        parse_int(1, 300),
        "30",
        "How long the image at an `image_url` may take to arrive, with all redirects.",
        scope=Scope.API,
    )
    max_artifact_bytes: int = _declare(
        parse_size, "256 MiB", "The largest result that is delivered to a tenant.", scope=Scope.API
    )
    tenant_share: float = _declare(
        parse_float(0.01, 1),
        "0.25",
        "The part of a process's memory for uploads, of its downloads and of its waits that one tenant may hold; 1 is "
        "no bound. An image of the largest size always fits.",
        scope=Scope.API,
    )
    reads_per_second: int = _declare(
        parse_int(0, 1_000_000),
        "200",
        "How many GET requests per second one token may send to a process, and five times as many in a burst; 0 is no "
        "limit.",
        scope=Scope.API,
    )
    poll_seconds: float = _declare(parse_float(0.05, 60), "2.5", "The minimum time between two checks of one task.")
    lease_seconds: int = _declare(
        parse_int(90, 3_600), "180", "How long a submission may take; sending ends 60 s before that."
    )
    task_retention_days: int = _declare(parse_int(1, 365), "30", "How long a task is kept after its end.")
    role: Role = _declare(
        parse_choice(Role), "all", "`api` or `worker` to scale them apart; a worker serves only health and metrics."
    )
    models: Mapping[str, str] = _declare(
        parse_catalogue, _format_pairs(DEFAULT_CATALOGUE.models), "Names of models, each with the upstream's own."
    )
    styles: Mapping[str, str] = _declare(
        parse_catalogue, _format_pairs(DEFAULT_CATALOGUE.styles), "Names of styles, each with the upstream's own."
    )
    metrics_tenants: int = _declare(
        parse_int(1, 10_000), "200", "The number of tenants with metrics of their own; the rest is counted as `other`."
    )
    playground: Switch = _declare(
        parse_choice(Switch),
        None,
        "`/playground`, a page on the tenants' port that submits pictures with the token that is pasted into it.",
        default_note="`on` in development, `off` in production",
        scope=Scope.API,
    )
    sandbox_port: int = _declare(
        _parse_port,
        "8082",
        "The port of the built-in sandbox; it takes a free one if another process has this, and for 0.",
        scope=Scope.DEVELOPMENT,
    )
    log_level: LogLevel = _declare(parse_choice(LogLevel), "info", "The lowest level that is logged.")
    traces_url: str | None = _declare(
        parse_base_url, None, "The collector for traces, by OTLP over HTTP, at `/v1/traces` unless the URL has a path."
    )
    traces_share: float = _declare(
        parse_float(0, 1), "1", "The share of requests to trace; requests that clients trace always are."
    )

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings from environment variables. Raises SettingsError with every error."""
        errors = list(_find_unknown_variables(environ))
        values: dict[str, Any] = {}
        for setting in SETTINGS:
            try:
                text = read_variable(environ, setting.name) or setting.default
                values[setting.field] = None if text is None else setting.parse(text)
            except ValueError as error:
                errors.append(f"{setting.name} {error}")
        if "ops_host" in values and "host" in values:
            values["ops_host"] = values["ops_host"] or values["host"]
        if values.get("playground", "faulty") is None:
            values["playground"] = Switch.OFF if values.get("env") is Environment.PRODUCTION else Switch.ON
        if values.get("role") is Role.WORKER:
            # It serves no operators, even where it shares its variables with others.
            values |= {"admin_token": None, "operators": None}
        errors.extend(_find_conflicts(values))
        if errors:
            raise SettingsError(errors)
        return cls(**values | {field: values[field] or () for field in ("secret_keys", "operators", "trusted_proxies")})

    @property
    def catalogue(self) -> Catalogue:
        return Catalogue(models=self.models, styles=self.styles)

    @property
    def is_production(self) -> bool:
        return self.env is Environment.PRODUCTION

    def base_url_error(self, url: str) -> str | None:
        """Return why an account may not have a base URL, None if it may."""
        return cleartext_error(vars(self), url) if self.is_production else None

    def base_url_warning(self, url: str) -> str | None:
        """Return the risk of an account's base URL in production, None without."""
        return cleartext_warning(vars(self), url)

    @property
    def has_admin(self) -> bool:
        """Whether an operator can make changes, or none is needed."""
        return has_admin(vars(self))

    @property
    def all_operators(self) -> tuple[Operator, ...]:
        """The operators, first that of the admin token: if another has the same token, it counts."""
        digests = [hash_token(self.admin_token)] if self.admin_token else []
        return (*(Operator(ADMIN, OperatorRole.ADMIN, digest) for digest in digests), *self.operators)

    def __repr__(self) -> str:
        values = {setting.field: getattr(self, setting.field) for setting in SETTINGS}
        masked = {setting.field: "***" for setting in SETTINGS if setting.is_secret and values[setting.field]}
        return f"Settings({', '.join(f'{field}={value!r}' for field, value in (values | masked).items())})"


SETTINGS: Sequence[Setting] = tuple(
    Setting(field=field.name, **field.metadata) for field in dataclasses.fields(Settings)
)
"""All settings in reading order."""


def _find_conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield conflicts between fields. An invalid field is absent and not reported again."""
    if values.get("env") is Environment.PRODUCTION:
        yield from (f"{PREFIX}{field.upper()} {error}" for field, error in production_errors(values))
    if values.get("role") in {Role.API, Role.WORKER} and _is_missing(values, "redis_url"):
        yield f"GATEWAY_ROLE={values['role']} needs GATEWAY_REDIS_URL: the embedded server belongs to one process"
    if values.get("upstream_user_key") and _is_missing(values, "upstream_url"):
        yield "GATEWAY_UPSTREAM_USER_KEY needs GATEWAY_UPSTREAM_URL: the sandbox has an account of its own"
    if values.get("host") == values.get("ops_host") and _has_same_port(values, "ops_port", "port"):
        yield "GATEWAY_OPS_PORT must differ from GATEWAY_PORT"
    if values.get("traces_url") and not _is_exporter_installed():
        yield "GATEWAY_TRACES_URL needs the exporter: install the gateway's wheel with its extra [otel]"


def _is_exporter_installed() -> bool:
    try:
        return find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:
        return False


def _is_missing(values: Mapping[str, Any], field: str) -> bool:
    return values.get(field, "faulty") is None


def _has_same_port(values: Mapping[str, Any], one: str, other: str) -> bool:
    """Return whether two ports are equal; 0 selects a different free port each time."""
    return bool(values.get(one)) and values[one] == values.get(other)
