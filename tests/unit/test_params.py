"""Preferences of requests, problem documents and CSV output."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.errors import _PROBLEM_TYPES, to_problem
from service.api.params import parse_wait_seconds
from service.api.schemas import render_csv
from service.domain import errors


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (["wait=10"], 10),
        (["WAIT = 7"], 7),
        (['wait="7"'], 7),
        ([",, wait=5 ,"], 5),
        # The first one counts.
        (["wait=5, wait=10"], 5),
        (["wait=soon", "wait=10"], 0),
        # Without a value, and beyond the cap, it is the longest.
        *(([header], 60) for header in ("wait", "WAIT", "wait=", 'wait=""', "wait ; reason=tea", "wait, wait=5")),
        *(([header], 60) for header in ("wait=61", "wait=100000", f"wait={'9' * 500}")),
        # These are ignored.
        ([], 0),
        *(([header], 0) for header in ("", "wait=0", "wait=-1", "wait=1.5", "wait=1 0", "wait=0x10", "wait=٣")),
        *(([header], 0) for header in ("wait 5", "waiting=5", "await=5", 'note="a, wait=5"', 'note="\\", wait=5')),
        *(([header], 0) for header in ('wait="5', "wait='5'", f"wait=5, {'x' * 1000}")),
    ],
)
def test_wait_of_the_prefer_header(headers: list[str], seconds: int) -> None:
    assert parse_wait_seconds(headers) == seconds


def test_every_error_is_in_the_table() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.GatewayError)
    ]
    bases = {base for cls in classes for base in cls.__mro__[1:]}
    assert [cls for cls in classes if cls not in bases and _PROBLEM_TYPES.keys().isdisjoint(cls.__mro__)] == []
    assert len(classes) > len(_PROBLEM_TYPES)


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.0, "2"), (-3.5, "0")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    assert to_problem(errors.Overloaded("Later.", retry_after=seconds)).headers["Retry-After"] == header


CELLS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.integers() | st.none()


@given(st.lists(st.tuples(CELLS, CELLS)))
def test_cells_are_no_formulas(rows: list[tuple[object, object]]) -> None:
    content = render_csv(["one", "other"], rows).decode()
    read_back = list(csv.reader(io.StringIO(content, newline=""), strict=True))[1:]
    for cells, row in zip(read_back, rows, strict=True):
        for cell, value in zip(cells, row, strict=True):
            assert cell.removeprefix("'").endswith("" if value is None else str(value).removeprefix("'"))
            if isinstance(value, str):
                assert cell[0] not in "=+-@\t\r\n"
            elif value is not None:
                assert cell == str(value)
