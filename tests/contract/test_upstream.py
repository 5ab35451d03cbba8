"""The upstream's client against servers that misbehave on the wire: a submit is sent once, and never misjudged."""

from __future__ import annotations

import asyncio
import gzip
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from service.clients import exchange, upstream
from service.clients.breaker import THRESHOLD
from service.clients.upstream import Operation, UpstreamClient
from service.domain.balance import Figures
from service.domain.task import (
    DEFAULT_CATALOGUE,
    FaceEnhanceOptions,
    Options,
    SeamlessOptions,
    UpscaleOptions,
    VectorizeOptions,
)
from service.domain.tenancy import Account
from service.usecases.ports import Answered, SubmitOutcome, Submitted
from tests.contract.client import ACCOUNT, IMAGE, LARGE, SEALER, USER_KEY, calling
from tests.contract.peer import (
    Connection,
    Serve,
    answering,
    closing_after,
    hanging,
    http,
    resetting,
    resetting_at_once,
    serving,
    told,
)
from tests.support.certificates import certify
from tests.support.valkey import free_port

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
NOT_SENT = SubmitOutcome.NOT_SENT
TASK = told(err_code=0, task_id="t-1", remaining_count=4, remaining_money=2)
BODY = TASK.partition(b"\r\n\r\n")[2]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def dripping(connection: Connection) -> None:
    """Send an answer byte by byte, and never come to its end."""
    await connection.receive()
    await connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 60000\r\n\r\n")
    for _ in range(60_000):
        await connection.send(b" ")
        await asyncio.sleep(0.01)


async def redirecting(connection: Connection) -> None:
    """Send the client to the same place again."""
    await connection.receive()
    await connection.send(http(b"", 307, Location=f"{connection.peer.url}/api/submit_task"))


async def refusing_early(connection: Connection) -> None:
    """Refuse a request before its body has come, as proxies do with large ones."""
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.peer.requests.append((b"", b""))
    await connection.send(http(b"too large", 413, Connection="close"))
    await connection.wait_for_the_end()


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [
        pytest.param(answering(TASK), ACCEPTED, id="whole"),
        pytest.param(answering(*(TASK[n : n + 1] for n in range(len(TASK)))), ACCEPTED, id="in-pieces"),
        pytest.param(answering(b"HTTP/1.1 103 Hints\r\n\r\n", TASK), ACCEPTED, id="after-an-informational-one"),
        pytest.param(closing_after(b"HTTP/1.0 200 OK\r\n\r\n" + BODY), ACCEPTED, id="without-a-length"),
        pytest.param(answering(CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)), ACCEPTED, id="chunked"),
        pytest.param(answering(http(b"nope", 400)), REJECTED, id="bad-request"),
        pytest.param(answering(http(b"", 404)), REJECTED, id="not-found"),
        pytest.param(answering(http(b"", 429)), REJECTED, id="too-many"),
        pytest.param(refusing_early, REJECTED, id="refused-early"),
        pytest.param(answering(told(err_code=1, err_msg="任务提交失败:坏")), REJECTED, id="rejected"),
        pytest.param(answering(told(err_code=1, err_msg="账户不存在")), SubmitOutcome.INVALID_ACCOUNT, id="invalid"),
        pytest.param(answering(told(err_code=1, err_msg="账户剩余次数不足")), SubmitOutcome.EXHAUSTED, id="exhausted"),
        pytest.param(resetting, UNKNOWN, id="reset"),
        pytest.param(closing_after(), UNKNOWN, id="closed"),
        pytest.param(closing_after(TASK[:20]), UNKNOWN, id="half-a-head"),
        pytest.param(closing_after(TASK[:-5]), UNKNOWN, id="half-a-body"),
        pytest.param(closing_after(TASK.replace(b"Content-Length: ", b"Content-Length: 9")), UNKNOWN, id="too-short"),
        pytest.param(answering(TASK.replace(b"Content-Length: ", b"Content-Length: 9-")), UNKNOWN, id="no-length"),
        pytest.param(closing_after(CHUNKED + b"%x\r\n%s\r\n" % (len(BODY), BODY)), UNKNOWN, id="torn-chunks"),
        pytest.param(closing_after(CHUNKED + b"nonsense\r\n"), UNKNOWN, id="broken-chunks"),
        pytest.param(closing_after(b"SSH-2.0-x\r\n\r\n"), UNKNOWN, id="not-http"),
        pytest.param(closing_after(b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 50_000), UNKNOWN, id="endless-head"),
        pytest.param(answering(http(b"<html>", 502)), UNKNOWN, id="bad-gateway"),
        pytest.param(answering(http(BODY, 500)), UNKNOWN, id="server-error-with-a-task"),
        pytest.param(answering(http(b"<html>ok</html>")), UNKNOWN, id="html"),
        pytest.param(answering(http(BODY[:-1])), UNKNOWN, id="torn-json"),
        pytest.param(answering(http(b"")), UNKNOWN, id="empty"),
        pytest.param(answering(b"HTTP/1.1 204 No\r\n\r\n"), UNKNOWN, id="no-content"),
        pytest.param(
            answering(b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), UNKNOWN, id="upgraded"
        ),
        pytest.param(answering(told(err_code=0)), UNKNOWN, id="no-task-id"),
        pytest.param(answering(told(err_code=0, task_id="t", padding="x" * 70_000)), UNKNOWN, id="too-large"),
        pytest.param(answering(http(gzip.compress(BODY), Content_Encoding="gzip")), UNKNOWN, id="compressed"),
        pytest.param(redirecting, UNKNOWN, id="redirected"),
        pytest.param(answering(http(b"", 301, Location="http://[")), UNKNOWN, id="redirected-nowhere"),
    ],
)
async def test_outcomes(serve: Serve, outcome: SubmitOutcome) -> None:
    """Whatever becomes of a submit, it is sent once, and judged by whether it may have been charged."""
    async with serving(serve) as peer, calling(peer.url) as caller:
        submitted = await caller.submit(image=LARGE)
        assert submitted.outcome is outcome
        assert caller.seen == [(Operation.SUBMIT, outcome)]
    assert len(peer.requests) == peer.connections == 1


