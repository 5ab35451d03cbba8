"""The breaker: opens after failures in a row, and lets one attempt through to see whether all is well again."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, MultipleResults, RuleBasedStateMachine, consumes, invariant, multiple, rule

from service.clients.http import FIRST_PAUSE, LONGEST_PAUSE, THRESHOLD, Attempt, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admitted(breaker: Breaker) -> Attempt:
    attempt = breaker.admit()
    assert attempt is not None
    return attempt


def opened(clock: Clock) -> Breaker:
    """A breaker that has just opened."""
    breaker = Breaker(clock)
    for _ in range(THRESHOLD):
        breaker.failed(admitted(breaker))
    return breaker


def test_opens_after_failures_in_a_row() -> None:
    """It stays closed until the last of the failures in a row, and a connection begins the row anew."""
    breaker = Breaker(Clock())
    for _ in range(2):
        for _ in range(THRESHOLD - 1):
            breaker.failed(admitted(breaker))
        breaker.connected(admitted(breaker))
    for _ in range(THRESHOLD):
        breaker.failed(admitted(breaker))
    assert breaker.admit() is None


def test_one_trial_after_the_pause() -> None:
    """When the pause is over one attempt is admitted, and no other while nothing is known of it."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE - 0.001
    assert breaker.admit() is None
    clock.now += 0.001
    admitted(breaker)
    clock.now += 10 * LONGEST_PAUSE
    assert breaker.admit() is None


def test_open_while_nobody_is_admitted() -> None:
    """It is said to be open in a pause and during a trial, and not for ever where nobody tries any more."""
    clock = Clock()
    breaker = opened(clock)
    said = [breaker.is_open]
    clock.now += FIRST_PAUSE
    said.append(breaker.is_open)
    trial = admitted(breaker)
    said.append(breaker.is_open)
    breaker.failed(trial)
    said.append(breaker.is_open)
    clock.now += 2 * FIRST_PAUSE
    said.append(breaker.is_open)
    assert said == [True, False, True, True, False]


def test_trial_that_connects() -> None:
    """A trial that connects closes it, and the next pause is a short one again."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE
    breaker.failed(admitted(breaker))
    clock.now += 2 * FIRST_PAUSE
    breaker.connected(admitted(breaker))
    for _ in range(THRESHOLD):
        breaker.failed(admitted(breaker))
    clock.now += FIRST_PAUSE
    admitted(breaker)


def test_trials_that_fail() -> None:
    """Each trial that fails doubles the pause, up to the longest."""
    clock = Clock()
    breaker = opened(clock)
    for pause in (10, 20, 40, 60, 60):
        clock.now += pause - 0.001
        assert breaker.admit() is None
        clock.now += 0.001
        breaker.failed(admitted(breaker))


def test_trial_that_is_given_up() -> None:
    """A trial that was given up leaves its place to the next, at once."""
    clock = Clock()
    breaker = opened(clock)
    clock.now += FIRST_PAUSE
    breaker.withdrawn(admitted(breaker))
    admitted(breaker)
    assert breaker.admit() is None


def test_stragglers() -> None:
    """Attempts from before it opened neither prolong the pause nor end the trial, but a connection is welcome."""
    clock = Clock()
    breaker = Breaker(clock)
    late = [admitted(breaker) for _ in range(3)]
    for _ in range(THRESHOLD):
        breaker.failed(admitted(breaker))
    clock.now += FIRST_PAUSE / 2
    breaker.failed(late[0])
    clock.now += FIRST_PAUSE / 2
    admitted(breaker)
    breaker.withdrawn(late[1])
    assert breaker.admit() is None
    breaker.connected(late[2])
    admitted(breaker)
    admitted(breaker)


class Model(RuleBasedStateMachine):
    """Any order of attempts, reports and time, held against a plain account of what was reported."""

    attempts = Bundle[Attempt]("attempts")

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(self.clock)
        self.row = 0
        self.trial: Attempt | None = None
        self.opened_at: float | None = None
        self.pause = FIRST_PAUSE

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
        self.breaker.connected(attempt)
        self.row, self.trial, self.opened_at, self.pause = 0, None, None, FIRST_PAUSE

    @rule(attempt=consumes(attempts))
    def fail(self, attempt: Attempt) -> None:
        self.breaker.failed(attempt)
        self.row += 1
        if attempt is self.trial:
            self.trial, self.opened_at, self.pause = None, self.clock.now, min(2 * self.pause, LONGEST_PAUSE)
        elif self.opened_at is None and self.row >= THRESHOLD:
            self.opened_at = self.clock.now

    @rule(attempt=consumes(attempts))
    def withdraw(self, attempt: Attempt) -> None:
        self.breaker.withdrawn(attempt)
        self.trial = None if attempt is self.trial else self.trial

    @rule(seconds=st.floats(0, 2 * LONGEST_PAUSE))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @invariant()
    def pause_is_bounded(self) -> None:
        assert FIRST_PAUSE <= self.pause <= LONGEST_PAUSE


TestModel = Model.TestCase
