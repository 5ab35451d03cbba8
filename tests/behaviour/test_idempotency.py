"""What is submitted twice under one idempotency key is sent once, and told of again, whatever became of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis import Redis

from service.crypto import Keyring
from service.domain.tasks import Kind, Reference, TaskIds
from service.storage.redis import Keys
from service.usecases.ports import SubmitOutcome, Submitted
from tests.behaviour.house import SECRET_KEY, House, house_of_fakes, real_house
from tests.behaviour.keyed import KEY, PLENTY, counted, keyed, lost, made, photo, refused, replayed
from tests.behaviour.upstreams import USER_KEY, SandboxControl
from tests.fakes import FakeUpstream
from tests.support.valkey import Valkey
from tests.unit.over_fakes import until

DAY = 86_400


async def test_replay(house: House) -> None:
    """Sent again it is the same answer, said to be an earlier one; the upstream got one submit, and one is counted."""
    await house.put_tenant(**PLENTY)
    first = await keyed(house)
    task = made(first)
    for _ in range(2):
        again = await keyed(house)
        assert replayed(again, task) == task
        told = {"etag", "location", "retry-after", "ratelimit", "ratelimit-policy", "cache-control"}
        assert {name: again.headers[name] for name in told} == {name: first.headers[name] for name in told}
    assert first.headers["ratelimit"] == '"total-tasks";r=99'
    assert await house.upstream.submits() == 1
    assert await counted(house) == (1, 0, 1)


async def test_replay_while_it_runs(house: House) -> None:
    """A replay shows the task as it is now: running, with the entity tag of that."""
    await house.upstream.keep_running()
    task = made(await keyed(house))
    await house.watch()
    read = await house.call("GET", task["links"]["self"])
    again = await keyed(house)
    assert replayed(again, task) == read.json()
    assert (again.json()["state"], again.headers["etag"]) == ("running", read.headers["etag"])
    assert again.headers["retry-after"] == "3"


@pytest.mark.parametrize("state", ["succeeded", "failed"])
async def test_replay_of_what_has_ended(house: House, state: str) -> None:
    """A replay of what has ended shows how, and does not ask to come again; to fail frees no key."""
    await house.put_tenant(**PLENTY)
    if state == "failed":
        await house.upstream.fail_next_task()
    task = made(await keyed(house))
    ended = await house.finished(task["id"])
    again = await keyed(house)
    assert replayed(again, task) == ended
    assert ended["state"] == state
    assert "retry-after" not in again.headers
    assert again.headers["etag"] == (await house.call("GET", task["links"]["self"])).headers["etag"]
    assert await counted(house) == (1, 0, 0)
    assert await house.upstream.submits() == 1


async def test_same_content(house: House) -> None:
    """What is only written differently is the same: defaults, numbers, the order of parts and metadata, file names."""
    image = ("image", ("a.jpg", photo(), "image/jpeg"))
    renamed = ("image", ("b", photo(), "application/octet-stream"))
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
    first, *others = [await house.call("POST", "/v1/tasks/upscale", files=form, headers=headers) for form in forms]
    task = made(first)
    assert [replayed(other, task) for other in others] == [task] * 4
    assert await house.upstream.submits() == 1


async def test_other_content(house: House) -> None:
    """Anything else under the same key is refused unsent: other options, kind, metadata, or one byte of the image."""
    await house.put_tenant(**PLENTY)
    task = made(await keyed(house, fields={"metadata": '{"a": "1"}'}))
    for answer in (
        await keyed(house, fields={"metadata": '{"a": "1"}', "fit": "0.6"}),
        await keyed(house, "face-enhance", {"metadata": '{"a": "1"}'}),
        await keyed(house, fields={"metadata": '{"a": "2"}'}),
        await keyed(house),
        await keyed(house, fields={"metadata": '{"a": "1"}'}, image=photo(b"b")),
    ):
        refused(answer, 422, "idempotency-key-reused")
    assert len(photo(b"b")) == len(photo())
    assert await house.upstream.submits() == 1
    assert await counted(house) == (1, 0, 1)
    replayed(await keyed(house, fields={"metadata": '{"a": "1"}'}), task)


async def test_tenants_have_keys_of_their_own(house: House) -> None:
    """Another tenant that submits the same under the same key submits for itself."""
    await house.put_tenant("other")
    stranger = await house.new_token("other")
    ours, theirs = made(await keyed(house)), made(await keyed(house, token=stranger))
    assert ours["id"] != theirs["id"]
    replayed(await keyed(house), ours)
    replayed(await keyed(house, token=stranger), theirs)
    assert await house.upstream.submits() == 2


async def test_other_account(house: House) -> None:
    """What went to the next account, since the first could not pay, is replayed like any other."""
    await house.admin("PUT", "/accounts/spare", json={"user_key": USER_KEY})
    await house.put_tenant(accounts=["main", "spare"], **PLENTY)
    await house.upstream.refuse_next(SubmitOutcome.EXHAUSTED)
    task = made(await keyed(house))
    replayed(await keyed(house), task)
    assert await house.upstream.submits() == 2
    assert await counted(house) == (1, 0, 1)


async def test_lost_answer(house: House) -> None:
    """An unknown outcome is kept: the same 504 again, with the same submission, and nothing is sent a second time."""
    await house.put_tenant(**PLENTY)
    await house.upstream.lose_next_answer()
    first = lost(await keyed(house))
    again = lost(await keyed(house), first)
    assert {**again, "instance": ""} == {**first, "instance": ""}
    refused(await keyed(house, image=photo(b"b")), 422, "idempotency-key-reused")
    assert await house.upstream.submits() == 1
    assert await counted(house) == (1, 0, 0)


async def test_lost_answer_that_was_found(house: House) -> None:
    """Once its task is known after all, an unknown outcome is replayed as that task."""
    await house.put_tenant(**PLENTY)
    await house.upstream.lose_next_answer()
    first = lost(await keyed(house))
    task_id = await _task_id_of(house, first["submission_id"])
    read = await house.call("GET", f"/v1/tasks/{task_id}")
    assert read.status_code == 200, read.text
    replayed(await keyed(house), {"id": task_id})
    refused(await keyed(house, image=photo(b"b")), 422, "idempotency-key-reused")
    ended = await house.finished(task_id)
    assert replayed(await keyed(house), ended) == ended
    assert await house.upstream.submits() == 1
    assert (await counted(house))[0] == 1


async def _task_id_of(house: House, reservation: str) -> str:
    """The id that a submission's task has, if the upstream accepted it."""
    services, upstream_id = house.services, "up-1"
    if isinstance(house.upstream, SandboxControl):
        (received,) = await house.upstream._control.requests()
        upstream_id = received.task_id
    tenant, account = services.registry.current.tenants["shop"], services.registry.current.accounts["main"]
    created = int(services.follow._clock.now() * 1000)
    reference = Reference(tenant.id, account.id, Kind.SEAMLESS, created, reservation, upstream_id)
    return TaskIds(Keyring([SECRET_KEY]).purpose("task-id")).seal(reference)