async def test_accepted() -> None:
    """An accepted submit tells the task's id and the balance."""
    async with serving(answering(TASK)) as peer, calling(peer.url) as caller:
        assert await caller.submit() == Submitted(outcome=ACCEPTED, upstream_id="t-1", figures=Figures(4, 200))


@pytest.mark.parametrize("serve", [resetting_at_once, closing_after()])
async def test_reset_before_anything_was_read(serve: Serve) -> None:
    """A connection that stood and then broke is unknown, even if the other side read nothing."""
    async with serving(serve) as peer, calling(peer.url) as caller:
        assert (await caller.submit(image=LARGE)).outcome is UNKNOWN
    assert peer.connections == 1


@pytest.mark.parametrize("serve", [hanging, dripping])
async def test_deadline(serve: Serve) -> None:
    """A submit ends within its time, and is unknown if it was sent by then."""
    async with serving(serve) as peer, calling(peer.url) as caller:
        async with asyncio.timeout(5):
            assert (await caller.submit(seconds=0.2)).outcome is UNKNOWN
    assert len(peer.requests) == 1


async def test_deadline_while_sending() -> None:
    """A submit whose body could not be sent in time is unknown."""

    async def reading_nothing(_: Connection) -> None:
        await asyncio.Event().wait()

    async with serving(reading_nothing) as peer, calling(peer.url) as caller:
        image = replace(LARGE, data=bytes(32 << 20))
        assert (await caller.submit(image=image, seconds=0.3)).outcome is UNKNOWN
    assert peer.connections == 1


async def test_refused() -> None:
    """Where nobody listens, nothing was sent."""
    async with calling(f"http://127.0.0.1:{free_port()}") as caller:
        assert (await caller.submit()).outcome is NOT_SENT
        assert (await caller.check()).answered is Answered.NOTHING
        assert caller.seen == [(Operation.SUBMIT, NOT_SENT), (Operation.CHECK, Answered.NOTHING)]


@contextmanager
def deaf() -> Iterator[str]:
    """An address where connections are never made: the queue of its listener is full."""
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_deadline_while_connecting() -> None:
    """A deadline that passes before there is a connection means that nothing was sent."""
    with deaf() as url:
        async with calling(url) as caller:
            assert (await caller.submit(seconds=0.2)).outcome is NOT_SENT


async def test_connect_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that takes too long means that nothing was sent, well before the deadline."""
    monkeypatch.setattr(exchange, "_TIMEOUTS", httpx2.Timeout(5, connect=0.1))
    with deaf() as url:
        async with calling(url) as caller, asyncio.timeout(5):
            assert (await caller.submit(seconds=60)).outcome is NOT_SENT


async def test_read_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that takes too long to begin is unknown, well before the deadline."""
    monkeypatch.setattr(exchange, "_TIMEOUTS", httpx2.Timeout(0.1))
    async with serving(hanging) as peer, calling(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.submit(seconds=60)).outcome is UNKNOWN


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://",
        "ftp://127.0.0.1",
        "http://[::1",
        "http://a..b",
        "http://x:99999",
        "http://\x00",
        f"http://{'é' * 90}",
    ],
)
async def test_unusable_address(url: str) -> None:
    """An address that is none means that nothing was sent."""
    async with calling(url) as caller:
        assert (await caller.submit()).outcome is NOT_SENT
        assert (await caller.check()).answered is Answered.NOTHING


