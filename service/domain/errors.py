"""Errors of the gateway, and the validation that collects several at once.

Messages are public instructions to the caller: they never contain secrets, figures of accounts or upstream addresses.
`service.api.errors` maps each class to its HTTP response; anything else becomes a generic 500.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, ParamSpec, TypeVar

from msgspec import Struct, inspect


class GatewayError(Exception):
    """The root: `detail` is for the caller, `retry_after` in seconds."""

    def __init__(self, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after


class CallerFault(GatewayError):
    """The caller can correct the request."""


class MalformedRequest(CallerFault):
    """Broken multipart, a body that ended early, a wrong query."""


class Unauthenticated(CallerFault):
    """The token is missing, wrong, expired or revoked."""


class TooManyFailures(CallerFault):
    """Too many requests without a valid token."""


class Forbidden(CallerFault):
    """The token is valid, but does not permit this."""


class KindNotAllowed(Forbidden):
    pass


class TenantDisabled(Forbidden):
    pass


class TenantReadOnly(Forbidden):
    pass


class NotFound(CallerFault):
    """It does not exist, or belongs to another tenant: the response is the same."""


class Conflict(CallerFault):
    """The state of other objects forbids an operator's change."""


class VersionConflict(CallerFault):
    """The object has changed since the caller read it."""


class ImageTooLarge(CallerFault):
    """Too many bytes or pixels."""


class RangeNotSatisfiable(CallerFault):
    """The result has no bytes in the requested range; `content_range` is the header with its length."""

    def __init__(self, detail: str, *, content_range: str | None) -> None:
        super().__init__(detail)
        self.content_range = content_range


class UnsupportedMediaType(CallerFault):
    """Of the request, or of the image by its bytes."""


class UnsupportedCoding(UnsupportedMediaType):
    """The request body has a `Content-Encoding`."""


class InvalidImage(CallerFault):
    """The image is broken or incomplete."""


class UnreachableReason(StrEnum):
    """Why an image can't be fetched. Nothing here depends on what lies behind an address that is not called."""

    NO_CONNECTION = "no-connection"
    """No address, none that may be called, no server, or none with a valid certificate: indistinguishable."""
    TIMEOUT = "timeout"
    HTTP_STATUS = "http-status"
    REDIRECT = "redirect"
    INTERRUPTED = "interrupted"


class ImageUnreachable(CallerFault):
    """The image can't be fetched from its `image_url`."""

    def __init__(self, detail: str, *, reason: UnreachableReason) -> None:
        super().__init__(detail)
        self.reason = reason


class IdempotencyKeyInvalid(CallerFault):
    pass


class IdempotencyKeyReused(CallerFault):
    """The key was used for other content."""


class IdempotencyInFlight(CallerFault):
    """The first submission under the key has no outcome yet."""


class FieldError(Exception):
    """One invalid field, and what it must be."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class InvalidOptions(CallerFault):
    """At least one field is unknown, repeated, mistyped or out of range."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = tuple(errors)


class Denial(GatewayError):
    """The request is valid, but nothing may be spent on it now."""


class Violation(Struct, frozen=True):
    """A policy that refused, and when it resets (None: never by itself)."""

    policy: str
    limit: int
    resets_at: int | None


class RateLimit(Struct, frozen=True):
    """The rest of a limit on tasks, with the window's length and the time to its reset."""

    policy: str
    limit: int
    remaining: int
    window_seconds: int | None
    resets_in_seconds: int | None


class QuotaDenied(Denial):
    """At least one policy of the tenant refused."""

    def __init__(
        self,
        detail: str,
        *,
        violations: Sequence[Violation],
        limits: Sequence[RateLimit] = (),
        retry_after: float | None = None,
    ) -> None:
        super().__init__(detail, retry_after=retry_after)
        self.violations = tuple(violations)
        self.limits = tuple(limits)


class BalanceExhausted(Denial):
    """No account of the tenant can pay now."""


class UpstreamFault(GatewayError):
    """The upstream or the connection to it failed."""


class UpstreamRejected(UpstreamFault):
    """The upstream refused the submission, nothing was charged; `reason` in its words."""

    def __init__(self, detail: str, *, reason: str) -> None:
        super().__init__(detail)
        self.reason = reason


class UpstreamInvalidResponse(UpstreamFault):
    """The response to a read is unusable."""


class UpstreamUnavailable(UpstreamFault):
    """The upstream is unreachable or busy; nothing was charged."""


class AccountMisconfigured(UpstreamFault):
    """The upstream does not know the account, or the tenant has none: an operator must act."""


class SubmissionUnknown(UpstreamFault):
    """Sent without a usable response: possibly charged, and never sent again."""

    def __init__(self, detail: str, *, submission_id: str, is_replay: bool = False) -> None:
        super().__init__(detail)
        self.submission_id = submission_id
        self.is_replay = is_replay


class Unavailable(GatewayError):
    """The gateway can't serve this now."""


class LedgerUnavailable(Unavailable):
    """Redis is away."""


class Overloaded(Unavailable):
    pass


P = ParamSpec("P")
R = TypeVar("R")
_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def field_path(*keys: str) -> str:
    """Join keys to a path as in TOML, quoted where necessary: `tenants.shop.max_active`."""
    return ".".join(key if _BARE_KEY.fullmatch(key) else f'"{key}"' for key in keys)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return `: did you mean ...?` for the closest known word; empty if none is close."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {matches[0]}?" if matches else ""


