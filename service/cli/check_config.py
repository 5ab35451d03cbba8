"""`gateway check-config`: the effective settings, or all their errors."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import urlsplit

import click
import httpx2
from msgspec import Struct

from service.cli.common import get_environment, json_option, print_errors
from service.cli.dev import SANDBOX_PACKAGES, missing_packages_error
from service.cli.formatting import format_json, format_table
from service.crypto import Keyring, UserKeyCipher
from service.devstack import DevServiceError, find_server_binary
from service.domain.errors import LedgerUnavailable, field_path
from service.domain.hosts import wide_network_warnings
from service.domain.tenants import Registry
from service.domain.webhooks import webhook_warnings
from service.production_checks import production_warnings
from service.settings import (
    FILE_SUFFIX,
    PREFIX,
    SETTINGS,
    Scope,
    Setting,
    Settings,
    SettingsError,
    variable_source,
)
from service.storage.connections import check_server, describe_os_error, redact_url
from service.storage.connections import connect as connect_to_store
from service.storage.redis import Keys, RedisScripts
from service.storage.registry import RedisRegistry

_TIMEOUT_SECONDS = 5.0
_ENV_VARIABLE = f"{PREFIX}ENV"


class Report(Struct, kw_only=True):
    """The result of the command, which `--json` prints."""

    valid: bool
    env: str | None = None
    settings: Sequence[SettingReport] = ()
    errors: list[str] = []
    warnings: list[str] = []
    connections: list[str] = []
    """What `--connect` reached."""


class SettingReport(Struct, frozen=True):
    name: str
    value: str
    source: str


@click.command()
@click.option("--production", is_flag=True, help="Check the settings as with GATEWAY_ENV=production.")
@click.option("--connect", is_flag=True, help="Connect to the store and the upstream, at no cost.")
@json_option
def check_config(*, production: bool, connect: bool, as_json: bool) -> None:
    """Print the effective settings, or all their errors, and start nothing.

    Secrets are not shown. The exit code is 0 if the settings are valid, else 1.
    """
    environ = get_environment()
    if production:
        environ = {name: text for name, text in environ.items() if name != _ENV_VARIABLE + FILE_SUFFIX} | {
            _ENV_VARIABLE: "production"
        }
    report = _check(environ, connect=connect)
    if as_json:
        click.echo(format_json(report))
    else:
        _print_report(report)
    if not report.valid:
        sys.exit(1)


def _check(environ: Mapping[str, str], *, connect: bool) -> Report:
    try:
        settings = Settings.load(environ)
    except SettingsError as error:
        return Report(valid=False, errors=list(error.errors))
    if errors := list(_missing_dependencies(settings)):
        return Report(valid=False, errors=errors)
    report = Report(
        valid=True,
        env=settings.env,
        settings=[
            SettingReport(item.name, _display_value(settings, item), _value_source(environ, item)) for item in SETTINGS
        ],
        warnings=list(_production_warnings(settings, environ)),
    )
    if connect:
        asyncio.run(_check_connections(settings, report))
    report.valid = not report.errors
    return report


def _print_report(report: Report) -> None:
    if report.settings:
        rows = [(item.name, item.value, item.source) for item in report.settings]
        click.echo(format_table(("setting", "value", "from"), rows))
    print_errors(f"warning: {warning}" for warning in report.warnings)
    print_errors(report.errors)
    for line in report.connections:
        click.echo(line)
    if report.valid:
        click.echo(f"These settings are valid for {report.env}.")


def _missing_dependencies(settings: Settings) -> Iterator[str]:
    if settings.redis_url is None:
        try:
            find_server_binary()
        except DevServiceError as error:
            yield str(error)
    if settings.upstream_url is None and (missing := missing_packages_error("the sandbox", SANDBOX_PACKAGES)):
        yield f"{missing}, or set {PREFIX}UPSTREAM_URL"


def _display_value(settings: Settings, setting: Setting) -> str:
    value = getattr(settings, setting.field)
    if value is None or value == ():
        return "none" if settings.is_production else setting.default_note.replace("`", "")
    match setting.field:
        case "redis_url":
            return redact_url(value)
        case "secret_keys":
            return f"*** ({len(value)} {'key' if len(value) == 1 else 'keys'})"
        case "operators":
            return ", ".join(f"{operator.name} ({operator.role})" for operator in value)
    if setting.is_secret:
        return "***"
    if isinstance(value, Mapping):
        value = tuple(f"{name}={item}" for name, item in value.items())
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value_source(environ: Mapping[str, str], setting: Setting) -> str:
    file = variable_source(environ, setting.name)
    if file is None:
        return "default"
    return f"file {file}" if file else "environment"


def _production_warnings(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    if not settings.is_production:
        return
    for field, warning in production_warnings(vars(settings)):
        yield f"{PREFIX}{field.upper()} {warning}"
    for setting in SETTINGS:
        if setting.scope is Scope.DEVELOPMENT and variable_source(environ, setting.name) is not None:
            yield f"{setting.name} has no effect in production"


async def _check_connections(settings: Settings, report: Report) -> None:
    """Check the store and the upstream, and add the results."""
    await asyncio.gather(_check_store(settings, report), _check_upstream(settings.upstream_url, report))


async def _check_store(settings: Settings, report: Report) -> None:
    url, prefix = settings.redis_url, settings.key_prefix
    if url is None:
        report.connections.append("`gateway serve` starts the embedded Valkey server.")
        return
    server = await check_server(url, prefix, timeout=_TIMEOUT_SECONDS)
    report.errors += [f"{PREFIX}REDIS_URL {error}" for error in server.errors]
    report.warnings += [f"{PREFIX}REDIS_URL {warning}" for warning in server.warnings]
    if server.errors:
        return
    report.connections.append(f"{server.server or 'The store'} answers at {redact_url(url)}.")
    try:
        registry = await _load_registry(url, prefix)
    except LedgerUnavailable:
        report.errors.append(f"{PREFIX}REDIS_URL became unavailable")
        return
    report.warnings += _registry_warnings(registry, settings)
    report.errors += _registry_errors(registry, settings, is_former_version=server.is_upgradable)


async def _load_registry(redis_url: str, prefix: str) -> Registry:
    """Read accounts and tenants from the store. Raises LedgerUnavailable."""
    connections = connect_to_store(redis_url, timeout=_TIMEOUT_SECONDS)
    try:
        return await RedisRegistry(RedisScripts(connections.commands), Keys(prefix)).load()
    finally:
        await connections.aclose()


def _registry_errors(registry: Registry, settings: Settings, *, is_former_version: bool) -> Iterator[str]:
    """Yield why accounts can't be used: a base URL that is refused today, a key that is not decrypted."""
    cipher = None
    if settings.secret_keys and settings.upstream_url:
        cipher = UserKeyCipher(Keyring(settings.secret_keys), settings.upstream_url)
    for name, account in sorted(registry.accounts.items()):
        if account.base_url and (error := settings.base_url_error(account.base_url)):
            yield f"{field_path('accounts', name, 'base_url')} {error}"
        if cipher and (cipher.bind(account) if is_former_version else cipher.decrypt(account)) is None:
            place = "its base_url" if account.base_url else f"{PREFIX}UPSTREAM_URL"
            yield (
                f"{field_path('accounts', name, 'user_key')} can't be decrypted: it was given for another address than "
                f"{place}, or with another secret key. Give it again"
            )


