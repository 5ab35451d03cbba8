"""Commands for the complete registry, and its TOML file."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
import tomli_w

from service.api.admin_schemas import rename_old_fields
from service.api.registry_schemas import (
    AccountEntry,
    ApplyResult,
    Difference,
    DifferenceKind,
    ReencryptResult,
    RegistryBody,
    SecretEntry,
    TenantEntry,
)
from service.cli.client import AdminClient, with_admin_client
from service.cli.common import CommandError, DetailedExitCommand, get_environment, json_option, print_errors
from service.cli.formatting import MAX_SECRET_BYTES, format_number
from service.client import single_line
from service.domain.errors import ErrorCollector, field_path, suggest, validate_tree
from service.domain.tenants import Name

_ENTRY_TYPES: Mapping[str, type[AccountEntry | TenantEntry]] = {"accounts": AccountEntry, "tenants": TenantEntry}
_REQUIRED_FIELDS: Mapping[str, dict[str, Any]] = {"accounts": {}, "tenants": {"accounts": []}}
_INLINE_SECRET_ERROR = 'must be a reference such as { env = "NAME" } or { file = "path" }: the file must not contain it'  # noqa: S105 - a message
_EXIT_DIFFERENT = 2
_DIFF_SIGNS = {DifferenceKind.ADDED: "+", DifferenceKind.CHANGED: "~", DifferenceKind.REMOVED: "-"}
_SECRET_SUFFIX = ".value"  # noqa: S105 - the end of a path
FILE_HEADER = """\
# The registry of an Imaging Gateway. `gateway export` writes it, `gateway apply` applies it.
#
# It contains no secrets and can be kept under version control. Tokens are SHA-256 hashes of 190 random bits; other
# secrets are references, which `gateway apply` reads: `user_key = { env = "MAIN_USER_KEY" }` or
# `{ file = "main.key" }`, and likewise the `secret` of a webhook. The `url` of a webhook is complete, with its query.
#
# Tasks and usage belong to the `id` behind a name. Keep these lines, and omit them for new entries.
"""


def read_registry_file(file: BinaryIO) -> RegistryBody:
    """Parse a registry and read the secrets that it refers to.

    Raises CommandError with all errors, never with a secret.
    """
    file_path = Path(getattr(file, "name", ""))
    folder, name = (file_path.parent, single_line(str(file_path))) if file_path.is_file() else (Path(), "the input")
    try:
        tree = tomllib.loads(file.read().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "not UTF-8"
        raise CommandError(f"{name} is not TOML: {single_line(why)}") from None
    errors = ErrorCollector()
    rename_old_fields(tree, errors)
    for path, table, key in _secret_fields(tree):
        _resolve_secret(path, table, key, folder, errors)
    _validate_registry(tree, errors)
    if errors.errors:
        lines = [single_line(f"{error.field}: {error.detail}") for error in errors.errors]
        raise CommandError("\n  ".join([f"{name} can't be applied:", *lines]))
    return msgspec.convert(tree, RegistryBody)


def format_registry_file(registry: RegistryBody) -> str:
    tree = _to_toml_value(msgspec.to_builtins(registry, builtin_types=(datetime,)))
    missing = _secret_paths(
        [name for name, account in registry.accounts.items() if not account.user_key],
        [name for name, tenant in registry.tenants.items() if tenant.webhook and not tenant.webhook.secret],
    )
    note = "#\n# These secrets have no reference. They are kept, but could not be restored:\n" if missing else ""
    return "\n".join([FILE_HEADER + note + "".join(f"#   {path}\n" for path in missing), tomli_w.dumps(tree)])


def _secret_paths(accounts: Sequence[str], tenants: Sequence[str]) -> list[str]:
    return [
        *(field_path("accounts", name, "user_key") for name in accounts),
        *(field_path("tenants", name, "webhook", "secret") for name in tenants),
    ]


def _secret_fields(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield the path, the table and the key of each secret."""
    for name, account in _subtables(tree.get("accounts")):
        yield field_path("accounts", name, "user_key"), account, "user_key"
    for name, tenant in _subtables(tree.get("tenants")):
        if isinstance(webhook := tenant.get("webhook"), dict):
            yield field_path("tenants", name, "webhook", "secret"), webhook, "secret"


