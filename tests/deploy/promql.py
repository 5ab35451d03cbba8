"""Static checks of PromQL against the exported series.

A query with an unknown name or label is no error to Prometheus but never returns data. So the labels of every part of a
query are computed here, by Prometheus' rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from promql_parser import (
    AggModifierType,
    AggregateExpr,
    BinaryExpr,
    BinModifier,
    Call,
    LabelModifierType,
    MatrixSelector,
    NumberLiteral,
    ParenExpr,
    StringLiteral,
    SubqueryExpr,
    UnaryExpr,
    VectorMatchCardinality,
    VectorSelector,
    parse,
    walk,
)

Labels = frozenset[str]

_NONE: Labels = frozenset()
_KEEP_ALL_LABELS = frozenset({"topk", "bottomk", "limitk", "limit_ratio"})
_SETS = frozenset({"and", "or", "unless"})
_LABELLING = frozenset({"label_replace", "label_join"})


class SeriesUse(NamedTuple):
    """A selector within a query."""

    name: str
    matched_labels: frozenset[str]
    enclosing: tuple[str, ...]
    """The functions and aggregations around it, from the inside out."""


def series_uses(query: str) -> list[SeriesUse]:
    """Return every selector of a query from left to right. Raises ValueError if it does not parse."""
    results: list[SeriesUse] = []
    around: list[str] = []

    def enter(part: Any) -> None:
        if isinstance(part, VectorSelector):
            matched = frozenset(matcher.name for matcher in _matchers(part))
            results.append(SeriesUse(_series_name(part), matched, tuple(reversed(around))))
        elif isinstance(part, AggregateExpr):
            around.append(str(part.op))
        elif isinstance(part, Call):
            around.append(part.func.name)

    def leave(part: Any) -> None:
        if isinstance(part, AggregateExpr | Call):
            around.pop()

    walk(parse(query), enter, leave)
    return results


def series_names(query: str) -> frozenset[str]:
    """Return the names of all series in a query. Raises ValueError if it does not parse."""
    return frozenset(use.name for use in series_uses(query))


def find_errors(query: str, exported: Mapping[str, Labels]) -> list[str]:
    """Return why a query cannot return the intended data; empty if it is correct."""
    try:
        part = parse(query)
    except ValueError as error:
        return [f"does not parse: {error}"]
    reader = _LabelChecker(exported)
    reader.labels(part)
    return reader.errors


def result_labels(query: str, exported: Mapping[str, Labels]) -> Labels:
    """Return the possible labels of a query's result. Raises ValueError if it does not parse."""
    return _LabelChecker(exported).labels(parse(query)) or _NONE


class _LabelChecker:
    """Computes the labels of each part of a query and collects errors."""

    def __init__(self, exported: Mapping[str, Labels]) -> None:
        self._exported = exported
        self.errors: list[str] = []

    def labels(self, part: Any) -> Labels | None:
        """Return the labels of a vector, or None for a number or a string."""
        if isinstance(part, NumberLiteral | StringLiteral):
            return None
        if isinstance(part, ParenExpr | UnaryExpr | SubqueryExpr):
            return self.labels(part.expr)
        if isinstance(part, MatrixSelector | VectorSelector):
            return self._selector_labels(part.vector_selector if isinstance(part, MatrixSelector) else part)
        if isinstance(part, Call):
            return self._call_labels(part)
        return self._aggregate_labels(part) if isinstance(part, AggregateExpr) else self._binary_labels(part)

    def _selector_labels(self, part: VectorSelector) -> Labels:
        name = _series_name(part)
        if name not in self._exported:
            self.errors.append(f"{name} is not exported")
            return _NONE
        labels = self._exported[name]
        self._require_labels({matcher.name for matcher in _matchers(part)} - {"__name__"}, labels, f"matcher of {name}")
        return labels

    def _call_labels(self, part: Call) -> Labels | None:
        of_arguments = [self.labels(arg) for arg in part.args]
        labels = next((of_argument for of_argument in of_arguments if of_argument is not None), None)
        name = part.func.name
        if labels is None:
            return None if name in {"time", "pi", "scalar"} else _NONE
        if name == "scalar":
            return None
        if name == "histogram_quantile":
            self._require_labels({"le"}, labels, name)
            return labels - {"le"}
        if name in _LABELLING:
            return labels | {part.args[1].val}
        if name in {"absent", "absent_over_time"}:
            return _NONE
        return labels

    def _aggregate_labels(self, part: AggregateExpr) -> Labels:
        labels = self.labels(part.expr) or _NONE
        how = str(part.op)
        if part.modifier is None:
            return labels if how in _KEEP_ALL_LABELS else _NONE
        named = frozenset(part.modifier.labels)
        self._require_labels(named, labels, f"grouping of {how}")
        if how in _KEEP_ALL_LABELS:
            return labels
        return named if part.modifier.type == AggModifierType.By else labels - named

    def _binary_labels(self, part: BinaryExpr) -> Labels | None:
        left, right = self.labels(part.lhs), self.labels(part.rhs)
        if left is None or right is None:
            return right if left is None else left
        how = str(part.op)
        self._check_matching(how, part.modifier, left, right)
        if how == "or":
            return left | right
        if how in _SETS or part.modifier is None:
            return left
        extra = frozenset(part.modifier.group_labels or ())
        match part.modifier.card:
            case VectorMatchCardinality.ManyToOne:
                self._require_labels(extra, right, f"group_left of {how}")
                return left | extra
            case VectorMatchCardinality.OneToMany:
                self._require_labels(extra, left, f"group_right of {how}")
                return right | extra
        return _matching_labels(part.modifier, left)

    def _check_matching(self, how: str, modifier: BinModifier | None, left: Labels, right: Labels) -> None:
        matching = modifier.matching if modifier is not None else None
        if matching is not None and matching.type == LabelModifierType.Include:
            self._require_labels(matching.labels, left, f"left of {how} on")
            self._require_labels(matching.labels, right, f"right of {how} on")
            return
        ignored = frozenset(matching.labels if matching is not None else ())
        if left - ignored != right - ignored:
            self.errors.append(
                f"{how} never matches {_format_labels(left - ignored)} with {_format_labels(right - ignored)}"
            )

    def _require_labels(self, expected: frozenset[str] | set[str] | list[str], actual: Labels, what: str) -> None:
        missing = frozenset(expected) - actual
        if missing:
            self.errors.append(f"{what}: no label {_format_labels(missing)} among {_format_labels(actual)}")


def _matching_labels(modifier: BinModifier, labels: Labels) -> Labels:
    """Return the labels that one-to-one matching keeps."""
    if modifier.matching is None:
        return labels
    named = frozenset(modifier.matching.labels)
    return named if modifier.matching.type == LabelModifierType.Include else labels - named


def _matchers(part: VectorSelector) -> Iterator[Any]:
    yield from part.matchers.matchers
    for group in part.matchers.or_matchers:
        yield from group


def _series_name(part: VectorSelector) -> str:
    named = (matcher.value for matcher in _matchers(part) if matcher.name == "__name__")
    return part.name or next(named, "a series of any name")


def _format_labels(labels: frozenset[str]) -> str:
    return "{" + ", ".join(sorted(labels)) + "}"
