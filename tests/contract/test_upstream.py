"""Requests to the upstream: sent at most once, and classified by whether they may have been charged."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import logging
import os
import socket
import ssl
import time
from base64 import b64encode
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from aiohappyeyeballs import start_connection
from msgspec.structs import replace
from structlog.testing import capture_logs

from service.clients import breaker, connection, http, upstream
from service.clients.breaker import BREAKER_THRESHOLD
from service.clients.upstream import UpstreamClient, UpstreamOperation
from service.domain.tasks import DEFAULT_CATALOGUE, FaceEnhanceOptions, UpscaleOptions
from service.domain.tenants import Account
from service.telemetry import tracing
from service.usecases.ports import CheckOutcome, SubmitOutcome, SubmitResult
from tests.contract.client import ACCOUNT, CIPHER, IMAGE, LARGE, LINKS, USER_KEY, make_account, open_caller
from tests.contract.scripted_server import (
    ACCEPTED_RESPONSE,
    Connection,
    Handler,
    http_response,
    never_reply,
    redirect_to_self,
    reply_and_close,
    reply_and_hold,
    reply_with,
    reset_after_request,
    run_server,
    unreachable_address,
    vendor_response,
)
from tests.support.network import create_certificate, reserve_port

ACCEPTED, REJECTED, UNKNOWN = SubmitOutcome.ACCEPTED, SubmitOutcome.REJECTED, SubmitOutcome.UNKNOWN
REDIRECTED, NOT_SENT = SubmitOutcome.REDIRECTED, SubmitOutcome.NOT_SENT
BODY = ACCEPTED_RESPONSE.partition(b"\r\n\r\n")[2]
INVALID = json.dumps({"err_code": 1, "err_msg": "账户不存在"}).encode()
EXHAUSTED = json.dumps({"err_code": 1, "err_msg": "账户剩余次数不足"}).encode()
GZIP = {"Content_Encoding": "gzip"}
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%s\r\n" % (len(BODY), BODY)
HEAD = b"HTTP/1.1 200 OK\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
PENDING = vendor_response(err_code=0, status="Pending")


async def reject_early(connection: Connection) -> None:
    """Reject a request before its body has arrived, as proxies do with large ones."""
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.server.requests.append((b"", b""))
    await connection.send(http_response(b"too large", 413, Connection="close"))
    await connection.wait_closed()


async def reject_unread(connection: Connection) -> None:
    """Reject a request as `reject_early` does, but never read its body."""
    await connection.reader.readuntil(b"\r\n\r\n")
    connection.server.requests.append((b"", b""))
    await connection.send(http_response(b"too large", 413))
    await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [
        pytest.param(reply_with(ACCEPTED_RESPONSE), ACCEPTED, id="complete"),
        pytest.param(reply_and_close(b"HTTP/1.0 200 OK\r\n\r\n" + BODY), ACCEPTED, id="without-a-length"),
        pytest.param(reply_with(CHUNKED + CHUNK + b"0\r\n\r\n"), ACCEPTED, id="chunked"),
        pytest.param(reply_and_close(CHUNKED + CHUNK), ACCEPTED, id="torn-chunks"),
        pytest.param(reply_and_close(CHUNKED + b"nonsense\r\n"), UNKNOWN, id="broken-chunks"),
        pytest.param(reply_and_close(ACCEPTED_RESPONSE[:-5]), UNKNOWN, id="half-a-body"),
        pytest.param(reply_and_close(ACCEPTED_RESPONSE.replace(b"Length: ", b"Length: 9")), ACCEPTED, id="short"),
        pytest.param(reply_and_close(http_response(b"nope", 400)[:-2]), REJECTED, id="rejection-torn"),
        pytest.param(reject_early, REJECTED, id="rejected-early"),
        pytest.param(reject_unread, REJECTED, id="rejected-unread"),
        pytest.param(reply_with(http_response(INVALID, 401)), SubmitOutcome.INVALID_ACCOUNT, id="invalid-account"),
        pytest.param(reply_with(http_response(EXHAUSTED, 429)), SubmitOutcome.EXHAUSTED, id="exhausted"),
        pytest.param(reply_with(http_response(b"", 429)), SubmitOutcome.BUSY, id="busy"),
        pytest.param(reply_with(http_response(BODY, 500)), ACCEPTED, id="task-with-500"),
        pytest.param(reply_with(http_response(b'{"task_id": "t"}', 500)), UNKNOWN, id="task-with-500-and-no-code"),
        pytest.param(reply_with(http_response(INVALID, 500)), UNKNOWN, id="message-with-500"),
        pytest.param(reply_with(b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"), UNKNOWN, id="101"),
        pytest.param(reply_with(vendor_response(err_code=0, task_id="t", x="x" * 70_000)), UNKNOWN, id="too-large"),
        pytest.param(reply_with(http_response(gzip.compress(BODY, mtime=0), 200, **GZIP)), ACCEPTED, id="gzip"),
        pytest.param(reply_with(http_response(gzip.compress(bytes(1 << 25)), 200, **GZIP)), UNKNOWN, id="bomb"),
        pytest.param(reply_with(ACCEPTED_RESPONSE + b"more"), ACCEPTED, id="followed-by-other-bytes"),
        pytest.param(reply_with(b"HTTP/1.1 103 x\r\n\r\n" + ACCEPTED_RESPONSE), ACCEPTED, id="early-hints"),
        pytest.param(reply_with(HEAD + LENGTH + LENGTH + b"\r\n", BODY), ACCEPTED, id="repeated-length"),
        pytest.param(reply_with(HEAD + LENGTH[:-2] + b", 9\r\n\r\n", BODY), UNKNOWN, id="two-lengths"),
        pytest.param(
            reply_with(CHUNKED[:-2] + LENGTH, b"\r\n" + CHUNK, b"0\r\n\r\n"), ACCEPTED, id="chunks-and-length"
        ),
        pytest.param(redirect_to_self, REDIRECTED, id="redirected"),
        pytest.param(reply_with(http_response(b"", 303, Location="/")), UNKNOWN, id="see-other"),
        pytest.param(reply_with(http_response(BODY, 301, Location="/")), ACCEPTED, id="redirected-with-a-task"),
    ],
)
async def test_submits(serve: Handler, outcome: SubmitOutcome) -> None:
    with capture_logs() as logs:
        async with run_server(serve) as peer, open_caller(peer.url) as caller:
            assert (await caller.submit(image=LARGE)).outcome is outcome
            assert caller.observations == [(UpstreamOperation.SUBMIT, outcome)]
    failed = [log["sent"] and bool(log["error"]) for log in logs if log["event"] == "upstream.request_failed"]
    assert failed == [True] * (outcome in {UNKNOWN, REDIRECTED})
    assert len(peer.requests) == peer.connections == 1


@pytest.mark.parametrize(
    ("serve", "outcome"),
    [
        (reply_with(vendor_response(err_code=0, status="Failed")), CheckOutcome.FAILED),
        (reply_with(http_response(b'{"err_code": 0, "status": "Failed"}', 502)), CheckOutcome.NO_RESPONSE),
        (redirect_to_self, CheckOutcome.NO_RESPONSE),
    ],
)
async def test_checks(serve: Handler, outcome: CheckOutcome) -> None:
    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        assert (await caller.check()).outcome is outcome
        assert caller.observations == [(UpstreamOperation.CHECK, outcome)]
    assert len(peer.requests) == 1


@pytest.mark.parametrize(
    ("limit", "status", "body", "outcome"),
    [
        ("", 200, BODY, ACCEPTED),
        ("READ_SECONDS", 200, BODY, ACCEPTED),
        ("READ_SECONDS", 400, b"no", REJECTED),
        ("ERROR_BODY_SECONDS", 403, INVALID, SubmitOutcome.INVALID_ACCOUNT),
    ],
)
async def test_what_has_arrived_of_a_body_counts(
    limit: str, status: int, body: bytes, outcome: SubmitOutcome, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit:
        monkeypatch.setattr(connection, limit, 0.1)

    answer = f"HTTP/1.1 {status} x\r\nContent-Length: 60000\r\n\r\n".encode() + body
    async with run_server(reply_and_hold(answer)) as peer, open_caller(peer.url) as caller, asyncio.timeout(20):
        assert (await caller.submit(seconds=60 if limit else 0.5)).outcome is outcome


@pytest.mark.parametrize(("read_seconds", "seconds"), [(0.1, 30), (30, 0.1)])
async def test_what_arrived_during_a_pause_of_the_process_counts(
    read_seconds: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "READ_SECONDS", read_seconds)

    async def reply_and_pause(connection: Connection) -> None:
        await connection.receive()
        os.write(connection.writer.get_extra_info("socket").fileno(), ACCEPTED_RESPONSE)
        time.sleep(0.3)  # to the event loop the same as a stopped process
        await connection.wait_closed()

    async with run_server(reply_and_pause) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit(seconds=seconds)).outcome is ACCEPTED


def list_sockets(url: str) -> list[str]:
    """Return the sockets of this process with the port of a URL."""
    port = f":{int(url.rpartition(':')[2]):04X} "
    inodes = {line.split()[9] for line in Path("/proc/net/tcp").read_text().splitlines() if port in line}
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.removeprefix("socket:[").removesuffix("]") in inodes]


async def read_nothing(_: Connection) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize(("write_seconds", "seconds"), [(0.1, 60), (30, 1)])
async def test_a_stalled_write_ends_the_connection_that_the_server_does_not_read(
    write_seconds: float, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", write_seconds)
    async with run_server(read_nothing) as peer, open_caller(peer.url) as caller:
        image = replace(LARGE, data=bytes(32 << 20))
        async with asyncio.timeout(20):
            assert (await caller.submit(image=image, seconds=seconds)).outcome is UNKNOWN
            while len(list_sockets(peer.url)) > 2:  # those of the listener and of the server's end
                await asyncio.sleep(0)
    assert peer.connections == 1


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_request_is_sent_whole_though_it_is_accepted_early(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def accept_early(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n--")
        await connection.send(ACCEPTED_RESPONSE)
        end = b""
        while not end.endswith(b"--\r\n") and (part := await connection.reader.read(65_536)):
            end = end[-4:] + part
        connection.server.requests.append((b"", end[-4:]))
        connection.server.request_received.set()

    trusted, context = create_certificate(tmp_path)
    monkeypatch.setattr(upstream, "default_tls", lambda: ssl.create_default_context(cafile=trusted))
    for megabytes in (5, 32):
        async with (
            run_server(accept_early, tls=context if scheme == "https" else None) as peer,
            open_caller(peer.url) as caller,
            asyncio.timeout(20),
        ):
            image = replace(LARGE, data=b"\n" * (megabytes * 1_000_000))
            assert (await caller.submit(image=image)).outcome is ACCEPTED
            await peer.request_received.wait()
            assert peer.requests == [(b"", b"--\r\n")]


async def test_response_head_counts_though_the_request_stalls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.1)

    async def begin_rejection(connection: Connection) -> None:
        await connection.reader.readuntil(b"\r\n\r\n")
        await connection.send(http_response(b"too large", 413)[:-3])
        await asyncio.Event().wait()

    async with run_server(begin_rejection) as peer, open_caller(peer.url) as caller, asyncio.timeout(20):
        assert (await caller.submit(image=replace(LARGE, data=bytes(32 << 20)), seconds=60)).outcome is REJECTED


@pytest.mark.parametrize(("where", "name"), [(connection.Connection, "abort"), (tracing, "record_status")])
async def test_faults_after_the_response_do_not_lose_the_task(
    where: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = Mock(side_effect=RuntimeError("a fault after the response"))
    async with (
        run_server(reply_with(ACCEPTED_RESPONSE)) as peer,
        UpstreamClient(peer.url, CIPHER, DEFAULT_CATALOGUE, on_call=fail, links=LINKS) as client,
    ):
        with monkeypatch.context() as patched, capture_logs():  # a traceback on the console is slow
            patched.setattr(where, name, fail)
            submitted = await client.submit(ACCOUNT, FaceEnhanceOptions(), IMAGE, timeout_seconds=10)
    assert (submitted.outcome, len(peer.requests)) == (ACCEPTED, 1)


async def test_submit_is_a_form_on_its_own_connection_and_checks_keep_theirs() -> None:
    replies = reply_with(vendor_response(err_code=0, task_id="t-1", status="Pending"))
    async with run_server(replies) as peer, open_caller(peer.url) as caller:
        for _ in range(2):
            assert (await caller.submit(options=UpscaleOptions())).outcome is ACCEPTED
            assert (await caller.check()).outcome is CheckOutcome.RUNNING
    assert peer.connections == 3
    (head, body), check = peer.requests[:2]
    assert head.startswith(b"POST /api/submit_task HTTP/1.1\r\n")
    assert b"content-type: multipart/form-data; boundary=" in head.lower()
    assert b"\r\nconnection: close\r\n" in head.lower()
    assert b'name="user_key"\r\n\r\n%s\r\n' % USER_KEY.encode() in body
    assert b'name="input_image"; filename="image.png"\r\nContent-Type: image/png\r\n\r\n%s\r\n' % IMAGE.data in body
    assert 'name="style_dropdown"\r\n\r\n通用风格\r\n'.encode() in body
    assert check[0].startswith(b"POST /api/check_task_status HTTP/1.1\r\n")
    assert check[1] == f"user_key={USER_KEY}&task_id=t-1".encode()


async def close_when_idle(connection: Connection) -> None:
    await reply_and_close(PENDING)(connection)


async def reset_second_request(connection: Connection) -> None:
    await reply_and_close(PENDING)(connection)
    await reset_after_request(connection)


async def send_more_when_idle(connection: Connection) -> None:
    await reply_and_close(PENDING)(connection)
    await asyncio.sleep(0)
    await connection.send(vendor_response(err_code=0, status="Failed"))
    await connection.wait_closed()


@pytest.mark.parametrize(
    ("serve", "results", "requests"),
    [
        (close_when_idle, [CheckOutcome.RUNNING] * 3, 3),
        (send_more_when_idle, [CheckOutcome.RUNNING] * 3, 3),
        (reset_second_request, [CheckOutcome.RUNNING, CheckOutcome.NO_RESPONSE, CheckOutcome.RUNNING], 3),
    ],
)
async def test_kept_connection_that_breaks(serve: Handler, results: list[CheckOutcome], requests: int) -> None:
    """A closed one is replaced; a check on one that breaks is not repeated."""
    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        for result in results:
            assert (await caller.check()).outcome is result
            for _ in range(50):
                await asyncio.sleep(0)
    assert len(peer.requests) == requests


@pytest.mark.parametrize("sent", [vendor_response(err_code=0, status="Failed"), b""], ids=["answer", "end"])
async def test_what_arrived_unread_on_a_kept_connection_is_no_response(sent: bytes) -> None:
    """Bytes and the end of a connection count as soon as they have arrived, not when the event loop reads them."""
    kept: list[Connection] = []

    async def serve(connection: Connection) -> None:
        kept.append(connection)
        await reply_with(PENDING)(connection)

    async with run_server(serve) as peer, open_caller(peer.url) as caller:
        assert (await caller.check("t-1")).outcome is CheckOutcome.RUNNING
        end = kept[0].writer.get_extra_info("socket")
        with socket.socket(fileno=os.dup(end.fileno())) as same:
            same.send(sent) if sent else same.shutdown(socket.SHUT_WR)
        assert (await caller.check("t-2")).outcome is CheckOutcome.RUNNING
    assert len(peer.requests) == peer.connections == 2


async def test_idle_connections_are_closed_after_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = asyncio.Event()

    async def serve(connection: Connection) -> None:
        await reply_and_hold(PENDING, disconnected=closed)(connection)

    monkeypatch.setattr(connection, "KEEP_ALIVE_SECONDS", 0.01)
    async with run_server(serve) as peer, open_caller(peer.url) as caller, asyncio.timeout(20):
        assert (await caller.check()).outcome is CheckOutcome.RUNNING
        await closed.wait()


async def test_links_are_relative_to_the_accounts_own_upstream() -> None:
    response = vendor_response(err_code=0, task_id="t", status="Completed", images_url="/files/1.png", grid_url="2.png")
    async with run_server(reply_with(response)) as peer, open_caller("http://127.0.0.1:1") as caller:
        account = make_account(f"{peer.url}/deep/")
        assert (await caller.submit(account=account)).outcome is ACCEPTED
        links = [artifact.url for artifact in (await caller.check(account=account)).artifacts]
    assert peer.requests[0][0].startswith(b"POST /deep/api/submit_face_enhance_task HTTP/1.1\r\n")
    assert links == [f"{peer.url}/files/1.png", f"{peer.url}/deep/api/2.png"]


async def test_account_whose_key_was_encrypted_with_a_lost_secret_sends_nothing() -> None:
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        account = Account(1, "main", b"encrypted by another")
        with capture_logs() as logs:
            assert (await caller.submit(account=account)).outcome is SubmitOutcome.MISCONFIGURED
            assert (await caller.check(account=account)).outcome is CheckOutcome.NO_RESPONSE
    assert peer.connections == 0
    assert [log["log_level"] for log in logs] == ["error", "error"]


async def test_unusable_links_are_logged_once_per_task_and_field() -> None:
    first = vendor_response(err_code=0, status="Completed", images_url="ftp://secret/y", vector_url={"a": 1})
    with capture_logs() as logs:
        async with run_server(reply_with(first)) as peer, open_caller(peer.url) as caller:
            for upstream_id in ("t-1", "t-1", "t-2"):
                assert (await caller.check(upstream_id)).outcome is CheckOutcome.INVALID
    assert [log["field"] for log in logs if log["event"] == "artifact.invalid_link"] == ["images_url", "vector_url"] * 2
    assert "secret" not in str(logs)


KEY_SPELLINGS = [
    *(USER_KEY, USER_KEY.upper(), "".join(f"%{octet:02x}" for octet in USER_KEY.encode())),
    *(USER_KEY.replace("-", "%252D"), USER_KEY.encode().hex(), b64encode(USER_KEY.encode()).decode()),
]


@pytest.mark.parametrize("spelling", KEY_SPELLINGS)
@pytest.mark.parametrize("before", ["", "x" * 490, " " * 1_990])
async def test_key_stays_secret(spelling: str, before: str, caplog: pytest.LogCaptureFixture) -> None:
    """A message is cut only once the key is removed: at 500 characters, and at 2,000 with its spaces."""
    caplog.set_level(logging.DEBUG)
    answer = {"err_msg": f"bad {before} {spelling} !", "images_url": f"/{spelling}.png", "grid_url": f"/?k={spelling}"}
    text: list[object] = []
    with capture_logs() as logs:
        for fields in ({"err_code": 1}, {"err_code": 0, "status": "Failed"}, {"err_code": 0, "status": "Completed"}):
            async with (
                run_server(reply_with(vendor_response(**answer, **fields))) as peer,
                open_caller(peer.url) as caller,
            ):
                text += [await caller.submit(), await caller.check(), vars(caller.client), logs, caplog.text]
                assert len(peer.requests) == 2
    assert spelling[:5] not in repr(text)


async def test_slow_connect_ends_at_the_deadline_or_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    with unreachable_address() as url:
        async with open_caller(url) as caller, asyncio.timeout(20):
            assert (await caller.submit(seconds=0.1)).outcome is NOT_SENT
            monkeypatch.setattr(connection, "CONNECT_SECONDS", 0.1)
            assert (await caller.submit(seconds=60)).outcome is NOT_SENT


async def test_next_address_is_tried_beside_one_that_does_not_respond(monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        with unreachable_address("127.0.0.2", int(peer.url.rpartition(":")[2])):

            async def start_at_dead_address(addresses: Any, **options: Any) -> Any:
                (*kind, (_, port)) = addresses[0]
                return await start_connection([(*kind, ("127.0.0.2", port)), *addresses], **options)

            monkeypatch.setattr(connection, "start_connection", start_at_dead_address)
            assert (await caller.submit(seconds=60)).outcome is ACCEPTED
    assert peer.connections == 1


async def test_nothing_is_sent_over_a_connection_that_took_longer_than_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def start_and_pause(*arguments: Any, **options: Any) -> Any:
        connected = await start_connection(*arguments, **options)
        time.sleep(0.3)  # to the event loop the same as a stopped process
        return connected

    monkeypatch.setattr(connection, "start_connection", start_and_pause)
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit(seconds=0.2)).outcome is NOT_SENT
    assert peer.requests == []


async def test_submit_cancelled_at_any_moment_leaves_no_connection() -> None:
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        for steps in range(20):
            task = asyncio.create_task(caller.submit(image=LARGE))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
        async with asyncio.timeout(20):
            while len(list_sockets(peer.url)) > 1:  # that of the listener
                await asyncio.sleep(0)
        assert (await caller.submit(image=LARGE)).outcome is ACCEPTED


async def test_submit_that_waits_for_a_slot_beyond_its_deadline_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REQUESTS", 1)
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller:
        first = asyncio.create_task(caller.submit(seconds=60))
        await peer.request_received.wait()
        assert (await caller.submit(seconds=0.1)).outcome is NOT_SENT
        checking = asyncio.create_task(caller.check())  # has slots of its own
        while len(peer.requests) < 2:
            await asyncio.sleep(0)
        late = asyncio.create_task(caller.submit(seconds=0.05))
        await asyncio.sleep(0)
        time.sleep(0.2)  # to the event loop the same as a stopped process
        first.cancel()
        assert (await late).outcome is NOT_SENT
        checking.cancel()
    assert len(peer.requests) == 2


async def test_cancelled_submit_releases_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_REQUESTS", 1)
    async with run_server(never_reply) as peer, open_caller(peer.url) as caller:
        head, waiting = asyncio.create_task(caller.submit()), asyncio.create_task(caller.submit())
        await peer.request_received.wait()
        for task in (waiting, head):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        peer.request_received.clear()
        last = asyncio.create_task(caller.submit())
        await peer.request_received.wait()
        last.cancel()
        await asyncio.wait({last})
        assert caller.observations == [(UpstreamOperation.SUBMIT, UNKNOWN)] * 3


async def test_breaker_stops_submits_and_checks_of_an_unreachable_upstream() -> None:
    port = reserve_port()
    async with open_caller(f"http://127.0.0.1:{port}") as caller:
        for _ in range(BREAKER_THRESHOLD):
            await caller.submit()
        async with (
            run_server(reply_with(ACCEPTED_RESPONSE), port=port) as peer,
            run_server(reply_with(ACCEPTED_RESPONSE)) as other,
        ):
            assert (await caller.submit()).outcome is NOT_SENT
            assert (await caller.check()).outcome is CheckOutcome.NO_RESPONSE
            assert peer.connections == 0
            assert (await caller.submit(account=make_account(other.url))).outcome is ACCEPTED


async def test_a_connected_trial_admits_others_before_its_response(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_SECONDS", 0.0)
    port, pending = reserve_port(), list[asyncio.Task[SubmitResult]]()
    async with open_caller(f"http://127.0.0.1:{port}") as caller:
        for _ in range(BREAKER_THRESHOLD):
            assert (await caller.submit()).outcome is NOT_SENT
        async with run_server(never_reply, port=port) as peer:
            for count in (1, 2):
                peer.request_received.clear()
                pending.append(asyncio.create_task(caller.submit()))
                await peer.request_received.wait()
                assert len(peer.requests) == count
        assert [(await submit).outcome for submit in pending] == [UNKNOWN] * 2


async def test_lost_responses_and_short_deadlines_do_not_open_the_breaker() -> None:
    async with run_server(reset_after_request) as peer, open_caller(peer.url) as caller:
        for _ in range(2 * BREAKER_THRESHOLD):
            assert (await caller.submit()).outcome is UNKNOWN
    with unreachable_address() as url:
        async with open_caller(url) as caller:
            for _ in range(2 * BREAKER_THRESHOLD):
                await caller.submit(seconds=0.01)
            trying = asyncio.create_task(caller.submit())
            assert not (await asyncio.wait({trying}, timeout=0.1))[0]
            trying.cancel()


async def test_local_error_is_unknown_only_after_sending_began(monkeypatch: pytest.MonkeyPatch) -> None:
    fail = Mock(side_effect=OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)))
    async with run_server(reply_with(ACCEPTED_RESPONSE)) as peer, open_caller(peer.url) as caller:
        assert (await caller.submit(seconds=0)).outcome is NOT_SENT
        assert peer.connections == 0
        monkeypatch.setattr(connection.Connection, "send", fail)
        assert (await caller.submit()).outcome is UNKNOWN
