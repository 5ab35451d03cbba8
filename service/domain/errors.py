"""The errors of the gateway, and the collection of several in one answer."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from msgspec import inspect

if TYPE_CHECKING:
    from collections.abc import Sequence

    from service.domain.ledger import RateLimit, Violation


class GatewayError(Exception):
    """The root: `detail` tells the caller what to do, `retry_after` (seconds) when it may help."""

    def __init__(self, detail: str, *, retry_after: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after = retry_after


class CallerFault(GatewayError):
    """The caller can mend the request."""


class MalformedRequest(CallerFault):
    """The request can't be read: broken multipart, a body that stopped half-way, a wrong query."""


class Unauthenticated(CallerFault):
    """No token, or one that is wrong, expired or revoked."""


class Forbidden(CallerFault):
    """The token is good, but not for this."""


class KindNotAllowed(Forbidden):
    """The tenant may not submit tasks of this kind."""


class TenantDisabled(Forbidden):
    """The tenant was switched off by an operator."""


class NotFound(CallerFault):
    """There is no such thing, or it belongs to somebody else: the two are not told apart."""


class Conflict(CallerFault):
    """An operator's change was refused because of what stands in its way."""


class VersionConflict(CallerFault):
    """What was to be changed has been changed by somebody else since it was read."""


class ImageTooLarge(CallerFault):
    """The image exceeds the limit on bytes or on pixels."""


class RangeNotSatisfiable(CallerFault):
    """A result has no bytes in the range asked for; `content_range` says how many it has, in HTTP's words."""

    def __init__(self, detail: str, *, content_range: str | None) -> None:
        super().__init__(detail)
        self.content_range = content_range


class UnsupportedMediaType(CallerFault):
    """The request is of the wrong media type, or the image is by its bytes."""


class UnsupportedCoding(UnsupportedMediaType):
    """The body of the request is compressed, or encoded otherwise."""


class InvalidImage(CallerFault):
    """The bytes claim to be an image that they are not."""


class IdempotencyKeyInvalid(CallerFault):
    """The idempotency key is malformed, too long, or given more than once."""


class IdempotencyKeyReused(CallerFault):
    """The idempotency key was used before for something else."""


class IdempotencyInFlight(CallerFault):
    """What was submitted first under the idempotency key has no outcome yet."""


class FieldError(Exception):
    """One faulty field, and what it must be instead."""

    def __init__(self, field: str, detail: str) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail


class InvalidOptions(CallerFault):
    """At least one field is unknown, repeated, mistyped or out of range; `errors` names each of them."""

    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(str(error) for error in errors))
        self.errors = tuple(errors)


class Denial(GatewayError):
    """The request is in order, but may not be spent on now."""


class QuotaDenied(Denial):
    """At least one policy of the tenant refused; `violations` names each that did, `limits` what is left of all."""

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
    """No account of the tenant can pay at the moment."""


class UpstreamFault(GatewayError):
    """The upstream, or the way to it, failed."""


class UpstreamRejected(UpstreamFault):
    """The upstream refused the submission: nothing was charged. `reason` is in its own words."""

    def __init__(self, detail: str, *, reason: str) -> None:
        super().__init__(detail)
        self.reason = reason


class UpstreamInvalidResponse(UpstreamFault):
    """The upstream answered a read with something that can't be used."""


class UpstreamUnavailable(UpstreamFault):
    """The upstream can't be reached, or can't take or give this now: nothing was charged."""


class AccountMisconfigured(UpstreamFault):
    """The tenant's account is not known upstream, or the tenant has none: an operator has to act."""


class SubmissionUnknown(UpstreamFault):
    """The submission was sent and no usable answer came: it may have been charged and is never sent again.

    `replayed` if that is what became of an earlier one under the same idempotency key.
    """

    def __init__(self, detail: str, *, submission_id: str, is_replay: bool = False) -> None:
        super().__init__(detail)
        self.submission_id = submission_id
        self.is_replay = is_replay


class Unavailable(GatewayError):
    """The gateway itself can't serve this now."""


class LedgerUnavailable(Unavailable):
    """Redis is away, so nothing can be reserved."""


class Overloaded(Unavailable):
    """Too much is in flight already."""


P = ParamSpec("P")


R = TypeVar("R")


_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def field_path(*keys: str) -> str:
    """Where something stands, as TOML says it: `tenants.shop.max_active`, with quotes around what needs them."""
    return ".".join(each if _BARE_KEY.fullmatch(each) else f'"{each}"' for each in keys)


