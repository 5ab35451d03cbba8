"""Processing of tasks, in threads."""

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

from service.sandbox.faults import FaultInjector, Kind
from service.sandbox.forms import Options, RejectedError
from service.sandbox.store import INPUT_NAME, Store, Task

_MAX_PARALLEL: Final = 2
_INTERNAL_ERROR: Final = "图片处理失败"
_log: Final = logging.getLogger(__name__)
ResultSizes: TypeAlias = dict[str, int]
"""Size in bytes by the name of the file."""


class Worker:
    """Processes the tasks of a store, two at a time, in the order of their submission."""

    def __init__(self, store: Store, fault_injector: FaultInjector) -> None:
        self._store = store
        self._fault_injector = fault_injector
        # One more thread, so that storing a new image never waits for a task.
        self._executor = ThreadPoolExecutor(_MAX_PARALLEL + 1, thread_name_prefix="sandbox")
        self._slots = asyncio.Semaphore(_MAX_PARALLEL)
        self._jobs: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Future[ResultSizes]] = set()
        self.running_ids: set[str] = set()
        """Ids of the unfinished tasks in progress; the others are queued."""

    def resume(self) -> None:
        """Start every unfinished task of the store."""
        for task in self._store.list_open_tasks():
            self.start(task)

    def start(self, task: Task) -> None:
        """Process a task whose input is stored."""
        job = asyncio.create_task(self._run_task(task), name=f"sandbox task {task.id}")
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)

    async def wait_until_idle(self) -> None:
        while self._jobs:
            await asyncio.wait(self._jobs)

    async def store_image(self, task_id: str, image: bytes) -> None:
        """Check an image and store it as the input of a task. Raises RejectedError."""
        await self._run_in_thread(lambda: _store_image(self._store.task_folder(task_id), image))

    async def discard_files(self, task_id: str) -> None:
        """Remove the files of a task that was not accepted."""
        await self._run_in_thread(lambda: shutil.rmtree(self._store.task_folder(task_id), ignore_errors=True))

    async def cancel_all(self) -> None:
        """Interrupt all tasks. Waits for busy threads, which can't be interrupted."""
        for job in self._jobs:
            job.cancel()
        await asyncio.gather(*self._jobs, *self._calls, return_exceptions=True)

    async def close(self) -> None:
        """Interrupt all tasks; another worker on the same store can resume them."""
        await self.cancel_all()
        self._executor.shutdown()

    async def _run_task(self, task: Task) -> None:
        folder = self._store.task_folder(task.id)
        try:
            async with self._slots:
                self.running_ids.add(task.id)
                results, reason = await self._process_task(task, folder)
            await asyncio.sleep(task.ready_at - time.time())
        finally:
            self.running_ids.discard(task.id)
        self._finish_task(task, results, reason)
        pruned = self._store.prune_tasks()
        await self._run_in_thread(lambda: _remove_files(folder / INPUT_NAME, pruned))

    async def _run_in_thread(self, function: Callable[[], None]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._executor, function)

    async def _process_task(self, task: Task, folder: Path) -> tuple[ResultSizes, str | None]:
        if task.planned_failure is not None:
            return {}, task.planned_failure
        call = asyncio.get_running_loop().run_in_executor(
            self._executor, _process_image, folder, task.kind, task.options
        )
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        # Unlike `await call`, this does not cancel the call with the job: `cancel_all` waits for it.
        await asyncio.wait({call})
        error = call.exception()
        if error is None:
            return call.result(), None
        if isinstance(error, RejectedError):
            return {}, str(error)
        _log.warning("a sandbox task failed", exc_info=error)
        return {}, _INTERNAL_ERROR

    def _finish_task(self, task: Task, results: ResultSizes, reason: str | None) -> None:
        """Write the end of a task. Must not await: no other task may change the balance between read and write."""
        balance = self._store.get_balance(task.user_key)
        if balance is not None and reason is None and not task.is_charged:
            # An account that can't pay any more keeps its balance.
            balance = balance.charge(self._fault_injector.behaviour.price_of(task.kind)) or balance
        finished = msgspec.structs.replace(
            task,
            state="completed" if reason is None else "failed",
            reason=reason,
            files=tuple(results),
            balance=balance,
        )
        self._store.finish_task(finished, sum(results.values()))


def _store_image(folder: Path, image: bytes) -> None:
    # Imported when needed: Pillow takes a tenth of a second, by which the server would start later.
    from service.sandbox.imaging import check_image  # noqa: PLC0415

    check_image(image)
    folder.mkdir()
    (folder / INPUT_NAME).write_bytes(image)


def _process_image(folder: Path, kind: Kind, options: Options) -> ResultSizes:
    from service.sandbox.imaging import apply_operation  # noqa: PLC0415

    return {path.name: path.stat().st_size for path in apply_operation(kind, options, folder / INPUT_NAME, folder)}


def _remove_files(image: Path, folders: Iterable[Path]) -> None:
    image.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