@pytest.mark.parametrize("seconds", [0, -1.5])
async def test_no_time_left(seconds: float) -> None:
    """Without any time left nothing is sent."""
    async with serving(answering(TASK)) as peer, calling(peer.url) as caller:
        assert (await caller.submit(seconds=seconds)).outcome is NOT_SENT
    assert peer.connections == 0


async def test_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over TLS nothing is sent to a server whose certificate is not trusted."""
    trusted, context = certify(tmp_path)
    async with serving(answering(TASK), tls=context) as peer:
        async with calling(peer.url) as caller:
            assert (await caller.submit()).outcome is NOT_SENT
        assert peer.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
        async with calling(peer.url) as caller:
            assert (await caller.submit()).outcome is ACCEPTED


async def speaking_plainly(connection: Connection) -> None:
    """Answer in plain HTTP whatever comes."""
    await connection.send(b"HTTP/1.1 400 Bad\r\n\r\n")


@pytest.mark.parametrize("serve", [speaking_plainly, resetting_at_once])
async def test_no_tls(serve: Serve) -> None:
    """Where the handshake of TLS fails, nothing was sent."""
    async with serving(serve) as peer, calling(peer.url.replace("http://", "https://")) as caller:
        assert (await caller.submit()).outcome is NOT_SENT


async def test_account_elsewhere() -> None:
    """An account's own address takes the place of the default one, with or without a slash at its end."""
    async with serving(answering(TASK)) as peer, calling("http://127.0.0.1:1") as caller:
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
async def test_what_is_sent(options: Options, path: bytes) -> None:
    """A submit is a form with the key, the options, and the image as a file, on a connection of its own."""
    async with serving(answering(TASK)) as peer, calling(peer.url) as caller:
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


async def test_checks_keep_their_connection() -> None:
    """Checks are small forms, and share a connection."""
    async with serving(answering(told(err_code=0, status="Pending"))) as peer, calling(peer.url) as caller:
        for _ in range(3):
            assert (await caller.check()).answered is Answered.RUNNING
    assert peer.connections == 1
    head, body = peer.requests[0]
    assert head.startswith(b"POST /api/check_task_status HTTP/1.1\r\n")
    assert body == b"user_key=hush-hush-key&task_id=t-1"


@pytest.mark.parametrize(
    ("serve", "answered"),
    [
        (answering(told(err_code=0, status="Completed", images_url="http://x/y")), Answered.SUCCEEDED),
        (answering(told(err_code=0, status="Failed")), Answered.FAILED),
        (answering(told(err_code=1, err_msg="任务未找到或状态未知")), Answered.SILENT),
        (answering(http(b"<html>", 502)), Answered.NOTHING),
        (answering(http(b"", 404)), Answered.NOTHING),
        (answering(http(b"x" * 70_000)), Answered.NOTHING),
        (resetting, Answered.NOTHING),
        (closing_after(TASK[:20]), Answered.NOTHING),
        (redirecting, Answered.NOTHING),
    ],
)
async def test_checks(serve: Serve, answered: Answered) -> None:
    """A check tells what was answered, or that nothing was, and is made once."""
    async with serving(serve) as peer, calling(peer.url) as caller:
        assert (await caller.check()).answered is answered
        assert caller.seen == [(Operation.CHECK, answered)]
    assert len(peer.requests) == 1


async def test_check_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that is not answered ends by itself."""
    monkeypatch.setattr(upstream, "CHECK_SECONDS", 0.1)
    async with serving(hanging) as peer, calling(peer.url) as caller, asyncio.timeout(5):
        assert (await caller.check()).answered is Answered.NOTHING


async def test_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who waits in vain for a turn sent nothing; checks have turns of their own."""
    monkeypatch.setattr(exchange, "MAX_REQUESTS", 1)

    async def serve(connection: Connection) -> None:
        await connection.receive()
        if b"check_task_status" in connection.peer.requests[-1][0]:
            await connection.send(told(err_code=0, status="Pending"))
        else:
            await connection.wait_for_the_end()

    async with serving(serve) as peer, calling(peer.url) as caller:
        first = asyncio.create_task(caller.submit(seconds=1))
        await peer.arrived.wait()
        assert (await caller.submit(seconds=0.1)).outcome is NOT_SENT
        assert (await caller.check()).answered is Answered.RUNNING
        assert len(peer.requests) == 2
        assert (await first).outcome is UNKNOWN


