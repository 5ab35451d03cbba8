"""Submits to misbehaving servers: sent once, and classified by whether they may have been charged."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from typing import Any, NoReturn

import httpx2
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from service.clients import http as http_module
from service.clients.upstream import UpstreamClient, UpstreamOperation
from service.domain.ledger import Balance
from service.domain.tasks import (
    DEFAULT_CATALOGUE,
    FaceEnhanceOptions,
    Options,
    SeamlessOptions,
    UpscaleOptions,
    VectorizeOptions,
)
from service.domain.tenants import Account
from service.telemetry import tracing
from service.usecases.ports import SubmitOutcome, SubmitResult
from tests.contract.client import ACCOUNT, CIPHER, IMAGE, LARGE, USER_KEY, open_caller
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Connection,
    Handler,
    http_response,
    never_reply,
    redirect_to_self,
    reply_and_close,
    reply_with,
    reset_after_request,
    reset_immediately,
    run_server,
    vendor_response,
)

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
BODY = ACCEPTED_RESPONSE.partition(b"\r\n\r\n")[2]
INVALID = json.dumps({"err_code": 1, "err_msg": "账户不存在"}).encode()
EXHAUSTED = json.dumps({"err_code": 1, "err_msg": "账户剩余次数不足"}).encode()
NO_DATE = "Mon, 01 Jan 99999999999 00:00:00 GMT"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def drip_reply(connection: Connection) -> None:
    """Send a response byte by byte, without an end."""
    await connection.receive()
    await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")
    for _ in range(60_000):
        await connection.send(b" ")
        await asyncio.sleep(0.01)


async def reject_early(connection: Connection) -> None:
    """Reject a request before its body has arrived, as proxies do with large ones."""
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.server.requests.append((b"", b""))
    await connection.send(http_response(b"too large", 413, Connection="close"))
    await connection.wait_closed()


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [
        pytest.param(reply_with(ACCEPTED_RESPONSE), ACCEPTED, id="complete"),
        pytest.param(
            reply_with(*(ACCEPTED_RESPONSE[n : n + 1] for n in range(len(ACCEPTED_RESPONSE)))), ACCEPTED, id="in-pieces"
        ),
        pytest.param(
            reply_with(b"HTTP/1.1 103 Hints\r\n\r\n", ACCEPTED_RESPONSE), ACCEPTED, id="after-an-informational-one"
        ),
        pytest.param(reply_and_close(b"HTTP/1.0 200 OK\r\n\r\n" + BODY), ACCEPTED, id="without-a-length"),
        pytest.param(reply_with(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), ACCEPTED, id="chunked"),
        pytest.param(reply_with(http_response(b"nope", 400)), REJECTED, id="bad-request"),
        pytest.param(reply_with(http_response(b"", 404)), REJECTED, id="not-found"),
        pytest.param(reply_with(http_response(b"", 429)), SubmitOutcome.BUSY, id="too-many"),
        pytest.param(reply_and_close(http_response(b"nope", 400)[:-2]), REJECTED, id="bad-request-torn"),
        pytest.param(reply_with(http_response(b"x" * 100_000, 400)), REJECTED, id="bad-request-large"),
        pytest.param(
            reply_with(http_response(INVALID, 401)), SubmitOutcome.INVALID_ACCOUNT, id="invalid-by-status-too"
        ),
        pytest.param(reply_with(http_response(EXHAUSTED, 429)), SubmitOutcome.EXHAUSTED, id="exhausted-by-status-too"),
        pytest.param(reply_with(http_response(BODY, 400)), ACCEPTED, id="bad-request-with-a-task"),
        pytest.param(reject_early, REJECTED, id="refused-early"),
        pytest.param(reply_with(vendor_response(err_code=1, err_msg="任务提交失败:坏")), REJECTED, id="rejected"),
        pytest.param(
            reply_with(vendor_response(err_code=1, err_msg="账户不存在")), SubmitOutcome.INVALID_ACCOUNT, id="invalid"
        ),
        pytest.param(
            reply_with(vendor_response(err_code=1, err_msg="账户剩余次数不足")), SubmitOutcome.EXHAUSTED, id="exhausted"
        ),
        pytest.param(reset_after_request, UNKNOWN, id="reset"),
        pytest.param(reply_and_close(), UNKNOWN, id="closed"),
        pytest.param(reply_and_close(ACCEPTED_RESPONSE[:20]), UNKNOWN, id="half-a-head"),
        pytest.param(reply_and_close(ACCEPTED_RESPONSE[:-5]), UNKNOWN, id="half-a-body"),
        pytest.param(
            reply_and_close(ACCEPTED_RESPONSE.replace(b"Content-Length: ", b"Content-Length: 9")),
            ACCEPTED,
            id="too-short",
        ),
        pytest.param(
            reply_with(ACCEPTED_RESPONSE.replace(b"Content-Length: ", b"Content-Length: 9-")), UNKNOWN, id="no-length"
        ),
        pytest.param(reply_and_close(CHUNKED + b"%x\r\n%s\r\n" % (len(BODY), BODY)), ACCEPTED, id="torn-chunks"),
        pytest.param(reply_and_close(CHUNKED + b"nonsense\r\n"), UNKNOWN, id="broken-chunks"),
        pytest.param(reply_and_close(b"SSH-2.0-x\r\n\r\n"), UNKNOWN, id="not-http"),
        pytest.param(reply_and_close(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000), UNKNOWN, id="endless-head"),
        pytest.param(reply_with(http_response(b"<html>", 502)), UNKNOWN, id="bad-gateway"),
        pytest.param(reply_with(http_response(BODY, 500)), ACCEPTED, id="server-error-with-a-task"),
        pytest.param(
            reply_with(http_response(b'{"task_id": "t"}', 500)), UNKNOWN, id="server-error-with-a-task-and-no-code"
        ),
        pytest.param(reply_with(http_response(INVALID, 500)), UNKNOWN, id="server-error-with-a-message"),
        pytest.param(reply_with(http_response(b"<html>ok</html>")), UNKNOWN, id="html"),
        pytest.param(reply_with(http_response(BODY[:-1])), UNKNOWN, id="torn-json"),
        pytest.param(reply_with(http_response(b"")), UNKNOWN, id="empty"),
        pytest.param(reply_with(b"HTTP/1.1 204 No\r\n\r\n"), UNKNOWN, id="no-content"),
        pytest.param(
            reply_with(b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), UNKNOWN, id="upgraded"
        ),
        pytest.param(reply_with(vendor_response(err_code=0)), UNKNOWN, id="no-task-id"),
        pytest.param(
            reply_with(vendor_response(err_code=0, task_id="t", padding="x" * 70_000)), UNKNOWN, id="too-large"
        ),
        pytest.param(
            reply_with(http_response(gzip.compress(BODY, mtime=0), Content_Encoding="gzip")), ACCEPTED, id="compressed"
        ),
        pytest.param(
            reply_with(http_response(gzip.compress(BODY, mtime=0))), ACCEPTED, id="compressed-without-a-header"
        ),
        pytest.param(
            reply_with(http_response(zlib.compress(BODY), Content_Encoding="deflate")), ACCEPTED, id="deflated"
        ),
        pytest.param(
            reply_with(http_response(gzip.compress(bytes(1 << 25)), Content_Encoding="gzip")), UNKNOWN, id="a-bomb"
        ),
        pytest.param(reply_with(http_response(BODY, Content_Encoding="br")), ACCEPTED, id="not-compressed"),
        pytest.param(redirect_to_self, SubmitOutcome.REDIRECTED, id="redirected"),
        pytest.param(
            reply_with(http_response(b"", 301, Location="http://[")), SubmitOutcome.REDIRECTED, id="redirected-nowhere"
        ),
        pytest.param(
            reply_with(http_response(b"", 302, Location="/")), SubmitOutcome.REDIRECTED, id="redirected-by-302"
        ),
        pytest.param(
            reply_with(http_response(b"", 308, Location="/")), SubmitOutcome.REDIRECTED, id="redirected-by-308"
        ),
        pytest.param(reply_with(http_response(b"", 303, Location="/")), UNKNOWN, id="sent-to-see-another"),
        pytest.param(reply_with(http_response(BODY, 301, Location="/")), ACCEPTED, id="redirected-with-a-task"),
    ],
)
async def test_outcomes(serve: Handler, outcome: SubmitOutcome) -> None:
    """Every submit is sent once, classified by whether it may have been charged, and logged if so."""
    with capture_logs() as logs:
        async with run_server(serve) as peer, open_caller(peer.url) as caller:
            submitted = await caller.submit(image=LARGE)
            assert submitted.outcome is outcome
            assert caller.observations == [(UpstreamOperation.SUBMIT, outcome)]
    failed = [log for log in logs if log["event"] == "upstream.request_failed"]
    assert [item["sent"] and bool(item["error"]) for item in failed] == [True] * (
        outcome in {UNKNOWN, SubmitOutcome.REDIRECTED}
    )
    assert len(peer.requests) == peer.connections == 1


async def test_refused_with_a_message() -> None:
    """The body of an HTTP 4xx is parsed for the vendor's message, in any charset, without secrets."""
    body = json.dumps({"err_code": 1, "err_msg": f"任务提交失败:图片太小 {USER_KEY}"}, ensure_ascii=False).encode("gbk")
    async with run_server(reply_with(http_response(body, 422))) as peer, open_caller(peer.url) as caller:
        submitted = await caller.submit()
    assert (submitted.outcome, submitted.reason) == (REJECTED, "图片太小 …")


