"""Parsing of `Prefer: wait` (RFC 7240)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.params import parse_wait_seconds


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("wait=10", 10),
        ("wait=1", 1),
        ("wait=60", 60),
        ("WAIT = 7", 7),
        ('wait="7"', 7),
        ("wait=007", 7),
        ("\twait=5 ", 5),
        ("wait=5; reason=tea", 5),
        ("respond-async, wait=5", 5),
        ("handling=lenient; wait=3, wait=5", 5),
        (",, wait=5 ,", 5),
    ],
)
def test_valid_preferences(header: str, seconds: int) -> None:
    assert parse_wait_seconds([header]) == seconds


@pytest.mark.parametrize(
    "header", ["wait", "WAIT", "wait=", 'wait=""', "wait ; reason=tea", "respond-async, wait", "wait, wait=5"]
)
def test_bare_wait_is_the_longest(header: str) -> None:
    assert parse_wait_seconds([header]) == 60


@pytest.mark.parametrize("header", ["wait=61", "wait=100000", f"wait={'9' * 500}"])
def test_wait_is_capped_at_60_seconds(header: str) -> None:
    assert parse_wait_seconds([header]) == 60


@pytest.mark.parametrize(
    "header",
    [
        *("", "wait=0", "wait=-1", "wait=1.5", "wait=ten", "wait=1 0", "wait=0x10", "wait=٣", "wait 5"),
        *("waiting=5", "await=5", "respond-async", 'note="a, wait=5"', 'note="\\", wait=5', 'wait="5', "wait='5'"),
        f"wait=5, {'x' * 1000}",
    ],
)
def test_invalid_preferences_are_ignored(header: str) -> None:
    assert parse_wait_seconds([header]) == 0


def test_first_preference_counts() -> None:
    assert parse_wait_seconds(["wait=5, wait=10"]) == 5
    assert parse_wait_seconds(["respond-async", "wait=5", "wait=10"]) == 5
    assert parse_wait_seconds(["wait=soon", "wait=10"]) == 0
    assert parse_wait_seconds([]) == 0


@given(st.lists(st.text(alphabet=st.sampled_from('wait=5,;"\\ \tx')), max_size=4))
def test_any_header_is_accepted(headers: list[str]) -> None:
    assert 0 <= parse_wait_seconds(headers) <= 60
