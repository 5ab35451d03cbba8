"""The circuit breaker."""

from __future__ import annotations

from service.clients.http import BREAKER_THRESHOLD, FIRST_PAUSE_SECONDS, Attempt, Breaker


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admit_attempt(breaker: Breaker) -> Attempt:
    attempt = breaker.admit()
    assert attempt is not None
    return attempt


def fail_attempts(breaker: Breaker, count: int = BREAKER_THRESHOLD) -> None:
    for _ in range(count):
        breaker.on_failed(admit_attempt(breaker))


def test_failed_trials_double_the_pause_up_to_a_minute() -> None:
    clock = ManualClock()
    breaker = Breaker(clock)
    fail_attempts(breaker)
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


def test_trials_and_late_attempts() -> None:
    clock = ManualClock()
    breaker = Breaker(clock)
    late = [admit_attempt(breaker) for _ in range(3)]
    fail_attempts(breaker)
    clock.now += FIRST_PAUSE_SECONDS / 2
    breaker.on_failed(late[0])  # does not prolong the pause
    clock.now += FIRST_PAUSE_SECONDS / 2
    breaker.on_abandoned(admit_attempt(breaker))
    trial = admit_attempt(breaker)
    breaker.on_abandoned(late[1])  # is not the trial
    assert breaker.admit() is None
    breaker.on_failed(trial)
    assert breaker.admit() is None
    breaker.on_connected(late[2])
    fail_attempts(breaker, BREAKER_THRESHOLD - 1)
    breaker.on_connected(admit_attempt(breaker))
    fail_attempts(breaker)
    assert breaker.admit() is None
    clock.now += FIRST_PAUSE_SECONDS  # the first pause again, after a connection
    admit_attempt(breaker)
