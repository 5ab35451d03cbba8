"""What is wrong with a command line, in the words in which the API names faulty fields."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click


class PlainGroup(click.Group):
    """A group whose commands, at any depth, tell what a value must be."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the command line up to the name of the command."""
        with plain_errors():
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Read the rest of the command line, and run the command."""
        with plain_errors():
            return super().invoke(ctx)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Translate errors of values. Raises UsageError."""
    try:
        yield
    except click.BadParameter as error:
        raise click.UsageError(_told(error), error.ctx) from None


def _told(error: click.BadParameter) -> str:
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