async def test_gate_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A submit that was cancelled, before or after it was sent, gives its turn to the next."""
    monkeypatch.setattr(exchange, "MAX_REQUESTS", 1)
    async with serving(hanging) as peer, calling(peer.url) as caller:
        sent, waiting = asyncio.create_task(caller.submit()), asyncio.create_task(caller.submit())
        await peer.arrived.wait()
        for task in (waiting, sent):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        peer.arrived.clear()
        last = asyncio.create_task(caller.submit(seconds=0.2))
        await peer.arrived.wait()
        assert (await last).outcome is UNKNOWN
        assert caller.seen == [(Operation.SUBMIT, UNKNOWN)] * 3


async def test_breaker() -> None:
    """After failures to connect in a row nobody tries for a while, neither to submit nor to check."""
    port = free_port()
    async with calling(f"http://127.0.0.1:{port}") as caller:
        for _ in range(THRESHOLD):
            await caller.submit()
        async with serving(answering(TASK), port=port) as peer, serving(answering(TASK)) as other:
            assert (await caller.submit()).outcome is NOT_SENT
            assert (await caller.check()).answered is Answered.NOTHING
            assert peer.connections == 0
            elsewhere = Account(2, "other", ACCOUNT.user_key, base_url=other.url)
            assert (await caller.submit(account=elsewhere)).outcome is ACCEPTED


async def test_breaker_ignores_what_was_sent() -> None:
    """Answers that can't be used, and waits that were given up, do not open the breaker."""
    async with serving(resetting) as peer, calling(peer.url) as caller:
        for _ in range(2 * THRESHOLD):
            assert (await caller.submit()).outcome is UNKNOWN
    with deaf() as url:
        async with calling(url) as caller:
            for _ in range(2 * THRESHOLD):
                await caller.submit(seconds=0.01)
            trying = asyncio.create_task(caller.submit())
            assert not (await asyncio.wait({trying}, timeout=0.1))[0]
            trying.cancel()


async def test_no_cookies() -> None:
    """Cookies that the other side sets are not sent back."""
    pending = http(b'{"err_code": 0, "status": "x"}', Set_Cookie="a=b; Path=/")
    async with serving(answering(pending)) as peer, calling(peer.url) as caller:
        await caller.check()
        await caller.check()
    assert b"cookie" not in peer.requests[1][0].lower()


async def test_no_proxy_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proxies that the environment names are not used: images and keys go where they are meant to go."""
    async with serving(answering(TASK)) as proxy, serving(answering(TASK)) as peer:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        async with calling(peer.url) as caller:
            assert (await caller.submit()).outcome is ACCEPTED
    assert (proxy.connections, peer.connections) == (0, 1)


async def test_key_that_can_not_be_opened() -> None:
    """An account whose key was sealed by a secret key that is gone sends nothing."""
    async with serving(answering(TASK)) as peer, calling(peer.url) as caller:
        account = Account(1, "main", b"sealed by another")
        with capture_logs() as logs:
            assert (await caller.submit(account=account)).outcome is NOT_SENT
            assert (await caller.check(account=account)).answered is Answered.NOTHING
    assert peer.connections == 0
    assert [each["log_level"] for each in logs] == ["error", "error"]


@pytest.mark.parametrize(
    "serve",
    [
        answering(told(err_code=1, err_msg=f"任务提交失败:bad key {USER_KEY}!")),
        answering(told(err_code=0, status="Failed", err_msg=f"bad key {USER_KEY}!")),
        answering(TASK),
        resetting,
    ],
)
async def test_key_stays_secret(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """The key is in no log, not even at the finest level, in no result, and in nothing that can be printed."""
    caplog.set_level(logging.DEBUG)
    with capture_logs() as logs:
        async with serving(serve) as peer, calling(peer.url) as caller:
            shown = [await caller.submit(), await caller.check(), vars(caller.client), logs, caplog.text]
    assert len(peer.requests) == 2
    assert USER_KEY not in repr(shown)


async def test_key_in_no_error() -> None:
    """An error that has to come through, since the gateway itself is at fault, shows no key."""

    def observe(*_: object) -> None:
        raise RuntimeError("a broken observer")

    async with UpstreamClient("http://127.0.0.1:1", SEALER, DEFAULT_CATALOGUE, observe=observe) as client:
        with pytest.raises(RuntimeError, match="a broken observer") as caught:
            await client.check(ACCOUNT, "t-1")
    assert USER_KEY not in repr(caught.getrepr(showlocals=False))
