"""All faults of a tree of plain values at once, in plain words, where a type says what it is to be.

Decoding it would end at the first fault.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from msgspec import inspect

from service.domain.errors import FieldError
from service.domain.faults import dotted, meant


def faults_of(value: Any, kind: Any, path: str) -> list[FieldError]:
    """What is wrong with a value, which stands at `path`, that is to become one of a type."""
    return list(_faults(value, inspect.type_info(kind), path))


def wanted_of(kind: Any) -> str:
    """What a plain value that is to become one of a type must be."""
    return faults_of(object(), kind, "")[0].detail


def check_json(text: str) -> None:
    """Raise ValueError for what is no JSON, nested too deep, or has a name twice in one object."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name is repeated")

    try:
        json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _faults(value: Any, kind: inspect.Type, path: str) -> Iterator[FieldError]:
    match kind:
        case inspect.Metadata():
            if not any(_faults(value, kind.type, path)):
                return
            must = (kind.extra or {}).get("must")
            yield from [FieldError(path, f"must {must}")] if must else _faults(value, kind.type, path)
        case inspect.UnionType() if value is None and any(isinstance(each, inspect.NoneType) for each in kind.types):
            return
        case inspect.UnionType():
            (only,) = [each for each in kind.types if not isinstance(each, inspect.NoneType)]
            yield from _faults(value, only, path)
        case inspect.StructType():
            yield from _struct_faults(value, kind, path)
        case inspect.DictType():
            yield from _table_faults(value, kind, path)
        case inspect.ListType() | inspect.VarTupleType():
            yield from _list_faults(value, kind, path)
        case _:
            if fault := _leaf_fault(value, kind):
                yield FieldError(path, fault)


def _struct_faults(value: Any, kind: inspect.StructType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    fields = {each.encode_name: each for each in kind.fields}
    for name in value:
        if name not in fields:
            yield FieldError(_below(path, name), f"is unknown{meant(name, fields)}")
    for name, field in fields.items():
        if name in value:
            yield from _faults(value[name], field.type, _below(path, name))
        elif field.required:
            yield FieldError(_below(path, name), "is required")


def _table_faults(value: Any, kind: inspect.DictType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, dict):
        yield FieldError(path, "must be a table")
        return
    for name, each in value.items():
        below = _below(path, name)
        if wrong := list(_faults(name, kind.key_type, below)):
            yield from (FieldError(below, f"as a name {fault.detail}") for fault in wrong)
        yield from _faults(each, kind.value_type, below)


def _list_faults(value: Any, kind: inspect.ListType | inspect.VarTupleType, path: str) -> Iterator[FieldError]:
    if not isinstance(value, list):
        yield FieldError(path, "must be a list")
        return
    if kind.max_length is not None and len(value) > kind.max_length:
        yield FieldError(path, f"must have at most {kind.max_length} entries")
    for place, each in enumerate(value):
        yield from _faults(each, kind.item_type, f"{path}[{place}]")


def _leaf_fault(value: Any, kind: inspect.Type) -> str | None:
    match kind:
        case inspect.EnumType():
            words = [str(each.value) for each in kind.cls]
            fits, wanted = value in words, f"must be {' or '.join(words)}"
            wanted += "" if fits or not isinstance(value, str) else meant(value, words)
        case inspect.IntType() | inspect.FloatType():
            fits, wanted = _is_number(value, kind)
        case inspect.StrType():
            fits, wanted = _is_text(value, kind)
        case inspect.BoolType():
            fits, wanted = isinstance(value, bool), "must be true or false"
        case inspect.DateTimeType():
            fits = _is_moment(value)
            wanted = "must be a moment with a time zone, such as 2030-01-31T12:00:00Z"
        case _:
            raise TypeError(f"nothing says what is wrong with {kind}")
    return None if fits else wanted


def _is_number(value: Any, kind: inspect.IntType | inspect.FloatType) -> tuple[bool, str]:
    least, most = kind.ge or 0, kind.le or math.inf
    whole = isinstance(kind, inspect.IntType)
    fits = isinstance(value, int if whole else int | float) and not isinstance(value, bool) and least <= value <= most
    bounds = (
        f" from {least} to {most}" if kind.le is not None else f" of at least {least}" if kind.ge is not None else ""
    )
    return fits, f"must be a {'whole ' if whole else ''}number{bounds}"


def _is_moment(value: Any) -> bool:
    """Whether it is a moment with a time zone, as TOML holds it, or as JSON writes it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return False
    return isinstance(value, datetime) and value.tzinfo is not None


def _is_text(value: Any, kind: inspect.StrType) -> tuple[bool, str]:
    least, most = kind.min_length or 0, kind.max_length or math.inf
    fits = isinstance(value, str) and least <= len(value) <= most
    fits = fits and (kind.pattern is None or re.search(kind.pattern, value) is not None)
    return fits, "must be text" if most == math.inf else f"must be text of {least} to {most} characters"


def _below(path: str, name: str) -> str:
    return f"{path}.{dotted(name)}" if path else dotted(name)
