"""Pagination is stable while tasks are added or lost: each remaining task is listed once, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from service.domain.tasks import Kind, State
from service.usecases.ports import CheckOutcome, TaskPage
from tests.storage.store_fixture import KEYS, StoreFixture, open_store
from tests.support.valkey import Valkey

TASKS = 230
"""More than one page."""


@pytest.fixture
async def kept(valkey: Valkey) -> AsyncIterator[StoreFixture]:
    """Yield a tenant whose tasks were all created in the same millisecond."""
    async with open_store(valkey.url) as found:
        await found.advance(3_600_000)
        await found.accept_tasks(*(f"r{number:03}" for number in range(TASKS)))
        yield found


async def read_page(kept: StoreFixture, cursor: str | None, limit: int, state: State | None = None) -> TaskPage:
    return await kept.tasks.list_page(1, state=state, kind=None, limit=limit, cursor=cursor)


async def read_all_pages(kept: StoreFixture, limit: int, state: State | None = None) -> list[str]:
    names, cursor = list[str](), None
    while True:
        found = await read_page(kept, cursor, limit, state)
        assert len(found.tasks) <= limit
        names += [task.reservation for task in found.tasks]
        cursor = found.next_cursor
        if cursor is None:
            return names


@pytest.mark.parametrize("limit", [1, 7, 100, TASKS - 1, TASKS, TASKS + 1])
async def test_same_millisecond(kept: StoreFixture, limit: int) -> None:
    """Tasks created in the same millisecond have a stable order across pages."""
    assert await read_all_pages(kept, limit) == [f"r{number:03}" for number in reversed(range(TASKS))]


async def test_added_meanwhile(kept: StoreFixture) -> None:
    """Added tasks move no other task to another page."""
    names, cursor = list[str](), None
    for added in range(TASKS):
        found = await read_page(kept, cursor, 10)
        names += [task.reservation for task in found.tasks]
        cursor = found.next_cursor
        if cursor is None:
            break
        await kept.accept_tasks(f"z{added:03}", f"a{added:03}")
    old = [name for name in names if name.startswith("r")]
    assert old == [f"r{number:03}" for number in reversed(range(TASKS))]
    assert not [name for name in names if name.startswith("z")]
    assert len(names) == len(set(names))


async def test_lost_meanwhile(kept: StoreFixture) -> None:
    """A cursor stays valid when its task and its neighbours are deleted."""
    first = await read_page(kept, None, 10)
    for name in [task.reservation for task in first.tasks] + ["r219", "r218"]:
        await kept.client.delete(KEYS.task(name))
        await kept.client.zrem(KEYS.tenant_tasks(1), name)
    following = await read_page(kept, first.next_cursor, 2)
    assert [task.reservation for task in following.tasks] == ["r217", "r216"]


async def test_few_that_match(kept: StoreFixture) -> None:
    """Tasks that do not match the filter are skipped, however many there are."""
    assert await read_all_pages(kept, 5, State.SUCCEEDED) == []
    ended = await kept.check_due_task(CheckOutcome.SUCCEEDED)
    assert ended
    assert ended.kind is Kind.SEAMLESS
    assert await read_all_pages(kept, 5, State.SUCCEEDED) == [ended.reservation]
    assert len(await read_all_pages(kept, 50, State.QUEUED)) == TASKS - 1
