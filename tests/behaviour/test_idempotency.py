"""Submissions repeated under one idempotency key."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis import Redis

from service.storage.redis import Keys
from service.usecases.ports import SubmitOutcome
from tests.behaviour.clients import LegacyClient, wait_until
from tests.behaviour.gateway_fixture import RunningGateway, reject_store_calls
from tests.behaviour.requests import (
    KEY,
    UNREACHABLE_LIMITS,
    UNREACHABLE_POLICIES,
    assert_nothing_happened,
    expect_created,
    expect_problem,
    expect_replayed,
    expect_unknown,
    make_jpeg,
    read_counts,
    recover_task,
    submit_with_key,
    use_unreachable_account,
)
from tests.support.valkey import Valkey
from tests.unit.asgi_client import AsgiResponse, open_raw_connection, read_response

DAY = 86_400
OTHER_IMAGE = make_jpeg(b"b")


async def expect_reused(gateway: RunningGateway, key: str = KEY) -> None:
    expect_problem(await submit_with_key(gateway, key=key, image=OTHER_IMAGE), 422, "idempotency-key-reused")


@pytest.mark.smoke
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
    expect_created(await submit_with_key(gateway, key="another"))
    assert (await submit_with_key(gateway)).headers["ratelimit"] == '"total-tasks";r=98'


async def test_equivalent_content_is_replayed(gateway: RunningGateway) -> None:
    image = ("image", ("a.jpg", make_jpeg(), "image/jpeg"))
    renamed = ("image", ("b", make_jpeg(), "application/octet-stream"))
    prompt, metadata = ("prompt", (None, "红")), ("metadata", (None, '{"a": "1", "b": "2"}'))
    prompt_in_gbk = ("prompt", (None, "红".encode("gbk"), "text/plain; charset=GBK"))
    reordered = ("metadata", (None, '{"b":"2",\n"a":"1"}', "application/json"))
    defaults = {"model": "通用模型", "style": "general", "noise": "1.003", "steps": "30", "vector": "false"}
    written = [(name, (None, value)) for name, value in defaults.items()]
    empty = [(name, (None, "")) for name in ("metadata", "webhook_url", "steps")]
    forms: list[list[Any]] = [
        [image, prompt, metadata],
        [("scale", (None, "2")), prompt, metadata, image],
        [reordered, renamed, ("scale", (None, "2.0", "application/json")), prompt_in_gbk],
        [*written, image, metadata, prompt, ("scale", (None, "2e0"))],
        [*empty, image, metadata, prompt],
    ]
    headers = {"Idempotency-Key": KEY}
    first, *others = [await gateway.call("POST", "/v1/tasks/upscale", files=form, headers=headers) for form in forms]
    task = expect_created(first)
    assert [expect_replayed(other, task) for other in others] == [task] * 4
    assert await gateway.upstream.count_submits() == 1


async def test_different_content_is_refused(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    fields = {"metadata": '{"a": "1"}'}
    task = expect_created(await submit_with_key(gateway, fields=fields))
    for response in (
        await submit_with_key(gateway, fields=fields | {"fit": "0.6"}),
        await submit_with_key(gateway, "face-enhance", fields),
        await submit_with_key(gateway),
        await submit_with_key(gateway, fields=fields, image=OTHER_IMAGE),
    ):
        expect_problem(response, 422, "idempotency-key-reused")
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 1)
    expect_replayed(await submit_with_key(gateway, fields=fields), task)


async def test_equal_and_different_keys(gateway: RunningGateway) -> None:
    keys = ['"a-key"', '"A-key"', '"a-key "', r'"a, \"key\"; \\"', "k" * 255, '"' + r"\"" * 255 + '"']
    await gateway.upstream.set_balance(100, 0)
    tasks = {key: expect_created(await submit_with_key(gateway, key=key)) for key in keys}
    for key, task in tasks.items():
        expect_replayed(await submit_with_key(gateway, key=key), task)
    expect_replayed(await submit_with_key(gateway, key="a-key"), tasks['"a-key"'])
    await gateway.put_tenant("other")
    other_token = await gateway.new_token("other")
    theirs = expect_created(await submit_with_key(gateway, key=keys[0], token=other_token))
    expect_replayed(await submit_with_key(gateway, key=keys[0], token=other_token), theirs)
    client = LegacyClient(gateway.http, gateway.url, gateway.token)  # whose protocol has no keys
    for key in (keys[0], '"never ended'):
        response = await client.submit("submit_face_enhance_task", headers={"Idempotency-Key": key})
        assert response["err_code"] == 0
    assert len({task["id"] for task in (*tasks.values(), theirs)}) + 2 == await gateway.upstream.count_submits() == 9


async def test_unknown_outcome_is_replayed_until_its_task_is_known(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    await gateway.upstream.lose_next_response()
    first = expect_unknown(await submit_with_key(gateway))
    again = expect_unknown(await submit_with_key(gateway), first)
    assert {**again, "instance": ""} == {**first, "instance": ""}
    await expect_reused(gateway)
    assert await read_counts(gateway) == (1, 0, 0)
    await gateway.put_tenant(accounts=[], limits=[{"window": "total", "tasks": 1}])
    expect_unknown(await submit_with_key(gateway), first)
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    task_id = await recover_task(gateway, first["submission_id"])
    ended = await gateway.wait_for_task(task_id)
    assert expect_replayed(await submit_with_key(gateway), ended) == ended
    await expect_reused(gateway)
    assert await gateway.upstream.count_submits() == 1
    assert (await read_counts(gateway))[0] == 1


@pytest.mark.smoke
async def test_submission_in_progress_is_409(gateway: RunningGateway) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    with gateway.hold_responses() as held:
        first = asyncio.create_task(submit_with_key(gateway))
        await wait_until(lambda: held.count == 1)
        for _ in range(2):
            waiting = await submit_with_key(gateway)
            expect_problem(waiting, 409, "idempotency-in-flight")
            assert int(waiting.headers["retry-after"]) > 0
            await expect_reused(gateway)
        assert await read_counts(gateway) == (0, 1, 1)
    expect_replayed(await submit_with_key(gateway), expect_created(await first))
    assert await gateway.upstream.count_submits() == 1


async def test_retry_after_a_disconnect_or_an_outage_is_a_replay(gateway: RunningGateway, valkey: Valkey) -> None:
    await gateway.put_tenant(**UNREACHABLE_LIMITS)
    with gateway.hold_responses() as held:
        leaving = asyncio.create_task(submit_with_key(gateway))
        await wait_until(lambda: held.count == 1)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        expect_problem(await submit_with_key(gateway), 409, "idempotency-in-flight")
        with reject_store_calls(valkey):
            held.released.set()
            expect_problem(await submit_with_key(gateway), 503, "ledger-unavailable")
    async with asyncio.timeout(20):
        while not (listed := (await gateway.call("GET", "/v1/tasks")).json()["items"]):
            pass
    expect_replayed(await submit_with_key(gateway), listed[0])
    assert await gateway.upstream.count_submits() == 1
    assert await read_counts(gateway) == (1, 0, 1)


async def test_stored_key_expires_and_is_hashed(gateway: RunningGateway, valkey: Valkey) -> None:
    with Redis(unix_socket_path=str(valkey.socket_path), decode_responses=True) as store:
        task = expect_created(await submit_with_key(gateway))
        tenant = gateway.services.registry.current.tenants["shop"]
        (name,) = store.scan_iter(match=Keys("gw").idempotency(tenant.id, "*"))
        assert DAY - 60 < store.pttl(name) / 1000 <= DAY
        assert KEY.strip('"') not in name + str(store.get(name))
        store.pexpire(name, 0)
        assert expect_created(await submit_with_key(gateway, image=OTHER_IMAGE))["id"] != task["id"]
    assert await gateway.upstream.count_submits() == 2


async def test_refusals_free_the_key(gateway: RunningGateway) -> None:
    await use_unreachable_account(gateway)
    refusals: list[tuple[dict[str, Any], SubmitOutcome | None, int, str]] = [
        ({"limits": [{"window": "total", "tasks": 0}]}, None, 429, "quota-exceeded"),
        ({}, SubmitOutcome.REJECTED, 502, "upstream-rejected"),
        ({}, SubmitOutcome.EXHAUSTED, 402, "balance-exhausted"),
        ({"accounts": ["dead"]}, None, 503, "upstream-unavailable"),
    ]
    for number, (policy, outcome, status, code) in enumerate(refusals, 1):
        key = f"key-{number}"
        await gateway.put_tenant(**policy)
        if outcome is not None:
            await gateway.upstream.refuse_next(outcome, "因为")
        expect_problem(await submit_with_key(gateway, key=key, image=OTHER_IMAGE), status, code)
        await gateway.call_admin("POST", "/accounts/main/reopen")
        await gateway.put_tenant(**UNREACHABLE_LIMITS)
        before = await gateway.upstream.count_submits()
        task = expect_created(await submit_with_key(gateway, key=key))
        expect_replayed(await submit_with_key(gateway, key=key), task)
        await expect_reused(gateway, key)
        assert await gateway.upstream.count_submits() == before + 1
        assert await read_counts(gateway) == (number, 0, number)


async def test_replay_ignores_refusals_of_new_submissions(gateway: RunningGateway) -> None:
    task = expect_created(await submit_with_key(gateway))
    limits = [{"window": "total", "tasks": 1}]
    for method, path, body, status, code in (
        ("PUT", "/tenants/shop", {"accounts": ["main"], "limits": limits}, 429, "quota-exceeded"),
        ("PUT", "/tenants/shop", {"accounts": []}, 503, "account-misconfigured"),
        ("PUT", "/accounts/main", {"floor_count": 100, "floor_money": 1_000}, 402, "balance-exhausted"),
        ("DELETE", "/accounts/main?force=true", None, 503, "account-misconfigured"),
    ):
        await gateway.put_tenant()
        assert (await gateway.call_admin(method, path, json=body)).is_success
        expect_problem(await submit_with_key(gateway, key="another"), status, code)
        before = await gateway.upstream.count_submits()
        expect_replayed(await submit_with_key(gateway), task)
        await expect_reused(gateway)
        assert await gateway.upstream.count_submits() == before


async def send_head_only(gateway: RunningGateway, *keys: bytes) -> AsgiResponse:
    """Send the head of a submission without a body."""
    lines = [b"POST /v1/tasks/vectorize HTTP/1.1", b"Host: gateway", b"Authorization: Bearer " + gateway.token.encode()]
    lines += [b"Content-Type: multipart/form-data; boundary=b", b"Content-Length: 1000"]
    lines += [b"Idempotency-Key: " + key for key in keys]
    async with open_raw_connection(urlsplit(gateway.url).port or 0) as (reader, writer):
        writer.write(b"\r\n".join([*lines, b"", b""]))
        return await read_response(reader)


async def test_malformed_key_is_400_before_the_body(gateway: RunningGateway, valkey: Valkey) -> None:
    await gateway.put_tenant(**UNREACHABLE_POLICIES)
    for keys in (
        [b'"Qx7fT2'],
        [b"Qx7fT2\xe9"],
        [b"Qx7fT2,Qx7fT2"],
        [b"Qx7fT2" + b"x" * 20_000],
        [b"Qx7fT2", b"Qx7fT2"],
        [b'"Qx7fT2"', b""],
    ):
        response = await send_head_only(gateway, *keys)
        assert (response.status, response.json()["code"]) == (400, "idempotency-key-invalid")
        assert "Qx7fT2" not in repr((response.headers, response.body))
    assert (await send_head_only(gateway, b'"Qx7fT2\x00"')).status == 400
    await assert_nothing_happened(gateway, valkey)
