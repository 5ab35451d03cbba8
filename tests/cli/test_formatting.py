"""The output of commands."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from service.cli.formatting import format_record, format_table, format_value


def test_columns_are_aligned() -> None:
    """Text is left-aligned and numbers are right-aligned, also after Chinese characters."""
    rows = [("main", 5, "生产服务", "x"), ("a-longer-name", 1_000, "web", "y"), ("b", None, None, "z")]
    assert format_table(("name", "uses", "label", "end"), rows).splitlines() == [
        "NAME           USES  LABEL     END",
        "main              5  生产服务  x",
        "a-longer-name  1000  web       y",
        "b                 -  -         z",
    ]


def test_empty_table() -> None:
    assert format_table(("name", "state"), []) == "NAME  STATE"


def test_record() -> None:
    assert format_record(("name", "main"), ("balance at", None)) == "name:        main\nbalance at:  -"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        (0, "0"),
        (0.5, "0.5"),
        (True, "yes"),
        (False, "no"),
        (["a", "b"], "a, b"),
        (datetime(2030, 1, 31, 12, tzinfo=UTC), "2030-01-31T12:00:00Z"),
        (datetime(2030, 1, 31, 12, 0, 0, 999_999, timezone(timedelta(hours=8))), "2030-01-31T04:00:00Z"),
        ("two\nlines\t\x1b[31m red\u202e", "two lines [31m red"),
    ],
)
def test_values(value: object, shown: str) -> None:
    """A value is printed on one line without control characters."""
    assert format_value(value) == shown
