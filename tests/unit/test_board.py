"""The board shows nothing old, wakes everybody who waits, and holds no more than it has to."""

from __future__ import annotations

import asyncio

import pytest

from service.domain.errors import Overloaded
from service.domain.tasks import Kind, State, Task
from service.usecases import task_cache
from service.usecases.task_cache import Board, Pace, Seen, Watcher
from tests.support.tasks import CREATED, a_task, succeeded
from tests.unit.over_fakes import until

QUEUED = a_task()
RUNNING = a_task(state=State.RUNNING, version=2)
ENDED = succeeded(5)
LONG = 1e6
"""Seconds that no test waits for."""


@pytest.fixture
def board() -> Board:
    """The board of a process that begins."""
    return Board(Pace(2.5))


async def waiting(watcher: Watcher, version: int) -> asyncio.Task[Seen | None]:
    """A wait for a later version, which has begun."""
    wait = asyncio.create_task(watcher.changed(version, LONG))
    await until(lambda: watcher._woken is not None)
    return wait


def test_never_back(board: Board) -> None:
    """Once a version was seen no older one is shown, nor what was known of the same version before."""
    running = a_task(state=State.RUNNING, version=2, checked=CREATED + 9)
    board.post(running, CREATED + 9)
    assert board.post(QUEUED, CREATED + 10).task is running
    earlier = a_task(state=State.RUNNING, version=2, checked=CREATED + 8)
    assert board.post(earlier, CREATED + 8).task is running
    later = a_task(state=State.RUNNING, version=2, checked=CREATED + 11)
    assert board.post(later, CREATED + 11).task is later
    assert board.newest("r1") == board.fresh("r1")


def test_an_end_is_never_taken_back(board: Board) -> None:
    """What has ended stays so, though the store has lost it and counts its versions anew."""
    board.post(ENDED, CREATED)
    assert board.post(a_task(state=State.RUNNING, version=9), CREATED + 10).task is ENDED
    again = succeeded(7)
    assert board.post(again, CREATED + 11).task is again


async def test_an_end_of_the_same_version(board: Board) -> None:
    """Who waits is woken by an end, whatever its version: the store may have lost the task and count anew."""
    board.post(RUNNING, CREATED)
    with board.watching("r1") as watcher:
        wait = await waiting(watcher, 2)
        ended = a_task(state=State.SUCCEEDED, version=2)
        board.announced(ended, CREATED + 1)
        seen = await wait
    assert seen
    assert seen.task is ended


def test_checked_before_the_clock_stepped_back(board: Board) -> None:
    """What is read after the server's clock has stepped back is no older than what was read before."""
    board.post(a_task(checked=CREATED + 1_200_000), CREATED + 1_200_000)
    later = a_task(checked=CREATED)
    assert board.post(later, CREATED).task is later


def test_verified_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all who read a task that has ended the first one per interval has the store asked; of a running one none."""
    board.post(ENDED, CREATED)
    assert not board.to_verify("r1")
    monkeypatch.setattr(task_cache, "VERIFIED_SECONDS", -1)
    board.post(a_task(reservation="r2"), CREATED)
    assert (board.to_verify("r1"), board.to_verify("r2"), board.to_verify("r3")) == (True, False, False)
    monkeypatch.undo()
    assert not board.to_verify("r1")


def test_how_long_it_is_shown(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that runs is shown from memory for a moment, one that has ended for good."""
    board.post(RUNNING, CREATED)
    assert board.fresh("r1")
    monkeypatch.setattr(task_cache, "RUNNING_SECONDS", -1)
    assert board.fresh("r1") is None
    assert board.newest("r1")
    board.post(ENDED, CREATED)
    assert board.fresh("r1")


async def test_a_change_before_the_wait(board: Board) -> None:
    """A change between the read and the wait is not missed."""
    with board.watching("r1") as watcher:
        board.announced(RUNNING, CREATED)
        seen = await watcher.changed(1, 0)
    assert seen
    assert seen.task is RUNNING