def _subtables(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, table) for name, table in value.items() if isinstance(table, dict))


def _resolve_secret(path: str, table: dict[str, Any], key: str, folder: Path, errors: ErrorCollector) -> None:
    """Add the value of a secret to its reference."""
    if key not in table:
        return
    entry = table[key]
    if not isinstance(entry, dict) or "value" in entry:
        errors.add(path, _INLINE_SECRET_ERROR)
        table.pop(key)
    elif invalid := validate_tree(entry, SecretEntry, path):
        errors.errors += invalid
        table.pop(key)
    elif len(entry) != 1:
        errors.add(path, "must have either env or file")
    else:
        try:
            table[key] = entry | {"value": _read_secret_value(entry, folder)}
        except ValueError as error:
            errors.add(path, str(error))


def _read_secret_value(entry: Mapping[str, str], folder: Path) -> str:
    """Raises ValueError."""
    if "env" in entry:
        if not (value := get_environment().get(entry["env"])):
            raise ValueError(f"there is no environment variable {entry['env']}")
        return value.strip()
    try:
        with (folder / entry["file"]).open("rb") as file:
            value = file.read(MAX_SECRET_BYTES).decode().strip()
    except OSError as error:
        raise ValueError(f"{entry['file']} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        value = ""
    if not value:
        raise ValueError(f"{entry['file']} contains no secret")
    return value


def _validate_registry(tree: Mapping[str, Any], errors: ErrorCollector) -> None:
    """Collect the errors of a registry."""
    for section, entries in tree.items():
        if section not in _ENTRY_TYPES:
            errors.add(field_path(section), f"is unknown{suggest(section, _ENTRY_TYPES)}")
        elif not isinstance(entries, dict):
            errors.add(section, "must be a table")
        else:
            for name, entry in entries.items():
                _validate_entry(section, name, entry, errors)


def _validate_entry(section: str, name: str, entry: Any, errors: ErrorCollector) -> None:
    path, kind = field_path(section, name), _ENTRY_TYPES[section]
    errors.errors += validate_tree(name, Name, path)
    invalid = validate_tree(entry, kind, path)
    errors.errors += invalid
    if isinstance(entry, dict):
        # The valid fields are converted without the others, so that all errors are reported at once.
        invalid_paths = {prefix for error in invalid for prefix in _path_prefixes(error.field)}
        valid = {key: value for key, value in entry.items() if f"{path}.{field_path(key)}" not in invalid_paths}
        errors.collect(path, None, msgspec.convert(_REQUIRED_FIELDS[section] | valid, kind).to_desired, name)


def _path_prefixes(path: str) -> Iterator[str]:
    yield path
    for index, char in enumerate(path):
        if char in ".[":
            yield path[:index]


def _to_toml_value(value: Any) -> Any:
    """Drop nulls and the decimals of whole numbers."""
    match value:
        case dict():
            return {key: _to_toml_value(item) for key, item in value.items() if item is not None}
        case list():
            return [_to_toml_value(item) for item in value]
        case float():
            return int(value) if value.is_integer() else value
        case _:
            return value


@click.command()
@json_option
@with_admin_client
def export(client: AdminClient, *, as_json: bool) -> None:
    """Print the registry as TOML: accounts, tenants and tokens.

    `gateway apply` restores all but history from it. It contains no secrets, only hashes of tokens and references to
    the other secrets.
    """
    response = client.request("GET", "registry")
    click.echo(response.format_json() if as_json else format_registry_file(response.decode(RegistryBody)), nl=as_json)


@click.command(cls=DetailedExitCommand)
@click.argument("file", type=click.File("rb"))
@click.option("--dry-run", is_flag=True, help="Show the differences, and change nothing.")
@click.option("--prune", is_flag=True, help="Delete the accounts, tenants and tokens that are not in the file.")
@click.option("--force", is_flag=True, help="Delete even entries with running tasks, and even all entries.")
@json_option
@with_admin_client
def apply(client: AdminClient, *, file: BinaryIO, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Change the registry to match FILE, completely or not at all, and show the differences.

    FILE is TOML as `gateway export` prints it, or `-`. Entries in it are replaced: omitted fields get their defaults,
    only ids and secrets are kept. Other entries stay, unless --prune is given. FILE contains references to secrets
    which this command reads: `user_key = { env = "MAIN_USER_KEY" }`, or `{ file = "main.key" }`, relative to FILE.

    The exit code is 0 if the registry matches FILE, 1 after an error, and with --dry-run 2 if there are differences.
    """
    body: dict[str, Any] = msgspec.to_builtins(read_registry_file(file))
    planned = client.request("PUT", "registry", body=body, dry_run=True, prune=prune, force=force)
    plan = planned.decode(ApplyResult)
    if not as_json:
        _print_diff(plan)
    if plan.differences and not dry_run:
        # `version` refuses the change if the registry changed after the differences were shown.
        applied = client.request("PUT", "registry", body=body, version=planned.version, prune=prune, force=force)
        click.echo(applied.format_json() if as_json else _format_result(applied.decode(ApplyResult)))
        return
    if as_json:
        click.echo(planned.format_json())
    if plan.differences:
        click.get_current_context().exit(_EXIT_DIFFERENT)


@click.command()
@json_option
@with_admin_client
def rotate_keys(client: AdminClient, *, as_json: bool) -> None:
    """Encrypt all secrets of the registry with the first of GATEWAY_SECRET_KEYS.

    Run it when every process has the new first key, and before the other keys are removed. The exit code is 1 if a
    secret can't be decrypted with any of the keys.
    """
    response = client.request("POST", "registry", "rotate-keys")
    result = response.decode(ReencryptResult)
    if as_json:
        click.echo(response.format_json())
    elif paths := _secret_paths(result.accounts, result.tenants):
        click.echo(f"Encrypted with the first secret key: {single_line(', '.join(paths))}")
    if result.undecryptable:
        raise CommandError(f"no secret key decrypts {single_line(', '.join(result.undecryptable))}: set them again")
    if not as_json:
        click.echo("All secrets of the registry are encrypted with the first secret key.")


def _print_diff(plan: ApplyResult) -> None:
    for line in _format_diff(plan.differences):
        click.echo(line)
    if plan.unmanaged:
        click.echo(f"Not in the file, and kept without --prune: {single_line(', '.join(plan.unmanaged))}")
    print_errors(f"warning: {warning}" for warning in plan.warnings)
    if not plan.differences:
        click.echo("The registry matches the file: nothing to change.")


def _format_result(result: ApplyResult) -> str:
    lines = [f"Applied {format_number(len(result.differences), 'difference')}."]
    for name, secret in result.generated_secrets.items():
        lines.append(f"The webhook secret of {name}, which is not shown again: {secret}")
    return "\n".join(lines)


def _format_diff(differences: Sequence[Difference]) -> Iterator[str]:
    for item in differences:
        sign, is_changed = _DIFF_SIGNS[item.action], item.action is DifferenceKind.CHANGED
        if item.path.endswith(_SECRET_SUFFIX):
            note = "the secret is changed" if is_changed else "a secret is generated and shown once"
            yield single_line(f"{sign} {item.path.removesuffix(_SECRET_SUFFIX)}: {note}")
        elif is_changed:
            yield single_line(f"{sign} {item.path} = {_format_json(item.before)} -> {_format_json(item.after)}")
        else:
            value = item.after if item.action is DifferenceKind.ADDED else item.before
            yield from (single_line(f"{sign} {line}") for line in _flatten_entry(item.path, value))


def _flatten_entry(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten_entry(f"{path}.{field_path(key)}", item)
    else:
        yield f"{path} = {_format_json(value)}"


def _format_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
