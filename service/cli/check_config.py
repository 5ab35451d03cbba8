"""`gateway check-config`: what the settings amount to, or all that is wrong with them, before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import click
import httpx2

from service.cli.formatting import format_table
from service.cli.sandbox import missing_packages_error
from service.devstack import EmbeddedValkeyError, find_server_binary
from service.settings import (
    FILE_SUFFIX,
    PREFIX,
    SETTINGS,
    Scope,
    Setting,
    Settings,
    SettingsError,
    production_warnings,
    variable_source,
)
from service.storage.connections import check_server, describe_os_error, redact_url

_TIMEOUT_SECONDS = 5.0
"""How long the store, and the upstream, may take to answer."""
_ENV_VARIABLE = f"{PREFIX}ENV"


def check_settings(environ: Mapping[str, str], *, production: bool, connect: bool) -> int:
    """Print what the settings amount to, with no secret; the exit code, 1 if they can't be used.

    `production` judges them as production does; `connect` tries the store and the upstream too, which costs nothing.
    """
    if production:
        environ = {name: text for name, text in environ.items() if name != _ENV_VARIABLE + FILE_SUFFIX} | {
            _ENV_VARIABLE: "production"
        }
    try:
        settings = Settings.load(environ)
    except SettingsError as error:
        _print_errors(error.errors)
        return 1
    if lacks := list(_missing_dependencies(settings)):
        _print_errors(lacks)
        return 1
    rows = [(each.name, _display_value(settings, each), _value_source(environ, each)) for each in SETTINGS]
    click.echo(format_table(("setting", "value", "from"), rows))
    _print_warnings(_production_warnings(settings, environ))
    if connect and not asyncio.run(_check_connections(settings)):
        return 1
    click.echo(f"These settings are fit for {settings.env}.")
    return 0


def _missing_dependencies(settings: Settings) -> Iterator[str]:
    """What a gateway would have to start on this machine, and is not installed."""
    if settings.redis_url is None:
        try:
            find_server_binary()
        except EmbeddedValkeyError as error:
            yield str(error)
    if settings.upstream_url is None and (lack := missing_packages_error()):
        yield f"{lack}, or set {PREFIX}UPSTREAM_URL"


def _display_value(settings: Settings, setting: Setting) -> str:
    value = getattr(settings, setting.field)
    if value is None or value == ():
        return setting.default.replace("`", "")
    match setting.field:
        case "redis_url":
            return redact_url(value)
        case "secret_keys":
            return f"*** ({len(value)} {'key' if len(value) == 1 else 'keys'})"
    if setting.is_secret:
        return "***"
    return ",".join(f"{name}={word}" for name, word in value.items()) if isinstance(value, Mapping) else str(value)


def _value_source(environ: Mapping[str, str], setting: Setting) -> str:
    file = variable_source(environ, setting.name)
    if file is None:
        return "default"
    return f"file {file}" if file else "environment"


def _production_warnings(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if not settings.is_production:
        return
    for field, doubt in production_warnings(vars(settings)):
        yield f"{PREFIX}{field.upper()} {doubt}"
    for setting in SETTINGS:
        if setting.scope is Scope.DEVELOPMENT and variable_source(environ, setting.name) is not None:
            yield f"{setting.name} does nothing in production"


async def _check_connections(settings: Settings) -> bool:
    """Try the store and the upstream at once, and say what came of it; whether both can be used."""
    return all(
        await asyncio.gather(
            _check_store(settings.redis_url, settings.key_prefix), _check_upstream(settings.upstream_url)
        )
    )


async def _check_store(url: str | None, prefix: str) -> bool:
    if url is None:
        click.echo("The embedded Valkey server is started by `gateway serve`.")
        return True
    found = await check_server(url, prefix, timeout=_TIMEOUT_SECONDS)
    _print_errors(f"{PREFIX}REDIS_URL {fault}" for fault in found.errors)
    _print_warnings(f"{PREFIX}REDIS_URL {doubt}" for doubt in found.warnings)
    if not found.errors:
        click.echo(f"{found.server or 'The store'} answers at {redact_url(url)}.")
    return not found.errors


async def _check_upstream(url: str | None) -> bool:
    """Connect, and send nothing: every call that the upstream would answer has a price."""
    if url is None:
        click.echo("The sandbox is started by `gateway serve`.")
        return True
    parts = urlsplit(url)
    secured = parts.scheme == "https"
    host, port = str(parts.hostname), parts.port or (443 if secured else 80)
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=httpx2.create_ssl_context() if secured else None)
    except TimeoutError:
        why = f"it did not answer within {_TIMEOUT_SECONDS:g} s"
    except OSError as error:
        why = describe_os_error(error)
    except UnicodeError:
        why = "it is no name of a host"
    else:
        writer.transport.abort()
        click.echo(
            f"The upstream takes connections at {host}:{port}{' with TLS' if secured else ''}; nothing was sent."
        )
        return True
    _print_errors([f"{PREFIX}UPSTREAM_URL can't be reached at {host}:{port}: {why}"])
    return False


def _print_errors(faults: Sequence[str] | Iterator[str]) -> None:
    for fault in faults:
        click.echo(f"gateway: {fault}", err=True)


def _print_warnings(words: Iterator[str]) -> None:
    _print_errors(f"warning: {each}" for each in words)
