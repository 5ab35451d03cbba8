"""Handing out the results of tasks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from service.domain.errors import NotFound
from service.domain.tasks import Artifact, State, Task
from service.domain.tenants import Tenant
from service.usecases.board import Seen
from service.usecases.follow import Follow
from service.usecases.ports import Artifacts, Asked, Fetched, RegistryView

RECENT_SECONDS = 300.0
"""For so long after a task's end its results may not have arrived where the upstream keeps them."""


class Fetch:
    """Fetches a result for the tenant whose task it is of, from the address that the upstream gave for it."""

    def __init__(self, *, follow: Follow, artifacts: Artifacts, registry: RegistryView) -> None:
        self._follow = follow
        self._artifacts = artifacts
        self._registry = registry

    @asynccontextmanager
    async def __call__(
        self, tenant: Tenant, task_id: str, name: str, asked: Asked
    ) -> AsyncIterator[tuple[Task, Fetched]]:
        """A task with one of its results, which is fetched as long as the block lasts.

        Raises before the block: NotFound also for a task that has no such result, or none yet; else as
        `Follow.read` and `Artifacts.fetch` do.
        """
        seen = await self._follow.read(tenant, task_id)
        task = seen.task
        artifact = _artifact(task, name)
        account = self._registry.current.account(task.account)
        async with self._artifacts.fetch(account, artifact, asked, recent=_is_recent(seen)) as fetched:
            yield task, fetched


def _is_recent(seen: Seen) -> bool:
    ended = seen.task.finished or seen.task.updated
    return (seen.now - ended) / 1000 + time.monotonic() - seen.at < RECENT_SECONDS


def _artifact(task: Task, name: str) -> Artifact:
    if not task.state.ended:
        raise NotFound("This task has not ended yet, and has no results before. Follow it until it has.")
    if task.state is State.FAILED:
        raise NotFound("This task has failed, so it has no results.")
    for artifact in task.artifacts:
        if artifact.name == name:
            return artifact
    raise NotFound(f"This task has no result of that name; it has {', '.join(each.name for each in task.artifacts)}.")
