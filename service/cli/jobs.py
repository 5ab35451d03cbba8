"""Submissions of files by the command `submit`: some at a time, with their progress, keys and results."""

from __future__ import annotations

import asyncio
import hashlib
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from service.cli.callers import ExitCode, exit_code_of
from service.cli.download import STREAM, Target, is_folder, print_result, save_results
from service.cli.formatting import format_number
from service.client import (
    AsyncGatewayClient,
    GatewayError,
    KindName,
    ProblemError,
    Task,
    TaskFailed,
    TaskOptions,
    WaitTimeout,
    single_line,
)
from service.domain.tasks import OPTIONS, Kind

_TICK_SECONDS = 1.0


@dataclass
class Job:
    """The submission of one file, or of the image at one URL."""

    source: str
    content: bytes | None = None
    """Of standard input, which is read before; a thread that reads it could not be interrupted."""
    key: str = ""
    """Of the submission, once it is sent."""
    task: Task | None = None
    is_replayed: bool = False
    results: list[str] = field(default_factory=list)
    error: GatewayError | OSError | ValueError | None = None

    @property
    def label(self) -> str:
        """Its name for people, without the query of a URL, which may grant access."""
        return single_line(self.source.partition("?")[0] if is_url(self.source) else self.source)

    @property
    def state(self) -> str:
        return "waiting" if self.task is None and self.error is None else self.task.state if self.task else "no task"

    @property
    def exit_code(self) -> ExitCode:
        return exit_code_of(self.error) if self.error else ExitCode.SUCCESS

    def describe(self) -> Mapping[str, Any]:
        """Return its form in the JSON output."""
        problem = self.error.problem if isinstance(self.error, ProblemError) else None
        error = {"message": str(self.error), "code": problem.code if problem else None}
        error |= {"submission_id": problem.submission_id} if problem and problem.submission_id else {}
        return {
            "file": self.source,
            "task": self.task,
            "replayed": self.is_replayed,
            "results": self.results,
            "error": error if self.error else None,
        }


@dataclass(frozen=True)
class Plan:
    """How all files are submitted."""

    kind: KindName
    options: TaskOptions
    metadata: Mapping[str, str]
    webhook_url: str | None
    idempotency_key: str | None
    is_new: bool
    can_wait: bool
    timeout_seconds: float
    max_jobs: int
    output: str | None

    def make_key(self, image: bytes) -> str:
        """Return the key of a submission: the same for the same content or URL, which then is paid for once."""
        if self.idempotency_key:
            return self.idempotency_key
        if self.is_new:
            return str(uuid.uuid4())
        defaults = {item.name: item.default for item in msgspec.structs.fields(OPTIONS[Kind(self.kind)])}
        changed = {name: value for name, value in self.options.items() if value != defaults[name]}
        content = (self.kind, sorted(changed.items()), sorted(self.metadata.items()), self.webhook_url)
        return hashlib.sha256(msgspec.json.encode(content) + hashlib.sha256(image).digest()).hexdigest()

    def find_target(self, source: str) -> Target:
        path = Path(self.output or "")
        return Target(path, f"{stem_of(source)}-{self.kind}" if is_folder(self.output or "") else "")


class Submitter:
    """Runs jobs, some at a time. Failures end up in the jobs."""

    def __init__(self, gateway: AsyncGatewayClient, plan: Plan, on_change: Callable[[], None]) -> None:
        self._gateway = gateway
        self._plan = plan
        self._on_change = on_change
        self._slots = asyncio.Semaphore(plan.max_jobs)

    async def run(self, job: Job) -> None:
        async with self._slots:
            try:
                await self._run(job)
            except (TaskFailed, WaitTimeout) as error:
                job.task, job.error = error.task, error
            except (GatewayError, OSError, ValueError) as error:  # the last is of text that is not Unicode
                job.error = error
        self._on_change()

    async def _run(self, job: Job) -> None:
        plan, gateway = self._plan, self._gateway
        url = job.source if is_url(job.source) else None
        image = job.content
        if image is None and url is None:
            image = await asyncio.to_thread(Path(job.source).read_bytes)
        job.key = plan.make_key(job.source.encode() if image is None else image)
        submitted = await gateway.submit(
            plan.kind,
            image,
            image_url=url,
            metadata=plan.metadata,
            webhook_url=plan.webhook_url,
            idempotency_key=job.key,
            **plan.options,
        )
        job.is_replayed = submitted.is_replayed
        self._update(job, submitted)
        if not plan.can_wait:
            return

        def update(task: Task) -> None:
            self._update(job, task)

        task = await gateway.wait(submitted, timeout_seconds=plan.timeout_seconds, on_update=update)
        if plan.output == STREAM:
            await print_result(gateway, task, None)
        elif plan.output:
            job.results = [str(path) for path in await save_results(gateway, task, plan.find_target(job.source), ())]

    def _update(self, job: Job, task: Task) -> None:
        job.task = task
        self._on_change()


async def submit_all(jobs: Sequence[Job], plan: Plan, place: tuple[str, str], *, is_quiet: bool) -> None:
    # Busy limits of the tenant pass while its tasks end.
    async with AsyncGatewayClient(*place, retry_seconds=plan.timeout_seconds) as gateway:
        with _show_progress(jobs, plan, is_shown=not is_quiet and sys.stderr.isatty()) as show:
            submitter = Submitter(gateway, plan, show)
            ticker = asyncio.create_task(_tick(show))
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(submitter.run(job))
            ticker.cancel()


async def _tick(show: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(_TICK_SECONDS)
        show()


@contextmanager
def _show_progress(jobs: Sequence[Job], plan: Plan, *, is_shown: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that draws the progress on a terminal: a step for each task accepted, and for each ended."""
    if not is_shown:
        yield lambda: None
        return
    started_at = time.monotonic()
    steps = 2 if plan.can_wait else 1

    def describe(_: object) -> str:
        counts = Counter(job.state for job in jobs)
        states = ", ".join(f"{count} {state}" for state, count in counts.items()) if len(jobs) > 1 else jobs[0].state
        return f"{states}, {time.monotonic() - started_at:.0f} s"

    label = format_number(len(jobs), "image")
    with click.progressbar(
        length=steps * len(jobs), label=label, file=sys.stderr, show_eta=False, item_show_func=describe
    ) as bar:

        def show() -> None:
            done = sum(steps if job.error or (job.task and job.task.has_ended) else bool(job.task) for job in jobs)
            bar.current_item = done
            bar.update(done - bar.pos)
            bar.render_progress()

        show()
        yield show


def is_url(source: str) -> bool:
    return source.lower().startswith(("http://", "https://"))


def stem_of(source: str) -> str:
    if is_url(source):
        return Path(urlsplit(source).path).stem or "image"
    return "stdin" if source == STREAM else Path(source).stem
