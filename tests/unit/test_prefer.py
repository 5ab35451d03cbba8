"""`Prefer: wait` is read as RFC 7240 wants it, and never turns a request into an error."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.params import parse_wait_seconds, preference_applied_header


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
def test_wishes_that_are_granted(header: str, seconds: int) -> None:
    """Names in any case, quotes, spaces, parameters and other preferences make no difference."""
    assert parse_wait_seconds([header]) == seconds


@pytest.mark.parametrize(
    "header", ["wait", "WAIT", "wait=", 'wait=""', "wait ; reason=tea", "respond-async, wait", "wait, wait=5"]
)
def test_a_wish_without_a_number_is_for_the_longest(header: str) -> None:
    """Bare `wait` waits as long as there is, and an empty value is the same as none."""
    assert parse_wait_seconds([header]) == 60


@pytest.mark.parametrize("header", ["wait=61", "wait=100000", f"wait={'9' * 500}"])
def test_no_longer_than_a_minute(header: str) -> None:
    """Whoever would wait longer waits for 60 seconds, and is told so."""
    assert parse_wait_seconds([header]) == 60
    assert preference_applied_header(60) == {"Preference-Applied": "wait=60"}


@pytest.mark.parametrize(
    "header",
    [
        *("", "wait=0", "wait=-1", "wait=1.5", "wait=ten", "wait=1 0", "wait=0x10", "wait=٣", "wait 5"),
        *("waiting=5", "await=5", "respond-async", 'note="a, wait=5"', 'note="\\", wait=5', 'wait="5', "wait='5'"),
        f"wait=5, {'x' * 1000}",
    ],
)
def test_wishes_that_are_passed_over(header: str) -> None:
    """What is malformed, zero, unknown, quoted within something else, or endless is as if it were not there."""
    assert parse_wait_seconds([header]) == 0
    assert preference_applied_header(0) == {}


def test_several() -> None:
    """Of several the first counts, in one header or in many, even if it makes no sense."""
    assert parse_wait_seconds(["wait=5, wait=10"]) == 5
    assert parse_wait_seconds(["respond-async", "wait=5", "wait=10"]) == 5
    assert parse_wait_seconds(["wait=soon", "wait=10"]) == 0
    assert parse_wait_seconds([]) == 0


@given(st.lists(st.text(alphabet=st.sampled_from('wait=5,;"\\ \tx')), max_size=4))
def test_anything(headers: list[str]) -> None:
    """Nothing that a client sends is an error."""
    assert 0 <= parse_wait_seconds(headers) <= 60
