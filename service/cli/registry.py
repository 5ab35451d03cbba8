"""`gateway export`, `gateway apply` and `gateway reseal`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import click
import msgspec

from service.api.admin_schemas import AppliedView, DifferenceKind, DifferenceView, RegistryBody, ResealedView
from service.cli import registry_file
from service.cli.client import Answer, CommandError, OperatorsPort, asking
from service.cli.shown import plain
from service.domain.errors import dotted

_DIFFERENT = 2
_SIGNS = {DifferenceKind.ADDED: "+", DifferenceKind.CHANGED: "~", DifferenceKind.REMOVED: "-"}
_SECRET = ".value"  # noqa: S105 - the end of a path


@asking
def show_registry(port: OperatorsPort, *, as_json: bool) -> None:
    """Print the whole registry."""
    answer = port.ask("GET", "registry")
    click.echo(answer.pretty() if as_json else registry_file.write(answer.read(RegistryBody)), nl=as_json)


@asking
def apply_file(port: OperatorsPort, *, file: BinaryIO, dry_run: bool, prune: bool, force: bool, as_json: bool) -> None:
    """Make the registry what a file says."""
    body: dict[str, Any] = msgspec.to_builtins(registry_file.read(file))
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
