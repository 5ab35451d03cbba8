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
    AppliedView,
    DifferenceKind,
    DifferenceView,
    RegistryBody,
    ResealedView,
    SecretEntry,
    TenantEntry,
)
from service.cli.client import Answer, CommandError, OperatorsPort, asking
from service.cli.common import variable
from service.cli.formatting import plain
from service.domain.errors import Faults, dotted, faults_of, meant
from service.domain.tenants import Name

_LONGEST_SECRET = 4_096


_SECTIONS: Mapping[str, type[AccountEntry | TenantEntry]] = {"accounts": AccountEntry, "tenants": TenantEntry}


_NEEDED: Mapping[str, dict[str, Any]] = {"accounts": {}, "tenants": {"accounts": []}}


_NOT_HERE = (
    'must be where the secret is, as in { env = "NAME" } or { file = "path" }: it does not belong in here itself'
)


HEAD = """\
# The registry of an Imaging Gateway. `gateway export` writes it, `gateway apply` makes it so.
#
# It can be kept under version control: there are no secrets in it. Of a token there is the SHA-256 of its 190 random
# bits, from which nobody finds them; of other secrets there is where `gateway apply` takes them from:
# `user_key = { env = "MAIN_USER_KEY" }` or `{ file = "main.key" }`, and likewise the `secret` of a webhook. The `url`
# of one is all there, with its query.
#
# Tasks and usage belong to the `id` behind a name. Leave those lines as they are, and write none for what is new.
"""


