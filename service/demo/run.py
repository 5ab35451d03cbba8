"""The demo: one task of each kind at the same time."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TextIO

from service.demo import DemoOptions
from service.demo.client import Artifact, Cost, GatewayClient, GatewayError, ResultFile, Task, open_client, single_line
from service.demo.verify import CheckResult, format_size, verify_results


@dataclass(frozen=True, slots=True)
class Job:
    kind: str
    image_name: str
    """Name of a file in `images`, fit for the kind."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Form fields that go with the picture."""

    def read_image(self) -> bytes:
        return resources.files("service.demo").joinpath("images", self.image_name).read_bytes()


JOBS = (
    Job("upscale", "photo.jpg", {"scale": "2"}),
    Job("vectorize", "logo.png", {"colors": "5"}),
    Job("face-enhance", "face.jpg"),
    Job("seamless", "texture.jpg", {"fit": "0.5"}),
)
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/svg+xml": "svg"}


class DemoTask:
    """Runs one task; what it knows so far can be read at any time, also after it was cut short."""

    def __init__(
        self,
        job: Job,
        gateway: GatewayClient,
        folder: Path,
        *,
        timeout_seconds: float,
        on_state: Callable[[str, str], None],
    ) -> None:
        """`note` is told the kind and its state whenever the state was looked at."""
        self.kind = job.kind
        self.state = "waiting"
        self.elapsed_seconds = 0.0
        """From the beginning to the last look."""
        self.task_id: str | None = None
        self.cost: Cost | None = None
        self.results: tuple[CheckResult, ...] = ()
        self.files: Mapping[str, str] = {}
        """Names of the files written, by the names of the results."""
        self.errors: tuple[str, ...] = ()
        self._job = job
        self._gateway = gateway
        self._folder = folder
        self._timeout_seconds = timeout_seconds
        self._on_state = on_state
        self._started_at = time.monotonic()

    async def run(self) -> None:
        """Run to the end; whatever goes wrong on the way becomes a complaint."""
        self._started_at = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._submit_and_verify()
        except TimeoutError:
            self._set_state("timed out")
            goes_on = f"; the gateway goes on with {self.task_id}" if self.task_id else ""
            self.errors = (f"not done after {self._timeout_seconds:g} s{goes_on}",)
        except GatewayError as error:
            if self.task_id is None:
                self._set_state("no task")
            self.errors = (str(error),)

    async def _submit_and_verify(self) -> None:
        self._set_state("submitting")
        picture = self._job.read_image()
        sighting = await self._gateway.submit(self.kind, (self._job.image_name, picture), self._job.options)
        self._update(sighting.task)
        while not sighting.task.is_finished:
            await asyncio.sleep(sighting.pause_seconds)
            sighting = await self._gateway.get_task(sighting.task.id)
            self._update(sighting.task)
        if sighting.task.state == "failed":
            self.errors = (f"the task failed: {_failure_reason(sighting.task.error)}",)
            return
        fetched = await self._fetch_artifacts(sighting.task.artifacts)
        self.files = await asyncio.to_thread(_write_files, self._folder, self.kind, fetched)
        contents = {name: file.content for name, file in fetched.items()}
        self.results = await asyncio.to_thread(verify_results, self.kind, picture, contents)
        self.errors = tuple(finding.text for finding in self.results if not finding.is_valid)

    async def _fetch_artifacts(self, artifacts: tuple[Artifact, ...]) -> Mapping[str, ResultFile]:
        return {artifact.name: await self._gateway.fetch_artifact(artifact) for artifact in artifacts}

    def _update(self, task: Task) -> None:
        self.task_id = task.id
        self.cost = task.cost
        self._set_state(task.state)

    def _set_state(self, state: str) -> None:
        self.state = state
        self.elapsed_seconds = time.monotonic() - self._started_at
        self._on_state(self.kind, state)


def _write_files(folder: Path, kind: str, fetched: Mapping[str, ResultFile]) -> Mapping[str, str]:
    names = {name: f"{kind}-{name}.{_EXTENSIONS.get(file.content_type, 'bin')}" for name, file in fetched.items()}
    try:
        for name, file in fetched.items():
            (folder / names[name]).write_bytes(file.content)
    except OSError as error:
        raise GatewayError(f"the results cannot be written: {error}") from error
    return names


def _failure_reason(error: Any) -> str:
    """Say why a task failed, whichever shape the reason has."""
    if isinstance(error, dict):
        parts = [error[key] for key in ("title", "detail", "message") if isinstance(error.get(key), str)]
        error = ": ".join(parts)
    return single_line(error) if isinstance(error, str) and error else "no reason is given"


FINAL_STATES = frozenset({"succeeded", "failed", "no task", "timed out"})
REDRAW_SECONDS = 0.2
_SPINNER = "|/-\\"
_CLEAR_LINES = "\x1b[{lines}F\x1b[J"


class Progress(Protocol):
    def set_state(self, kind: str, state: str) -> None:
        """Take in the state of a task, changed or not."""

    async def animate(self) -> None:
        """Keep what is shown fresh; runs until cancelled, or returns at once where there is nothing to do."""

    def clear(self) -> None:
        """Make room for the table."""


class LineProgress:
    """One line for each change, fit for a log."""

    def __init__(self, output: TextIO) -> None:
        self._output = output
        self._states: dict[str, str] = {}

    def set_state(self, kind: str, state: str) -> None:
        if self._states.get(kind) != state:
            self._states[kind] = state
            self._output.write(f"{kind}: {state}\n")
            self._output.flush()

    async def animate(self) -> None:
        """Lines that were written stay as they are."""

    def clear(self) -> None:
        self._output.write("\n")


