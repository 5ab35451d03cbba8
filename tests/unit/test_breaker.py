"""The breaker: opens after failures in a row, and lets one attempt through to see whether all is well again."""

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
    """A breaker that has just opened."""
    breaker = Breaker(clock)
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    return breaker


def test_opens_after_failures_in_a_row() -> None:
    """It stays closed until the last of the failures in a row, and a connection begins the row anew."""
    breaker = Breaker(ManualClock())
    for _ in range(2):
        for _ in range(BREAKER_THRESHOLD - 1):
            breaker.on_failed(admit_attempt(breaker))
        breaker.on_connected(admit_attempt(breaker))
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    assert breaker.admit() is None


def test_one_trial_after_the_pause() -> None:
    """When the pause is over one attempt is admitted, and no other while nothing is known of it."""
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    clock.now += FIRST_PAUSE_SECONDS - 0.001
    assert breaker.admit() is None
    clock.now += 0.001
    admit_attempt(breaker)
    clock.now += 10 * MAX_PAUSE_SECONDS
    assert breaker.admit() is None


def test_open_while_nobody_is_admitted() -> None:
    """It is said to be open in a pause and during a trial, and not for ever where nobody tries any more."""
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    said = [breaker.is_open]
    clock.now += FIRST_PAUSE_SECONDS
    said.append(breaker.is_open)
    trial = admit_attempt(breaker)
    said.append(breaker.is_open)
    breaker.on_failed(trial)
    said.append(breaker.is_open)
    clock.now += 2 * FIRST_PAUSE_SECONDS
    said.append(breaker.is_open)
    assert said == [True, False, True, True, False]


def test_trial_that_connects() -> None:
    """A trial that connects closes it, and the next pause is a short one again."""
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    clock.now += FIRST_PAUSE_SECONDS
    breaker.on_failed(admit_attempt(breaker))
    clock.now += 2 * FIRST_PAUSE_SECONDS
    breaker.on_connected(admit_attempt(breaker))
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    clock.now += FIRST_PAUSE_SECONDS
    admit_attempt(breaker)


def test_trials_that_fail() -> None:
    """Each trial that fails doubles the pause, up to the longest."""
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    for pause in (10, 20, 40, 60, 60):
        clock.now += pause - 0.001
        assert breaker.admit() is None
        clock.now += 0.001
        breaker.on_failed(admit_attempt(breaker))


def test_trial_that_is_given_up() -> None:
    """A trial that was given up leaves its place to the next, at once."""
    clock = ManualClock()
    breaker = make_open_breaker(clock)
    clock.now += FIRST_PAUSE_SECONDS
    breaker.on_abandoned(admit_attempt(breaker))
    admit_attempt(breaker)
    assert breaker.admit() is None


def test_stragglers() -> None:
    """Attempts from before it opened neither prolong the pause nor end the trial, but a connection is welcome."""
    clock = ManualClock()
    breaker = Breaker(clock)
    late = [admit_attempt(breaker) for _ in range(3)]
    for _ in range(BREAKER_THRESHOLD):
        breaker.on_failed(admit_attempt(breaker))
    clock.now += FIRST_PAUSE_SECONDS / 2
    breaker.on_failed(late[0])
    clock.now += FIRST_PAUSE_SECONDS / 2
    admit_attempt(breaker)
    breaker.on_abandoned(late[1])
    assert breaker.admit() is None
    breaker.on_connected(late[2])
    admit_attempt(breaker)
    admit_attempt(breaker)


class BreakerMachine(RuleBasedStateMachine):
    """Any order of attempts, reports and time, held against a plain account of what was reported."""

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
