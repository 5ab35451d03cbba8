"""The circuit breaker of HTTP clients, and the failures of this machine that do not count against a server."""

from __future__ import annotations

import errno
import socket

import httpx2
import pytest

from service.clients.breaker import BREAKER_THRESHOLD, FIRST_PAUSE_SECONDS, Attempt, Breaker
from service.clients.network import local_error_reason
from tests.support.network import exhaust_descriptors

REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
UNRESOLVED_NAME = socket.gaierror(socket.EAI_NONAME, "unknown")
LOCAL = [
    OSError(getattr(errno, name), "lacking") for name in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EADDRNOTAVAIL")
]


def make_connect_error(*attempts: Exception) -> Exception:
    raised = OSError("All connection attempts failed")
    raised.__cause__ = attempts[0] if len(attempts) == 1 else ExceptionGroup("several", attempts)
    error = httpx2.ConnectError("failed")
    error.__cause__ = raised
    return error


@pytest.mark.parametrize("error", [*LOCAL, MemoryError(), socket.gaierror(socket.EAI_MEMORY, "memory")])
def test_local_failures(error: Exception) -> None:
    assert local_error_reason(error)
    assert local_error_reason(make_connect_error(error))
    assert local_error_reason(make_connect_error(error, error))
    # A machine without IPv6 has no address to call from, while IPv4 shows whether the server responds.
    assert local_error_reason(make_connect_error(error, REFUSED)) is None


@pytest.mark.parametrize(
    "error", [None, ValueError(), TimeoutError(), httpx2.ConnectTimeout("late"), REFUSED, UNRESOLVED_NAME]
)
def test_network_failures(error: Exception | None) -> None:
    assert local_error_reason(error) is None
    if error is not None:
        assert local_error_reason(make_connect_error(error)) is None


def test_resolver_without_descriptors() -> None:
    with exhaust_descriptors():
        assert local_error_reason(make_connect_error(UNRESOLVED_NAME))


def admit_attempt(breaker: Breaker) -> Attempt:
    attempt = breaker.admit()
    assert attempt is not None
    return attempt


def fail_attempts(breaker: Breaker, count: int = BREAKER_THRESHOLD) -> None:
    for _ in range(count):
        breaker.on_failed(admit_attempt(breaker))


def test_failed_trials_double_the_pause_up_to_a_minute() -> None:
    now = [100.0]
    breaker = Breaker(lambda: now[0])
    fail_attempts(breaker)
    for pause in (10, 20, 40, 60, 60):
        now[0] += pause - 0.001
        assert (breaker.admit(), breaker.is_open) == (None, True)
        now[0] += 0.001
        is_open, trial = breaker.is_open, admit_attempt(breaker)
        assert (is_open, breaker.is_open) == (False, True)
        breaker.on_failed(trial)


def test_trials_and_late_attempts() -> None:
    now = [100.0]
    breaker = Breaker(lambda: now[0])
    late = [admit_attempt(breaker) for _ in range(3)]
    fail_attempts(breaker)
    now[0] += FIRST_PAUSE_SECONDS / 2
    breaker.on_failed(late[0])  # does not prolong the pause
    now[0] += FIRST_PAUSE_SECONDS / 2
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
    now[0] += FIRST_PAUSE_SECONDS  # the first pause again, after a connection
    admit_attempt(breaker)
