"""The demo: submits one image for each kind of task and reports on the results.

It uses the gateway's public HTTP API alone, through the client for callers.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TextIO

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from service.client import (
    EXTENSIONS,
    AsyncGatewayClient,
    Content,
    Cost,
    GatewayError,
    KindName,
    NoConnection,
    Task,
    TaskOptions,
)
from service.demo.verify import CheckResult, format_size, verify_results

FINAL_STATES = frozenset({"succeeded", "failed", "no task", "timed out"})
_COLUMNS = ("kind", "state", "seconds", "cost", "file", "pixels", "check")
_RIGHT_ALIGNED = frozenset({"seconds"})


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Options of a run."""

    base_url: str
    """Address of the tenants' port, such as `http://127.0.0.1:8080`."""
    token: str
    """A tenant's bearer token. The four tasks are charged to that tenant."""
    folder: Path
    """Receives the results; created if missing. Files of an earlier run are overwritten."""
    output: TextIO
    """Receives the progress and the report."""
    as_json: bool = False
    """Whether the report is JSON, and no progress is shown."""
    timeout_seconds: float = 120.0
    """Limit for each task, from the upload to the last byte of its results."""


@dataclass(frozen=True, slots=True)
class Job:
    kind: KindName
    image_name: str
    """Name of a file in `images`, fit for the kind."""
    options: TaskOptions = field(default_factory=TaskOptions)

    def read_image(self) -> bytes:
        return resources.files("service.demo").joinpath("images", self.image_name).read_bytes()


JOBS = (
    Job("upscale", "photo.jpg", {"scale": 2}),
    Job("vectorize", "logo.png", {"colors": 5}),
    Job("face-enhance", "face.jpg"),
    Job("seamless", "texture.jpg", {"fit": 0.5}),
)


async def run_demo(options: DemoOptions) -> int:
    """Run one task of each kind at the same time and report on them. Return 0 if every result is valid, else 1.

    Failures of the gateway and of the connection are reported on `output`. A cancelled run (Ctrl-C) first lists the
    submitted tasks, which the gateway continues, then raises `CancelledError`.
    """
    try:
        _create_folder(options.folder)
        # A demo reports a failure at once, instead of repeating the call.
        async with AsyncGatewayClient(
            options.base_url, options.token, retry_seconds=0, timeout_seconds=options.timeout_seconds
        ) as gateway:
            await gateway.get_quota()  # checks the address and the token, at no cost
            tasks = await _run_all_tasks(options, gateway)
    except GatewayError as error:
        hint = " — start a gateway with `make run`" if isinstance(error, NoConnection) else ""
        return _print_report(options, (), error=f"{error}{hint}")
    return _print_report(options, tasks)


async def _run_all_tasks(options: DemoOptions, gateway: AsyncGatewayClient) -> Sequence["DemoTask"]:
    tasks: list[DemoTask] = []
    try:
        with show_progress(None if options.as_json else options.output) as show_state:
            async with asyncio.TaskGroup() as group:
                for job in JOBS:
                    task = DemoTask(job, gateway, options, show_state)
                    tasks.append(task)
                    group.create_task(task.run())
    except asyncio.CancelledError:
        submitted = ", ".join(task.task_id for task in tasks if task.task_id and task.state not in FINAL_STATES)
        options.output.write(f"Interrupted. The gateway continues: {submitted or 'nothing'}\n")
        raise
    return tasks


def _create_folder(folder: Path) -> None:
    # Before anything is paid for.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GatewayError(f"The results can't be written to {folder}: {error.strerror}") from error


class DemoTask:
    """One task. Its attributes can be read at any time, also after a cancelled run."""

    def __init__(
        self, job: Job, gateway: AsyncGatewayClient, options: DemoOptions, on_state: Callable[[str, str], None]
    ) -> None:
        """`on_state` is called with the kind and its state after every poll."""
        self.kind = job.kind
        self.state = "waiting"
        self.elapsed_seconds = 0.0
        """From the start to the last poll."""
        self.task_id: str | None = None
        self.cost: Cost | None = None
        self.results: tuple[CheckResult, ...] = ()
        self.files: Mapping[str, str] = {}
        """Names of the files written, by the names of the results."""
        self.errors: tuple[str, ...] = ()
        self._job = job
        self._gateway = gateway
        self._options = options
        self._on_state = on_state
        self._started_at = time.monotonic()

    async def run(self) -> None:
        """Submit, poll, download and verify; failures end up in `errors`."""
        timeout_seconds = self._options.timeout_seconds
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._submit_and_verify()
        except TimeoutError:
            self._set_state("timed out")
            continued = f"; the gateway continues {self.task_id}" if self.task_id else ""
            self.errors = (f"not done after {timeout_seconds:g} s{continued}",)
        except GatewayError as error:
            if self.task_id is None:
                self._set_state("no task")
            self.errors = (str(error),)

    def describe(self) -> Mapping[str, Any]:
        """Return its form in the JSON report."""
        return {
            "kind": self.kind,
            "state": self.state,
            "seconds": round(self.elapsed_seconds, 1),
            "task": self.task_id,
            "cost": self.cost,
            "files": self.files,
            "errors": self.errors,
        }

    async def _submit_and_verify(self) -> None:
        self._set_state("submitting")
        image = self._job.read_image()
        task: Task = await self._gateway.submit(self._job.kind, image, **self._job.options)
        self._update(task)
        task = await self._gateway.wait(task, on_update=self._update)
        files = {artifact.name: await self._gateway.fetch_artifact(artifact) for artifact in task.artifacts}
        self.files = await asyncio.to_thread(_write_files, self._options.folder, self.kind, files)
        contents = {name: file.content for name, file in files.items()}
        self.results = await asyncio.to_thread(verify_results, self.kind, image, contents)
        self.errors = tuple(result.text for result in self.results if not result.is_valid)

    def _update(self, task: Task) -> None:
        self.task_id = task.id
        self.cost = task.cost
        self._set_state(task.state)

    def _set_state(self, state: str) -> None:
        self.state = state
        self.elapsed_seconds = time.monotonic() - self._started_at
        self._on_state(self.kind, state)


