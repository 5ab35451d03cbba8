"""Errors: their problem documents, and failures of this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import httpx2
import pytest

from service.api.errors import _PROBLEM_TYPES, to_problem
from service.clients.http import local_error_reason
from service.domain import errors
from tests.support.network import exhaust_descriptors


def leaf_errors(cls: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    """Return the error classes without subclasses."""
    children = [subclass for subclass in cls.__subclasses__() if subclass.__module__ == errors.__name__]
    if not children:
        yield cls
    for item in children:
        yield from leaf_errors(item)


@pytest.mark.parametrize("cls", list(leaf_errors(errors.GatewayError)), ids=lambda cls: cls.__name__)
def test_every_error_is_in_the_table(cls: type[errors.GatewayError]) -> None:
    assert any(base in _PROBLEM_TYPES for base in cls.__mro__)


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
