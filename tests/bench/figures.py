"""Figures and their table."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A measured value; `target`, if given, is its upper bound."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def is_reached(self) -> bool | None:
        """Whether the value is within its target; None without one."""
        return None if self.target is None else self.value <= self.target


Benchmark = Callable[[], Coroutine[Any, Any, Sequence[Figure]]]


def format_table(figures: Sequence[Figure]) -> str:
    """Format the figures as lines, with their targets."""
    width = max(len(figure.name) for figure in figures)
    return "\n".join(
        f"  {figure.name:<{width}} {figure.value:>9,.1f} {figure.unit:<6} {_format_target(figure)}".rstrip()
        for figure in figures
    )


def _format_target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"target {figure.target:,.0f}: {'reached' if figure.is_reached else 'MISSED'}"
