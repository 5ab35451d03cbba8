"""The circuit breaker."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from service.clients.http import BREAKER_THRESHOLD, FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS, Attempt, Breaker


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admit_attempt(breaker: Breaker) -> Attempt:
    attempt = breaker.admit()
    assert attempt is not None
    return attempt


def make_open_breaker(clock: ManualClock) -> Breaker:
    breaker = Breaker(clock)
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    return breaker


def test_failed_trials_double_the_pause_up_to_a_minute() -> None:
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    for pause in (10, 20, 40, 60, 60):
        clock.now += pause - 0.001
        assert breaker.admit() is None
        states = [breaker.is_open]
        clock.now += 0.001
        states.append(breaker.is_open)
        trial = admit_attempt(breaker)
        states.append(breaker.is_open)
        assert states == [True, False, True]
        breaker.on_failed(trial)


def test_connection_of_a_late_attempt_closes() -> None:
    clock = ManualClock()
    breaker = Breaker(clock)
    late = [admit_attempt(breaker) for _ in range(3)]
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    clock.now += FIRST_PAUSE_SECONDS / 2
    breaker.on_failed(late[0])
    clock.now += FIRST_PAUSE_SECONDS / 2
    breaker.on_abandoned(admit_attempt(breaker))
    admit_attempt(breaker)
    breaker.on_abandoned(late[1])
    assert breaker.admit() is None
    breaker.on_connected(late[2])
    admit_attempt(breaker)
    admit_attempt(breaker)


class BreakerMachine(RuleBasedStateMachine):
    """Random attempts, results and times, compared with a simple model."""

    attempts = Bundle[Attempt]("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.breaker = Breaker(self.clock)
        self.failures_in_row = 0
        self.trial: Attempt | None = None
        self.opened_at: float | None = None
        self.pause = FIRST_PAUSE_SECONDS

    @rule(target=attempts)
    def attempt(self) -> Attempt | MultipleResults[Attempt]:
        attempt = self.breaker.admit()
        closed = self.opened_at is None
        over = self.opened_at is not None and self.clock.now >= self.opened_at + self.pause
        assert (attempt is not None) == (closed or (over and self.trial is None))
        if attempt is None:
            return multiple()
        if not closed:
            self.trial = attempt
        return attempt

    @rule(attempt=consumes(attempts))
    def connect(self, attempt: Attempt) -> None:
        self.breaker.on_connected(attempt)
        self.failures_in_row, self.trial, self.opened_at, self.pause = 0, None, None, FIRST_PAUSE_SECONDS

    @rule(attempt=consumes(attempts))
    def fail(self, attempt: Attempt) -> None:
        self.breaker.on_failed(attempt)
        self.failures_in_row += 1
        if attempt is self.trial:
            self.trial, self.opened_at, self.pause = None, self.clock.now, min(2 * self.pause, MAX_PAUSE_SECONDS)
        elif self.opened_at is None and self.failures_in_row >= BREAKER_THRESHOLD:
            self.opened_at = self.clock.now

    @rule(attempt=consumes(attempts))
    def withdraw(self, attempt: Attempt) -> None:
        self.breaker.on_abandoned(attempt)
        self.trial = None if attempt is self.trial else self.trial

    @rule(seconds=st.floats(0, 2 * MAX_PAUSE_SECONDS))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def pause_is_bounded(self) -> None:
        assert FIRST_PAUSE_SECONDS <= self.pause <= MAX_PAUSE_SECONDS


TestModel = BreakerMachine.TestCase
