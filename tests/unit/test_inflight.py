"""Uploads share the memory there is for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.errors import ClientLeft
from service.api.uploads import STEP, InFlight
from service.domain.errors import GatewayError, Overloaded
from tests.unit.asgi import body_messages, receiving
from tests.unit.forms import PNG, file, form, scope_of, uploads

WHOLE = 200_000


class Line:
    """Uploads that share ten steps of memory, each of which takes what it is told to, and waits for it."""

    def __init__(self, total: int = 10 * STEP, wait_seconds: float = 60) -> None:
        self.total = total
        self.budget = InFlight(total, wait_seconds)
        self.held: dict[str, int] = {}
        self._wants: dict[str, asyncio.Queue[int]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, need: int) -> None:
        """Begin an upload of at most so many bytes; nothing has come of it yet."""
        self._wants[name] = asyncio.Queue()
        self._tasks[name] = asyncio.create_task(self._upload(name, need))
        await settled()

    async def grow(self, name: str, size: int) -> None:
        """So many bytes of an upload have come in all; run until nothing happens any more."""
        self._wants[name].put_nowait(size)
        await settled()

    async def arrive(self, name: str, size: int) -> None:
        """Begin an upload, all of which comes at once."""
        await self.begin(name, size)
        await self.grow(name, size)

    async def end(self, name: str) -> None:
        """End an upload, wherever it is."""
        self._tasks[name].cancel()
        await asyncio.wait([self._tasks[name]])
        await settled()

    async def close(self) -> None:
        """End all, and see that the whole budget is free again."""
        for name in list(self._tasks):
            await self.end(name)
        assert self.held == {}
        await self.arrive("last", self.total)
        assert self.held == {"last": self.total}
        await self.end("last")

    async def _upload(self, name: str, need: int) -> None:
        with self.budget.share(need) as share:
            try:
                while True:
                    await self.budget.grow(share, await self._wants[name].get())
                    self.held[name] = share.held
                    assert sum(self.held.values()) <= self.total
            finally:
                self.held.pop(name, None)


async def settled() -> None:
    """Let the loop run until every task waits for something that only the test does."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_is_announced_keeps_nobody_out() -> None:
    """However many uploads announce much and send little, one that comes whole gets in."""
    line = Line()
    for each in range(50):
        await line.begin(f"silent {each}", 10 * STEP)
    for each in range(3):
        await line.begin(f"slow {each}", 5 * STEP)
        await line.grow(f"slow {each}", 1)
    await line.arrive("real", 5 * STEP)
    assert line.held == {"slow 0": STEP, "slow 1": STEP, "slow 2": STEP, "real": 5 * STEP}
    await line.close()


async def test_bytes_are_taken_in_steps_and_never_more_than_needed() -> None:
    """A share grows by whole steps, and at its end to what the upload announced."""
    line = Line()
    await line.begin("one", STEP + 7)
    for size, held in ((1, STEP), (STEP, STEP), (STEP + 1, STEP + 7), (STEP + 7, STEP + 7)):
        await line.grow("one", size)
        assert line.held == {"one": held}
    await line.close()


async def test_nobody_begins_who_could_keep_all_from_their_end() -> None:
    """A step after which none that have begun could become whole is not granted, until one of them has ended."""
    line = Line()
    for name in ("first", "second", "third"):
        await line.begin(name, 8 * STEP)
        await line.grow(name, STEP)
    await line.begin("fourth", 8 * STEP)
    await line.grow("fourth", STEP)
    assert sorted(line.held) == ["first", "second", "third"]
    await line.grow("first", 8 * STEP)
    assert line.held["first"] == 8 * STEP
    await line.end("first")
    assert sorted(line.held) == ["fourth", "second", "third"]
    await line.close()


async def test_a_newcomer_does_not_overtake() -> None:
    """A small upload behind a large one that waits is not let in before it."""
    line = Line()
    await line.arrive("first", 7 * STEP)
    await line.arrive("large", 8 * STEP)
    await line.arrive("small", STEP)
    assert list(line.held) == ["first"]
    await line.end("first")
    assert line.held == {"large": 8 * STEP, "small": STEP}
    await line.close()


async def test_who_has_begun_is_finished_before_who_waits() -> None:
    """An upload that can become whole at once does so although another waits, whose turn comes the sooner."""
    line = Line()
    await line.begin("begun", 4 * STEP)
    await line.grow("begun", STEP)
    await line.arrive("large", 10 * STEP)
    await line.grow("begun", 4 * STEP)
    assert line.held == {"begun": 4 * STEP}
    await line.end("begun")
    assert line.held == {"large": 10 * STEP}
    await line.close()


