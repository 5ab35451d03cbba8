"""Runs tasks outside the event loop."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

from service.sandbox.faults import Kind, Panel
from service.sandbox.forms import Options, RejectedError
from service.sandbox.store import INPUT, Store, Task

_BENCHES: Final = 2


_UNEXPECTED: Final = "图片处理失败"


_log: Final = logging.getLogger(__name__)


Results: TypeAlias = dict[str, int]
"""Size in bytes by the name of the file."""


class Workshop:
    """Works on the tasks of a store, two at a time, in the order of their submission."""

    def __init__(self, store: Store, panel: Panel) -> None:
        """Bind the workshop to its store.

        Args:
            store: holds the tasks.
            panel: says the price of a task that was not charged at its submit.

        """
        self._store = store
        self._panel = panel
        # One thread more than benches: taking in a new image never waits for a task.
        self._threads = ThreadPoolExecutor(_BENCHES + 1, thread_name_prefix="sandbox")
        self._benches = asyncio.Semaphore(_BENCHES)
        self._jobs: dict[str, asyncio.Task[None]] = {}
        self._calls: set[asyncio.Future[Results]] = set()
        self._started: set[str] = set()

    def resume(self) -> None:
        """Take up every task that has not ended."""
        for task in self._store.open_tasks():
            self.start(task)

    def start(self, task: Task) -> None:
        """Work on a task whose input lies in its folder."""
        job = asyncio.create_task(self._run(task), name=f"sandbox task {task.id}")
        self._jobs[task.id] = job
        job.add_done_callback(lambda _: self._jobs.pop(task.id, None))

    def started(self, task_id: str) -> bool:
        """Say whether a task that has not ended is being worked on, or still waits for its turn."""
        return task_id in self._started

    async def idle(self) -> None:
        """Wait until every task has ended."""
        while self._jobs:
            await asyncio.wait(self._jobs.values())

    async def take_in(self, task_id: str, image: bytes) -> None:
        """Look at an image and lay it down as the input of a task that may follow.

        Raises:
            RejectedError: it is no image that could be worked on.

        """
        await self._call(lambda: _take_in(self._store.folder_of(task_id), image))

    async def throw_away(self, task_id: str) -> None:
        """Remove the files of a task that does not exist."""
        await self._call(lambda: shutil.rmtree(self._store.folder_of(task_id), ignore_errors=True))

    async def drop(self) -> None:
        """Leave all tasks where they are. Waits for threads in the middle of their work, which nothing can stop."""
        jobs = [*self._jobs.values()]
        for job in jobs:
            job.cancel()
        await asyncio.gather(*jobs, *self._calls, return_exceptions=True)

    async def close(self) -> None:
        """Leave all tasks where they are; a later workshop on the same store resumes them."""
        await self.drop()
        self._threads.shutdown()

    async def _run(self, task: Task) -> None:
        folder = self._store.folder_of(task.id)
        try:
            async with self._benches:
                self._started.add(task.id)
                results, reason = await self._work(task, folder)
            await asyncio.sleep(task.ready - time.time())
        finally:
            self._started.discard(task.id)
        self._finish(task, results, reason)
        outdated = self._store.prune()
        await self._call(lambda: _remove(folder / INPUT, outdated))

    async def _call(self, function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._threads, function)

    async def _work(self, task: Task, folder: Path) -> tuple[Results, str | None]:
        if task.doomed is not None:
            return {}, task.doomed
        call = asyncio.get_running_loop().run_in_executor(self._threads, _produce, folder, task.kind, task.options)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        # Unlike awaiting the call, this leaves it alone when the job is cancelled: `drop` waits for it.
        await asyncio.wait({call})
        error = call.exception()
        if error is None:
            return call.result(), None
        if isinstance(error, RejectedError):
            return {}, str(error)
        _log.warning("a sandbox task failed", exc_info=error)
        return {}, _UNEXPECTED

    def _finish(self, task: Task, results: Results, reason: str | None) -> None:
        """Write the end of a task. Awaits nothing: the balance that is read must still be the one that is replaced."""
        balance = self._store.balance(task.user_key)
        if balance is not None and reason is None and not task.charged:
            # An account that ran dry since the submit keeps the little it has.
            balance = balance.pay(self._panel.dials.price(task.kind)) or balance
        ended = msgspec.structs.replace(
            task,
            state="completed" if reason is None else "failed",
            reason=reason,
            files=tuple(results),
            balance=balance,
        )
        self._store.finish(ended, sum(results.values()))


def _take_in(folder: Path, image: bytes) -> None:
    # Imported when needed, as below.
    from service.sandbox.imaging import probe  # noqa: PLC0415

    probe(image)
    folder.mkdir()
    (folder / INPUT).write_bytes(image)


def _produce(folder: Path, kind: Kind, options: Options) -> Results:
    # OpenCV and NumPy take most of a second to import, which nobody should wait for before the server listens.
    from service.sandbox.imaging import produce  # noqa: PLC0415

    return {path.name: path.stat().st_size for path in produce(kind, options, folder / INPUT, folder)}


def _remove(image: Path, folders: Iterable[Path]) -> None:
    image.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