@pytest.mark.parametrize(
    ("retry_after", "seconds"), [("30", 30), ("0", 0), ("soon", None), ("", None), (NO_DATE, None)]
)
async def test_busy(retry_after: str, seconds: float | None) -> None:
    """The retry delay of a busy upstream is returned, if there is one."""
    async with (
        run_server(reply_with(http_response(b"busy", 429, Retry_After=retry_after))) as peer,
        open_caller(peer.url) as caller,
    ):
        assert await caller.submit() == SubmitResult(outcome=SubmitOutcome.BUSY, retry_after_seconds=seconds)


async def test_refused_with_a_body_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "ERROR_BODY_SECONDS", 0.1)

    async def stopping(connection: Connection) -> None:
        await connection.receive()
        await connection.send(http_response(b"nope", 400)[:-2])
        await connection.wait_closed()

    async with run_server(stopping) as peer, open_caller(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.submit()).outcome is REJECTED


async def test_accepted() -> None:
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        assert await caller.submit() == SubmitResult(outcome=ACCEPTED, upstream_id="t-1", balance=Balance(4, 200))


@pytest.mark.parametrize("status", [200, 403])
async def test_incomplete_body(status: int) -> None:
    """A body with all that is needed counts, although its announced rest never arrives."""

    async def stalling(connection: Connection) -> None:
        await connection.receive()
        body = BODY if status == 200 else INVALID
        await connection.send(f"HTTP/1.1 {status} x\r\nContent-Length: 60000\r\n\r\n".encode() + body)
        await connection.wait_closed()

    async with run_server(stalling) as peer, open_caller(peer.url) as caller, asyncio.timeout(5):
        outcome = (await caller.submit(seconds=1)).outcome
    assert outcome is (ACCEPTED if status == 200 else SubmitOutcome.INVALID_ACCOUNT)


