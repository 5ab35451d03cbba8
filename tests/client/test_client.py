"""The client for callers, blocking and for asyncio, against a real gateway and scripted servers."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from datetime import UTC, datetime
from email.utils import formatdate
from io import BytesIO
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints
from urllib.parse import urlsplit

import httpx2
import pytest

from service.api import schemas
from service.client import (
    AsyncGatewayClient,
    ConnectionLost,
    Forbidden,
    GatewayClient,
    GatewayError,
    GatewayUnavailable,
    ImageUnreachable,
    InvalidRequest,
    InvalidWebhook,
    NoConnection,
    NoResult,
    NotConfigured,
    NotFound,
    QuotaExceeded,
    SubmissionInFlight,
    SubmissionUnknown,
    Task,
    TaskFailed,
    TaskOptions,
    Unauthenticated,
    UnexpectedResponse,
    UpstreamRejected,
    WaitTimeout,
    calls,
    may_be_served,
    models,
    verify_webhook,
)
from service.client.calls import Request, Retries
from service.client.errors import parse_retry_after
from service.domain.tasks import OPTIONS
from service.usecases.ports import SubmitOutcome
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import RunningGateway, run_real_gateway
from tests.behaviour.webhook_receiver import make_secret, run_receiver
from tests.contract.scripted_server import (
    Connection,
    file_response,
    http_response,
    reply_and_close,
    response_head,
    run_server,
)
from tests.support.images import make_png
from tests.support.proxy import Proxy
from tests.support.valkey import Valkey

Invoke: TypeAlias = Callable[..., Coroutine[Any, Any, Any]]
"""Calls a method of a client by its name."""
IMAGE = make_png()
SVG = b'\xef\xbb\xbf<?xml version="1.0"?><svg/>'


@pytest.fixture
async def gateway(valkey: Valkey) -> AsyncIterator[RunningGateway]:
    async with run_real_gateway(valkey, GATEWAY_POLL_SECONDS="0.05") as running, running.services.run_jobs():
        yield running


def connect(url: str, token: str = "token", *, is_async: bool = False, **options: Any) -> Invoke:
    async def call(method: str, /, *arguments: Any, **named: Any) -> Any:
        if is_async:
            async with AsyncGatewayClient(url, token, **options) as client:
                return await getattr(client, method)(*arguments, **named)
        # In a thread, since this event loop serves the gateway.
        with GatewayClient(url, token, **options) as blocking:
            return await asyncio.to_thread(getattr(blocking, method), *arguments, **named)

    return call


@pytest.fixture(params=[False, True], ids=["blocking", "async"])
def is_async(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "_FIRST_BACKOFF_SECONDS", 0.01)


@pytest.mark.smoke
async def test_first_task(
    gateway: RunningGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_async: bool
) -> None:
    (tmp_path / "photo.png").write_bytes(IMAGE)
    monkeypatch.setenv("GATEWAY_URL", f"{gateway.url}/")
    (tmp_path / "token").write_text(f"{gateway.token}\n")
    monkeypatch.setenv("GATEWAY_TOKEN_FILE", str(tmp_path / "token"))
    call = connect("", "", is_async=is_async)
    metadata = {"order": "47:11"}
    task = await call("submit", "upscale", tmp_path / "photo.png", scale=2, vector=True, metadata=metadata)
    states: list[str] = []
    ended = await call("wait", task, on_update=lambda seen: states.append(seen.state))
    assert (states[-1], ended.metadata, ended.options["vector"]) == ("succeeded", metadata, True)
    saved = await call("download", ended, tmp_path / "result.png")
    assert (saved.path.read_bytes()[:4], saved.size) == (b"\x89PNG", saved.path.stat().st_size)
    assert (await call("download", ended, tmp_path / "vector", name="vector")).media_type == "image/svg+xml"
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "token", "result.png", "vector"}
    assert (await call("fetch_artifact", ended.find_artifact())).content == saved.path.read_bytes()

    assert await call("get_task", task.id) == ended
    more = [await call("submit", "seamless", image, fit=0.3) for image in (IMAGE, BytesIO(IMAGE))]
    monkeypatch.setattr(calls, "_MAX_PAGE_SIZE", 1)
    newest = [more[1].id, more[0].id, task.id]
    assert [item.id for item in await call("list_tasks", limit=None)] == newest
    assert [item.id for item in await call("list_tasks", limit=2)] == newest[:2]
    assert [item.id for item in await call("list_tasks", kind="upscale", state="succeeded")] == [task.id]
    assert (await call("get_quota")).account.can_pay
    usage = await call("get_usage", interval="total", group_by="none")
    assert (usage.total.charged.tasks, usage.items[0].kind) == (3, None)
    assert (await call("get_usage_csv", from_=str(usage.last))).startswith("period,kind,")


async def test_lost_response_is_paid_for_once(gateway: RunningGateway, *, is_async: bool) -> None:
    """The answer to a submission is torn; the repetition returns its task, and so does a later call with its key."""
    proxy = Proxy(urlsplit(gateway.url).port or 0)
    async with proxy.serve():
        call = connect(f"http://127.0.0.1:{proxy.port}", gateway.token, is_async=is_async)
        losing = asyncio.create_task(proxy.lose_answers(3_600))
        submitting = asyncio.create_task(call("submit", "face-enhance", IMAGE))
        await wait_until(lambda: proxy.resets > 0)
        losing.cancel()
        task = await submitting
        again = await call("submit", "face-enhance", IMAGE, idempotency_key=task.idempotency_key)
    assert (task.is_replayed, again.is_replayed, again.id) == (True, True, task.id)
    assert await gateway.upstream.count_submits() == 1


async def test_keys_are_random_or_given(gateway: RunningGateway) -> None:
    call = connect(gateway.url, gateway.token)
    first, other = [await call("submit", "face-enhance", IMAGE) for _ in range(2)]
    assert not {first.is_replayed, other.is_replayed} - {False}
    assert first.id != other.id
    key = r'order "1" \ 2'
    given, again = [await call("submit", "face-enhance", IMAGE, idempotency_key=key) for _ in range(2)]
    assert (given.id, given.is_replayed, again.is_replayed, again.idempotency_key) == (again.id, False, True, key)
    with pytest.raises(InvalidRequest) as reused:
        await call("submit", "seamless", IMAGE, idempotency_key=key)
    assert (reused.value.code, reused.value.idempotency_key) == ("idempotency-key-reused", key)
    with pytest.raises(ValueError, match="255"):
        await call("submit", "seamless", IMAGE, idempotency_key="\n")


async def test_unknown_outcome_is_never_sent_again(gateway: RunningGateway) -> None:
    call = connect(gateway.url, gateway.token)
    await gateway.upstream.lose_next_response()
    with pytest.raises(SubmissionUnknown):
        await call("submit", "face-enhance", IMAGE, idempotency_key="order-1")
    with pytest.raises(SubmissionUnknown) as unknown:
        await call("submit", "face-enhance", IMAGE, idempotency_key="order-1")
    assert unknown.value.idempotency_key == "order-1"
    assert (await call("get_submission", unknown.value.problem.submission_id)).outcome == "unknown"
    assert await gateway.upstream.count_submits() == 1


async def test_image_by_url(gateway: RunningGateway, *, is_async: bool) -> None:
    call = connect(gateway.url, gateway.token, is_async=is_async)
    async with run_server(reply_and_close(file_response())) as images:
        await gateway.put_tenant(allow_image_url=[f"127.0.0.0/8:{urlsplit(images.url).port}"])
        arguments = {"image_url": images.url, "scale": 3, "vector": True, "metadata": {"a": "1"}}
        task = await call("submit", "upscale", **arguments)
        assert (task.options["scale"], task.options["vector"], task.metadata) == (3, True, {"a": "1"})
    assert (await call("submit", "upscale", **arguments, idempotency_key=task.idempotency_key)).id == task.id
    with pytest.raises(ImageUnreachable) as unreachable:
        await call("submit", "upscale", **arguments)
    assert unreachable.value.problem.reason == "no-connection"
    for both in ({}, {"image": IMAGE, "image_url": images.url}):
        with pytest.raises(ValueError, match="image_url"):
            await call("submit", "upscale", **both)


async def test_problems_are_typed(gateway: RunningGateway) -> None:
    call = connect(gateway.url, gateway.token, retry_seconds=0)
    with pytest.raises(InvalidRequest) as invalid:
        await call("submit", "upscale", IMAGE, scale=9)
    assert [error.field for error in invalid.value.problem.errors] == ["scale"]
    assert invalid.value.problem.instance
    with pytest.raises(InvalidRequest):
        await call("submit", "upscale", b"no image")
    for task_id in ("task_1", "..", "", "a/b"):
        with pytest.raises(NotFound):
            await call("get_task", task_id)
    with pytest.raises(Unauthenticated):
        await connect(gateway.url, "igw_unknown")("get_quota")
    await gateway.upstream.refuse_next(SubmitOutcome.REJECTED, "图片过大")
    with pytest.raises(UpstreamRejected) as rejected:
        await call("submit", "upscale", IMAGE)
    assert rejected.value.problem.upstream_reason == "图片过大"
    await gateway.upstream.fail_next_task()
    failing = await call("submit", "upscale", IMAGE)
    with pytest.raises(TaskFailed) as failed:
        await call("wait", failing.id)
    with pytest.raises(TaskFailed):
        await call("download", failed.value.task, "/nowhere/x")
    await gateway.put_tenant(limits=[{"window": "day", "tasks": 0}])
    with pytest.raises(QuotaExceeded) as denied:
        await connect(gateway.url, gateway.token)("submit", "upscale", IMAGE)  # tomorrow is too late
    assert [item.policy for item in denied.value.problem.violated_policies] == ["day-tasks"]
    assert (denied.value.retry_after or 0) > 3_600
    await gateway.put_tenant(state="read-only")
    with pytest.raises(Forbidden):
        await call("submit", "upscale", IMAGE)


async def test_wait_ends_in_time(gateway: RunningGateway, tmp_path: Path, *, is_async: bool) -> None:
    call = connect(gateway.url, gateway.token, is_async=is_async)
    await gateway.upstream.keep_running()
    task = await call("submit", "upscale", IMAGE)
    with pytest.raises(WaitTimeout) as late:
        await call("wait", task, timeout_seconds=0)
    assert late.value.task.id == task.id
    with pytest.raises(NoResult):
        await call("download", late.value.task, tmp_path / "x")


def test_unusable_addresses_and_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calls, "_MAX_CONNECT_ATTEMPTS", 2)
    for name in ("GATEWAY_URL", "GATEWAY_TOKEN", "GATEWAY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    cases = (("", "t"), ("http://a", ""), ("http://a:b", "t"), ("ftp://a", "t"), ("a", "t"), ("http://a", "ü\n"))
    for url, token in cases:
        with pytest.raises(NotConfigured):
            GatewayClient(url, token).get_quota()
    with pytest.raises(NoConnection, match=r"http://127\.0\.0\.1:1:"):
        GatewayClient("http://127.0.0.1:1", "t").get_quota()
    for url, token in (("http://a", "igw_secret\x00"), ("http://a", "igw secret"), ("http://u:secret@a", "t")):
        with pytest.raises(NotConfigured) as refused:
            GatewayClient(url, token)
        assert "secret" not in str(refused.value)
    quoted = httpx2.LocalProtocolError("Illegal header value b'Bearer secret'")
    asking = calls.get_quota(Retries("http://a", 0))
    asking.send(None)
    with pytest.raises(NotConfigured) as refused:
        asking.send(quoted)
    assert "secret" not in str(refused.value)
    monkeypatch.setenv("GATEWAY_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(NotConfigured, match="GATEWAY_TOKEN_FILE"):
        GatewayClient("http://a")


def problem(status: int, code: str, **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"title": "T", "detail": "d", "code": code}, headers=headers)


PAGE = httpx2.Response(200, content=b"<html>")
TORN = httpx2.ReadError("torn")


@pytest.mark.parametrize(
    ("outcomes", "pauses", "error"),
    [
        ([TORN, problem(409, "idempotency-in-flight", **{"Retry-After": "2"}), TORN], [0, 2, 0], None),
        ([problem(503, "overloaded", **{"Retry-After": "7"}), problem(500, "internal-error")], [7, 0], None),
        ([problem(429, "rate-limited", **{"Retry-After": "59"}), problem(429, "too-many-active-tasks")], [59, 0], None),
        ([httpx2.Response(502), httpx2.Response(504, content=b"<html>")], [0, 0], None),  # of a proxy
        ([httpx2.ConnectError("no")] * 5, [0] * 4, NoConnection),
        ([problem(429, "quota-exceeded", **{"Retry-After": "86400"})], [], QuotaExceeded),
        ([problem(429, "quota-exceeded")], [], QuotaExceeded),
        ([TORN, problem(504, "submission-unknown")], [0], SubmissionUnknown),
        ([problem(502, "upstream-rejected")], [], UpstreamRejected),
        ([problem(409, "idempotency-in-flight", **{"Retry-After": "100"})], [], SubmissionInFlight),
        ([problem(402, "balance-exhausted", **{"Retry-After": "1"})], [], GatewayError),
        ([problem(503, "account-misconfigured")], [], GatewayError),
        ([httpx2.Response(302, headers={"Location": "http://elsewhere"})], [], UnexpectedResponse),
    ],
)
def test_repeated_outcomes(outcomes: list[Any], pauses: list[int], error: type[Exception] | None) -> None:
    """What passes is repeated after its `Retry-After`, at most for the time allowed; nothing else is."""
    exchange = Retries("http://gateway", 60).exchange(lambda: Request("GET", "/"))
    seen: list[float] = []

    def run() -> httpx2.Response:
        assert isinstance(exchange.send(None), Request)
        for outcome in [*outcomes, PAGE]:
            step = exchange.send(outcome)
            assert isinstance(step, float)
            seen.append(step)
            exchange.send(None)
        raise AssertionError

    with pytest.raises(error or StopIteration) as end:
        run()
    assert [int(pause) for pause in seen] == pauses
    assert isinstance(end.value, StopIteration) == (error is None)


@pytest.mark.parametrize(
    ("outcomes", "error", "may_count"),
    [
        ([TORN, *[httpx2.ConnectError("no")] * 4], ConnectionLost, True),
        ([TORN, problem(503, "overloaded", **{"Retry-After": "99"})], ConnectionLost, True),
        ([httpx2.Response(504), problem(401, "unauthenticated")], ConnectionLost, True),
        ([TORN, problem(502, "upstream-rejected")], UpstreamRejected, False),
        ([TORN, problem(422, "invalid-options")], InvalidRequest, False),
        ([httpx2.ConnectError("no")] * 5, NoConnection, False),
        ([problem(503, "overloaded", **{"Retry-After": "99"})], GatewayUnavailable, False),
        ([httpx2.Response(413)], UnexpectedResponse, False),
        ([httpx2.Response(201, content=b'{"id"')], UnexpectedResponse, True),
        ([httpx2.Response(201, content=b'{"id": "task_1"}'), problem(404, "not-found")], UnexpectedResponse, True),
    ],
)
def test_submission_that_may_have_been_charged(outcomes: list[Any], error: type[Exception], *, may_count: bool) -> None:
    """What happened to an attempt is not forgotten when the next one is refused."""
    submitting = calls.Upload.build("upscale", IMAGE, {}, None, None, None).submit(Retries("http://gateway", 60))

    def run() -> None:
        step = submitting.send(None)
        for outcome in outcomes:
            step = submitting.send(outcome)
            if not isinstance(step, Request):
                submitting.send(None)

    with pytest.raises(error) as end:
        run()
    assert may_be_served(end.value) == may_count


def test_retry_after() -> None:
    """In seconds or as a date."""
    tomorrow = formatdate(time.time() + 86_400, usegmt=True)
    cases = (("3", 3, 3), ("0", 0, 0), (tomorrow, 80_000, 86_400))
    for value, least, most in cases:
        assert least <= (parse_retry_after(value) or 0) <= most
    assert [parse_retry_after(value) for value in (None, "soon")] == [None, None]


async def test_wait_pauses_where_the_gateway_does_not() -> None:
    """At least for a moment, else as long as `Retry-After` or a second."""
    task = b'{"id": "t", "kind": "upscale", "state": "queued", "created_at": "2026-01-31T12:00:00Z",'
    body = task + b'"updated_at": "2026-01-31T12:00:00Z"}'
    for headers, pause in (({"Retry-After": "3"}, 3), ({"Retry-After": "0"}, 0.1), ({}, 1)):
        waiting = calls.wait_for_task(Retries("", 0), "t", None, None)
        assert isinstance(waiting.send(None), Request)
        assert waiting.send(httpx2.Response(200, content=body, headers=headers)) == pause
        assert isinstance(waiting.send(None), Request)
        applied = {"Preference-Applied": "wait=30"}
        assert isinstance(waiting.send(httpx2.Response(200, content=body, headers=applied)), Request)


async def test_accepted_task_of_which_only_the_id_came() -> None:
    """A task that was paid for is not lost with the rest of its response."""
    submitting = calls.Upload.build("upscale", IMAGE, {}, None, None, None).submit(Retries("", 0))
    submitting.send(None)
    reading = submitting.send(httpx2.Response(201, content=b'{"id": "task_1", "links": {}}'))
    assert isinstance(reading, Request)
    assert (reading.method, reading.path) == ("GET", "/v1/tasks/task_1")


def test_task_whose_kind_or_id_is_no_part_of_a_file_name() -> None:
    """`download` names files after them, and prints them."""
    at = "2026-01-31T12:00:00Z"
    task = {"id": "task_1", "kind": "upscale", "state": "queued", "created_at": at, "updated_at": at}
    for change in ({}, {"kind": "../../x"}, {"kind": "/x"}, {"id": "task_../x"}, {"id": "\x1b[2J"}, {"id": "a\n"}):
        reading = calls.get_task(Retries("", 0), "task_1")
        reading.send(None)
        with pytest.raises(UnexpectedResponse if change else StopIteration):
            reading.send(httpx2.Response(200, json=task | change))


def make_task(name: str = "image") -> Task:
    artifacts, at = (models.Artifact(name, "/result"),), datetime.now(UTC)
    return Task(id="t", kind="upscale", state="succeeded", created_at=at, updated_at=at, artifacts=artifacts)


@pytest.mark.parametrize("received", [len(IMAGE) // 2, len(IMAGE)])
async def test_broken_download_is_resumed(tmp_path: Path, received: int, *, is_async: bool) -> None:
    """Also if only the end of a chunked response was lost."""
    whole = IMAGE

    async def serve(connection: Connection) -> None:
        head = (await connection.receive()).lower()
        if "if-range:" in head:
            assert f"range: bytes={received - 1}-" in head
            assert 'if-range: "v1"' in head
            content_range = f"bytes {received - 1}-{len(whole) - 1}/{len(whole)}"
            rest = whole[received - 1 :]
            await connection.send(response_head(206, Content_Range=content_range, Content_Length=str(len(rest))) + rest)
        else:
            chunk = b"%x\r\n%s\r\n" % (received, whole[:received])
            await connection.send(response_head(ETag='"v1"', Transfer_Encoding="chunked") + chunk)

    async with run_server(serve) as server:
        saved = await connect(server.url, is_async=is_async, retry_seconds=1)(
            "download", make_task(), tmp_path / "out.png"
        )
    assert saved.path.read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


@pytest.mark.parametrize("received", [0, 10])
async def test_part_is_no_result(received: int, tmp_path: Path) -> None:
    """A server may send less of the rest than was requested, or a part without being asked."""
    start = max(received - 1, 0)
    part = f"bytes {start}-19/{len(IMAGE)}"

    async def serve(connection: Connection) -> None:
        if b"range:" in (await connection.receive()).lower().encode() or not received:
            await connection.send(
                response_head(206, Content_Range=part, Content_Length=str(20 - start)) + IMAGE[start:20]
            )
        else:
            await connection.send(response_head(ETag='"v1"', Content_Length=str(len(IMAGE))) + IMAGE[:received])

    async with run_server(serve) as server:
        with pytest.raises(UnexpectedResponse, match=f"20 of {len(IMAGE)}"):
            await connect(server.url, retry_seconds=1)("download", make_task(), tmp_path / "out.png")
    assert not list(tmp_path.iterdir())


async def test_download_replaces_neither_devices_nor_links(tmp_path: Path, *, is_async: bool) -> None:
    """Root could replace `/dev/null` for the whole machine."""

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(response_head(Content_Length=str(len(IMAGE))) + IMAGE)

    pipe, link, linked = (tmp_path / name for name in ("pipe", "link", "linked.png"))
    os.mkfifo(pipe)
    link.symlink_to(linked)
    async with run_server(serve) as server:
        call = connect(server.url, is_async=is_async)
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        assert (await call("download", make_task(), pipe)).path == pipe
        await call("download", make_task(), link)
    assert os.read(reading, len(IMAGE) + 1) == IMAGE == linked.read_bytes()
    os.close(reading)
    assert (pipe.is_fifo(), link.is_symlink()) == (True, True)
    assert {path.name for path in tmp_path.iterdir()} == {"pipe", "link", "linked.png"}


@pytest.mark.parametrize(
    ("name", "media_type", "body"),
    [
        ("image", "text/html", b"<html>log in</html>"),
        ("image", "image/png", b"<html>log in</html>"),
        ("image", "image/png", b""),
        ("image", "image/svg+xml", SVG),
        ("vector", "image/png", IMAGE),
        ("vector", "image/svg+xml", b"{}"),
    ],
)
async def test_other_content_is_no_result(tmp_path: Path, name: str, media_type: str, body: bytes) -> None:
    """What a file held before stays."""

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await connection.send(http_response(body, Content_Type=media_type))

    (tmp_path / "out.png").write_bytes(b"before")
    async with run_server(serve) as server:
        with pytest.raises(UnexpectedResponse):
            await connect(server.url)("download", make_task(name), tmp_path / "out.png")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out.png", b"before")]


async def test_webhooks_are_verified(gateway: RunningGateway) -> None:
    secret = make_secret()
    async with run_receiver() as receiver:
        webhook = {"url": receiver.url, "secret": secret, "allow": [receiver.network]}
        await gateway.put_tenant(webhook=webhook)
        task = await connect(gateway.url, gateway.token)("submit", "seamless", IMAGE)
        await wait_until(lambda: bool(receiver.requests))
    (received,) = receiver.requests
    now = float(received.headers["webhook-timestamp"])
    named = {name.title(): value for name, value in received.headers.items()}
    event = verify_webhook(received.body, named, [make_secret(b"x"), secret], now=now + 299)
    assert (event.type, event.id, event.task.id) == ("task.succeeded", received.headers["webhook-id"], task.id)
    unsigned = received.headers | {"webhook-signature": "v1, v1a,x v2,y"}
    for body, headers, secrets, at in (
        (received.body + b" ", received.headers, secret, now),
        (received.body, received.headers | {"webhook-id": "msg_other"}, secret, now),
        (received.body, unsigned, secret, now),
        (received.body, {}, secret, now),
        (received.body, received.headers, make_secret(b"x"), now),
        (received.body, received.headers, secret, now + 301),
        (received.body, received.headers, secret, now - 301),
        (received.body, received.headers | {"webhook-timestamp": "9" * 400}, secret, now),
        (received.body, received.headers | {"webhook-signature": "v1,\udce9"}, secret, now),
        (received.body, received.headers | {"webhook-id": "\udce9"}, secret, now),
    ):
        with pytest.raises(InvalidWebhook):
            verify_webhook(body, headers, secrets, now=at)
    with pytest.raises(ValueError, match="whsec_"):
        verify_webhook(received.body, received.headers, "whsec_", now=now)


def test_options_are_those_of_the_api() -> None:
    declared = {name: kind for cls in OPTIONS.values() for name, kind in get_type_hints(cls).items() if name != "kind"}
    assert get_type_hints(TaskOptions) == declared


@pytest.mark.parametrize("name", ["Task", "Quota", "Policy", "Submission", "Usage", "UsageRow", "UsageSum", "Cost"])
def test_models_have_the_fields_of_the_api(name: str) -> None:
    ours, theirs = getattr(models, name), getattr(schemas, name)
    assert set(theirs.__struct_encode_fields__) - {"links"} == set(ours.__struct_encode_fields__)
