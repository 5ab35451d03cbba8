"""Commands whose exit codes tell apart what went wrong from what was found."""

from __future__ import annotations

from typing import Any

import click

from service.cli.usage_errors import plain_errors


class DetailedExit(click.Command):
    """A command that keeps exit code 2 for what it found: whatever is wrong ends it with 1."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the command line."""
        try:
            with plain_errors():
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
