"""Preferences of requests, and CSV output."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.params import parse_wait_seconds
from service.api.schemas import flatten, render_csv


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


def test_csv_format() -> None:
    content = render_csv(["a", "b"], [["x,y", 'say "hi"'], ["two\r\nlines", None], [0, 0.29]])
    assert content == b'a,b\r\n"x,y","say ""hi"""\r\n"two\r\nlines",\r\n0,0.29\r\n'
    assert list(flatten({"b": {"x": 1, "y": {"z": None}}, "a": 2}).items()) == [("b_x", 1), ("b_y_z", None), ("a", 2)]


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
