"""Strict query parameters, JSON bodies and the `Prefer` header."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Sequence
from datetime import date
from enum import StrEnum
from typing import Any, TypeVar

import msgspec
from litestar import Request
from litestar.connection import ASGIConnection
from litestar.exceptions import InternalServerException
from litestar.handlers import BaseRouteHandler
from litestar.params import QueryParameter

from service.api.errors import BodyTimeout, ClientDisconnected
from service.domain.errors import FieldError, InvalidOptions, MalformedRequest, check_json

_NONE = "none"
E = TypeVar("E", bound=StrEnum)


BODY_SECONDS = 30.0
"""Time limit of a JSON body."""


class JsonRequest(Request[Any, Any, Any]):
    """A request with a strict JSON body: valid, without repeated names."""

    async def body(self) -> bytes:
        """Read the body. Raises BodyTimeout or ClientDisconnected."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                return await super().body()
        except TimeoutError:
            raise BodyTimeout("The body of the request did not arrive in time. Send it again.") from None
        except InternalServerException:  # what litestar raises for it
            raise ClientDisconnected from None

    async def json(self) -> Any:
        """Decode the body. Raises MalformedRequest."""
        try:
            check_json((await self.body() or b"null").decode())
        except UnicodeDecodeError:
            raise MalformedRequest("The body of the request is not UTF-8.") from None
        except ValueError:
            raise MalformedRequest(
                "The body of the request can't be read as JSON: it must be valid, not deeply nested, and have each "
                "name once in an object."
            ) from None
        return await super().json()


def check_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """Reject unknown, repeated and null query parameters. Raises InvalidOptions.

    A token whose mistyped `grace` was ignored would be revoked at once.
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
    """Parse an ISO 8601 date. Raises InvalidOptions."""
    try:
        return None if text is None else msgspec.convert(text, date)
    except msgspec.ValidationError:
        raise InvalidOptions([FieldError(name, "must be a day such as 2026-01-31")]) from None


def parse_choices(name: str, text: str, choices: Collection[E]) -> tuple[E, ...]:
    """Parse choices separated by commas, or `none`. Raises InvalidOptions."""
    words = [] if text in {"", _NONE} else text.split(",")
    if len(set(words)) < len(words) or not set(words) <= {str(choice) for choice in choices}:
        raise InvalidOptions([FieldError(name, f"must be {_NONE} or a list of {', '.join(choices)}, each once")])
    return tuple(choice for choice in choices if choice in words)


MAX_WAIT_SECONDS = 60
"""Longest wait: proxies close connections that are idle for longer."""
_MAX_PREFER_CHARS = 1_000
_PREFERENCE = re.compile(r'(?:[^,"]|"(?:[^"\\]|\\.)*(?:"|$))+')
_WAIT = re.compile(r'wait[ \t]*(?:=[ \t]*(?:([0-9]+)|"([0-9]*)")?)?[ \t]*(?:;.*)?', re.IGNORECASE)
_WAIT_NAME = re.compile(r"wait[ \t]*(?:[=;]|$)", re.IGNORECASE)


def parse_wait_seconds(headers: Sequence[str]) -> int:
    """Return the seconds to wait according to the `Prefer` headers, at most MAX_WAIT_SECONDS; 0 without `wait`.

    Bare or empty `wait` is the maximum. The first of several counts, invalid ones are ignored (RFC 7240).
    """
    value = ",".join(headers)
    if len(value) > _MAX_PREFER_CHARS:  # parsing a longer one would cost time
        return 0
    for preference in _PREFERENCE.findall(value):
        stripped = preference.strip(" \t")
        if _WAIT_NAME.match(stripped):
            wait = _WAIT.fullmatch(stripped)
            return min(int(wait[1] or wait[2] or MAX_WAIT_SECONDS), MAX_WAIT_SECONDS) if wait else 0
    return 0
