"""Allocation of upload memory."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.api.errors import ClientDisconnected
from service.api.uploads import RESERVATION_STEP_BYTES, UploadMemory
from service.domain.errors import GatewayError, Overloaded
from tests.unit.asgi_client import make_body_messages, make_receive
from tests.unit.multipart_forms import PNG, encode_file, encode_form, make_upload_scope, make_uploads

WHOLE_STEPS = 200_000


class UploadQueue:
    """Uploads that share ten steps of memory."""

    def __init__(self, total: int = 10 * RESERVATION_STEP_BYTES, wait_seconds: float = 60) -> None:
        self.total = total
        self.memory = UploadMemory(total, wait_seconds)
        self.held: dict[str, int] = {}
        self._sizes: dict[str, asyncio.Queue[int]] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, name: str, need: int) -> None:
        self._sizes[name] = asyncio.Queue()
        self._tasks[name] = asyncio.create_task(self._upload(name, need))
        await run_until_idle()

    async def receive_bytes(self, name: str, size: int) -> None:
        """Set the received size of an upload and run until idle."""
        self._sizes[name].put_nowait(size)
        await run_until_idle()

    async def arrive(self, name: str, size: int) -> None:
        await self.begin(name, size)
        await self.receive_bytes(name, size)

    async def end(self, name: str) -> None:
        self._tasks[name].cancel()
        await asyncio.wait([self._tasks[name]])
        await run_until_idle()

    async def close(self) -> None:
        """End all uploads and assert that the whole memory is free."""
        for name in list(self._tasks):
            await self.end(name)
        assert self.held == {}
        await self.arrive("last", self.total)
        assert self.held == {"last": self.total}
        await self.end("last")

    async def _upload(self, name: str, need: int) -> None:
        with self.memory.allocate(need) as share:
            try:
                while True:
                    await self.memory.reserve(share, await self._sizes[name].get())
                    self.held[name] = share.reserved_bytes
                    assert sum(self.held.values()) <= self.total
            finally:
                self.held.pop(name, None)


async def run_until_idle() -> None:
    """Run the loop until every task waits for the test."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_announced_lengths_reserve_nothing() -> None:
    line = UploadQueue()
    for number in range(50):
        await line.begin(f"silent {number}", 10 * RESERVATION_STEP_BYTES)
    for item in range(3):
        await line.begin(f"slow {item}", 5 * RESERVATION_STEP_BYTES)
        await line.receive_bytes(f"slow {item}", 1)
    await line.arrive("real", 5 * RESERVATION_STEP_BYTES)
    assert line.held == {
        "slow 0": RESERVATION_STEP_BYTES,
        "slow 1": RESERVATION_STEP_BYTES,
        "slow 2": RESERVATION_STEP_BYTES,
        "real": 5 * RESERVATION_STEP_BYTES,
    }
    await line.close()


async def test_allocation_grows_in_steps_up_to_the_length() -> None:
    line = UploadQueue()
    await line.begin("one", RESERVATION_STEP_BYTES + 7)
    for size, expected in (
        (1, RESERVATION_STEP_BYTES),
        (RESERVATION_STEP_BYTES, RESERVATION_STEP_BYTES),
        (RESERVATION_STEP_BYTES + 1, RESERVATION_STEP_BYTES + 7),
        (RESERVATION_STEP_BYTES + 7, RESERVATION_STEP_BYTES + 7),
    ):
        await line.receive_bytes("one", size)
        assert line.held == {"one": expected}
    await line.close()


async def test_unsafe_steps_are_delayed() -> None:
    """A step after which no upload could finish would be a deadlock."""
    line = UploadQueue()
    for name in ("first", "second", "third"):
        await line.begin(name, 8 * RESERVATION_STEP_BYTES)
        await line.receive_bytes(name, RESERVATION_STEP_BYTES)
    await line.begin("fourth", 8 * RESERVATION_STEP_BYTES)
    await line.receive_bytes("fourth", RESERVATION_STEP_BYTES)
    assert sorted(line.held) == ["first", "second", "third"]
    await line.receive_bytes("first", 8 * RESERVATION_STEP_BYTES)
    assert line.held["first"] == 8 * RESERVATION_STEP_BYTES
    await line.end("first")
    assert sorted(line.held) == ["fourth", "second", "third"]
    await line.close()


async def test_smaller_newcomer_does_not_overtake() -> None:
    line = UploadQueue()
    await line.arrive("first", 7 * RESERVATION_STEP_BYTES)
    await line.arrive("large", 8 * RESERVATION_STEP_BYTES)
    await line.arrive("small", RESERVATION_STEP_BYTES)
    assert list(line.held) == ["first"]
    await line.end("first")
    assert line.held == {"large": 8 * RESERVATION_STEP_BYTES, "small": RESERVATION_STEP_BYTES}
    await line.close()


async def test_started_uploads_precede_waiting_ones() -> None:
    line = UploadQueue()
    await line.begin("begun", 4 * RESERVATION_STEP_BYTES)
    await line.receive_bytes("begun", RESERVATION_STEP_BYTES)
    await line.arrive("large", 10 * RESERVATION_STEP_BYTES)
    await line.receive_bytes("begun", 4 * RESERVATION_STEP_BYTES)
    assert line.held == {"begun": 4 * RESERVATION_STEP_BYTES}
    await line.end("begun")
    assert line.held == {"large": 10 * RESERVATION_STEP_BYTES}
    await line.close()


