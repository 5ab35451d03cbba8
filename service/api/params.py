"""Strict query parameters, JSON bodies and the `Prefer` header."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import date
from enum import StrEnum
from typing import Any, TypeVar

from litestar import Request
from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.params import QueryParameter

from service.domain.errors import FieldError, InvalidOptions, MalformedRequest, check_json

_NONE = "none"


E = TypeVar("E", bound=StrEnum)


class JsonRequest(Request[Any, Any, Any]):
    """A request whose body, if it has one, is JSON in which each name stands once."""

    async def json(self) -> Any:
        """The decoded body. Raises MalformedRequest."""
        try:
            check_json((await self.body() or b"null").decode())
        except UnicodeDecodeError:
            raise MalformedRequest("The body of the request is not UTF-8.") from None
        except ValueError:
            raise MalformedRequest(
                "The body of the request is not JSON that can be read: it must be valid, not nested deep, and have "
                "each name once in an object."
            ) from None
        return await super().json()


def check_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Refuse what would quietly be taken for something else: unknown names, repeated values, and `null`.

    A token whose mistyped grace was overlooked would be gone at once. Raises InvalidOptions.
    """
    query = connection.query_params
    parameters = {
        name: parameter.kwarg_definition for name, parameter in handler.parsed_fn_signature.parameters.items()
    }
    known = {parameter.name or name for name, parameter in parameters.items() if isinstance(parameter, QueryParameter)}
    errors = [FieldError(name, "is unknown") for name in sorted(query.keys() - known)]
    errors += [FieldError(name, "is given more than once") for name, item in query.dict().items() if len(item) > 1]
    errors += [FieldError(name, "must not be null") for name, value in query.multi_items() if value == "null"]
    if errors:
        raise InvalidOptions(errors)


def parse_date(name: str, text: str | None) -> date | None:
    """A day of the calendar such as 2026-01-31. Raises InvalidOptions."""
    try:
        found = None if text is None else date.fromisoformat(text)
    except ValueError:
        found = None
    # Python takes other spellings of ISO 8601 too.
    if text is not None and str(found) != text:
        raise InvalidOptions([FieldError(name, "must be a day such as 2026-01-31")])
    return found


def parse_choices(name: str, text: str, choices: Collection[E]) -> tuple[E, ...]:
    """Some choices, separated by commas, or `none` of them. Raises InvalidOptions."""
    words = [] if text in {"", _NONE} else text.split(",")
    if len(set(words)) < len(words) or not set(words) <= {str(choice) for choice in choices}:
        raise InvalidOptions([FieldError(name, f"must be {_NONE}, or some of {', '.join(choices)}, each once")])
    return tuple(choice for choice in choices if choice in words)


MAX_WAIT_SECONDS = 60
"""No longer than that, in seconds, since what stands between closes connections on which nothing happens."""


_MAX_PREFER_CHARS = 1_000


_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*(?:"|$))+')


_WAIT = re.compile(r'wait[ \t]*(?:=[ \t]*(?:([0-9]+)|"([0-9]*)")?)?[ \t]*(?:;.*)?', re.IGNORECASE)


_WAIT_NAME = re.compile(r"wait[ \t]*(?:[=;]|$)", re.IGNORECASE)


def parse_wait_seconds(headers: Sequence[str]) -> int:
    """For how many seconds the `Prefer` headers of a request want to wait, 60 at the most; 0 if they do not.

    `wait` without a number wants as long as there is; an empty value is the same as none.
    As the standard wants it, only the first of several counts, and what is not known or makes no sense is passed over.
    """
    given = ",".join(headers)
    if len(given) > _MAX_PREFER_CHARS:  # nobody prefers so much, and taking it apart costs time
        return 0
    for preference in _PREFERENCE.findall(given):
        stripped = preference.strip(" \t")
        if _WAIT_NAME.match(stripped):
            found = _WAIT.fullmatch(stripped)
            return min(int(found[1] or found[2] or MAX_WAIT_SECONDS), MAX_WAIT_SECONDS) if found else 0
    return 0


def preference_applied_header(seconds: int) -> dict[str, str]:
    """The header that says so, if it was gone by."""
    return {"Preference-Applied": f"wait={seconds}"} if seconds else {}
