"""Figures and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Something that was measured; `most` is the target, which it may reach but not pass, if there is one."""

    name: str
    value: float
    unit: str
    target: float | None = None

    @property
    def is_reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else self.value <= self.target


Benchmark = Callable[[], Coroutine[Any, Any, Sequence[Figure]]]


def format_table(figures: Sequence[Figure]) -> str:
    """The figures below each other, with their targets beside them."""
    width = max(len(each.name) for each in figures)
    return "\n".join(
        f"  {each.name:<{width}} {each.value:>9,.1f} {each.unit:<6} {_format_target(each)}".rstrip() for each in figures
    )


def _format_target(figure: Figure) -> str:
    if figure.target is None:
        return ""
    return f"target {figure.target:,.0f}: {'reached' if figure.is_reached else 'MISSED'}"
