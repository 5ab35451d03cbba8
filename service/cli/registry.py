"""Commands that show and apply the registry."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec
import tomli_w

from service.api.admin_schemas import (
    AccountEntry,
    ApplyResult,
    Difference,
    DifferenceKind,
    ReencryptResult,
    RegistryBody,
    SecretEntry,
    TenantEntry,
    rename_purse,
)
from service.cli.client import AdminClient, AdminResponse, CommandError, with_admin_client
from service.cli.common import read_environment
from service.cli.formatting import single_line
from service.domain.errors import ErrorCollector, field_path, suggest, validate_tree
from service.domain.tenants import Name

_MAX_SECRET_BYTES = 4_096
_ENTRY_TYPES: Mapping[str, type[AccountEntry | TenantEntry]] = {"accounts": AccountEntry, "tenants": TenantEntry}
_REQUIRED_FIELDS: Mapping[str, dict[str, Any]] = {"accounts": {}, "tenants": {"accounts": []}}
_INLINE_SECRET_ERROR = (
    'must be where the secret is, as in { env = "NAME" } or { file = "path" }: it does not belong in here itself'  # noqa: S105 - a message
)
FILE_HEADER = """\
# The registry of an Imaging Gateway. `gateway export` writes it, `gateway apply` makes it so.
#
# It can be kept under version control: there are no secrets in it. Of a token there is the SHA-256 of its 190 random
# bits, from which nobody finds them; of other secrets there is where `gateway apply` takes them from:
# `user_key = { env = "MAIN_USER_KEY" }` or `{ file = "main.key" }`, and likewise the `secret` of a webhook. The `url`
# of one is all there, with its query.
#
# Tasks and usage belong to the `id` behind a name. Leave those lines as they are, and write none for what is new.
"""


def read_registry_file(file: BinaryIO) -> RegistryBody:
    """The registry that a file describes, with the secrets from where it says they are.

    Raises CommandError with all faults, and never with a secret.
    """
    path = Path(getattr(file, "name", ""))
    folder, name = (path.parent, single_line(str(path))) if path.is_file() else (Path(), "what was given")
    try:
        tree = tomllib.loads(file.read().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
        raise CommandError(f"gateway: {name} is no TOML: {single_line(why)}") from None
    faults = ErrorCollector()
    rename_purse(tree, faults)
    for where, holder, key in _secret_fields(tree):
        _resolve_secret(where, holder, key, folder, faults)
    _validate_registry(tree, faults)
    if faults.errors:
        lines = [single_line(f"{each.field}: {each.detail}") for each in faults.errors]
        raise CommandError("\n  ".join([f"gateway: {name} can't be applied:", *lines]))
    return msgspec.convert(tree, RegistryBody)


def format_registry_file(registry: RegistryBody) -> str:
    """The registry as a file."""
    tree = _to_toml_value(msgspec.to_builtins(registry, builtin_types=(datetime,)))
    unsaid = [
        *(field_path("accounts", name, "user_key") for name, each in registry.accounts.items() if not each.user_key),
        *(
            field_path("tenants", name, "webhook", "secret")
            for name, each in registry.tenants.items()
            if each.webhook and not each.webhook.secret
        ),
    ]
    note = "#\n# Where these are is not said. They are kept, but could not be restored:\n" if unsaid else ""
    return "\n".join([FILE_HEADER + note + "".join(f"#   {each}\n" for each in unsaid), tomli_w.dumps(tree)])


def _secret_fields(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where secrets are spoken of: the path, and the table and the key in it."""
    for name, account in _subtables(tree.get("accounts")):
        yield field_path("accounts", name, "user_key"), account, "user_key"
    for name, tenant in _subtables(tree.get("tenants")):
        for key, webhook in _subtables({"webhook": tenant.get("webhook")}):
            yield field_path("tenants", name, key, "secret"), webhook, "secret"


def _subtables(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, each) for name, each in value.items() if isinstance(each, dict))


def _resolve_secret(path: str, holder: dict[str, Any], key: str, folder: Path, faults: ErrorCollector) -> None:
    """Put a secret beside where it is said to be."""
    if key not in holder:
        return
    entry = holder[key]
    if not isinstance(entry, dict) or "value" in entry:
        faults.add(path, _INLINE_SECRET_ERROR)
        holder.pop(key)
    elif wrong := validate_tree(entry, SecretEntry, path):
        faults.errors += wrong
        holder.pop(key)
    elif len(entry) != 1:
        faults.add(path, "must say one of env and file")
    else:
        try:
            holder[key] = entry | {"value": _read_secret_value(entry, folder)}
        except ValueError as error:
            faults.add(path, str(error))