async def test_oversized_upload_runs_alone() -> None:
    line = UploadQueue(total=1_000)
    await line.arrive("small", 10)
    await line.arrive("huge", 9_000)
    await line.arrive("next", 10)
    assert line.held == {"small": 10}
    await line.end("small")
    assert line.held == {"huge": 1_000}
    await line.end("huge")
    assert line.held == {"next": 10}
    await line.close()


async def test_cancelled_waiter_unblocks_the_queue() -> None:
    line = UploadQueue()
    await line.arrive("first", 7 * RESERVATION_STEP_BYTES)
    await line.arrive("large", 8 * RESERVATION_STEP_BYTES)
    await line.arrive("small", RESERVATION_STEP_BYTES)
    await line.end("large")
    assert line.held == {"first": 7 * RESERVATION_STEP_BYTES, "small": RESERVATION_STEP_BYTES}
    await line.close()


async def test_finished_upload_shrinks_to_its_size() -> None:
    budget = UploadMemory(10 * RESERVATION_STEP_BYTES, wait_seconds=60)
    with budget.allocate(10 * RESERVATION_STEP_BYTES) as chunked, budget.allocate(9 * RESERVATION_STEP_BYTES) as other:
        await budget.reserve(chunked, RESERVATION_STEP_BYTES + 5)
        waiting = asyncio.create_task(budget.reserve(other, 9 * RESERVATION_STEP_BYTES))
        await run_until_idle()
        assert (chunked.reserved_bytes, other.reserved_bytes) == (2 * RESERVATION_STEP_BYTES, 0)
        budget.shrink(chunked, RESERVATION_STEP_BYTES)
        await waiting
        assert (chunked.reserved_bytes, other.reserved_bytes) == (RESERVATION_STEP_BYTES, 9 * RESERVATION_STEP_BYTES)


@pytest.mark.parametrize("granted_first", [True, False])
async def test_grant_to_a_cancelled_upload_is_returned(granted_first: bool) -> None:
    budget = UploadMemory(10, wait_seconds=60)

    async def take() -> None:
        with budget.allocate(10) as share:
            await budget.reserve(share, 10)
            pytest.fail("it was cancelled")

    with budget.allocate(10) as first:
        await budget.reserve(first, 10)
        waiting = asyncio.create_task(take())
        await run_until_idle()
        if not granted_first:
            waiting.cancel()
    waiting.cancel()
    await asyncio.wait([waiting])
    with budget.allocate(10) as last:
        async with asyncio.timeout(1):
            await budget.reserve(last, 10)


async def test_wait_times_out_with_overload() -> None:
    budget = UploadMemory(10, wait_seconds=0.01)
    with budget.allocate(10) as first, budget.allocate(10) as second:
        await budget.reserve(first, 10)
        with pytest.raises(Overloaded) as caught:
            await budget.reserve(second, 1)
    assert caught.value.retry_after == 0.01


PLAN = st.tuples(
    st.integers(1, 14 * RESERVATION_STEP_BYTES),
    st.lists(st.floats(0, 1), max_size=6),
    st.integers(0, 5),
    st.one_of(st.none(), st.integers(0, 8)),
)
"""An upload: length, cut offsets, delay, and the chunk at which it is cancelled."""


@given(st.lists(PLAN, max_size=12))
async def test_every_interleaving_finishes_within_the_budget(
    plans: Sequence[tuple[int, Sequence[float], int, int | None]],
) -> None:
    total = 10 * RESERVATION_STEP_BYTES
    budget = UploadMemory(total, wait_seconds=60)
    reserved: dict[int, int] = {}
    whole: set[int] = set()

    async def upload(name: int, need: int, cuts: Sequence[float], delay: int, left_at: int | None) -> None:
        for _ in range(delay):
            await asyncio.sleep(0)
        with budget.allocate(need) as share:
            try:
                for piece, size in enumerate([*sorted(int(cut * need) for cut in cuts), need]):
                    if piece == left_at:
                        return
                    await budget.reserve(share, size)
                    reserved[name] = share.reserved_bytes
                    assert min(size, total) <= share.reserved_bytes
                    assert sum(reserved.values()) <= total
                    await asyncio.sleep(0)
                whole.add(name)
            finally:
                reserved.pop(name, None)

    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        for name, plan in enumerate(plans):
            group.create_task(upload(name, *plan))
    assert whole == {name for name, (_, cuts, _, left_at) in enumerate(plans) if left_at is None or left_at > len(cuts)}
    with budget.allocate(total) as last:
        await asyncio.wait_for(budget.reserve(last, total), 1)


async def test_every_failure_releases_the_memory() -> None:
    reader = make_uploads(memory_bytes=WHOLE_STEPS, idle_seconds=0.01, max_image_bytes=WHOLE_STEPS)
    good = encode_form(encode_file("image", PNG))
    for messages in (
        make_body_messages([good[:-9]]),
        make_body_messages([encode_form()]),
        make_body_messages([encode_form(encode_file("image", b"GIF89a"))]),
        make_body_messages([good[:99]])[:-1],
    ):
        for silent in (True, False):
            receive = make_receive(messages, stay_open=silent)
            with pytest.raises((GatewayError, ClientDisconnected)):
                async with reader.receive(make_upload_scope(WHOLE_STEPS), receive, part="image"):
                    pass
    with pytest.raises(ZeroDivisionError):
        async with reader.receive(
            make_upload_scope(WHOLE_STEPS), make_receive(make_body_messages([good])), part="image"
        ):
            raise ZeroDivisionError
    async with reader.receive(
        make_upload_scope(WHOLE_STEPS), make_receive(make_body_messages([good])), part="image"
    ) as submission:
        assert submission.image.data == PNG