async def test_woken_by_the_newest(board: Board) -> None:
    """Who waits is woken by a later version, by no repetition, and finds the newest, however many there were."""
    board.post(QUEUED, CREATED)
    with board.watching("r1") as watcher:
        wait = await waiting(watcher, 1)
        board.post(a_task(checked=CREATED + 1), CREATED + 1)
        board.post(a_task(reservation="r2", version=7), CREATED + 1)
        await asyncio.sleep(0)
        assert not wait.done()
        board.recorded(RUNNING, CREATED + 2)
        board.announced(ENDED, CREATED + 3)
        seen = await wait
    assert seen
    assert seen.task is ENDED


async def test_time_over(board: Board) -> None:
    """Who has waited for long enough is told that there is nothing."""
    with board.watching("r1") as watcher:
        assert await watcher.changed(1, 0.001) is None
        assert await watcher.changed(1, -1) is None


async def test_closed(board: Board) -> None:
    """When the process ends all who wait are told so at once, and nobody waits any more; a change is still told."""
    with board.watching("r1") as one, board.watching("r2") as other:
        waits = [await waiting(one, 1), await waiting(other, 1)]
        board.close()
        async with asyncio.timeout(20):
            assert await asyncio.gather(*waits) == [None, None]
            assert await one.changed(1, LONG) is None
        board.post(ENDED, CREATED)
        assert await one.changed(1, LONG) is not None


async def test_a_crowd(board: Board) -> None:
    """One change wakes all who wait for the task, at once."""
    crowd = 10_000

    async def wait() -> Seen | None:
        with board.watching("r1") as watcher:
            return await watcher.changed(1, LONG)

    waits = [asyncio.create_task(wait()) for _ in range(crowd)]
    await until(lambda: board.waiting == crowd)
    board.announced(ENDED, CREATED)
    assert set(map(id, await asyncio.gather(*waits))) == {id(board.newest("r1"))}
    assert board.waiting == 0


def test_no_more_than_so_many() -> None:
    """So many may wait at once; the next is refused until one has left."""
    board = Board(Pace(2.5), most_watchers=2)
    with board.watching("r1"):
        with board.watching("r2"):
            with pytest.raises(Overloaded) as told, board.watching("r1"):
                pass
            assert told.value.retry_after
        with board.watching("r1"):
            assert board.waiting == 2
    assert board.waiting == 0


async def test_nothing_is_left_behind(board: Board) -> None:
    """Whoever leaves, in whatever way, is forgotten."""
    with board.watching("r1"):
        assert board.watched() == ["r1"]
        with board.watching("r1") as watcher:
            wait = await waiting(watcher, 1)
            wait.cancel()
            with pytest.raises(asyncio.CancelledError):
                await wait
        assert board.watched() == ["r1"]
    assert board.watched() == []


@pytest.mark.parametrize("told", [Board.announced, Board.recorded])
def test_what_is_not_asked_for(board: Board, told: object) -> None:
    """A change of a task that nobody has asked for is not kept."""
    assert callable(told)
    told(board, ENDED, CREATED)
    assert board.newest("r1") is None
    with board.watching("r1"):
        told(board, RUNNING, CREATED)
    told(board, ENDED, CREATED)
    seen = board.newest("r1")
    assert seen
    assert seen.task is ENDED


def test_learns_once(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every end teaches how long tasks take when it is announced, and not once more where it was recorded."""
    taught: list[Task] = []
    monkeypatch.setattr(board.pace, "ended", taught.append)
    board.recorded(ENDED, CREATED)
    board.announced(RUNNING, CREATED)
    board.announced(ENDED, CREATED)
    assert taught == [ENDED]


def test_the_oldest_is_forgotten(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tasks those that were asked for last are remembered, and all that somebody waits for."""
    monkeypatch.setattr(task_cache, "REMEMBERED", 2)
    with board.watching("a"):
        for name in "abcd":
            board.post(succeeded(1, reservation=name), CREATED)
            board.fresh("b")
        assert [name for name in "abcd" if board.newest(name)] == ["a", "b", "d"]
    board.post(a_task(reservation="e", kind=Kind.SEAMLESS), CREATED)
    assert [name for name in "abcde" if board.newest(name)] == ["b", "e"]


def test_age(board: Board) -> None:
    """The age of what is known counts from the last word of the upstream."""
    seen = board.post(a_task(checked=CREATED), CREATED + 4_000)
    assert 4 <= seen.age < 5
