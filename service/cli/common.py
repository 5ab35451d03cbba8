"""Settings, errors and lazy groups of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from service.settings import Settings

url_option = click.option(
    "--url", help="Address of the operators' port.  [default: from GATEWAY_OPS_HOST and GATEWAY_OPS_PORT]"
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the JSON response.")


def load_settings() -> Settings:
    """Load the settings from the environment, or print all errors and exit with 2."""
    from service.settings import Settings, SettingsError

    try:
        return Settings.load(os.environ)
    except SettingsError as error:
        print_errors(error.errors)
        sys.exit(2)


def read_environment(name: str) -> str | None:
    """Return a variable that a command line or a registry file names."""
    return os.environ.get(name)


def print_errors(errors: Iterable[str]) -> None:
    for error in errors:
        click.echo(f"gateway: {error}", err=True)


class LazyGroup(click.Group):
    """A group defined under its name in a module, which is imported only for its commands.

    `gateway --help` does not wait for it.
    """

    def __init__(self, name: str, module: str, description: str) -> None:
        super().__init__(name, help=description)
        self._module = module

    def list_commands(self, ctx: click.Context) -> list[str]:
        return self._load_group().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._load_group().get_command(ctx, cmd_name)

    def _load_group(self) -> click.Group:
        group = getattr(import_module(self._module), str(self.name))
        if not isinstance(group, click.Group):
            raise TypeError(f"{self._module}.{self.name} is no group of commands")
        return group


def add_alias(group: click.Group, name: str, command: click.Command) -> None:
    """Add an old name of a command, which the help does not list."""
    help_text = f"The old name of {command.name}."
    group.add_command(
        click.Command(name, callback=command.callback, params=command.params, help=help_text, hidden=True)
    )


class FieldErrorGroup(click.Group):
    """A group whose commands report invalid values in the words of the API."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with translate_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        with translate_errors():
            return super().invoke(ctx)


class DetailedExitCommand(click.Command):
    """A command that uses exit code 2 for its result: every error exits with 1."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            with translate_errors():
                return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            error.show()
            raise click.exceptions.Exit(1) from None

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SystemExit:  # of `load_settings`
            raise click.exceptions.Exit(1) from None


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate Click's errors of values into UsageError with the API's words."""
    try:
        yield
    except click.BadParameter as error:
        raise click.UsageError(_describe_error(error), error.ctx) from None


def _describe_error(error: click.BadParameter) -> str:
    name = error.param_hint or (error.param.get_error_hint(error.ctx) if error.param else "")
    name = (name if isinstance(name, str) else " ".join(name)).replace("'", "")
    if isinstance(error, click.MissingParameter):
        return f"{name} is required"
    match error.param and error.param.type:
        case click.Choice(choices=choices):
            return f"{name} must be {' or '.join(map(str, choices))}"
        case click.IntRange(min=minimum, max=maximum):
            bounds = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"
            return f"{name} must be a whole number {bounds}"
        case click.types.IntParamType():
            return f"{name} must be a whole number"
        case click.File() | click.Path():
            return f"{name} can't be read: {error.message.rpartition(': ')[2]}"
        case _:
            return f"{name} {error.message}"
