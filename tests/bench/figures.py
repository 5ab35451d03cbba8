"""Figures and how they are printed."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Figure:
    """Something that was measured; `most` is the target, which it may reach but not pass, if there is one."""

    what: str
    value: float
    unit: str
    most: float | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.most is None else self.value <= self.most


Benchmark = Callable[[], Coroutine[Any, Any, Sequence[Figure]]]


def table(figures: Sequence[Figure]) -> str:
    """The figures below each other, with their targets beside them."""
    width = max(len(each.what) for each in figures)
    return "\n".join(
        f"  {each.what:<{width}} {each.value:>9,.1f} {each.unit:<6} {_verdict(each)}".rstrip() for each in figures
    )


def _verdict(figure: Figure) -> str:
    if figure.most is None:
        return ""
    return f"target {figure.most:,.0f}: {'reached' if figure.reached else 'MISSED'}"
