"""Which failures of a call are the fault of this machine."""

from __future__ import annotations

import errno
import socket

import httpx2
import pytest

from service.clients.http import local_error_reason
from tests.support.file_descriptors import exhaust_descriptors

REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
UNRESOLVED_NAME = socket.gaierror(socket.EAI_NONAME, "unknown")


def make_error(*attempts: Exception) -> Exception:
    """The error of a client, with one attempt or several behind it."""
    raised = OSError("All connection attempts failed")
    raised.__cause__ = attempts[0] if len(attempts) == 1 else ExceptionGroup("several", attempts)
    error = httpx2.ConnectError("failed")
    error.__cause__ = raised
    return error


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EADDRNOTAVAIL", "EADDRINUSE"])
def test_wants_of_this_machine(number: str) -> None:
    """No descriptor, no memory and no port are of this machine, in every attempt."""
    lacking = OSError(getattr(errno, number), "lacking")
    assert local_error_reason(lacking)
    assert local_error_reason(make_error(lacking))
    assert local_error_reason(make_error(lacking, lacking))


@pytest.mark.parametrize("error", [MemoryError(), socket.gaierror(socket.EAI_MEMORY, "memory")])
def test_no_memory(error: Exception) -> None:
    """No memory is of this machine, whatever needed it."""
    assert local_error_reason(make_error(error))


@pytest.mark.parametrize(
    "error",
    [
        None,
        ValueError(),
        TimeoutError(),
        httpx2.ConnectTimeout("late"),
        OSError(errno.ENETUNREACH, "unreachable"),
        make_error(REFUSED),
        make_error(UNRESOLVED_NAME),
        make_error(OSError(errno.EADDRNOTAVAIL, "no IPv6"), REFUSED),
    ],
)
def test_what_the_network_did(error: Exception | None) -> None:
    """All else may be of the other side, if only one of several attempts was."""
    assert local_error_reason(error) is None


def test_name_without_a_descriptor() -> None:
    """A resolver that could open nothing reports an unknown name."""
    with exhaust_descriptors():
        assert local_error_reason(make_error(UNRESOLVED_NAME))
