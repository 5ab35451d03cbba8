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
async def task_store(valkey: Valkey) -> AsyncIterator[StoreFixture]:
    """Yield a tenant whose tasks were all created in the same millisecond."""
    async with open_store(valkey.url) as store:
        await store.advance(3_600_000)
        await store.accept_tasks(*(f"r{number:03}" for number in range(TASKS)))
        yield store


async def read_page(task_store: StoreFixture, cursor: str | None, limit: int, state: State | None = None) -> TaskPage:
    return await task_store.tasks.list_page(1, state=state, kind=None, limit=limit, cursor=cursor)


async def read_all_pages(task_store: StoreFixture, limit: int, state: State | None = None) -> list[str]:
    names, cursor = list[str](), None
    while True:
        result = await read_page(task_store, cursor, limit, state)
        assert len(result.tasks) <= limit
        names += [task.reservation for task in result.tasks]
        cursor = result.next_cursor
        if cursor is None:
            return names


@pytest.mark.parametrize("limit", [1, 7, 100, TASKS - 1, TASKS, TASKS + 1])
async def test_same_millisecond(task_store: StoreFixture, limit: int) -> None:
    """Tasks created in the same millisecond have a stable order across pages."""
    assert await read_all_pages(task_store, limit) == [f"r{number:03}" for number in reversed(range(TASKS))]


async def test_added_meanwhile(task_store: StoreFixture) -> None:
    """Added tasks move no other task to another page."""
    names, cursor = list[str](), None
    for added in range(TASKS):
        result = await read_page(task_store, cursor, 10)
        names += [task.reservation for task in result.tasks]
        cursor = result.next_cursor
        if cursor is None:
            break
        await task_store.accept_tasks(f"z{added:03}", f"a{added:03}")
    old = [name for name in names if name.startswith("r")]
    assert old == [f"r{number:03}" for number in reversed(range(TASKS))]
    assert not [name for name in names if name.startswith("z")]
    assert len(names) == len(set(names))


async def test_lost_meanwhile(task_store: StoreFixture) -> None:
    """A cursor stays valid when its task and its neighbours are deleted."""
    first = await read_page(task_store, None, 10)
    for name in [task.reservation for task in first.tasks] + ["r219", "r218"]:
        await task_store.client.delete(KEYS.task(name))
        await task_store.client.zrem(KEYS.tenant_tasks(1), name)
    following = await read_page(task_store, first.next_cursor, 2)
    assert [task.reservation for task in following.tasks] == ["r217", "r216"]


async def test_few_that_match(task_store: StoreFixture) -> None:
    """Tasks that do not match the filter are skipped, however many there are."""
    assert await read_all_pages(task_store, 5, State.SUCCEEDED) == []
    ended = await task_store.check_due_task(CheckOutcome.SUCCEEDED)
    assert ended
    assert ended.kind is Kind.SEAMLESS
    assert await read_all_pages(task_store, 5, State.SUCCEEDED) == [ended.reservation]
    assert len(await read_all_pages(task_store, 50, State.QUEUED)) == TASKS - 1
