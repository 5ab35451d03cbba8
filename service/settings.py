"""The gateway's settings, each declared once, on the field it fills.

The field `port` is the variable `GATEWAY_PORT`, which may also be given as `GATEWAY_PORT_FILE`, the name of a file that
holds it. An empty variable counts as not given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self, get_type_hints

from service import environ as text
from service.domain.tasks import DEFAULT_CATALOGUE, Catalogue
from service.production import SHORTEST_ADMIN_TOKEN, Cleartext, refusals
from service.storage.connections import parse_url
from service.telemetry import tracing
from service.variables import Scope, Variable, described

PREFIX = "GATEWAY_"


class SettingsError(Exception):
    """The environment can't be used; `faults` names everything that is wrong with it, without any secret."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = tuple(faults)


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


def _redis_url(url: str) -> str:
    parse_url(url)
    return url


def _pairs(words: Mapping[str, str]) -> str:
    return ",".join(f"{name}={word}" for name, word in words.items())


_PORT = text.whole(0, 65_535)


@dataclass(frozen=True, kw_only=True, repr=False)
class Settings:
    """All settings, checked; `load` makes them."""

    env: Annotated[
        Environment,
        Variable(
            text.choice(Environment),
            "development",
            "`production` refuses the embedded server, the sandbox, and secrets that are generated or can be guessed.",
        ),
    ]
    host: Annotated[str, Variable(text.listening_host, "127.0.0.1", "Where tenants are listened to.", scope=Scope.API)]
    port: Annotated[int, Variable(_PORT, "8080", "The tenants' port; 0 takes a free one.", scope=Scope.API)]
    ops_host: Annotated[
        str,
        Variable(text.listening_host, None, "Where operators are listened to.", otherwise="as `GATEWAY_HOST`"),
    ]
    ops_port: Annotated[int, Variable(_PORT, "8081", "The operators' port; 0 takes a free one.")]
    data_dir: Annotated[
        Path,
        Variable(
            text.folder, ".gateway", "What the gateway keeps on this machine in development.", scope=Scope.DEVELOPMENT
        ),
    ]
    redis_url: Annotated[
        str | None,
        Variable(
            _redis_url,
            None,
            "`redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `redis+cluster://`. `rediss+sentinel://` is "
            "TLS to the primary, and `?sentinel_ssl=true` to the Sentinels.",
            otherwise="an embedded Valkey server that keeps its data in the data folder",
            secret=True,
        ),
    ]
    key_prefix: Annotated[
        str,
        Variable(text.key_prefix, "gw", "Every key is `{gw}:...`, so that one Redis can serve several gateways."),
    ]
    upstream_url: Annotated[
        str | None,
        Variable(text.http_url, None, "The base address of the upstream.", otherwise="the built-in sandbox"),
    ]
    upstream_user_key: Annotated[
        str | None,
        Variable(
            text.printable,
            None,
            "The `user_key` of the account that is made in development.",
            secret=True,
            scope=Scope.DEVELOPMENT,
        ),
    ]
    upstream_cleartext: Annotated[
        Cleartext,
        Variable(
            text.choice(Cleartext),
            "refuse",
            "`allow` lets production call an upstream in another network by `http://`, for all to read.",
        ),
    ]
    secret_keys: Annotated[
        tuple[bytes, ...],
        Variable(
            text.secret_keys,
            None,
            "Keys of 32 bytes in base64, separated by commas: the first encrypts, all decrypt.",
            otherwise="generated into the data folder",
            secret=True,
        ),
    ]
    admin_token: Annotated[
        str | None,
        Variable(
            text.printable,
            None,
            f"The operators' bearer token, in production of at least {SHORTEST_ADMIN_TOKEN} characters.",
            otherwise="generated into the data folder",
            secret=True,
        ),
    ]
    max_image_bytes: Annotated[int, Variable(text.size, "32 MiB", "The largest image that is taken.", scope=Scope.API)]
    max_image_pixels: Annotated[
        int,
        Variable(text.whole(1, 1_000_000_000), "25000000", "The most pixels an image may have.", scope=Scope.API),
    ]
    max_artifact_bytes: Annotated[
        int,
        Variable(text.size, "256 MiB", "The largest result that is passed on to a tenant.", scope=Scope.API),
    ]
    poll_seconds: Annotated[
        float, Variable(text.decimal(0.05, 60), "2.5", "How long at least between two checks of one task.")
    ]
    lease_seconds: Annotated[
        int,
        Variable(
            text.whole(90, 3_600), "180", "How long a submission may take; sending ends 60 s before that runs out."
        ),
    ]
    task_retention_days: Annotated[int, Variable(text.whole(1, 365), "30", "How long a task is kept after its end.")]
    role: Annotated[Role, Variable(text.choice(Role), "all", "`api` or `worker` to scale them apart.")]
    models: Annotated[
        Mapping[str, str],
        Variable(text.words, _pairs(DEFAULT_CATALOGUE.models), "Names of models, each with the upstream's own."),
    ]
    styles: Annotated[
        Mapping[str, str],
        Variable(text.words, _pairs(DEFAULT_CATALOGUE.styles), "Names of styles, each with the upstream's own."),
    ]
    metrics_tenants: Annotated[
        int,
        Variable(
            text.whole(1, 10_000), "200", "So many tenants have metrics of their own; the rest is counted as `other`."
        ),
    ]
    sandbox_port: Annotated[
        int,
        Variable(_PORT, "8082", "The port of the built-in sandbox; 0 takes a free one.", scope=Scope.DEVELOPMENT),
    ]
    log_level: Annotated[LogLevel, Variable(text.choice(LogLevel), "info", "The least that is logged.")]
    traces_url: Annotated[
        str | None,
        Variable(
            text.http_url,
            None,
            "The collector that traces are sent to, by OTLP over HTTP, at `/v1/traces` unless it has another path.",
        ),
    ]
    traces_share: Annotated[
        float,
        Variable(text.decimal(0, 1), "1", "The share of requests to trace; those that their clients trace always are."),
    ]

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Read the settings from environment variables. Raises SettingsError that names every fault."""
        faults = list(text.strangers(environ, PREFIX, [_name(field) for field in _VARIABLES]))
        values: dict[str, Any] = {}
        for field, variable in _VARIABLES.items():
            try:
                found = text.given(environ, _name(field)) or variable.default
                values[field] = None if found is None else variable.parse(found)
            except ValueError as error:
                faults.append(f"{_name(field)} {error}")
        if "ops_host" in values and "host" in values:
            values["ops_host"] = values["ops_host"] or values["host"]
        faults.extend(_conflicts(values))
        if faults:
            raise SettingsError(faults)
        return cls(**values | {"secret_keys": values["secret_keys"] or ()})

    @property
    def catalogue(self) -> Catalogue:
        """The names of models and styles that a task may give."""
        return Catalogue(models=self.models, styles=self.styles)

    @property
    def in_production(self) -> bool:
        """Whether nothing may be used that is only fit for a machine of one's own."""
        return self.env is Environment.PRODUCTION

    def __repr__(self) -> str:
        shown = {field: getattr(self, field) for field in _VARIABLES}
        hidden = {field: "***" for field, variable in _VARIABLES.items() if variable.secret and shown[field]}
        return f"Settings({', '.join(f'{field}={value!r}' for field, value in (shown | hidden).items())})"