def _write_files(folder: Path, kind: str, files: Mapping[str, Content]) -> Mapping[str, str]:
    names = {name: f"{kind}-{name}.{EXTENSIONS.get(file.media_type, 'bin')}" for name, file in files.items()}
    try:
        for name, file in files.items():
            (folder / names[name]).write_bytes(file.content)
    except OSError as error:
        raise GatewayError(f"the results cannot be written: {error}") from error
    return names


@contextmanager
def show_progress(output: TextIO | None) -> Iterator[Callable[[str, str], None]]:
    """Yield a function that shows the state of a kind: in a live table of a terminal, line by line, or not at all."""
    if output is None:
        yield lambda _kind, _state: None
        return
    if output.isatty():
        columns = (SpinnerColumn("line", finished_text=" "), "{task.description}", "{task.fields[state]}")
        console = Console(file=output, force_terminal=True)
        with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
            rows = {str(job.kind): progress.add_task(job.kind, total=1, state="waiting") for job in JOBS}
            yield lambda kind, state: progress.update(rows[kind], state=state, completed=state in FINAL_STATES)
        return
    states: dict[str, str] = {}

    def write_change(kind: str, state: str) -> None:
        if states.get(kind) != state:
            states[kind] = state
            output.write(f"{kind}: {state}\n")
            output.flush()

    yield write_change
    output.write("\n")


def _print_report(options: DemoOptions, tasks: Sequence[DemoTask], *, error: str = "") -> int:
    if options.as_json:
        is_valid = not error and not any(task.errors for task in tasks)
        report = {"valid": is_valid, "tasks": [task.describe() for task in tasks], "error": error or None}
        options.output.write(msgspec.json.format(msgspec.json.encode(report), indent=2).decode() + "\n")
        return 0 if is_valid else 1
    if error:
        options.output.write(f"{error}\n")
        return 1
    options.output.write(f"{format_report(tasks)}\n")
    errors = group_errors(tasks)
    if errors:
        options.output.writelines(f"{line}\n" for line in errors)
        return 1
    options.output.write(f"All results are valid. They are in {options.folder}\n")
    return 0


def format_report(tasks: Iterable[DemoTask]) -> str:
    """Format a table with one line for each result, and one for a task without any."""
    rows: list[Sequence[str]] = [_COLUMNS]
    for task in tasks:
        first = (task.kind, task.state, f"{task.elapsed_seconds:.1f}", format_cost(task.cost))
        results = [
            (
                task.files.get(result.name, ""),
                format_size(result.size),
                result.text if result.is_valid else "wrong, see below",
            )
            for result in task.results
        ] or [("", "", "")]
        rows.append((*first, *results[0]))
        rows.extend(("", "", "", "", *result) for result in results[1:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(_format_row(row, widths) for row in rows)


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if name in _RIGHT_ALIGNED else cell.ljust(width)
        for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"


def format_cost(cost: Cost | None) -> str:
    """Format a cost as uses, yuan or both: `~` marks an estimate, `?` an unknown cost."""
    if cost is None or cost.basis == "unknown":
        return "?"
    parts = []
    if cost.count:
        parts.append(f"{cost.count} use{'' if cost.count == 1 else 's'}")
    if cost.money:
        parts.append(f"¥{cost.money:.2f}")
    return ("~" if cost.basis == "estimated" else "") + (" + ".join(parts) or "nothing")


def group_errors(tasks: Iterable[DemoTask]) -> Sequence[str]:
    """Return each distinct error once, after the kinds that have it."""
    kinds_by_error: dict[str, list[str]] = {}
    for task in tasks:
        for error in task.errors:
            kinds_by_error.setdefault(error, []).append(task.kind)
    return [f"{', '.join(kinds)}: {error}" for error, kinds in kinds_by_error.items()]