class LiveProgress:
    """One line for each task, redrawn with its state and the seconds it has taken."""

    def __init__(self, output: TextIO, kinds: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._output = output
        self._clock = clock
        self._started_at = clock()
        self._states = dict.fromkeys(kinds, "waiting")
        self._finished_at: dict[str, float] = {}
        self._frame = 0
        self._drawn_lines = 0

    def set_state(self, kind: str, state: str) -> None:
        self._states[kind] = state
        if state in FINAL_STATES:
            self._finished_at.setdefault(kind, self._clock())
        self._draw()

    async def animate(self) -> None:
        while True:
            self._frame += 1
            self._draw()
            await asyncio.sleep(REDRAW_SECONDS)

    def clear(self) -> None:
        self._output.write(self._rewind())
        self._output.flush()
        self._drawn_lines = 0

    def _draw(self) -> None:
        now = self._clock()
        width = max(map(len, self._states))
        spinner = _SPINNER[self._frame % len(_SPINNER)]
        lines = [
            f"{' ' if kind in self._finished_at else spinner} {kind:<{width}}  {state:<10}"
            f" {self._finished_at.get(kind, now) - self._started_at:6.1f} s\n"
            for kind, state in self._states.items()
        ]
        self._output.write(self._rewind() + "".join(lines))
        self._output.flush()
        self._drawn_lines = len(lines)

    def _rewind(self) -> str:
        return _CLEAR_LINES.format(lines=self._drawn_lines) if self._drawn_lines else ""


_COLUMNS = ("kind", "state", "seconds", "cost", "file", "pixels", "check")
_RIGHT_ALIGNED = frozenset({"seconds"})


def format_report(errands: Iterable[DemoTask]) -> str:
    """Draw one line for each result, and one for a task without any."""
    rows: list[Sequence[str]] = [_COLUMNS]
    for errand in errands:
        first = (errand.kind, errand.state, f"{errand.elapsed_seconds:.1f}", format_cost(errand.cost))
        results = [
            (
                errand.files.get(finding.name, ""),
                format_size(finding.size),
                finding.text if finding.is_valid else "wrong, see below",
            )
            for finding in errand.results
        ] or [("", "", "")]
        rows.append((*first, *results[0]))
        rows.extend(("", "", "", "", *result) for result in results[1:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(_format_row(row, widths) for row in rows)


def group_errors(errands: Iterable[DemoTask]) -> Sequence[str]:
    """Say each complaint once, after the kinds that have it."""
    kinds: dict[str, list[str]] = {}
    for errand in errands:
        for complaint in errand.errors:
            kinds.setdefault(complaint, []).append(errand.kind)
    return [f"{', '.join(those)}: {complaint}" for complaint, those in kinds.items()]


def format_cost(cost: Cost | None) -> str:
    """Write a cost as uses, yuan or both: `~` marks an estimate, `?` a cost that nobody knows."""
    if cost is None or cost.basis == "unknown":
        return "?"
    parts = []
    if cost.count:
        parts.append(f"{cost.count} use{'' if cost.count == 1 else 's'}")
    if cost.money:
        parts.append(f"¥{cost.money:.2f}")
    return ("~" if cost.basis == "estimated" else "") + (" + ".join(parts) or "nothing")


def _format_row(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if name in _RIGHT_ALIGNED else cell.ljust(width)
        for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"


async def run_tasks(options: DemoOptions) -> int:
    """Run the demo as `run_demo` promises."""
    try:
        _create_folder(options.folder)
        async with open_client(options.base_url, options.token, options.timeout_seconds) as gateway:
            await gateway.ping()
            errands = await _run_all_tasks(options, gateway)
    except GatewayError as error:
        options.output.write(f"{error}\n")
        return 1
    return _print_report(options, errands)


async def _run_all_tasks(options: DemoOptions, gateway: GatewayClient) -> Sequence[DemoTask]:
    progress = _create_progress(options)
    errands = [
        DemoTask(job, gateway, options.folder, timeout_seconds=options.timeout_seconds, on_state=progress.set_state)
        for job in JOBS
    ]
    try:
        async with asyncio.TaskGroup() as around:
            animation = around.create_task(progress.animate())
            async with asyncio.TaskGroup() as group:
                for errand in errands:
                    group.create_task(errand.run())
            animation.cancel()
    except asyncio.CancelledError:
        submitted = ", ".join(
            errand.task_id for errand in errands if errand.task_id and errand.state not in FINAL_STATES
        )
        options.output.write(f"Interrupted. The gateway goes on with: {submitted or 'nothing'}\n")
        raise
    progress.clear()
    return errands


def _create_folder(folder: Path) -> None:
    """Make sure, before anything is paid for, that there is a place for the results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GatewayError(f"The results cannot be put into {folder}: {error.strerror}") from error


def _create_progress(options: DemoOptions) -> Progress:
    if options.interactive:
        return LiveProgress(options.output, [job.kind for job in JOBS])
    return LineProgress(options.output)


def _print_report(options: DemoOptions, errands: Sequence[DemoTask]) -> int:
    options.output.write(f"{format_report(errands)}\n")
    wrong = group_errors(errands)
    if wrong:
        options.output.writelines(f"{line}\n" for line in wrong)
        return 1
    options.output.write(f"All results are real. They are in {options.folder}\n")
    return 0