class ErrorCollector:
    """Collects field errors, to report them together."""

    def __init__(self) -> None:
        self.errors: list[FieldError] = []

    def add(self, field: str, detail: str) -> None:
        self.errors.append(FieldError(field, detail))

    def collect(self, prefix: str, default: R, make: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the result of `make`, or collect its InvalidOptions below `prefix` and return the default."""
        try:
            return make(*args, **kwargs)
        except InvalidOptions as error:
            for field_error in error.errors:
                self.add(f"{prefix}.{field_error.field}" if prefix else field_error.field, field_error.detail)
            return default

    def raise_if_any(self) -> None:
        """Raise InvalidOptions if an error was collected."""
        if self.errors:
            raise InvalidOptions(self.errors)


def validate_tree(value: Any, type_: Any, path: str) -> list[FieldError]:
    """Return all errors of a tree of plain values against a type; decoding would stop at the first."""
    return list(_find_errors(value, inspect.type_info(type_), path))


def expected_format(type_: Any) -> str:
    """Describe the value that a type expects."""
    return validate_tree(object(), type_, "")[0].detail


def check_json(text: str) -> None:
    """Raise ValueError if the text is not JSON, nested too deeply, or repeats a name in an object."""

    def reject_duplicates(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is repeated")

    try:
        json.loads(text, object_pairs_hook=reject_duplicates)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _find_errors(value: Any, type_: inspect.Type, path: str) -> Iterator[FieldError]:
    match type_:
        case inspect.Metadata():
            if not any(_find_errors(value, type_.type, path)):
                return
            must = (type_.extra or {}).get("must")
            yield from [FieldError(path, f"must {must}")] if must else _find_errors(value, type_.type, path)
        case inspect.UnionType():  # of one type and None
            if value is not None:
                (only,) = [option for option in type_.types if not isinstance(option, inspect.NoneType)]
                yield from _find_errors(value, only, path)
        case inspect.StructType():
            yield from _struct_errors(value, type_, path)
        case inspect.DictType():
            yield from _mapping_errors(value, type_, path)
        case inspect.ListType() | inspect.VarTupleType():
            yield from _list_errors(value, type_, path)
        case _:
            if detail := _scalar_error(value, type_):
                yield FieldError(path, detail)


def _struct_errors(value: Any, type_: inspect.StructType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    fields = {field.encode_name: field for field in type_.fields}
    for name in value:
        if name not in fields:
            yield FieldError(_child_path(path, name), f"is unknown{suggest(name, fields)}")
    for name, field in fields.items():
        if name in value:
            yield from _find_errors(value[name], field.type, _child_path(path, name))
        elif field.required:
            yield FieldError(_child_path(path, name), "is required")


def _mapping_errors(value: Any, type_: inspect.DictType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    for name, entry in value.items():
        child = _child_path(path, name)
        for error in _find_errors(name, type_.key_type, child):
            yield FieldError(child, f"as a name {error.detail}")
        yield from _find_errors(entry, type_.value_type, child)


def _list_errors(value: Any, type_: inspect.ListType | inspect.VarTupleType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, list):
        yield FieldError(path, "must be a list")
        return
    if type_.max_length is not None and len(value) > type_.max_length:
        yield FieldError(path, f"must have at most {type_.max_length} entries")
    for index, entry in enumerate(value):
        yield from _find_errors(entry, type_.item_type, f"{path}[{index}]")


def _scalar_error(value: Any, type_: inspect.Type) -> str | None:
    match type_:
        case inspect.EnumType():
            values = [str(member.value) for member in type_.cls]
            is_valid, expected = value in values, f"must be {' or '.join(values)}"
            expected += "" if is_valid or not isinstance(value, str) else suggest(value, values)
        case inspect.IntType() | inspect.FloatType():
            is_valid, expected = _check_number(value, type_)
        case inspect.StrType():
            is_valid, expected = _check_text(value, type_)
        case inspect.BoolType():
            is_valid, expected = isinstance(value, bool), "must be true or false"
        case inspect.DateTimeType():
            is_valid = _is_timestamp(value)
            expected = "must be a time with a time zone, such as 2030-01-31T12:00:00Z"
        case _:
            raise TypeError(f"no validation for {type_}")
    return None if is_valid else expected


def _check_number(value: Any, type_: inspect.IntType | inspect.FloatType) -> tuple[bool, str]:
    minimum, maximum = type_.ge or 0, type_.le or math.inf
    is_integer = isinstance(type_, inspect.IntType)
    is_number = isinstance(value, int if is_integer else int | float) and not isinstance(value, bool)
    expected = "must be a whole number" if is_integer else "must be a number"
    if type_.le is not None:
        expected += f" from {minimum} to {maximum}"
    elif type_.ge is not None:
        expected += f" of at least {minimum}"
    return is_number and minimum <= value <= maximum, expected


def _is_timestamp(value: Any) -> bool:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return False
    return isinstance(value, datetime) and value.tzinfo is not None


def _check_text(value: Any, type_: inspect.StrType) -> tuple[bool, str]:
    minimum, maximum = type_.min_length or 0, type_.max_length or math.inf
    is_valid = isinstance(value, str) and minimum <= len(value) <= maximum
    is_valid = is_valid and (type_.pattern is None or re.search(type_.pattern, value) is not None)
    if type_.max_length is None:
        return is_valid, "must be text"
    return is_valid, f"must be text of {f'{minimum} to' if minimum else 'at most'} {maximum} characters"


def _child_path(path: str, name: str) -> str:
    return f"{path}.{field_path(name)}" if path else field_path(name)
