"""Classification of local failures."""

from __future__ import annotations

import errno
import socket

import httpx2
import pytest

from service.clients.http import local_error_reason
from tests.support.network import exhaust_descriptors

REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "refused")
UNRESOLVED_NAME = socket.gaierror(socket.EAI_NONAME, "unknown")


def make_error(*attempts: Exception) -> Exception:
    """Make a client error caused by one or several attempts."""
    raised = OSError("All connection attempts failed")
    raised.__cause__ = attempts[0] if len(attempts) == 1 else ExceptionGroup("several", attempts)
    error = httpx2.ConnectError("failed")
    error.__cause__ = raised
    return error


@pytest.mark.parametrize("number", ["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EADDRNOTAVAIL", "EADDRINUSE"])
def test_exhausted_local_resources(number: str) -> None:
    lacking = OSError(getattr(errno, number), "lacking")
    assert local_error_reason(lacking)
    assert local_error_reason(make_error(lacking))
    assert local_error_reason(make_error(lacking, lacking))


@pytest.mark.parametrize("error", [MemoryError(), socket.gaierror(socket.EAI_MEMORY, "memory")])
def test_no_memory(error: Exception) -> None:
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
def test_network_failures(error: Exception | None) -> None:
    assert local_error_reason(error) is None


def test_resolver_without_descriptors() -> None:
    with exhaust_descriptors():
        assert local_error_reason(make_error(UNRESOLVED_NAME))
