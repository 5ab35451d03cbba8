"""Minimum rates and timeouts of uploads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.api.errors import BodyTimeout, ClientDisconnected
from service.domain.errors import Unauthenticated
from tests.unit.asgi_client import Message, make_body_messages, make_receive
from tests.unit.multipart_forms import PNG, encode_field, encode_file, encode_form, make_upload_scope, make_uploads


async def test_client_disconnect_within_the_body() -> None:
    receive = make_receive(make_body_messages([encode_form(encode_file("image", PNG))[:200]])[:-1])
    with pytest.raises(ClientDisconnected):
        async with make_uploads().receive(make_upload_scope(), receive, part="image"):
            pass


@pytest.mark.parametrize("limits", [{"idle_seconds": 0.01}, {"total_seconds": 0.01}])
async def test_idle_body_times_out(limits: dict[str, float]) -> None:
    receive = make_receive(make_body_messages([encode_form(encode_file("image", PNG))[:200]])[:-1], stay_open=True)
    with pytest.raises(BodyTimeout):
        async with make_uploads(**limits).receive(make_upload_scope(), receive, part="image"):
            pass


async def test_trickling_body_times_out() -> None:
    async def trickle() -> Message:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"", "more_body": True}

    receive: Any = trickle
    with pytest.raises(BodyTimeout):
        async with make_uploads(idle_seconds=10, total_seconds=0.05).receive(
            make_upload_scope(), receive, part="image"
        ):
            pass


def make_slow_receive(body: bytes, size: int, seconds: float) -> Any:
    """Make a `receive` that returns chunks of this size, each after a delay."""
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    receive_next = make_receive(make_body_messages(chunks))

    async def receive() -> Message:
        await asyncio.sleep(seconds)
        message: Message = await receive_next()
        return message

    return receive


LARGE = encode_form(encode_file("image", PNG + b"\0" * 99_000))
MIN_RATE_LIMITS: dict[str, Any] = {"grace_seconds": 0.01, "min_bytes_per_second": 1_000_000, "max_image_bytes": 100_000}


@pytest.mark.parametrize("length", [len(LARGE), None])
async def test_large_body_below_the_minimum_rate_times_out(length: int | None) -> None:
    with pytest.raises(BodyTimeout):
        async with make_uploads(**MIN_RATE_LIMITS).receive(
            make_upload_scope(length), make_slow_receive(LARGE, 1_000, 0.005), part="image"
        ):
            pass


async def test_small_body_needs_no_rate() -> None:
    reader = make_uploads(**MIN_RATE_LIMITS | {"min_bytes_per_second": 1e9})
    body = encode_form(encode_file("image", PNG))
    async with reader.receive(
        make_upload_scope(len(body)), make_slow_receive(body, 50, 0.005), part="image"
    ) as submission:
        assert submission.image.data == PNG
    body = encode_form(encode_field("scale", "2"))
    assert await reader.read_form(make_upload_scope(), make_slow_receive(body, 20, 0.005)) == [("scale", "2")]


async def test_waiting_for_memory_does_not_count() -> None:
    reader = make_uploads(total_seconds=0.25, max_image_bytes=100_000, memory_bytes=100_000, wait_seconds=60)
    second: Any = reader.receive(make_upload_scope(), make_slow_receive(LARGE, 50_000, 0), part="image")
    async with reader.receive(make_upload_scope(), make_receive(make_body_messages([LARGE])), part="image"):
        waiting = asyncio.create_task(second.__aenter__())
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
    assert (await waiting).image.width == 5
    await second.__aexit__(None, None, None)


async def test_announced_lengths_block_no_other_upload() -> None:
    reader = make_uploads(memory_bytes=1_000_000, max_image_bytes=800_000, idle_seconds=60)

    async def slow() -> None:
        sent = make_body_messages([LARGE[:100]])[:-1]
        async with reader.receive(make_upload_scope(800_000), make_receive(sent, stay_open=True), part="image"):
            pytest.fail("it never ends")

    connections = [asyncio.create_task(slow()) for _ in range(3)]
    await asyncio.sleep(0)
    async with reader.receive(
        make_upload_scope(800_000), make_receive(make_body_messages([LARGE])), part="image"
    ) as submission:
        assert submission.image.width == 5
    for connection in connections:
        connection.cancel()
    await asyncio.wait(connections)


async def test_fields_are_reported_before_the_file() -> None:
    body = encode_form(encode_field("user_key", "k"), encode_file("image", PNG))
    before = body[: body.index(PNG)]
    fields: list[tuple[str, str]] = []

    def refuse(name: str, value: str) -> None:
        fields.append((name, value))
        raise Unauthenticated("no")

    receive = make_receive(make_body_messages([before])[:-1], stay_open=True)
    with pytest.raises(Unauthenticated):
        async with make_uploads().receive(make_upload_scope(), receive, part="image", on_field=refuse):
            pass
    assert fields == [("user_key", "k")]
