"""What the application answers when something goes wrong anywhere in it."""

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
    """A part of the body below."""

    tasks: Annotated[int, Meta(ge=0)]


class Body(Struct, forbid_unknown_fields=True):
    """A body of an operator's call."""

    accounts: tuple[str, ...]
    limits: tuple[Limit, ...] = ()


@put("/bodies")
async def put_body(data: JSONBody[Body]) -> None:
    """Take a body."""


@post("/forms")
async def post_form(request: Request[Any, Any, Any]) -> None:
    """Take any body."""
    await request.body()


@get("/queries")
async def get_query(must: FromQuery[int], limit: Annotated[int, QueryParameter(ge=1)] = 1) -> None:
    """Take a query."""


@get("/faults/{name:str}")
async def fault(name: FromPath[str]) -> None:
    """Fail in the way asked for."""
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
    """What was logged."""
    return CapturingLogger()


@pytest.fixture
def app(logger: CapturingLogger) -> App:
    """A real application with the handlers."""
    handlers: dict[Any, Any] = dict(exception_handlers(logger))
    return Litestar(
        [put_body, post_form, get_query, fault],
        exception_handlers=handlers,
        openapi_config=None,
        logging_config=None,
        request_max_body_size=1000,
    )


async def send_request(app: App, method: str, path: str, body: bytes = b"", **headers: str) -> AsgiResponse:
    """The answer to one request."""
    sent = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    answer = await call_app(app, method, path, headers=sent, messages=make_body_messages([body]))
    assert answer is not None
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status
    return answer


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
async def test_the_handlers_cover_all_of_the_application(
    app: App, method: str, path: str, status: int, code: str
) -> None:
    """Unknown addresses, unknown methods, errors of the domain and crashes are all answered as problems."""
    answer = await send_request(app, method, path)
    assert (answer.status, answer.json()["code"]) == (status, code)


async def test_a_wrong_method_is_told_the_right_ones(app: App) -> None:
    """A 405 names the methods there are."""
    assert "GET" in (await send_request(app, "DELETE", "/queries")).headers["allow"]


@pytest.mark.parametrize("name", ["crash", "base", "framework"])
async def test_a_crash_is_logged_and_not_told(app: App, logger: CapturingLogger, name: str) -> None:
    """The cause of a 500 is in the log, with its exception, and nowhere in the answer."""
    answer = await send_request(app, "GET", f"/faults/{name}")
    assert b"hunter2" not in answer.body
    ((logged),) = logger.calls
    assert logged.method_name == "error"
    assert "hunter2" in str(logged.kwargs["exc_info"])


async def test_a_missing_token_and_a_wrong_one_are_challenged_differently(app: App) -> None:
    """Who sent a token is told that it is invalid, who sent none only how to authenticate."""
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
async def test_faults_of_a_body_are_named(app: App, body: bytes, expected: dict[str, str]) -> None:
    """A JSON body that does not fit is a 422 that names the field at fault."""
    answer = await send_request(app, "PUT", "/bodies", body)
    assert (answer.status, answer.json()["code"]) == (422, "invalid-options")
    assert {each["field"]: each["detail"] for each in answer.json()["errors"]} == expected


@pytest.mark.parametrize(
    ("path", "field"), [("/queries", "must"), ("/queries?must=a", "must"), ("/queries?must=1&limit=0", "limit")]
)
async def test_faults_of_a_query_are_named(app: App, path: str, field: str) -> None:
    """A query that does not fit is a 422 that names the parameter, and does not repeat the query."""
    answer = await send_request(app, "GET", f"{path}{'&' if '?' in path else '?'}key=hunter2")
    assert (answer.status, [each["field"] for each in answer.json()["errors"]]) == (422, [field])
    assert b"hunter2" not in answer.body


@pytest.mark.parametrize("body", [b"{", b'{"accounts": ["\xff"]}', b"x" * 2000])
async def test_a_body_that_cannot_be_read_is_malformed(app: App, body: bytes) -> None:
    """Broken JSON, broken UTF-8 and too long a body are a 400."""
    answer = await send_request(app, "PUT", "/bodies", body)
    assert (answer.status, answer.json()["code"]) == (400, "malformed-request")


async def test_a_form_beyond_the_limit_of_the_server_is_too_large(app: App) -> None:
    """A multipart body that the framework refuses for its size is a 413."""
    answer = await send_request(
        app, "POST", "/forms", b"x" * 2000, **{"content-type": "multipart/form-data; boundary=x"}
    )
    assert (answer.status, answer.json()["code"]) == (413, "image-too-large")


async def test_a_client_that_left_is_answered_nothing(app: App, logger: CapturingLogger) -> None:
    """That the client is gone passes through to whoever serves the application, unanswered and unlogged."""
    with pytest.raises(ClientDisconnected):
        await call_app(app, "GET", "/faults/left")
    assert logger.calls == []