@pytest.fixture
async def slow() -> AsyncIterator[tuple[House, FakeUpstream, asyncio.Event]]:
    """A house, and an upstream that answers submits only once an event is set."""
    with pytest.MonkeyPatch.context() as patch:
        async with house_of_fakes() as (house, _, upstream):
            go, submit = asyncio.Event(), upstream.submit

            async def held(*arguments: Any, **more: Any) -> Submitted:
                answer = await submit(*arguments, **more)
                await go.wait()
                return answer

            patch.setattr(upstream, "submit", held)
            try:
                yield house, upstream, go
            finally:
                go.set()  # else the house would wait for its answer for ever


async def test_in_flight(slow: tuple[House, FakeUpstream, asyncio.Event]) -> None:
    """What has no outcome yet is 409 with a time to come back, other content 422; then it is replayed."""
    house, upstream, go = slow
    await house.put_tenant(**PLENTY)
    first = asyncio.create_task(keyed(house))
    await until(lambda: bool(upstream.submits))
    for _ in range(2):
        waiting = await keyed(house)
        refused(waiting, 409, "idempotency-in-flight")
        assert int(waiting.headers["retry-after"]) > 0
        refused(await keyed(house, image=photo(b"b")), 422, "idempotency-key-reused")
    assert await counted(house) == (0, 1, 1)
    go.set()
    replayed(await keyed(house), made(await first))
    assert len(upstream.submits) == 1


async def test_client_that_left(slow: tuple[House, FakeUpstream, asyncio.Event]) -> None:
    """Who hung up before there was an answer learns by sending it again what it led to."""
    house, upstream, go = slow
    leaving = asyncio.create_task(keyed(house))
    await until(lambda: bool(upstream.submits))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    refused(await keyed(house), 409, "idempotency-in-flight")
    go.set()
    async with asyncio.timeout(10):
        while (again := await keyed(house)).status_code == 409:
            pass
    (listed,) = (await house.call("GET", "/v1/tasks")).json()["items"]
    assert replayed(again, listed) == listed
    assert len(upstream.submits) == 1


async def test_forgotten() -> None:
    """A key is known for 24 hours from when it was first used, however often it is used; then it is new."""
    async with house_of_fakes() as (house, _, upstream):
        task = made(await keyed(house))
        for seconds in (DAY - 3_600, 3_599.999):
            await house.advance(seconds)
            replayed(await keyed(house), task)
        await house.advance(0.001)
        assert made(await keyed(house, image=photo(b"b")))["id"] != task["id"]
        assert len(upstream.submits) == 2


async def test_forgotten_by_the_store(valkey: Valkey) -> None:
    """The store forgets a key 24 hours after its first use, which no replay puts off; and it never sees it in clear."""
    async with real_house(valkey) as house:
        with Redis(unix_socket_path=str(valkey.path), decode_responses=True) as store:
            task = made(await keyed(house))
            tenant = house.services.registry.current.tenants["shop"]
            (name,) = store.scan_iter(match=Keys("gw").idempotency(tenant.id, "*"))
            assert DAY - 60 < store.pttl(name) / 1000 <= DAY
            assert KEY.strip('"') not in name + str(store.get(name))
            store.pexpire(name, 60_000)
            await house.finished(task["id"])
            replayed(await keyed(house), task)
            assert 0 < store.pttl(name) <= 60_000
            store.pexpire(name, 0)
            assert made(await keyed(house, image=photo(b"b")))["id"] != task["id"]
            assert await house.upstream.submits() == 2


async def test_same_content_in_other_spellings(house: House) -> None:
    """Empty fields, other charsets, types and orders of parts, and other spellings of values are the same content."""
    image = ("image", ("a.jpg", photo(), "image/jpeg"))
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
        await house.call("POST", "/v1/tasks/upscale", files=parts, headers={"Idempotency-Key": KEY})
        for parts in spellings
    ]
    task = made(first)
    for answer in others:
        replayed(answer, task)
    assert await house.upstream.submits() == 1
