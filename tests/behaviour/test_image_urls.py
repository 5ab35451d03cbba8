"""Submissions whose image is at an `image_url`, or within it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pytest
from httpx2 import Response
from structlog.testing import capture_logs

from service.domain.errors import Overloaded
from tests.behaviour.clients import wait_until
from tests.behaviour.gateway_fixture import MAX_BYTES, RunningGateway, reject_store_calls
from tests.behaviour.requests import (
    KEY,
    UNREACHABLE_POLICIES,
    assert_nothing_happened,
    expect_created,
    expect_invalid,
    expect_problem,
    expect_replayed,
    make_jpeg,
    read_counts,
    submit_with_key,
)
from tests.contract.scripted_server import Connection, ScriptedServer, file_response, run_server
from tests.support.images import make_png, png_claiming_size
from tests.support.valkey import Valkey

DATA_URL = "data:image/png;base64," + base64.b64encode(make_png()).decode()
PATH = "/v1/tasks/seamless"


@dataclass
class ImageServer:
    """Sends `content`, or 404 without any; it does not respond while it is not `may_respond`."""

    server: ScriptedServer
    may_respond: asyncio.Event
    disconnected: asyncio.Event
    content: bytes | None = make_jpeg()

    @property
    def network(self) -> str:
        return f"127.0.0.0/8:{urlsplit(self.server.url).port}"

    @property
    def url(self) -> str:
        return f"{self.server.url}/a.jpg?signature=hush"

    @property
    def request_count(self) -> int:
        return len(self.server.requests)


@asynccontextmanager
async def run_image_server() -> AsyncIterator[ImageServer]:
    started: list[ImageServer] = []

    async def serve(connection: Connection) -> None:
        images = started[0]
        await connection.receive()
        if images.may_respond.is_set():
            await connection.send(file_response(images.content or b"", 200 if images.content else 404))
        else:
            await connection.wait_closed()
            images.disconnected.set()

    async with run_server(serve) as server:
        started.append(ImageServer(server, asyncio.Event(), asyncio.Event()))
        started[0].may_respond.set()
        yield started[0]


@pytest.fixture
async def images(gateway: RunningGateway) -> AsyncIterator[ImageServer]:
    """Run a server of images, which is allowed to the tenant `shop`."""
    async with run_image_server() as server:
        await gateway.upstream.set_balance(100, 0)
        await gateway.put_tenant(**UNREACHABLE_POLICIES, allow_image_url=[server.network])
        yield server


async def post(
    gateway: RunningGateway, path: str = PATH, key: str | None = None, token: str | None = None, **fields: Any
) -> Response:
    """Submit a JSON body."""
    headers = {"Idempotency-Key": key} if key else {}
    return await gateway.call("POST", path, json=fields, headers=headers, token=token)


@pytest.mark.smoke
async def test_image_by_url_in_every_encoding_of_the_request(gateway: RunningGateway, images: ImageServer) -> None:
    url = images.url
    text = {"fit": "0.6", "metadata": '{"a": "1"}'}
    parts = [(name, (None, value)) for name, value in (text | {"image_url": url}).items()]
    responses = [
        await post(gateway, image_url=url, fit=0.6, metadata={"a": "1"}),
        await gateway.call("POST", PATH, data=text | {"image_url": url}),
        await gateway.call("POST", PATH, files=parts),
        # As browsers send a form whose file was not chosen.
        await gateway.call("POST", PATH, data=text | {"image_url": url}, files={"image": ("", b"")}),
        await post(gateway, image_url=DATA_URL, fit=0.6, metadata={"a": "1"}),
        await gateway.call("POST", PATH, data=text | {"image_url": DATA_URL}),
        await gateway.call("POST", PATH, data=text, files={"image": make_png(), "image_url": (None, "")}),
    ]
    tasks = [expect_created(response) for response in responses]
    assert all((task["options"], task["metadata"]) == ({"fit": 0.6}, {"a": "1"}) for task in tasks)
    assert images.request_count == 4
    ended = await gateway.wait_for_task(tasks[0]["id"])
    assert ended["state"] == "succeeded"
    assert await gateway.upstream.count_submits() == 7


async def test_options_of_json_have_types(gateway: RunningGateway, valkey: Valkey) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    path = "/v1/tasks/upscale"
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"scale": "2"}, ["scale"]),
        ({"scale": None, "vector": 1, "steps": 20.5}, ["scale", "vector", "steps"]),
        ({"prompt": ["a"], "model": ""}, ["prompt", "model"]),
        ({"sclae": 2}, ["sclae"]),
        ({"image": "AAAA"}, ["image"]),
        ({"metadata": '{"a": "1"}'}, ["metadata"]),
        ({"metadata": {"a": 1}}, ["metadata"]),
        ({"metadata": {"a": "x" * 3_000}}, ["metadata"]),
        ({"metadata": None}, ["metadata"]),
        ({"webhook_url": None}, ["webhook_url"]),
        ({"webhook_url": "http://127.0.0.1/"}, ["webhook_url"]),
    ]
    for refused, invalid in cases:
        expect_invalid(await post(gateway, path, image_url=DATA_URL, **refused), *invalid)
    for body in (b"", b"[]", b"{", b'{"image_url": "a", "image_url": "b"}', b"null"):
        headers = {"Content-Type": "application/json; charset=utf-8"}
        response = await gateway.call("POST", path, content=body, headers=headers)
        expect_problem(response, 400, "malformed-request")
    await assert_nothing_happened(gateway, valkey)
    fields: dict[str, Any] = {"scale": 3, "steps": 20, "vector": True, "model": "通用模型", "prompt": ""}
    task = expect_created(await post(gateway, path, image_url=DATA_URL, **fields))
    assert task["options"] | fields | {"model": "general"} == task["options"]


async def test_exactly_one_of_image_and_url(gateway: RunningGateway, images: ImageServer, valkey: Valkey) -> None:
    for fields in ({"image_url": ""}, {"fit": "0.5"}):
        expect_invalid(await gateway.call("POST", PATH, data=fields), "image_url")
        parts = [(name, (None, value)) for name, value in fields.items()]
        expect_invalid(await gateway.call("POST", PATH, files=parts), "image")
    expect_invalid(await post(gateway), "image_url")
    expect_invalid(await post(gateway, image="AAAA"), "image_url")
    expect_invalid(await post(gateway, image_url=""), "image_url")
    for value in (None, 1, [DATA_URL]):
        expect_invalid(await post(gateway, image_url=value), "image_url")
    for url in (images.url, DATA_URL, "x"):
        expect_invalid(await gateway.submit("seamless", {"image_url": url}), "image_url")
    twice = [("image_url", (None, images.url)), ("image_url", (None, images.url))]
    expect_invalid(await gateway.call("POST", PATH, files=twice), "image_url")
    assert images.request_count == 0
    await assert_nothing_happened(gateway, valkey)


async def test_no_host_is_allowed_by_default(gateway: RunningGateway, images: ImageServer, valkey: Valkey) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    expect_invalid(await post(gateway, image_url=images.url), "image_url")
    await gateway.put_tenant(**UNREACHABLE_POLICIES, allow_image_url=["127.0.0.1", "images.test"])
    expect_invalid(await post(gateway, image_url=images.url), "image_url")  # another port
    assert images.request_count == 0
    problem = expect_problem(await post(gateway, image_url="http://images.test/"), 422, "image-unreachable")
    assert problem["reason"] == "no-connection"
    await assert_nothing_happened(gateway, valkey)


async def test_image_that_can_not_be_used(gateway: RunningGateway, images: ImageServer, valkey: Valkey) -> None:
    for content, status, code in (
        (None, 422, "image-unreachable"),
        (b"GIF89a" + bytes(99), 415, "unsupported-media-type"),
        (make_png()[:-9], 422, "invalid-image"),
        (make_png() + bytes(MAX_BYTES), 413, "image-too-large"),
        (png_claiming_size(60_000, 60_000), 413, "image-too-large"),
    ):
        images.content = content
        problem = expect_problem(await post(gateway, image_url=images.url, key=KEY), status, code)
        assert "127.0.0.1" not in json.dumps(problem)
        if content is not None:
            url = "data:;base64," + base64.b64encode(content).decode()
            expect_problem(await post(gateway, image_url=url, key=KEY), status, code)
    for url in ("data:image/png,abc", "data:;base64,A"):
        expect_invalid(await post(gateway, image_url=url), "image_url")
    too_long = "data:;base64," + "A" * (9 << 20)
    expect_problem(await post(gateway, image_url=too_long), 413, "image-too-large")
    await assert_nothing_happened(gateway, valkey)
    images.content = make_jpeg()
    expect_created(await post(gateway, image_url=images.url, key=KEY))


async def test_same_bytes_are_the_same_submission_wherever_they_are_from(
    gateway: RunningGateway, images: ImageServer
) -> None:
    image = images.content or b""
    data_url = "data:;base64," + base64.b64encode(image).decode()
    task = expect_created(await submit_with_key(gateway, "seamless", image=image))
    for url in (images.url, images.url + "2", data_url):
        assert expect_replayed(await post(gateway, image_url=url, key=KEY), task) == task
    images.content = make_jpeg(b"b")
    expect_problem(await post(gateway, image_url=images.url, key=KEY), 422, "idempotency-key-reused")
    expect_problem(await post(gateway, image_url=images.url, key=KEY, fit=0.7), 422, "idempotency-key-reused")
    assert await gateway.upstream.count_submits() == 1


async def test_same_request_is_replayed_without_a_fetch(gateway: RunningGateway, images: ImageServer) -> None:
    task = expect_created(await post(gateway, image_url=images.url, key=KEY, metadata={"a": "1"}))
    again: dict[str, Any] = {"image_url": images.url, "key": KEY, "metadata": {"a": "1"}}
    images.content = None
    first = await post(gateway, **again)
    assert expect_replayed(first, task) == task
    assert '"day-tasks";r=999' in first.headers["ratelimit"]
    await gateway.put_tenant(limits=[{"window": "total", "tasks": 1}])  # nor is the host allowed any more
    form = {"image_url": images.url, "metadata": '{"a": "1"}'}
    headers = {"Idempotency-Key": KEY}
    assert expect_replayed(await gateway.call("POST", PATH, data=form, headers=headers), task) == task
    expect_invalid(await post(gateway, **(again | {"key": "another"})), "image_url")
    assert images.request_count == 1
    await gateway.put_tenant(**UNREACHABLE_POLICIES, allow_image_url=[images.network])
    changes: list[dict[str, Any]] = [{"metadata": {"a": "2"}}, {"fit": 0.6}]
    for changed in (*changes, {"image_url": images.url + "2"}):
        expect_problem(await post(gateway, **(again | changed)), 422, "image-unreachable")
    images.content = make_jpeg()
    for changed in changes:
        expect_problem(await post(gateway, **(again | changed)), 422, "idempotency-key-reused")
    assert expect_replayed(await post(gateway, **(again | {"image_url": images.url + "2"})), task) == task
    expect_replayed(await submit_with_key(gateway, "seamless", {"metadata": '{"a": "1"}'}, image=images.content), task)
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 1)


async def test_repeats_in_every_state_of_the_first_request(
    gateway: RunningGateway, images: ImageServer, valkey: Valkey
) -> None:
    """In progress, lost by a disconnect, while the store is away, of unknown outcome: sent once."""
    with gateway.hold_responses() as held:
        first = asyncio.create_task(post(gateway, image_url=images.url, key=KEY))
        await wait_until(lambda: held.count == 1)
        images.content = None
        expect_problem(await post(gateway, image_url=images.url, key=KEY), 409, "idempotency-in-flight")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        with reject_store_calls(valkey):
            expect_problem(await post(gateway, image_url=images.url, key=KEY), 503, "ledger-unavailable")
    async with asyncio.timeout(20):
        while not (listed := (await gateway.call("GET", "/v1/tasks")).json()["items"]):
            pass
    expect_replayed(await post(gateway, image_url=images.url, key=KEY), listed[0])
    assert (images.request_count, await gateway.upstream.count_submits()) == (1, 1)

    images.content = make_jpeg()
    await gateway.upstream.lose_next_response()
    unknown = expect_problem(await post(gateway, image_url=images.url, key="lost"), 504, "submission-unknown")
    images.content = None
    again = await post(gateway, image_url=images.url, key="lost")
    assert again.headers["idempotent-replayed"] == "true"
    problem = expect_problem(again, 504, "submission-unknown")
    assert problem["submission_id"] == unknown["submission_id"]
    assert (images.request_count, await gateway.upstream.count_submits()) == (2, 2)


async def test_requests_at_once_with_one_key_are_sent_once(gateway: RunningGateway, images: ImageServer) -> None:
    responses = await asyncio.gather(*(post(gateway, image_url=f"{images.url}{n}", key=KEY) for n in range(5)))
    assert {response.status_code for response in responses} <= {201, 409}
    ids = {response.json()["id"] for response in responses if response.status_code == 201}
    assert len(ids) == await gateway.upstream.count_submits() == 1


# A fetch ends with its client. Each wait is for a condition that holds in the end, within a time limit.


async def start_held_fetch(gateway: RunningGateway, images: ImageServer) -> asyncio.Task[Response]:
    """Start a submission; return once its image was requested from the server, which does not respond."""
    images.may_respond.clear()
    submitting = asyncio.create_task(post(gateway, image_url=images.url))
    await wait_until(lambda: images.request_count == 1 or submitting.done())
    assert not submitting.done()
    return submitting


async def test_disconnect_ends_the_fetch(gateway: RunningGateway, images: ImageServer, valkey: Valkey) -> None:
    with capture_logs() as logs:
        submitting = await start_held_fetch(gateway, images)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        async with asyncio.timeout(20):
            await images.disconnected.wait()
        await wait_until(lambda: any(log["event"] == "request.ended" and log["status"] == 499 for log in logs))
    (log,) = [log for log in logs if log["event"] == "image.fetch_ended"]
    assert (log["outcome"], log["host"]) == ("cancelled", "127.0.0.1")
    assert "hush" not in repr(logs)
    await assert_nothing_happened(gateway, valkey)


@pytest.mark.parametrize(
    ("change", "body", "problem"),
    [
        ("POST /tenants/shop/revoke-all", None, (401, "unauthenticated")),
        ("PATCH /tenants/shop", {"state": "disabled"}, (403, "tenant-disabled")),
        ("DELETE /tenants/shop?force=true", None, (401, "unauthenticated")),
    ],
)
async def test_access_lost_while_an_image_is_fetched(
    gateway: RunningGateway, images: ImageServer, change: str, body: Any, problem: tuple[int, str]
) -> None:
    submitting = await start_held_fetch(gateway, images)
    async with asyncio.timeout(20):
        await gateway.call_admin(*change.split(), json=body)
        expect_problem(await submitting, *problem)
        await images.disconnected.wait()
    assert await gateway.upstream.count_submits() == 0


async def test_tenant_that_becomes_read_only_meanwhile(gateway: RunningGateway) -> None:
    """It loses no access, so its image is fetched, but nothing is submitted."""
    released = asyncio.Event()

    async def serve(connection: Connection) -> None:
        await connection.receive()
        await released.wait()
        await connection.send(file_response())

    async with run_server(serve) as server, asyncio.timeout(30):
        await gateway.put_tenant(allow_image_url=[f"127.0.0.0/8:{urlsplit(server.url).port}"])
        submitting = asyncio.create_task(post(gateway, image_url=server.url))
        await server.request_received.wait()
        await gateway.call_admin("PATCH", "/tenants/shop", json={"state": "read-only"})
        released.set()
        expect_problem(await submitting, 403, "tenant-read-only")
    assert await gateway.upstream.count_submits() == 0


async def test_fetches_of_a_tenant_are_bounded(gateway: RunningGateway, images: ImageServer) -> None:
    tenant = gateway.services.registry.current.tenants["shop"]
    with ExitStack() as held:
        with suppress(Overloaded):
            while True:
                held.enter_context(gateway.services.image_fetches.hold(tenant.id))
        refused = await post(gateway, image_url=images.url)
        expect_problem(refused, 503, "overloaded")
        assert int(refused.headers["retry-after"]) > 0
        expect_created(await gateway.submit())  # uploads go on
        expect_created(await post(gateway, image_url=DATA_URL))
        await gateway.put_tenant("other", allow_image_url=[images.network])
        expect_created(await post(gateway, image_url=images.url, token=await gateway.new_token("other")))
    expect_created(await post(gateway, image_url=images.url))


async def test_metrics(gateway: RunningGateway, images: ImageServer) -> None:
    expect_created(await post(gateway, image_url=images.url))
    images.content = None
    await post(gateway, image_url=images.url)
    metrics = (await gateway.http.get(f"{gateway.ops_url}/metrics")).text
    for outcome, count in (("done", 1), ("http-status", 1), ("no-connection", 0)):
        assert f'gateway_image_fetches_total{{outcome="{outcome}"}} {count}.0' in metrics
    assert "gateway_image_fetch_duration_seconds_count 2.0" in metrics


async def test_old_clients_have_no_image_url(gateway: RunningGateway, images: ImageServer) -> None:
    """The upstream's protocol ignores unknown fields, and needs its file."""
    form = {"user_key": gateway.token, "image_url": images.url}
    response = await gateway.http.post(f"{gateway.url}/api/submit_seamless_task", data=form)
    assert (response.status_code, response.json()["err_code"]) == (200, 1)
    files = {"input_image": make_png()}
    response = await gateway.http.post(f"{gateway.url}/api/submit_seamless_task", data=form, files=files)
    assert response.json()["err_code"] == 0
    assert images.request_count == 0
