"""Uploads share the memory there is for them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from service.api.inflight import InFlight
from service.api.uploads import FORM_ALLOWANCE, ClientLeft
from service.domain.errors import GatewayError, Overloaded
from tests.unit.asgi import body_messages, receiving
from tests.unit.forms import PNG, file, form, scope_of, unread, uploads

WHOLE = 200_000


class Line:
    """Submissions that share a budget, each of which holds its place until told to leave."""

    def __init__(self, **limits: Any) -> None:
        self.reader = uploads(in_flight_bytes=WHOLE, wait_seconds=limits.pop("wait_seconds", 60), **limits)
        self.inside: list[str] = []
        self._leave: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def enter(self, name: str, length: int | None) -> None:
        """Submit an image with this announced length, and run until nothing happens any more."""
        self._leave[name] = asyncio.Event()
        self._tasks[name] = asyncio.create_task(self._submit(name, length))
        await settled()

    async def leave(self, name: str) -> None:
        """Let a submission end."""
        self._leave[name].set()
        await self._tasks[name]
        await settled()

    async def cancel(self, name: str) -> None:
        """Cancel a submission, wherever it is."""
        self._tasks[name].cancel()
        await asyncio.wait([self._tasks[name]])
        await settled()

    async def close(self) -> None:
        """Let all go, and see that the whole budget is free again."""
        for name in list(self._tasks):
            await self.cancel(name)
        self.inside.clear()
        await self.enter("last", WHOLE)
        assert self.inside == ["last"]
        await self.leave("last")

    async def _submit(self, name: str, length: int | None) -> None:
        receive = receiving(body_messages([form(file("image", PNG))]))
        async with self.reader.receive(scope_of(length), receive, part="image"):
            self.inside.append(name)
            await self._leave[name].wait()


async def settled() -> None:
    """Let the loop run until every task waits for something that only the test does."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_submissions_wait_unread_for_their_place_in_order() -> None:
    """Who does not fit waits, and the small one behind a large one does not overtake it."""
    line = Line()
    await line.enter("first", 150_000)
    await line.enter("large", 180_000)
    await line.enter("small", 20_000)
    assert line.inside == ["first"]
    await line.leave("first")
    assert line.inside == ["first", "large", "small"]
    await line.close()


async def test_a_body_of_unknown_length_takes_the_place_of_the_largest() -> None:
    """Without an announced length the largest possible body is reserved."""
    line = Line(max_image_bytes=WHOLE - FORM_ALLOWANCE // 2)
    await line.enter("chunked", None)
    await line.enter("small", 20_000)
    assert line.inside == ["chunked"]
    await line.close()


async def test_a_body_larger_than_the_whole_budget_runs_alone() -> None:
    """A budget smaller than one image still lets images through, one at a time."""
    line = Line(max_image_bytes=1_000_000)
    await line.enter("small", 1_000)
    await line.enter("huge", 1_000_000)
    assert line.inside == ["small"]
    await line.leave("small")
    assert line.inside == ["small", "huge"]
    await line.enter("next", 1_000)
    assert line.inside == ["small", "huge"]
    await line.close()


async def test_a_cancelled_submission_leaves_the_line_and_its_place() -> None:
    """Cancelled while waiting it no longer blocks who is behind it; cancelled inside it gives its place back."""
    line = Line()
    await line.enter("first", 150_000)
    await line.enter("large", 180_000)
    await line.enter("small", 20_000)
    await line.cancel("large")
    assert line.inside == ["first", "small"]
    await line.close()


@pytest.mark.parametrize("granted_first", [True, False])
async def test_a_place_granted_to_one_who_is_just_cancelled_is_not_lost(granted_first: bool) -> None:
    """A grant and a cancellation in the same turn of the loop, in either order, leave the budget whole."""
    budget = InFlight(10, wait_seconds=60)

    async def hold() -> None:
        async with budget.hold(10):
            pytest.fail("it was cancelled")

    async with budget.hold(10):
        waiting = asyncio.create_task(hold())
        await settled()
        if not granted_first:
            waiting.cancel()
    waiting.cancel()
    await asyncio.wait([waiting])
    async with asyncio.timeout(1), budget.hold(10):
        pass


async def test_who_waits_too_long_is_sent_away() -> None:
    """Without a place in time the answer is that the gateway is overloaded, and when to come back."""
    line = Line(wait_seconds=0.01)
    await line.enter("first", 150_000)
    with pytest.raises(Overloaded) as caught:
        async with line.reader.receive(scope_of(150_000), unread(), part="image"):
            pass
    assert caught.value.retry_after == 0.01
    await line.close()


async def test_every_way_to_fail_gives_the_place_back() -> None:
    """After any fault the whole budget is there for the next submission."""
    reader = uploads(in_flight_bytes=WHOLE, idle_seconds=0.01, max_image_bytes=WHOLE)
    good = form(file("image", PNG))
    for messages in (
        body_messages([good[:-9]]),
        body_messages([form()]),
        body_messages([form(file("image", b"GIF89a"))]),
        body_messages([good[:99]])[:-1],
    ):
        for silent in (True, False):
            receive = receiving(messages, then_silent=silent)
            with pytest.raises((GatewayError, ClientLeft)):
                async with reader.receive(scope_of(WHOLE), receive, part="image"):
                    pass
    with pytest.raises(ZeroDivisionError):
        async with reader.receive(scope_of(WHOLE), receiving(body_messages([good])), part="image"):
            raise ZeroDivisionError
    async with reader.receive(scope_of(WHOLE), receiving(body_messages([good])), part="image") as submission:
        assert submission.image.data == PNG
