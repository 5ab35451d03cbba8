"""The ledger's clock."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from service.domain.ledger import ClockReading, LedgerClock
from tests.model.ledger_model import to_server_time

START = 1_790_000_000_000
MINUTE = 60_000


def test_follows_the_server() -> None:
    clock = LedgerClock()
    for wall in (START, START + 1, START + 1, START + 86_400_000):
        clock = clock.advance(wall)
        assert clock == LedgerClock(wall, 0)


def test_slows_down_after_a_step_back() -> None:
    """Nine tenths of the speed, until both clocks agree."""
    clock = LedgerClock(START, 0).advance(START - 20 * MINUTE)
    assert clock.last_ms == START
    ahead = clock.advance(START - 10 * MINUTE)
    assert ahead.last_ms == START + 9 * MINUTE
    level = ahead.advance(START + 180 * MINUTE)
    assert level == LedgerClock(START + 180 * MINUTE, 0)


def test_repeated_steps_add_to_the_offset() -> None:
    clock = LedgerClock(START, 0).advance(START - MINUTE).advance(START - 3 * MINUTE)
    assert (clock.last_ms, clock.offset_units) == (START, 3 * MINUTE * 10)


@given(st.lists(st.integers(-2_000_000, 2_000_000) | st.integers(0, 30)))
def test_never_goes_back(steps: list[int]) -> None:
    wall, clock = START, LedgerClock(START, 0)
    for step in steps:
        wall += step
        after = clock.advance(wall)
        assert after.last_ms >= max(clock.last_ms, wall)
        if step > 0:
            assert after.last_ms - clock.last_ms >= step * 9 // 10
        clock = after


@given(st.integers(1, 10**7), st.lists(st.integers(0, 10**6)))
def test_independent_of_the_number_of_reads(offset: int, steps: list[int]) -> None:
    clock = one = LedgerClock(START + 1_000_000, offset)
    wall = clock.last_ms - -(-offset // 10)
    for step in steps:
        wall += step
        clock = clock.advance(wall)
    assert clock == one.advance(wall)


def test_shown_in_server_time() -> None:
    reading = ClockReading(START, START - MINUTE)
    assert (reading.offset_ms, to_server_time(reading, START + 1), to_server_time(reading, 0)) == (
        MINUTE,
        START + 1 - MINUTE,
        0,
    )