def _name(field: str) -> str:
    return PREFIX + field.upper()


_VARIABLES: Mapping[str, Variable] = {
    field: hint.__metadata__[0] for field, hint in get_type_hints(Settings, include_extras=True).items()
}

SETTINGS = described(PREFIX, _VARIABLES)
"""All settings, in the order in which they are best read."""


def _conflicts(values: Mapping[str, Any]) -> Iterator[str]:
    """What does not go together. A field whose own text was faulty is absent, and not blamed twice."""
    if values.get("env") is Environment.PRODUCTION:
        yield from (f"{_name(field)} {fault}" for field, fault in refusals(values))
    if values.get("role") in {Role.API, Role.WORKER} and _is_left_out(values, "redis_url"):
        yield f"GATEWAY_ROLE={values['role']} needs GATEWAY_REDIS_URL: the embedded server belongs to one process"
    if values.get("upstream_user_key") and _is_left_out(values, "upstream_url"):
        yield "GATEWAY_UPSTREAM_USER_KEY needs GATEWAY_UPSTREAM_URL: the sandbox has an account of its own"
    if values.get("host") == values.get("ops_host") and _same_port(values, "ops_port", "port"):
        yield "GATEWAY_OPS_PORT must differ from GATEWAY_PORT"
    if values.get("traces_url") and not tracing.installed():
        yield "GATEWAY_TRACES_URL needs what sends traces: pip install 'imaging-gateway[otel]'"
    for other in ("port", "ops_port"):
        if _is_left_out(values, "upstream_url") and _same_port(values, "sandbox_port", other):
            yield f"GATEWAY_SANDBOX_PORT must differ from {_name(other)}"


def _is_left_out(values: Mapping[str, Any], field: str) -> bool:
    return values.get(field, "faulty") is None


def _same_port(values: Mapping[str, Any], one: str, other: str) -> bool:
    """Whether two ports are the same one; 0 never is, since it takes a free one each time."""
    return bool(values.get(one)) and values[one] == values.get(other)