def read(file: BinaryIO) -> RegistryBody:
    """The registry that a file describes, with the secrets from where it says they are.

    Raises CommandError with all faults, and never with a secret.
    """
    path = Path(getattr(file, "name", ""))
    folder, name = (path.parent, plain(str(path))) if path.is_file() else (Path(), "what was given")
    try:
        tree = tomllib.loads(file.read().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        why = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "it is not UTF-8"
        raise CommandError(f"gateway: {name} is no TOML: {plain(why)}") from None
    faults = Faults()
    for where, holder, key in _secrets(tree):
        _resolve(where, holder, key, folder, faults)
    _check(tree, faults)
    if faults.found:
        lines = [plain(f"{each.field}: {each.detail}") for each in faults.found]
        raise CommandError("\n  ".join([f"gateway: {name} can't be applied:", *lines]))
    return msgspec.convert(tree, RegistryBody)


def write(registry: RegistryBody) -> str:
    """The registry as a file."""
    tree = _bare(msgspec.to_builtins(registry, builtin_types=(datetime,)))
    unsaid = [
        *(dotted("accounts", name, "user_key") for name, each in registry.accounts.items() if not each.user_key),
        *(
            dotted("tenants", name, "webhook", "secret")
            for name, each in registry.tenants.items()
            if each.webhook and not each.webhook.secret
        ),
    ]
    note = "#\n# Where these are is not said. They are kept, but could not be restored:\n" if unsaid else ""
    return "\n".join([HEAD + note + "".join(f"#   {each}\n" for each in unsaid), tomli_w.dumps(tree)])


def _secrets(tree: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where secrets are spoken of: the path, and the table and the key in it."""
    for name, account in _tables(tree.get("accounts")):
        yield dotted("accounts", name, "user_key"), account, "user_key"
    for name, tenant in _tables(tree.get("tenants")):
        for key, webhook in _tables({"webhook": tenant.get("webhook")}):
            yield dotted("tenants", name, key, "secret"), webhook, "secret"


def _tables(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, each) for name, each in value.items() if isinstance(each, dict))


def _resolve(path: str, holder: dict[str, Any], key: str, folder: Path, faults: Faults) -> None:
    """Put a secret beside where it is said to be."""
    if key not in holder:
        return
    entry = holder[key]
    if not isinstance(entry, dict) or "value" in entry:
        faults.add(path, _NOT_HERE)
        holder.pop(key)
    elif wrong := faults_of(entry, SecretEntry, path):
        faults.found += wrong
        holder.pop(key)
    elif len(entry) != 1:
        faults.add(path, "must say one of env and file")
    else:
        try:
            holder[key] = entry | {"value": _found(entry, folder)}
        except ValueError as error:
            faults.add(path, str(error))


def _found(entry: Mapping[str, str], folder: Path) -> str:
    """The secret itself. Raises ValueError that says why there is none."""
    if "env" in entry:
        if not (value := variable(entry["env"])):
            raise ValueError(f"there is no environment variable {entry['env']}")
        return value.strip()
    try:
        with (folder / entry["file"]).open("rb") as opened:
            value = opened.read(_LONGEST_SECRET).decode().strip()
    except OSError as error:
        raise ValueError(f"{entry['file']} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        value = ""
    if not value:
        raise ValueError(f"{entry['file']} holds no secret")
    return value


def _check(tree: Mapping[str, Any], faults: Faults) -> None:
    """Gather what is wrong with a registry: how it is written, and where that is right, what it says."""
    for section, found in tree.items():
        if section not in _SECTIONS:
            faults.add(dotted(section), f"is unknown{meant(section, _SECTIONS)}")
        elif not isinstance(found, dict):
            faults.add(section, "must be a table")
        else:
            for name, entry in found.items():
                _check_entry(section, name, entry, faults)


def _check_entry(section: str, name: str, entry: Any, faults: Faults) -> None:
    path, kind = dotted(section, name), _SECTIONS[section]
    faults.found += faults_of(name, Name, path)
    wrong = faults_of(entry, kind, path)
    faults.found += wrong
    if isinstance(entry, dict):
        # What a part says is looked at though others can't be read, so that its faults are not told only after theirs.
        broken = {place for fault in wrong for place in _above(fault.field)}
        right = {key: each for key, each in entry.items() if f"{path}.{dotted(key)}" not in broken}
        msgspec.convert(_NEEDED[section] | right, kind).wanted(name, faults)


def _above(path: str) -> Iterator[str]:
    """A place and all in which it is."""
    yield path
    for place, each in enumerate(path):
        if each in ".[":
            yield path[:place]


def _bare(value: Any) -> Any:
    """A value as TOML can say it: without nulls, and whole numbers without decimals."""
    match value:
        case dict():
            return {key: _bare(each) for key, each in value.items() if each is not None}
        case list():
            return [_bare(each) for each in value]
        case float():
            return int(value) if value.is_integer() else value
        case _:
            return value


_DIFFERENT = 2


_SIGNS = {DifferenceKind.ADDED: "+", DifferenceKind.CHANGED: "~", DifferenceKind.REMOVED: "-"}


_SECRET = ".value"  # noqa: S105 - the end of a path


@asking
def show_registry(port: OperatorsPort, *, as_json: bool) -> None:
    """Print the whole registry."""
    answer = port.ask("GET", "registry")
    click.echo(answer.pretty() if as_json else write(answer.read(RegistryBody)), nl=as_json)


@asking
def apply_file(port: OperatorsPort, *, file: BinaryIO, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Make the registry what a file says."""
    body: dict[str, Any] = msgspec.to_builtins(read(file))
    planned = port.ask("PUT", "registry", body=body, dry_run=True, prune=prune, force=force)
    found = planned.read(AppliedView)
    if not as_json:
        _show(found)
    if found.differences and not dry_run:
        # What was shown is what is done, or nothing: somebody else may have changed the registry since.
        done = port.ask("PUT", "registry", body=body, version=planned.version, prune=prune, force=force)
        _end(done, as_json=as_json)
        return
    if as_json:
        click.echo(planned.pretty())
    if found.differences:
        click.get_current_context().exit(_DIFFERENT)


@asking
def reseal(port: OperatorsPort, *, as_json: bool) -> None:
    """Have all secrets sealed with the first secret key; what no key opens ends the command with 1."""
    answer = port.ask("POST", "registry", "reseal")
    found = answer.read(ResealedView)
    anew = [
        *(dotted("accounts", name, "user_key") for name in found.accounts),
        *(dotted("tenants", name, "webhook", "secret") for name in found.tenants),
    ]
    if as_json:
        click.echo(answer.pretty())
    elif anew:
        click.echo(f"Sealed anew, with the first secret key: {plain(', '.join(anew))}")
    if found.lost:
        raise CommandError(f"gateway: no secret key opens {plain(', '.join(found.lost))}: give them anew")
    if not as_json:
        click.echo("All secrets of the registry are sealed with the first secret key.")


def _show(found: AppliedView) -> None:
    for line in _lines(found.differences):
        click.echo(line)
    if found.kept:
        click.echo(f"Not in the file, and kept without --prune: {plain(', '.join(found.kept))}")
    if not found.differences:
        click.echo("All is as the file says: there is nothing to change.")


def _end(done: Answer, *, as_json: bool) -> None:
    if as_json:
        click.echo(done.pretty())
        return
    applied = done.read(AppliedView)
    click.echo(f"Applied, with {len(applied.differences)} differences.")
    for name, secret in applied.secrets.items():
        click.echo(f"The secret of the webhooks of {name}, which is not shown again: {secret}")


def _lines(differences: Sequence[DifferenceView]) -> Iterator[str]:
    for each in differences:
        sign = _SIGNS[each.what]
        if each.path.endswith(_SECRET):
            says = (
                "the secret is another one" if each.what is DifferenceKind.CHANGED else "one is made, to be shown once"
            )
            yield plain(f"{sign} {each.path.removesuffix(_SECRET)}: {says}")
        elif each.what is DifferenceKind.CHANGED:
            yield plain(f"{sign} {each.path} = {_said(each.before)} -> {_said(each.after)}")
        elif each.what is DifferenceKind.ADDED:
            yield from (plain(f"{sign} {line}") for line in _leaves(each.path, each.after))
        else:
            yield from (plain(f"{sign} {line}") for line in _leaves(each.path, each.before))


def _leaves(path: str, value: Any) -> Iterator[str]:
    """What there is in a part of the registry, place by place."""
    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _leaves(f"{path}.{dotted(key)}", each)
    else:
        yield f"{path} = {_said(value)}"


def _said(value: Any) -> str:
    return msgspec.json.encode(value).decode()
