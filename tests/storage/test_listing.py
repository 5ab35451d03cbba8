"""Whatever is added or lost while a list is read page by page, each task that stays is listed once, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.domain.tasks import Kind, State
from service.usecases.ports import Answered, Page
from tests.storage.shop import KEYS, Shop, shop
from tests.support.valkey import Valkey

AT_ONCE = 230
"""More than are read in one go."""


@pytest.fixture
async def kept(valkey: Valkey) -> AsyncIterator[Shop]:
    """A tenant whose tasks were all created in the same millisecond."""
    async with shop(valkey.url) as found:
        await found.advance(3_600_000)
        await found.accept(*(f"r{number:03}" for number in range(AT_ONCE)))
        yield found


async def page(kept: Shop, cursor: str | None, limit: int, state: State | None = None) -> Page:
    """A page of the list."""
    return await kept.tasks.page(1, state=state, kind=None, limit=limit, cursor=cursor)


async def whole(kept: Shop, limit: int, state: State | None = None) -> list[str]:
    """The whole list, page by page."""
    names, cursor = list[str](), None
    while True:
        found = await page(kept, cursor, limit, state)
        assert len(found.tasks) <= limit
        names += [task.reservation for task in found.tasks]
        cursor = found.cursor
        if cursor is None:
            return names


@pytest.mark.parametrize("limit", [1, 7, 100, AT_ONCE - 1, AT_ONCE, AT_ONCE + 1])
async def test_one_moment(kept: Shop, limit: int) -> None:
    """Tasks of the same millisecond have an order too, on whatever pages they come to stand."""
    assert await whole(kept, limit) == [f"r{number:03}" for number in reversed(range(AT_ONCE))]


async def test_added_meanwhile(kept: Shop) -> None:
    """Tasks that are added move none of the others to another page, be they newer or of the same moment."""
    names, cursor = list[str](), None
    for added in range(AT_ONCE):
        found = await page(kept, cursor, 10)
        names += [task.reservation for task in found.tasks]
        cursor = found.cursor
        if cursor is None:
            break
        await kept.accept(f"z{added:03}", f"a{added:03}")
    old = [name for name in names if name.startswith("r")]
    assert old == [f"r{number:03}" for number in reversed(range(AT_ONCE))]
    assert not [name for name in names if name.startswith("z")]
    assert len(names) == len(set(names))


async def test_lost_meanwhile(kept: Shop) -> None:
    """Where a page has ended is found again though that very task and its neighbours are gone."""
    first = await page(kept, None, 10)
    for name in [task.reservation for task in first.tasks] + ["r219", "r218"]:
        await kept.client.delete(KEYS.task(name))
        await kept.client.zrem(KEYS.tasks(1), name)
    following = await page(kept, first.cursor, 2)
    assert [task.reservation for task in following.tasks] == ["r217", "r216"]


async def test_few_that_match(kept: Shop) -> None:
    """What does not match is passed over, however much it is."""
    assert await whole(kept, 5, State.SUCCEEDED) == []
    ended = await kept.check(Answered.SUCCEEDED)
    assert ended
    assert ended.kind is Kind.SEAMLESS
    assert await whole(kept, 5, State.SUCCEEDED) == [ended.reservation]
    assert len(await whole(kept, 50, State.QUEUED)) == AT_ONCE - 1
