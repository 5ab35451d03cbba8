"""A submission has to keep coming, fast enough for the room it holds."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.api.errors import ClientLeft, TooSlow
from service.domain.errors import Unauthenticated
from tests.unit.asgi import Message, body_messages, receiving
from tests.unit.forms import PNG, field, file, form, scope_of, uploads


async def test_a_client_that_leaves_half_way_is_noticed() -> None:
    """A disconnect within the body is told apart from a body that is wrong."""
    receive = receiving(body_messages([form(file("image", PNG))[:200]])[:-1])
    with pytest.raises(ClientLeft):
        async with uploads().receive(scope_of(), receive, part="image"):
            pass


@pytest.mark.parametrize("limits", [{"idle_seconds": 0.01}, {"total_seconds": 0.01}])
async def test_a_body_that_stops_is_given_up(limits: dict[str, float]) -> None:
    """A body that does not go on, or does not end, is given up after a while."""
    receive = receiving(body_messages([form(file("image", PNG))[:200]])[:-1], then_silent=True)
    with pytest.raises(TooSlow):
        async with uploads(**limits).receive(scope_of(), receive, part="image"):
            pass


async def test_a_body_that_trickles_is_given_up() -> None:
    """Chunks that keep coming do not extend the time for the whole body."""

    async def trickle() -> Message:
        await asyncio.sleep(0.001)
        return {"type": "http.request", "body": b"", "more_body": True}

    receive: Any = trickle
    with pytest.raises(TooSlow):
        async with uploads(idle_seconds=10, total_seconds=0.05).receive(scope_of(), receive, part="image"):
            pass


def dripping(body: bytes, size: int, seconds: float) -> Any:
    """A `receive` that gives a body in chunks of this size, each after this time."""
    chunks = [body[start : start + size] for start in range(0, len(body), size)]
    given = receiving(body_messages(chunks))

    async def receive() -> Message:
        await asyncio.sleep(seconds)
        message: Message = await given()
        return message

    return receive


LARGE = form(file("image", PNG + b"\0" * 99_000))
RATE: dict[str, Any] = {"grace_seconds": 0.01, "least_rate": 1_000_000, "max_image_bytes": 100_000}


@pytest.mark.parametrize("length", [len(LARGE), None])
async def test_a_large_body_below_the_least_rate_is_given_up(length: int | None) -> None:
    """A body that keeps coming and would end in time, but holds its room for too long, is given up."""
    with pytest.raises(TooSlow):
        async with uploads(**RATE).receive(scope_of(length), dripping(LARGE, 1_000, 0.005), part="image"):
            pass


async def test_a_small_body_may_come_slowly() -> None:
    """A submission as small as a form, and a form, hold next to nothing, and are asked for no rate."""
    reader = uploads(**RATE | {"least_rate": 1e9})
    body = form(file("image", PNG))
    async with reader.receive(scope_of(len(body)), dripping(body, 50, 0.005), part="image") as submission:
        assert submission.image.data == PNG
    body = form(field("scale", "2"))
    assert await reader.read_form(scope_of(), dripping(body, 20, 0.005)) == [("scale", "2")]


async def test_waiting_for_room_is_not_the_fault_of_the_client() -> None:
    """The time until there is room does not count as the client's."""
    reader = uploads(total_seconds=0.25, max_image_bytes=100_000, in_flight_bytes=100_000, wait_seconds=60)
    second: Any = reader.receive(scope_of(), dripping(LARGE, 50_000, 0), part="image")
    async with reader.receive(scope_of(), receiving(body_messages([LARGE])), part="image"):
        waiting = asyncio.create_task(second.__aenter__())
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
    assert (await waiting).image.width == 5
    await second.__aexit__(None, None, None)


async def test_uploads_that_only_announce_much_stop_nobody() -> None:
    """While slow connections announce more than there is room for, a submission of another is read."""
    reader = uploads(in_flight_bytes=1_000_000, max_image_bytes=800_000, idle_seconds=60)

    async def slow() -> None:
        sent = body_messages([LARGE[:100]])[:-1]
        async with reader.receive(scope_of(800_000), receiving(sent, then_silent=True), part="image"):
            pytest.fail("it never ends")

    connections = [asyncio.create_task(slow()) for _ in range(3)]
    await asyncio.sleep(0)
    async with reader.receive(scope_of(800_000), receiving(body_messages([LARGE])), part="image") as submission:
        assert submission.image.width == 5
    for each in connections:
        each.cancel()
    await asyncio.wait(connections)


async def test_a_field_is_told_as_soon_as_it_is_complete() -> None:
    """Who is told a field may refuse the body by it, before its file has come."""
    body = form(field("user_key", "k"), file("image", PNG))
    before = body[: body.index(PNG)]
    told: list[tuple[str, str]] = []

    def refuse(name: str, value: str) -> None:
        told.append((name, value))
        raise Unauthenticated("no")

    receive = receiving(body_messages([before])[:-1], then_silent=True)
    with pytest.raises(Unauthenticated):
        async with uploads().receive(scope_of(), receive, part="image", on_field=refuse):
            pass
    assert told == [("user_key", "k")]