def suggest(word: str, known: Iterable[str]) -> str:
    """A question to end a sentence with, about the word that was probably meant; empty if none comes near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f": did you mean {near[0]}?" if near else ""


class ErrorCollector:
    """Gathers faults, to tell them together."""

    def __init__(self) -> None:
        self.errors: list[FieldError] = []

    def add(self, field: str, detail: str) -> None:
        """There is a fault."""
        self.errors.append(FieldError(field, detail))

    def collect(self, prefix: str, default: R, make: Callable[P, R], *args: P.args, **more: P.kwargs) -> R:
        """What `make` makes, or `instead` if it raises InvalidOptions, whose fields stand below `where` if given."""
        try:
            return make(*args, **more)
        except InvalidOptions as error:
            for each in error.errors:
                self.add(f"{prefix}.{each.field}" if prefix else each.field, each.detail)
            return default

    def raise_if_any(self) -> None:
        """Raise InvalidOptions if there is a fault."""
        if self.errors:
            raise InvalidOptions(self.errors)


def validate_tree(value: Any, type_: Any, path: str) -> list[FieldError]:
    """What is wrong with a value, which stands at `path`, that is to become one of a type."""
    return list(_find_errors(value, inspect.type_info(type_), path))


def expected_format(type_: Any) -> str:
    """What a plain value that is to become one of a type must be."""
    return validate_tree(object(), type_, "")[0].detail


def check_json(text: str) -> None:
    """Raise ValueError for what is no JSON, nested too deep, or has a name twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is repeated")

    try:
        json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _find_errors(value: Any, kind: inspect.Type, path: str) -> Iterator[FieldError]:
    match kind:
        case inspect.Metadata():
            if not any(_find_errors(value, kind.type, path)):
                return
            must = (kind.extra or {}).get("must")
            yield from [FieldError(path, f"must {must}")] if must else _find_errors(value, kind.type, path)
        case inspect.UnionType() if value is None and any(isinstance(each, inspect.NoneType) for each in kind.types):
            return
        case inspect.UnionType():
            (only,) = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
            yield from _find_errors(value, only, path)
        case inspect.StructType():
            yield from _struct_errors(value, kind, path)
        case inspect.DictType():
            yield from _mapping_errors(value, kind, path)
        case inspect.ListType() | inspect.VarTupleType():
            yield from _list_errors(value, kind, path)
        case _:
            if fault := _scalar_error(value, kind):
                yield FieldError(path, fault)


def _struct_errors(value: Any, kind: inspect.StructType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    fields = {each.encode_name: each for each in kind.fields}
    for name in value:
        if name not in fields:
            yield FieldError(_child_path(path, name), f"is unknown{suggest(name, fields)}")
    for name, field in fields.items():
        if name in value:
            yield from _find_errors(value[name], field.type, _child_path(path, name))
        elif field.required:
            yield FieldError(_child_path(path, name), "is required")


def _mapping_errors(value: Any, kind: inspect.DictType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    for name, each in value.items():
        below = _child_path(path, name)
        if wrong := list(_find_errors(name, kind.key_type, below)):
            yield from (FieldError(below, f"as a name {fault.detail}") for fault in wrong)
        yield from _find_errors(each, kind.value_type, below)


def _list_errors(value: Any, kind: inspect.ListType | inspect.VarTupleType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, list):
        yield FieldError(path, "must be a list")
        return
    if kind.max_length is not None and len(value) > kind.max_length:
        yield FieldError(path, f"must have at most {kind.max_length} entries")
    for place, each in enumerate(value):
        yield from _find_errors(each, kind.item_type, f"{path}[{place}]")


def _scalar_error(value: Any, kind: inspect.Type) -> str | None:
    match kind:
        case inspect.EnumType():
            words = [str(each.value) for each in kind.cls]
            fits, wanted = value in words, f"must be {' or '.join(words)}"
            wanted += "" if fits or not isinstance(value, str) else suggest(value, words)
        case inspect.IntType() | inspect.FloatType():
            fits, wanted = _check_number(value, kind)
        case inspect.StrType():
            fits, wanted = _check_text(value, kind)
        case inspect.BoolType():
            fits, wanted = isinstance(value, bool), "must be true or false"
        case inspect.DateTimeType():
            fits = _is_timestamp(value)
            wanted = "must be a moment with a time zone, such as 2030-01-31T12:00:00Z"
        case _:
            raise TypeError(f"nothing says what is wrong with {kind}")
    return None if fits else wanted


def _check_number(value: Any, kind: inspect.IntType | inspect.FloatType) -> tuple[bool, str]:
    least, most = kind.ge or 0, kind.le or math.inf
    whole = isinstance(kind, inspect.IntType)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and least <= value <= most
    bounds = (
        f" from {least} to {most}" if kind.le is not None else f" of at least {least}" if kind.ge is not None else ""
    )
    return fits, f"must be a {'whole ' if whole else ''}number{bounds}"


def _is_timestamp(value: Any) -> bool:
    """Whether it is a moment with a time zone, as TOML holds it, or as JSON writes it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return False
    return isinstance(value, datetime) and value.tzinfo is not None


def _check_text(value: Any, kind: inspect.StrType) -> tuple[bool, str]:
    least, most = kind.min_length or 0, kind.max_length or math.inf
    fits = isinstance(value, str) and least <= len(value) <= most
    fits = fits and (kind.pattern is None or re.search(kind.pattern, value) is not None)
    return fits, "must be text" if most == math.inf else f"must be text of {least} to {most} characters"


def _child_path(path: str, name: str) -> str:
    return f"{path}.{field_path(name)}" if path else field_path(name)