async def test_an_upload_larger_than_the_whole_budget_runs_alone() -> None:
    """A budget smaller than one image still lets images through, one at a time."""
    line = Line(total=1_000)
    await line.arrive("small", 10)
    await line.arrive("huge", 9_000)
    await line.arrive("next", 10)
    assert line.held == {"small": 10}
    await line.end("small")
    assert line.held == {"huge": 1_000}
    await line.end("huge")
    assert line.held == {"next": 10}
    await line.close()


async def test_who_leaves_the_line_no_longer_blocks_it() -> None:
    """An upload cancelled while it waits makes way for those behind it."""
    line = Line()
    await line.arrive("first", 7 * STEP)
    await line.arrive("large", 8 * STEP)
    await line.arrive("small", STEP)
    await line.end("large")
    assert line.held == {"first": 7 * STEP, "small": STEP}
    await line.close()


async def test_a_finished_upload_keeps_only_what_came() -> None:
    """Once its end is known, an upload of unknown length holds its bytes alone, and the rest is for others."""
    budget = InFlight(10 * STEP, wait_seconds=60)
    with budget.share(10 * STEP) as chunked, budget.share(9 * STEP) as other:
        await budget.grow(chunked, STEP + 5)
        waiting = asyncio.create_task(budget.grow(other, 9 * STEP))
        await settled()
        assert (chunked.held, other.held) == (2 * STEP, 0)
        budget.complete(chunked, STEP)
        await waiting
        assert (chunked.held, other.held) == (STEP, 9 * STEP)


@pytest.mark.parametrize("granted_first", [True, False])
async def test_a_step_granted_to_one_who_is_just_cancelled_is_not_lost(granted_first: bool) -> None:
    """A grant and a cancellation in the same turn of the loop, in either order, leave the budget whole."""
    budget = InFlight(10, wait_seconds=60)

    async def take() -> None:
        with budget.share(10) as share:
            await budget.grow(share, 10)
            pytest.fail("it was cancelled")

    with budget.share(10) as first:
        await budget.grow(first, 10)
        waiting = asyncio.create_task(take())
        await settled()
        if not granted_first:
            waiting.cancel()
    waiting.cancel()
    await asyncio.wait([waiting])
    with budget.share(10) as last:
        async with asyncio.timeout(1):
            await budget.grow(last, 10)


async def test_who_waits_too_long_is_sent_away() -> None:
    """Without room in time the answer is that the gateway is overloaded, and when to come back."""
    budget = InFlight(10, wait_seconds=0.01)
    with budget.share(10) as first, budget.share(10) as second:
        await budget.grow(first, 10)
        with pytest.raises(Overloaded) as caught:
            await budget.grow(second, 1)
    assert caught.value.retry_after == 0.01


PLAN = st.tuples(
    st.integers(1, 14 * STEP),
    st.lists(st.floats(0, 1), max_size=6),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(0, 8)),
)
"""An upload: its length, where it is cut, how late it begins, and at which piece it is cancelled, if it is."""


@given(st.lists(PLAN, max_size=12))
async def test_every_interleaving_ends_and_stays_within_the_budget(
    plans: Sequence[tuple[int, Sequence[float], int, int | None]],
) -> None:
    """Whatever uploads come in whatever order, the budget is kept, and each that is not cancelled becomes whole."""
    total = 10 * STEP
    budget = InFlight(total, wait_seconds=60)
    held: dict[int, int] = {}
    whole: set[int] = set()

    async def upload(name: int, need: int, cuts: Sequence[float], delay: int, left_at: int | None) -> None:
        for _ in range(delay):
            await asyncio.sleep(0)
        with budget.share(need) as share:
            try:
                for piece, size in enumerate([*sorted(int(cut * need) for cut in cuts), need]):
                    if piece == left_at:
                        return
                    await budget.grow(share, size)
                    held[name] = share.held
                    assert min(size, total) <= share.held
                    assert sum(held.values()) <= total
                    await asyncio.sleep(0)
                whole.add(name)
            finally:
                held.pop(name, None)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for name, plan in enumerate(plans):
            group.create_task(upload(name, *plan))
    assert whole == {name for name, (_, cuts, _, left_at) in enumerate(plans) if left_at is None or left_at > len(cuts)}
    with budget.share(total) as last:
        await asyncio.wait_for(budget.grow(last, total), 1)


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
