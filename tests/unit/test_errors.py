"""Errors: their problem documents, and failures of this machine."""

from __future__ import annotations

import errno
import socket

import httpx2
import pytest

from service.api.errors import _PROBLEM_TYPES, to_problem
from service.clients.http import local_error_reason
from service.domain import errors
from tests.support.network import exhaust_descriptors


def test_every_error_is_in_the_table() -> None:
    classes = [
        item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.GatewayError)
    ]
    bases = {base for cls in classes for base in cls.__mro__[1:]}
    assert [cls for cls in classes if cls not in bases and _PROBLEM_TYPES.keys().isdisjoint(cls.__mro__)] == []
    assert len(classes) > len(_PROBLEM_TYPES)


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.0, "2"), (-3.5, "0")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    assert to_problem(errors.Overloaded("Later.", retry_after=seconds)).headers["Retry-After"] == header


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
UNRESOLVED_NAME = socket.gaierror(socket.EAI_NONAME, "unknown")
LOCAL = [
    OSError(getattr(errno, name), "lacking") for name in ("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EADDRNOTAVAIL")
]


def make_connect_error(*attempts: Exception) -> Exception:
    """Make a client error caused by one or several attempts."""
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
