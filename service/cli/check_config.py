"""`gateway check-config`: what the settings amount to, or all that is wrong with them, before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import click
import httpx2

from service.cli.formatting import table
from service.cli.sandbox import lacking
from service.devstack import EmbeddedError, server_binary
from service.settings import FILE, PREFIX, SETTINGS, Scope, Setting, Settings, SettingsError, doubts, source
from service.storage.connections import examine, masked, reason

_SECONDS = 5.0
"""How long the store, and the upstream, may take to answer."""
_ENV = f"{PREFIX}ENV"


def run(environ: Mapping[str, str], *, production: bool, connect: bool) -> int:
    """Print what the settings amount to, with no secret; the exit code, 1 if they can't be used.

    `production` judges them as production does; `connect` tries the store and the upstream too, which costs nothing.
    """
    if production:
        environ = {name: text for name, text in environ.items() if name != _ENV + FILE} | {_ENV: "production"}
    try:
        settings = Settings.load(environ)
    except SettingsError as error:
        _complain(error.faults)
        return 1
    if lacks := list(_lacking(settings)):
        _complain(lacks)
        return 1
    rows = [(each.name, _value(settings, each), _whence(environ, each)) for each in SETTINGS]
    click.echo(table(("setting", "value", "from"), rows))
    _warn(_doubts(settings, environ))
    if connect and not asyncio.run(_try(settings)):
        return 1
    click.echo(f"These settings are fit for {settings.env}.")
    return 0


def _lacking(settings: Settings) -> Iterator[str]:
    """What a gateway would have to start on this machine, and is not installed."""
    if settings.redis_url is None:
        try:
            server_binary()
        except EmbeddedError as error:
            yield str(error)
    if settings.upstream_url is None and (lack := lacking()):
        yield f"{lack}, or set {PREFIX}UPSTREAM_URL"


def _value(settings: Settings, setting: Setting) -> str:
    value = getattr(settings, setting.field)
    if value is None or value == ():
        return setting.default.replace("`", "")
    match setting.field:
        case "redis_url":
            return masked(value)
        case "secret_keys":
            return f"*** ({len(value)} {'key' if len(value) == 1 else 'keys'})"
    if setting.secret:
        return "***"
    return ",".join(f"{name}={word}" for name, word in value.items()) if isinstance(value, Mapping) else str(value)


def _whence(environ: Mapping[str, str], setting: Setting) -> str:
    file = source(environ, setting.name)
    if file is None:
        return "default"
    return f"file {file}" if file else "environment"


def _doubts(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if not settings.in_production:
        return
    for field, doubt in doubts(vars(settings)):
        yield f"{PREFIX}{field.upper()} {doubt}"
    for setting in SETTINGS:
        if setting.scope is Scope.DEVELOPMENT and source(environ, setting.name) is not None:
            yield f"{setting.name} does nothing in production"


async def _try(settings: Settings) -> bool:
    """Try the store and the upstream at once, and say what came of it; whether both can be used."""
    return all(
        await asyncio.gather(_try_store(settings.redis_url, settings.key_prefix), _try_upstream(settings.upstream_url))
    )


async def _try_store(url: str | None, prefix: str) -> bool:
    if url is None:
        click.echo("The embedded Valkey server is started by `gateway serve`.")
        return True
    found = await examine(url, prefix, timeout=_SECONDS)
    _complain(f"{PREFIX}REDIS_URL {fault}" for fault in found.faults)
    _warn(f"{PREFIX}REDIS_URL {doubt}" for doubt in found.doubts)
    if not found.faults:
        click.echo(f"{found.server or 'The store'} answers at {masked(url)}.")
    return not found.faults


async def _try_upstream(url: str | None) -> bool:
    """Connect, and send nothing: every call that the upstream would answer has a price."""
    if url is None:
        click.echo("The sandbox is started by `gateway serve`.")
        return True
    parts = urlsplit(url)
    secured = parts.scheme == "https"
    host, port = str(parts.hostname), parts.port or (443 if secured else 80)
    try:
        async with asyncio.timeout(_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=httpx2.create_ssl_context() if secured else None)
    except TimeoutError:
        why = f"it did not answer within {_SECONDS:g} s"
    except OSError as error:
        why = reason(error)
    except UnicodeError:
        why = "it is no name of a host"
    else:
        writer.transport.abort()
        click.echo(
            f"The upstream takes connections at {host}:{port}{' with TLS' if secured else ''}; nothing was sent."
        )
        return True
    _complain([f"{PREFIX}UPSTREAM_URL can't be reached at {host}:{port}: {why}"])
    return False


def _complain(faults: Sequence[str] | Iterator[str]) -> None:
    for fault in faults:
        click.echo(f"gateway: {fault}", err=True)


def _warn(words: Iterator[str]) -> None:
    _complain(f"warning: {each}" for each in words)
