"""Shared parts of the commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import IO, TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from service.settings import Settings


class ExtraMissingError(click.ClickException):
    """A command needs what only the package's extra `local` brings, and production does without."""

    def __init__(self, feature: str, error: ModuleNotFoundError) -> None:
        super().__init__(f"{feature} needs {error.name}, which is not installed here: install imaging-gateway[local]")

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message as the gateway prints its other complaints."""
        click.echo(f"gateway: {self.message}", file=file, err=file is None)


class LazyGroup(click.Group):
    """A group that is defined, under its name, in a module of its own.

    The module is imported for its commands only, so that what they need does not slow `gateway --help` down.
    """

    def __init__(self, name: str, module: str, description: str) -> None:
        super().__init__(name, help=description)
        self._module = module

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names of the commands."""
        return self._load_group().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name."""
        return self._load_group().get_command(ctx, cmd_name)

    def _load_group(self) -> click.Group:
        found = getattr(import_module(self._module), str(self.name))
        if not isinstance(found, click.Group):
            raise TypeError(f"{self._module}.{self.name} is no group of commands")
        return found


class FieldErrorGroup(click.Group):
    """A group whose commands, at any depth, tell what a value must be."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the command line up to the name of the command."""
        with translate_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Read the rest of the command line, and run the command."""
        with translate_errors():
            return super().invoke(ctx)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate errors of values. Raises UsageError."""
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
        case click.IntRange(min=least, max=most):
            return (
                f"{name} must be a whole number {f'of at least {least}' if most is None else f'from {least} to {most}'}"
            )
        case click.types.IntParamType():
            return f"{name} must be a whole number"
        case click.File() | click.Path():
            return f"{name} can't be read: {error.message.rpartition(': ')[2]}"
        case _:
            return f"{name} {error.message}"


class DetailedExitCommand(click.Command):
    """A command that keeps exit code 2 for what it found: whatever is wrong ends it with 1."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the command line."""
        try:
            with translate_errors():
                return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            error.show()
            raise click.exceptions.Exit(1) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command, which says what it found with `ctx.exit`."""
        try:
            return super().invoke(ctx)
        except SystemExit:  # the settings are wrong, and that was said
            raise click.exceptions.Exit(1) from None


def load_settings() -> Settings:
    """The settings from the environment; every fault of them ends the command."""
    from service.settings import Settings, SettingsError

    try:
        return Settings.load(os.environ)
    except SettingsError as error:
        for fault in error.errors:
            click.echo(f"gateway: {fault}", err=True)
        sys.exit(2)


def read_environment(name: str) -> str | None:
    """An environment variable that somebody named on the command line."""
    return os.environ.get(name)
