"""Groups of commands that cost nothing until one of them is asked for."""

from __future__ import annotations

from importlib import import_module

import click


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
