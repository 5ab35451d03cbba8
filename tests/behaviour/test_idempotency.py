"""Submissions repeated under one idempotency key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis

from service.crypto import Keyring, TaskIdCodec
from service.domain.tasks import Kind, TaskReference
from service.storage.redis import Keys
from service.usecases.ports import SubmitOutcome, SubmitResult
from tests.behaviour.gateway_fixture import SECRET_KEY, RunningGateway, run_fake_gateway, run_real_gateway
from tests.behaviour.idempotent_requests import (
    KEY,
    UNREACHABLE_LIMITS,
    expect_created,
    expect_refused,
    expect_replayed,
    expect_unknown,
    make_jpeg,
    read_counts,
    submit_with_key,
)
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.fakes import FakeUpstream
from tests.support.valkey import Valkey
from tests.unit.fake_gateway import wait_until

DAY = 86_400


async def test_replay_returns_the_first_response(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    first = await submit_with_key(gateway)
    task = expect_created(first)
    for _ in range(2):
        again = await submit_with_key(gateway)
        assert expect_replayed(again, task) == task
        names = {"etag", "location", "retry-after", "ratelimit", "ratelimit-policy", "cache-control"}
        assert {name: again.headers[name] for name in names} == {name: first.headers[name] for name in names}
    assert first.headers["ratelimit"] == '"total-tasks";r=99'
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 1)


async def test_replay_of_a_running_task_is_current(gateway: RunningGateway) -> None:
    await gateway.upstream.keep_running()
    task = expect_created(await submit_with_key(gateway))
    await gateway.poll_due_tasks()
    read = await gateway.call("GET", task["links"]["self"])
    again = await submit_with_key(gateway)
    assert expect_replayed(again, task) == read.json()
    assert (again.json()["state"], again.headers["etag"]) == ("running", read.headers["etag"])
    assert again.headers["retry-after"] == "3"


@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_replay_of_a_finished_task(gateway: RunningGateway, state: str) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    if state == "failed":
        await gateway.upstream.fail_next_task()
    task = expect_created(await submit_with_key(gateway))
    ended = await gateway.wait_for_task(task["id"])
    again = await submit_with_key(gateway)
    assert expect_replayed(again, task) == ended
    assert ended["state"] == state
    assert "retry-after" not in again.headers
    assert again.headers["etag"] == (await gateway.call("GET", task["links"]["self"])).headers["etag"]
    assert await read_counts(gateway) == (1, 0, 0)
    assert await gateway.upstream.count_submits() == 1


async def test_equivalent_content_is_replayed(gateway: RunningGateway) -> None:
    image = ("image", ("a.jpg", make_jpeg(), "image/jpeg"))
    renamed = ("image", ("b", make_jpeg(), "application/octet-stream"))
    scale, prompt = ("scale", (None, "2")), ("prompt", (None, "红"))
    metadata = ("metadata", (None, '{"a": "1", "b": "2"}'))
    reordered = ("metadata", (None, '{"b":"2",\n"a":"1"}'))
    defaults = {
        "model": "通用模型",
        "style": "general",
        "noise": "1.003",
        "steps": "30",
        "vector": "false",
        "colors": "5",
    }
    written: list[Any] = [(name, (None, value)) for name, value in defaults.items()]
    forms: list[list[Any]] = [
        [image, prompt, metadata],
        [scale, prompt, metadata, image],
        [("scale", (None, "2.0")), metadata, image, prompt],
        [reordered, renamed, prompt],
        [*written, image, metadata, prompt, ("scale", (None, "2e0"))],
    ]
    headers = {"Idempotency-Key": KEY}
    first, *others = [await gateway.call("POST", "/v1/tasks/upscale", files=form, headers=headers) for form in forms]
    task = expect_created(first)
    assert [expect_replayed(other, task) for other in others] == [task] * 4
    assert await gateway.upstream.count_submits() == 1


async def test_different_content_is_refused(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    task = expect_created(await submit_with_key(gateway, fields={"metadata": '{"a": "1"}'}))
    for response in (
        await submit_with_key(gateway, fields={"metadata": '{"a": "1"}', "fit": "0.6"}),
        await submit_with_key(gateway, "face-enhance", {"metadata": '{"a": "1"}'}),
        await submit_with_key(gateway, fields={"metadata": '{"a": "2"}'}),
        await submit_with_key(gateway),
        await submit_with_key(gateway, fields={"metadata": '{"a": "1"}'}, image=make_jpeg(b"b")),
    ):
        expect_refused(response, 422, "idempotency-key-reused")
    assert len(make_jpeg(b"b")) == len(make_jpeg())
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 1)
    expect_replayed(await submit_with_key(gateway, fields={"metadata": '{"a": "1"}'}), task)


async def test_keys_are_per_tenant(gateway: RunningGateway) -> None:
    await gateway.put_tenant("other")
    other_token = await gateway.new_token("other")
    ours, theirs = (
        expect_created(await submit_with_key(gateway)),
        expect_created(await submit_with_key(gateway, token=other_token)),
    )
    assert ours["id"] != theirs["id"]
    expect_replayed(await submit_with_key(gateway), ours)
    expect_replayed(await submit_with_key(gateway, token=other_token), theirs)
    assert await gateway.upstream.count_submits() == 2


async def test_replay_after_a_failover(gateway: RunningGateway) -> None:
    await gateway.call_admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await gateway.put_tenant(accounts=["main", "spare"], **UNREACHABLE_LIMITS)
    await gateway.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    task = expect_created(await submit_with_key(gateway))
    expect_replayed(await submit_with_key(gateway), task)
    assert await gateway.upstream.count_submits() == 2
    assert await read_counts(gateway) == (1, 0, 1)


async def test_unknown_outcome_is_replayed(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    await gateway.upstream.lose_next_response()
    first = expect_unknown(await submit_with_key(gateway))
    again = expect_unknown(await submit_with_key(gateway), first)
    assert {**again, "instance": ""} == {**first, "instance": ""}
    expect_refused(await submit_with_key(gateway, image=make_jpeg(b"b")), 422, "idempotency-key-reused")
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 0)


async def test_recovered_task_is_replayed(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    await gateway.upstream.lose_next_response()
    first = expect_unknown(await submit_with_key(gateway))
    task_id = await _task_id_of(gateway, first["submission_id"])
    read = await gateway.call("GET", f"/v1/tasks/{task_id}")
    assert read.status_code == 200, read.text
    expect_replayed(await submit_with_key(gateway), {"id": task_id})
    expect_refused(await submit_with_key(gateway, image=make_jpeg(b"b")), 422, "idempotency-key-reused")
    ended = await gateway.wait_for_task(task_id)
    assert expect_replayed(await submit_with_key(gateway), ended) == ended
    assert await gateway.upstream.count_submits() == 1
    assert (await read_counts(gateway))[0] == 1


async def _task_id_of(gateway: RunningGateway, reservation: str) -> str:
    """Return the id of the task of a submission, whether or not it exists."""
    services, upstream_id = gateway.services, "up-1"
    if isinstance(gateway.upstream, SandboxUpstreamControl):
        (received,) = await gateway.upstream.control.list_requests()
        upstream_id = received.task_id
    tenant, account = services.registry.current.tenants["shop"], services.registry.current.accounts["main"]
    created = int(services.task_reader.now() * 1000)
    reference = TaskReference(tenant.id, account.id, Kind.SEAMLESS, created, reservation, upstream_id)
    return TaskIdCodec(Keyring([SECRET_KEY]).derive("task-id")).encode(reference)


@pytest.fixture
async def slow_gateway() -> AsyncIterator[tuple[RunningGateway, FakeUpstream, asyncio.Event]]:
    """Run a gateway whose upstream responds to submits once an event is set."""
    with pytest.MonkeyPatch.context() as patch:
        async with run_fake_gateway() as (gateway, _, upstream):
            go, submit = asyncio.Event(), upstream.submit

            async def delayed_submit(*arguments: Any, **more: Any) -> SubmitResult:
                response = await submit(*arguments, **more)
                await go.wait()
                return response

            patch.setattr(upstream, "submit", delayed_submit)
            try:
                yield gateway, upstream, go
            finally:
                go.set()  # else the gateway would wait for its answer for ever


async def test_submission_in_progress_is_409(slow_gateway: tuple[RunningGateway, FakeUpstream, asyncio.Event]) -> None:
    gateway, upstream, go = slow_gateway
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    first = asyncio.create_task(submit_with_key(gateway))
    await wait_until(lambda: bool(upstream.submits))
    for _ in range(2):
        waiting = await submit_with_key(gateway)
        expect_refused(waiting, 409, "idempotency-in-flight")
        assert int(waiting.headers["retry-after"]) > 0
        expect_refused(await submit_with_key(gateway, image=make_jpeg(b"b")), 422, "idempotency-key-reused")
    assert await read_counts(gateway) == (0, 1, 1)
    go.set()
    expect_replayed(await submit_with_key(gateway), expect_created(await first))
    assert len(upstream.submits) == 1


async def test_retry_after_a_disconnect_is_a_replay(
    slow_gateway: tuple[RunningGateway, FakeUpstream, asyncio.Event],
) -> None:
    gateway, upstream, go = slow_gateway
    leaving = asyncio.create_task(submit_with_key(gateway))
    await wait_until(lambda: bool(upstream.submits))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    expect_refused(await submit_with_key(gateway), 409, "idempotency-in-flight")
    go.set()
    async with asyncio.timeout(10):
        while (again := await submit_with_key(gateway)).status_code == 409:
            pass
    (listed,) = (await gateway.call("GET", "/v1/tasks")).json()["items"]
    assert expect_replayed(again, listed) == listed
    assert len(upstream.submits) == 1


async def test_key_expires_after_24_hours() -> None:
    async with run_fake_gateway() as (gateway, _, upstream):
        task = expect_created(await submit_with_key(gateway))
        for seconds in (DAY - 3_600, 3_599.999):
            await gateway.advance(seconds)
            expect_replayed(await submit_with_key(gateway), task)
        await gateway.advance(0.001)
        assert expect_created(await submit_with_key(gateway, image=make_jpeg(b"b")))["id"] != task["id"]
        assert len(upstream.submits) == 2


async def test_stored_key_expires_and_is_hashed(valkey: Valkey) -> None:
    async with run_real_gateway(valkey) as gateway:
        with Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as store:
            task = expect_created(await submit_with_key(gateway))
            tenant = gateway.services.registry.current.tenants["shop"]
            (name,) = store.scan_iter(match=Keys("gw").idempotency(tenant.id, "*"))
            assert DAY - 60 < store.pttl(name) / 1000 <= DAY
            assert KEY.strip('"') not in name + str(store.get(name))
            store.pexpire(name, 60_000)
            await gateway.wait_for_task(task["id"])
            expect_replayed(await submit_with_key(gateway), task)
            assert 0 < store.pttl(name) <= 60_000
            store.pexpire(name, 0)
            assert expect_created(await submit_with_key(gateway, image=make_jpeg(b"b")))["id"] != task["id"]
            assert await gateway.upstream.count_submits() == 2


async def test_other_spellings_of_the_same_content_are_replayed(gateway: RunningGateway) -> None:
    image = ("image", ("a.jpg", make_jpeg(), "image/jpeg"))
    spellings: list[list[tuple[str, Any]]] = [
        [("prompt", (None, "猫")), ("scale", (None, "2.50")), image],
        [
            image,
            ("scale", (None, "2.5", "application/json")),
            ("prompt", (None, "猫".encode("gbk"), "text/plain; charset=GBK")),
        ],
        [
            ("metadata", (None, "")),
            ("webhook_url", (None, "")),
            ("steps", (None, "")),
            ("prompt", (None, "猫")),
            image,
            ("scale", (None, "25e-1")),
            ("metadata", (None, "{}", "application/json")),
        ],
    ]
    first, *others = [
        await gateway.call("POST", "/v1/tasks/upscale", files=parts, headers={"Idempotency-Key": KEY})
        for parts in spellings
    ]
    task = expect_created(first)
    for response in others:
        expect_replayed(response, task)
    assert await gateway.upstream.count_submits() == 1
