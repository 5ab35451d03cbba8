"""Groups of commands that cost nothing until one of them is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import IO, Any

import click


class ExtraMissingError(click.ClickException):
    """A command needs what only the package's extra `local` brings, and production does without."""

    def __init__(self, what: str, error: ModuleNotFoundError) -> None:
        super().__init__(f"{what} needs {error.name}, which is not installed here: install imaging-gateway[local]")

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
        return self._defined().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name."""
        return self._defined().get_command(ctx, cmd_name)

    def _defined(self) -> click.Group:
        found = getattr(import_module(self._module), str(self.name))
        if not isinstance(found, click.Group):
            raise TypeError(f"{self._module}.{self.name} is no group of commands")
        return found
