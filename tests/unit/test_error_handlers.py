"""Exception handlers of the application."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from litestar import Litestar, Request, get, post, put
from litestar.exceptions import ImproperlyConfiguredException, PermissionDeniedException
from litestar.params import FromPath, FromQuery, JSONBody, QueryParameter
from msgspec import Meta, Struct
from structlog.testing import CapturingLogger

from service.api.errors import ClientDisconnected, exception_handlers
from service.domain import errors
from tests.unit.asgi_client import App, AsgiResponse, call_app, make_body_messages


class Limit(Struct, forbid_unknown_fields=True):
    tasks: Annotated[int, Meta(ge=0)]


class Body(Struct, forbid_unknown_fields=True):
    accounts: tuple[str, ...]
    limits: tuple[Limit, ...] = ()


@put("/bodies")
async def put_body(data: JSONBody[Body]) -> None:
    """Accept a body."""


@post("/forms")
async def post_form(request: Request[Any, Any, Any]) -> None:
    await request.body()


@get("/queries")
async def get_query(must: FromQuery[int], limit: Annotated[int, QueryParameter(ge=1)] = 1) -> None:
    """Accept a query."""


@get("/faults/{name:str}")
async def fault(name: FromPath[str]) -> None:
    raise {
        "domain": errors.NotFound("No such task."),
        "base": errors.UpstreamFault("hunter2"),
        "token": errors.Unauthenticated("No."),
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
        [put_body, post_form, get_query, fault],
        exception_handlers=handlers,
        openapi_config=None,
        logging_config=None,
        request_max_body_size=1000,
    )


async def send_request(app: App, method: str, path: str, body: bytes = b"", **headers: str) -> AsgiResponse:
    sent = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    response = await call_app(app, method, path, headers=sent, messages=make_body_messages([body]))
    assert response is not None
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["status"] == response.status
    return response


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("DELETE", "/queries", 405, "method-not-allowed"),
        ("BREW", "/queries", 405, "method-not-allowed"),
        ("GET", "/faults/domain", 404, "not-found"),
        ("GET", "/faults/base", 500, "internal-error"),
        ("GET", "/faults/crash", 500, "internal-error"),
        ("GET", "/faults/framework", 500, "internal-error"),
        ("GET", "/faults/forbidden", 403, "forbidden"),
    ],
)
async def test_all_errors_are_problems(app: App, method: str, path: str, status: int, code: str) -> None:
    response = await send_request(app, method, path)
    assert (response.status, response.json()["code"]) == (status, code)


async def test_method_not_allowed_lists_methods(app: App) -> None:
    assert "GET" in (await send_request(app, "DELETE", "/queries")).headers["allow"]


@pytest.mark.parametrize("name", ["crash", "base", "framework"])
async def test_internal_error_is_logged_and_hidden(app: App, logger: CapturingLogger, name: str) -> None:
    response = await send_request(app, "GET", f"/faults/{name}")
    assert b"hunter2" not in response.body
    ((logged),) = logger.calls
    assert logged.method_name == "error"
    assert "hunter2" in str(logged.kwargs["exc_info"])


async def test_missing_and_invalid_token_challenges_differ(app: App) -> None:
    missing = await send_request(app, "GET", "/faults/token")
    wrong = await send_request(app, "GET", "/faults/token", authorization="Bearer x")
    assert missing.headers["www-authenticate"] == 'Bearer realm="imaging-gateway"'
    assert wrong.headers["www-authenticate"] == 'Bearer realm="imaging-gateway", error="invalid_token"'


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{}", {"accounts": "is required"}),
        (b'{"accounts": [], "zzz": 1}', {"zzz": "is unknown"}),
        (b'{"accounts": [1]}', {"accounts[0]": "must be text"}),
        (b'{"accounts": [], "limits": [{}]}', {"limits[0].tasks": "is required"}),
        (b'{"accounts": [], "limits": [{"tasks": -1}]}', {"limits[0].tasks": "must be a whole number of at least 0"}),
        (b"[]", {"body": "must be an object"}),
        (b"", {"body": "is required"}),
    ],
)
async def test_invalid_body_field_is_named(app: App, body: bytes, expected: dict[str, str]) -> None:
    response = await send_request(app, "PUT", "/bodies", body)
    assert (response.status, response.json()["code"]) == (422, "invalid-options")
    assert {error["field"]: error["detail"] for error in response.json()["errors"]} == expected


@pytest.mark.parametrize(
    ("path", "field"), [("/queries", "must"), ("/queries?must=a", "must"), ("/queries?must=1&limit=0", "limit")]
)
async def test_invalid_query_parameter_is_named(app: App, path: str, field: str) -> None:
    response = await send_request(app, "GET", f"{path}{'&' if '?' in path else '?'}key=hunter2")
    assert (response.status, [error["field"] for error in response.json()["errors"]]) == (422, [field])
    assert b"hunter2" not in response.body


@pytest.mark.parametrize("body", [b"{", b'{"accounts": ["\xff"]}', b"x" * 2000])
async def test_unreadable_body_is_400(app: App, body: bytes) -> None:
    response = await send_request(app, "PUT", "/bodies", body)
    assert (response.status, response.json()["code"]) == (400, "malformed-request")


async def test_form_over_the_framework_limit_is_413(app: App) -> None:
    response = await send_request(
        app, "POST", "/forms", b"x" * 2000, **{"content-type": "multipart/form-data; boundary=x"}
    )
    assert (response.status, response.json()["code"]) == (413, "image-too-large")


async def test_client_disconnect_passes_through(app: App, logger: CapturingLogger) -> None:
    with pytest.raises(ClientDisconnected):
        await call_app(app, "GET", "/faults/left")
    assert logger.calls == []
