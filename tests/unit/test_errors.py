"""Errors: their problem documents, the handlers of the application, and failures of this machine."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from litestar import Litestar, get, put
from litestar.exceptions import ImproperlyConfiguredException, PermissionDeniedException
from litestar.params import FromPath, JSONBody
from structlog.testing import CapturingLogger

from service.api.errors import _PROBLEM_TYPES, ClientDisconnected, exception_handlers, to_problem
from service.clients.http import local_error_reason
from service.domain import errors
from service.domain.errors import RateLimit, Violation
from tests.support.network import exhaust_descriptors
from tests.unit.asgi_client import App, AsgiResponse, call_app, make_body_messages


def leaf_errors(cls: type[errors.GatewayError]) -> Iterator[type[errors.GatewayError]]:
    """Return the error classes without subclasses."""
    children = [subclass for subclass in cls.__subclasses__() if subclass.__module__ == errors.__name__]
    if not children:
        yield cls
    for item in children:
        yield from leaf_errors(item)


def make_quota_error(*policies: str) -> errors.QuotaDenied:
    return errors.QuotaDenied("Later.", violations=[Violation(policy, 950, None) for policy in policies])


@pytest.mark.parametrize("cls", list(leaf_errors(errors.GatewayError)), ids=lambda cls: cls.__name__)
def test_every_error_is_in_the_table(cls: type[errors.GatewayError]) -> None:
    assert any(base in _PROBLEM_TYPES for base in cls.__mro__)


@pytest.mark.parametrize(
    ("policies", "code"),
    [
        (["max-active"], "too-many-active-tasks"),
        (["minute-tasks"], "rate-limited"),
        (["minute-tasks", "minute-money"], "rate-limited"),
        (["minute-tasks", "max-active"], "quota-exceeded"),
        (["minute-tasks", "day-tasks"], "quota-exceeded"),
        (["total-money"], "quota-exceeded"),
    ],
)
def test_denial_code_by_policy(policies: list[str], code: str) -> None:
    assert to_problem(make_quota_error(*policies)).type.code == code


def test_denial_has_violations_and_limits() -> None:
    violations = [Violation("day-tasks", 5, 1_767_312_000_000), Violation("total-money", 950, None)]
    limits = [RateLimit("day-tasks", 5, 0, 86_400, 60), RateLimit("total-tasks", 100, 7, None, None)]
    problem = to_problem(errors.QuotaDenied("Later.", violations=violations, limits=limits))
    amounts = [(item["policy"], item["limit"]) for item in problem.extras["violated_policies"]]
    assert amounts == [("day-tasks", 5), ("total-money", 9.5)]
    assert problem.headers == {
        "RateLimit-Policy": '"day-tasks";q=5;w=86400, "total-tasks";q=100',
        "RateLimit": '"day-tasks";r=0;t=60, "total-tasks";r=7',
    }


@pytest.mark.parametrize(("seconds", "header"), [(0.2, "1"), (2.0, "2"), (-3.5, "0")])
def test_retry_after_is_rounded_up(seconds: float, header: str) -> None:
    assert to_problem(errors.Overloaded("Later.", retry_after=seconds)).headers["Retry-After"] == header


@put("/bodies")
async def put_body(data: JSONBody[dict[str, int]]) -> None:
    """Accept a body."""


@get("/faults/{name:str}")
async def fault(name: FromPath[str]) -> None:
    raise {
        "domain": errors.NotFound("No such task."),
        "base": errors.UpstreamFault("hunter2"),
        "crash": ZeroDivisionError("hunter2"),
        "framework": ImproperlyConfiguredException("hunter2"),
        "forbidden": PermissionDeniedException("hunter2"),
        "left": ClientDisconnected(),
    }[name]


@pytest.fixture
def logger() -> CapturingLogger:
    return CapturingLogger()


@pytest.fixture
def app(logger: CapturingLogger) -> App:
    handlers: dict[Any, Any] = dict(exception_handlers(logger))
    return Litestar(
        [put_body, fault],
        exception_handlers=handlers,
        openapi_config=None,
        logging_config=None,
        request_max_body_size=1000,
    )


async def send_request(app: App, method: str, path: str, body: bytes = b"") -> AsgiResponse:
    sent = {"content-type": "application/json", "content-length": str(len(body))}
    response = await call_app(app, method, path, headers=sent, messages=make_body_messages([body]))
    assert response is not None
    assert response.headers["content-type"] == "application/problem+json"
    assert b"hunter2" not in response.body
    return response


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nowhere", b"", 404, "not-found"),
        ("BREW", "/bodies", b"", 405, "method-not-allowed"),
        ("GET", "/faults/domain", b"", 404, "not-found"),
        ("GET", "/faults/forbidden", b"", 403, "forbidden"),
        ("PUT", "/bodies", b"{", 400, "malformed-request"),
        ("PUT", "/bodies", b'{"\xff": 1}', 400, "malformed-request"),
        ("PUT", "/bodies", b"x" * 2000, 400, "malformed-request"),
    ],
)
async def test_errors_are_problems(app: App, method: str, path: str, body: bytes, status: int, code: str) -> None:
    response = await send_request(app, method, path, body)
    assert (response.status, response.json()["code"]) == (status, code)


@pytest.mark.parametrize("name", ["crash", "base", "framework"])
async def test_internal_error_is_logged_and_hidden(app: App, logger: CapturingLogger, name: str) -> None:
    response = await send_request(app, "GET", f"/faults/{name}")
    assert (response.status, response.json()["code"]) == (500, "internal-error")
    ((logged),) = logger.calls
    assert logged.method_name == "error"
    assert "hunter2" in str(logged.kwargs["exc_info"])


async def test_client_disconnect_passes_through(app: App, logger: CapturingLogger) -> None:
    with pytest.raises(ClientDisconnected):
        await call_app(app, "GET", "/faults/left")
    assert logger.calls == []


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