def _read_secret_value(entry: Mapping[str, str], folder: Path) -> str:
    """The secret itself. Raises ValueError that says why there is none."""
    if "env" in entry:
        if not (value := read_environment(entry["env"])):
            raise ValueError(f"there is no environment variable {entry['env']}")
        return value.strip()
    try:
        with (folder / entry["file"]).open("rb") as opened:
            value = opened.read(_MAX_SECRET_BYTES).decode().strip()
    except OSError as error:
        raise ValueError(f"{entry['file']} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        value = ""
    if not value:
        raise ValueError(f"{entry['file']} holds no secret")
    return value


def _validate_registry(tree: Mapping[str, Any], faults: ErrorCollector) -> None:
    """Gather what is wrong with a registry: how it is written, and where that is right, what it says."""
    for section, found in tree.items():
        if section not in _ENTRY_TYPES:
            faults.add(field_path(section), f"is unknown{suggest(section, _ENTRY_TYPES)}")
        elif not isinstance(found, dict):
            faults.add(section, "must be a table")
        else:
            for name, entry in found.items():
                _validate_entry(section, name, entry, faults)


def _validate_entry(section: str, name: str, entry: Any, faults: ErrorCollector) -> None:
    path, kind = field_path(section, name), _ENTRY_TYPES[section]
    faults.errors += validate_tree(name, Name, path)
    wrong = validate_tree(entry, kind, path)
    faults.errors += wrong
    if isinstance(entry, dict):
        # What a part says is looked at though others can't be read, so that its faults are not told only after theirs.
        broken = {place for fault in wrong for place in _path_prefixes(fault.field)}
        right = {key: each for key, each in entry.items() if f"{path}.{field_path(key)}" not in broken}
        msgspec.convert(_REQUIRED_FIELDS[section] | right, kind).to_desired(name, faults)


def _path_prefixes(path: str) -> Iterator[str]:
    """A place and all in which it is."""
    yield path
    for place, each in enumerate(path):
        if each in ".[":
            yield path[:place]


def _to_toml_value(value: Any) -> Any:
    """A value as TOML can say it: without nulls, and whole numbers without decimals."""
    match value:
        case dict():
            return {key: _to_toml_value(each) for key, each in value.items() if each is not None}
        case list():
            return [_to_toml_value(each) for each in value]
        case float():
            return int(value) if value.is_integer() else value
        case _:
            return value


_EXIT_DIFFERENT = 2
_DIFF_SIGNS = {DifferenceKind.ADDED: "+", DifferenceKind.CHANGED: "~", DifferenceKind.REMOVED: "-"}
_SECRET_SUFFIX = ".value"  # noqa: S105 - the end of a path


@with_admin_client
def export_registry(port: AdminClient, *, as_json: bool) -> None:
    """Print the whole registry."""
    answer = port.request("GET", "registry")
    click.echo(answer.format_json() if as_json else format_registry_file(answer.decode(RegistryBody)), nl=as_json)


@with_admin_client
def apply_file(port: AdminClient, *, file: BinaryIO, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Make the registry what a file says."""
    body: dict[str, Any] = msgspec.to_builtins(read_registry_file(file))
    planned = port.request("PUT", "registry", body=body, dry_run=True, prune=prune, force=force)
    found = planned.decode(ApplyResult)
    if not as_json:
        _print_diff(found)
    if found.differences and not dry_run:
        # What was shown is what is done, or nothing: somebody else may have changed the registry since.
        done = port.request("PUT", "registry", body=body, version=planned.version, prune=prune, force=force)
        _print_result(done, as_json=as_json)
        return
    if as_json:
        click.echo(planned.format_json())
    if found.differences:
        click.get_current_context().exit(_EXIT_DIFFERENT)


@with_admin_client
def rotate_keys(port: AdminClient, *, as_json: bool) -> None:
    """Have all secrets sealed with the first secret key; what no key opens ends the command with 1."""
    answer = port.request("POST", "registry", "rotate-keys")
    found = answer.decode(ReencryptResult)
    anew = [
        *(field_path("accounts", name, "user_key") for name in found.accounts),
        *(field_path("tenants", name, "webhook", "secret") for name in found.tenants),
    ]
    if as_json:
        click.echo(answer.format_json())
    elif anew:
        click.echo(f"Sealed anew, with the first secret key: {single_line(', '.join(anew))}")
    if found.undecryptable:
        undecryptable = single_line(", ".join(found.undecryptable))
        raise CommandError(f"gateway: no secret key opens {undecryptable}: give them anew")
    if not as_json:
        click.echo("All secrets of the registry are sealed with the first secret key.")


def _print_diff(found: ApplyResult) -> None:
    for line in _format_diff(found.differences):
        click.echo(line)
    if found.unmanaged:
        click.echo(f"Not in the file, and kept without --prune: {single_line(', '.join(found.unmanaged))}")
    if not found.differences:
        click.echo("All is as the file says: there is nothing to change.")


def _print_result(done: AdminResponse, *, as_json: bool) -> None:
    if as_json:
        click.echo(done.format_json())
        return
    applied = done.decode(ApplyResult)
    click.echo(f"Applied, with {len(applied.differences)} differences.")
    for name, secret in applied.generated_secrets.items():
        click.echo(f"The secret of the webhooks of {name}, which is not shown again: {secret}")


def _format_diff(differences: Sequence[Difference]) -> Iterator[str]:
    for each in differences:
        sign = _DIFF_SIGNS[each.action]
        if each.path.endswith(_SECRET_SUFFIX):
            says = (
                "the secret is another one"
                if each.action is DifferenceKind.CHANGED
                else "one is made, to be shown once"
            )
            yield single_line(f"{sign} {each.path.removesuffix(_SECRET_SUFFIX)}: {says}")
        elif each.action is DifferenceKind.CHANGED:
            yield single_line(f"{sign} {each.path} = {_format_json(each.before)} -> {_format_json(each.after)}")
        elif each.action is DifferenceKind.ADDED:
            yield from (single_line(f"{sign} {line}") for line in _flatten_entry(each.path, each.after))
        else:
            yield from (single_line(f"{sign} {line}") for line in _flatten_entry(each.path, each.before))


def _flatten_entry(path: str, value: Any) -> Iterator[str]:
    """What there is in a part of the registry, place by place."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _flatten_entry(f"{path}.{field_path(key)}", each)
    else:
        yield f"{path} = {_format_json(value)}"


def _format_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
