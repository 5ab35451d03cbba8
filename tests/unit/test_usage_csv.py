"""CSV output."""

from __future__ import annotations

import csv
import io

from hypothesis import given
from hypothesis import strategies as some

from service.api.schemas import flatten, prefers_csv, render_csv

CELLS = some.text(some.characters(exclude_categories=["Cs"]), min_size=1) | some.integers() | some.none()


def read_rows(content: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(content.decode(), newline=""), strict=True))


def test_line_format() -> None:
    content = render_csv(["a", "b"], [["x,y", 'say "hi"'], ["two\r\nlines", None], [0, 0.29]])
    assert content == b'a,b\r\n"x,y","say ""hi"""\r\n"two\r\nlines",\r\n0,0.29\r\n'


@given(some.lists(some.tuples(CELLS, CELLS)))
def test_cells_are_no_formulas(rows: list[tuple[object, object]]) -> None:
    read_back = read_rows(render_csv(["one", "other"], rows))[1:]
    assert len(read_back) == len(rows)
    for cells, row in zip(read_back, rows, strict=True):
        for cell, value in zip(cells, row, strict=True):
            assert cell.removeprefix("'").endswith("" if value is None else str(value).removeprefix("'"))
            if isinstance(value, str):
                assert cell[0] not in "=+-@\t\r\n"
            elif value is not None:
                assert cell == str(value)


def test_nested_members_are_flattened() -> None:
    assert flatten({"b": {"x": 1, "y": {"z": None}}, "a": 2}) == {"b_x": 1, "b_y_z": None, "a": 2}
    assert list(flatten({"b": {"x": 1}, "a": 2})) == ["b_x", "a"]


@given(some.text())
def test_any_accept_header(accept: str) -> None:
    if prefers_csv(accept):
        assert "text/" in accept.lower()
