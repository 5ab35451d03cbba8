"""What there is to say of an environment variable that is a setting."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum

from msgspec import Struct

from service.environ import wanted


class Scope(StrEnum):
    """Where a setting matters; elsewhere it may be given, and does nothing."""

    ANYWHERE = "anywhere"
    API = "where requests are answered"
    DEVELOPMENT = "in development"


class Variable(Struct, frozen=True):
    """How a field is read: `default` is text like any other, `otherwise` says what happens without one."""

    parse: Callable[[str], object]
    default: str | None
    description: str
    otherwise: str = "none"
    secret: bool = False
    scope: Scope = Scope.ANYWHERE


class Setting(Struct, frozen=True, kw_only=True):
    """A setting as it is told to people.

    `default` could be given as it is if it is `literal`, else it says what happens without one; `accepts` goes on from
    "must be".
    """

    name: str
    field: str
    default: str
    literal: bool
    description: str
    accepts: str
    secret: bool
    scope: Scope


def described(prefix: str, variables: Mapping[str, Variable]) -> Sequence[Setting]:
    """The settings that fields are filled from, in their order."""
    return tuple(
        Setting(
            name=prefix + field.upper(),
            field=field,
            default=variable.default or variable.otherwise,
            literal=variable.default is not None,
            description=variable.description,
            accepts=wanted(variable.parse),
            secret=variable.secret,
            scope=variable.scope,
        )
        for field, variable in variables.items()
    )