async def test_stalled_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same when the timeout between chunks ends the wait, well before the deadline."""
    monkeypatch.setattr(http_module, "READ_SECONDS", 0.2)

    async def stalling(connection: Connection) -> None:
        await connection.receive()
        await connection.send(ACCEPTED_RESPONSE.replace(b"Content-Length: ", b"Content-Length: 9"))
        await connection.wait_closed()

    async with run_server(stalling) as peer, open_caller(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.submit(seconds=60)).outcome is ACCEPTED


@pytest.mark.parametrize("error", [RuntimeError, OSError, KeyError])
@pytest.mark.parametrize(
    ("where", "name"),
    [(httpx2.Response, "aclose"), (httpx2.AsyncHTTPTransport, "aclose"), (tracing, "record_status")],
)
async def test_faults_after_the_response(
    where: Any, name: str, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure after the response, such as while closing, does not lose the task."""

    def failing(*_: Any, **__: Any) -> NoReturn:
        raise error("a fault after the response")

    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        with monkeypatch.context() as patched:
            patched.setattr(where, name, failing)
            assert (await caller.submit()).outcome is ACCEPTED
    assert len(peer.requests) == 1


async def test_failing_observer() -> None:
    def failing(*_: Any) -> NoReturn:
        raise KeyError("a fault of the gateway")

    async with (
        run_server(reply_with(ACCEPTED_RESPONSE)) as peer,
        UpstreamClient(peer.url, CIPHER, DEFAULT_CATALOGUE, on_call=failing) as client,
    ):
        submitted = await client.submit(ACCOUNT, FaceEnhanceOptions(), IMAGE, timeout_seconds=10)
    assert submitted.outcome is ACCEPTED