def _registry_warnings(registry: Registry, settings: Settings) -> Iterator[str]:
    for name, tenant in sorted(registry.tenants.items()):
        yield from (f"{field_path('tenants', name, 'limits')} {text}" for text in registry.limit_warnings(tenant))
    if not settings.is_production:
        return
    for name, account in sorted(registry.accounts.items()):
        if account.base_url and (warning := settings.base_url_warning(account.base_url)):
            yield f"{field_path('accounts', name, 'base_url')} {warning}"
    for name, tenant in sorted(registry.tenants.items()):
        for field, warning in webhook_warnings(tenant.webhook, settings.private_domains):
            yield f"{field_path('tenants', name, 'webhook', field)} {warning}"
        for warning in wide_network_warnings(tenant.allow_image_url):
            yield f"{field_path('tenants', name, 'allow_image_url')} {warning}"


async def _check_upstream(url: str | None, report: Report) -> None:
    """Connect without a request, since every call of the upstream costs money."""
    if url is None:
        report.connections.append("`gateway serve` starts the sandbox.")
        return
    parts = urlsplit(url)
    is_tls = parts.scheme == "https"
    host, port = str(parts.hostname), parts.port or (443 if is_tls else 80)
    try:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            _, writer = await asyncio.open_connection(host, port, ssl=httpx2.create_ssl_context() if is_tls else None)
    except TimeoutError:
        why = f"no connection within {_TIMEOUT_SECONDS:g} s"
    except OSError as error:
        why = describe_os_error(error)
    except UnicodeError:
        why = "invalid host name"
    else:
        writer.transport.abort()
        report.connections.append(
            f"The upstream accepts connections at {host}:{port}{' with TLS' if is_tls else ''}; nothing was sent."
        )
        return
    report.errors.append(f"{PREFIX}UPSTREAM_URL can't be reached at {host}:{port}: {why}")
