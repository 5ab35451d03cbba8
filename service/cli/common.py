"""Settings, errors and lazy groups of the commands."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from service.settings import Settings

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
T = TypeVar("T")
_Command = Callable[..., None]
# The parameter of an option that removes a value is the field behind this prefix.
_CLEAR = "clear_"
_ROLES = {"caller": "GATEWAY_TOKEN", "operator": "GATEWAY_ADMIN_TOKEN"}
"""The variables with the tokens by role."""
_ROLE = "role"


def add_options(*options: Callable[[_Command], _Command]) -> Callable[[_Command], _Command]:
    return lambda command: reduce(lambda wrapped, option: option(wrapped), reversed(options), command)


def clear_option(name: str, field: str, help_text: str) -> Callable[[_Command], _Command]:
    return click.option(name, _CLEAR + field, is_flag=True, help=help_text)


def named_fields(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that the options name, None for those to remove. Raises UsageError for a contradiction."""
    named = {option: value for option, value in options.items() if value not in (None, (), {}) and value is not False}
    for option in named:
        if _CLEAR + option in named:
            raise click.UsageError(f"Set or remove {option.replace('_', ' ')}, not both.")
    return {
        option.removeprefix(_CLEAR): None if option.startswith(_CLEAR) else value for option, value in named.items()
    }


def named_items(option: str, items: Iterable[tuple[str, T]], removed: Sequence[str] = ()) -> dict[str, T | None]:
    """Return the items by name, None for those to remove. Raises UsageError if a name is repeated."""
    named: dict[str, T | None] = {}
    for name, value in [*items, *((name, None) for name in removed)]:
        if name in named:
            raise click.UsageError(f"{option} names {name} more than once.")
        named[name] = value
    return named


class CommandError(click.ClickException):
    """Ends a command with exit code 1 and this message."""

    def show(self, file: Any = None) -> None:  # noqa: ARG002 - always on standard error
        print_errors([self.message])


def load_settings() -> Settings:
    """Load the settings from the environment, or print all errors and exit with 2."""
    from service.settings import Settings, SettingsError

    try:
        return Settings.load(get_environment())
    except SettingsError as error:
        print_errors(error.errors)
        sys.exit(2)
    finally:
        # The lists of words that rate the secrets would take 12 MB for as long as the process runs.
        for name in [name for name in sys.modules if name.partition(".")[0] == "zxcvbn"]:
            del sys.modules[name]


def get_environment() -> Mapping[str, str]:
    return os.environ


def print_errors(errors: Iterable[str]) -> None:
    for error in errors:
        click.echo(f"gateway: {error}", err=True)


@click.command("set", hidden=True, add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def removed_set(context: click.Context, *, arguments: Sequence[str]) -> None:  # noqa: ARG001 - all are accepted
    group = context.parent.info_name if context.parent else None
    raise click.UsageError(
        f"`gateway {group} set` was removed: use `gateway {group} create NAME`, or `gateway {group} update NAME`, "
        "which changes only what you name."
    )


class LazyCommand(click.Command):
    """A command or a group defined in a module that is imported when it runs. `gateway --help` does not wait for it."""

    def __init__(self, name: str, module: str, summary: str = "", *, attribute: str = "") -> None:
        super().__init__(name, help=summary, hidden=not summary)
        self._module = module
        self._attribute = attribute or name.replace("-", "_")

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _lean_imports():
            command: click.Command = getattr(import_module(self._module), self._attribute)
        return command.make_context(info_name, args, parent, **extra)


_UNUSED = ("rich", "opentelemetry.sdk")
"""What libraries load if it is installed: structlog for tracebacks (3 MB), redis for metrics of its own (1.4 MB)."""


@contextmanager
def _lean_imports() -> Iterator[None]:
    """Import without the garbage collector, which would find nothing in a fifth of the time, and without `_UNUSED`."""
    modules: dict[str, Any] = sys.modules
    blocked = [name for name in _UNUSED if modules.setdefault(name, None) is None]  # importing None raises ImportError
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        for name in blocked:
            del modules[name]


class RoleCommand(LazyCommand):
    """A command of operators and one of callers under the same name.

    The token that is set decides; with both, `--as` does. A subcommand of operators is theirs in any case. Without any
    token, as in development, a command is the operators', unless it has an id in place of a subcommand, or is `quota`
    without a tenant.
    """

    def __init__(self, name: str, modules: Mapping[str, str], summary: str, subcommands: Collection[str] = ()) -> None:
        """`modules` are those of both roles, `subcommands` those of operators."""
        super().__init__(name, modules["operator"], summary)
        self._modules = modules
        self._subcommands = {*subcommands}

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        role = self._find_role(args, is_strict=not extra.get("resilient_parsing") and not {"-h", "--help"} & {*args})
        with _lean_imports():
            command: click.Command = getattr(import_module(self._modules[role]), self._attribute)
        if not any(option.name == _ROLE for option in command.params):
            text = "Whose command it is, if the tokens of both are set."
            option = click.Option(["--as", _ROLE], type=click.Choice(_ROLES), expose_value=False, help=text)
            command.params.append(option)
        return command.make_context(info_name, args, parent, **extra)

    def _find_role(self, args: Sequence[str], *, is_strict: bool) -> str:
        words = [word for argument in args for word in argument.partition("=")[::2] if word]
        if "--as" in words and (named := words[words.index("--as") + 1 :]) and named[0] in _ROLES:
            return named[0]
        if self._subcommands & {*args}:
            return "operator"
        environ = get_environment()
        set_roles = [
            role for role, name in _ROLES.items() if any(environ.get(name + suffix) for suffix in ("", "_FILE"))
        ]
        if len(set_roles) > 1 and is_strict:
            raise click.UsageError(f"{' and '.join(_ROLES.values())} are both set: use --as caller or --as operator.")
        if len(set_roles) == 1:
            return set_roles[0]
        has_name = any(not argument.startswith("-") for argument in args)
        if self.name == "quota":
            return "operator" if has_name else "caller"  # operators must name a tenant
        return "caller" if self._subcommands and has_name else "operator"


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
        case click.types.IntParamType() | click.types.FloatParamType() as kind:
            noun = "a whole number" if isinstance(kind, click.types.IntParamType) else "a number"
            return f"{name} must be {noun}{_describe_range(kind)}"
        case click.File() | click.Path():
            return f"{name} can't be read: {error.message.rpartition(': ')[2]}"
        case _:
            return f"{name} {error.message}"


def _describe_range(kind: click.ParamType[Any]) -> str:
    match kind:
        case click.IntRange(min=minimum, max=None):
            return f" of at least {minimum}"
        case click.IntRange(min=minimum, max=maximum):
            return f" from {minimum} to {maximum}"
        case click.FloatRange(min=minimum, max=maximum):
            return f" from {minimum:g} to {maximum:g}"
        case _:
            return ""