@pytest.mark.parametrize("serve", [reset_immediately, reply_and_close()])
async def test_reset_before_anything_was_read(serve: Handler) -> None:
    """A connection that breaks once it is established leaves the outcome unknown."""
    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit(image=LARGE)).outcome is UNKNOWN
    assert peer.connections == 1


@pytest.mark.parametrize("serve", [never_reply, drip_reply])
async def test_deadline(serve: Handler) -> None:
    """A submit ends by its deadline, with unknown outcome if it was sent."""
    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        async with asyncio.timeout(5):
            assert (await caller.submit(seconds=0.2)).outcome is UNKNOWN
    assert len(peer.requests) == 1


async def test_deadline_while_sending() -> None:
    async def reading_nothing(_: Connection) -> None:
        await asyncio.Event().wait()

    async with run_server(reading_nothing) as peer, open_caller(peer.url) as caller:
        image = replace(LARGE, data=bytes(32 << 20))
        assert (await caller.submit(image=image, seconds=0.3)).outcome is UNKNOWN
    assert peer.connections == 1


async def test_read_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A late response leaves the outcome unknown, well before the deadline."""
    monkeypatch.setattr(http_module, "_TIMEOUTS", httpx2.Timeout(0.1).as_dict())
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.submit(seconds=60)).outcome is UNKNOWN


async def test_account_base_url() -> None:
    """An account's own URL replaces the default one, with or without a trailing slash."""
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller("http://127.0.0.1:1") as caller:
        account = Account(1, "other", ACCOUNT.user_key, base_url=f"{peer.url}/deep/")
        assert (await caller.submit(account=account)).outcome is ACCEPTED
    assert peer.requests[0][0].startswith(b"POST /deep/api/submit_face_enhance_task HTTP/1.1\r\n")


@pytest.mark.parametrize(
    ("options", "path"),
    [
        (UpscaleOptions(), b"/api/submit_task"),
        (VectorizeOptions(), b"/api/submit_vector_task"),
        (FaceEnhanceOptions(), b"/api/submit_face_enhance_task"),
        (SeamlessOptions(), b"/api/submit_seamless_task"),
    ],
)
async def test_request(options: Options, path: bytes) -> None:
    """A submit is a form with key, options and image file, on a connection of its own."""
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        await caller.submit(options=options)
        await caller.submit(options=options)
    assert peer.connections == 2
    head, body = peer.requests[0]
    assert head.startswith(b"POST %s HTTP/1.1\r\n" % path)
    assert b"content-type: multipart/form-data; boundary=" in head.lower()
    assert b"connection: close" in head.lower()
    assert b'name="user_key"\r\n\r\n%s\r\n' % USER_KEY.encode() in body
    assert b'name="input_image"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n%s\r\n' % IMAGE.data in body
    if isinstance(options, UpscaleOptions):
        assert 'name="style_dropdown"\r\n\r\n通用风格\r\n'.encode() in body
