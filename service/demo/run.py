"""The demo: one task of each kind at the same time."""

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Protocol, TextIO

from service.demo import DemoOptions
from service.demo.client import Artifact, Cost, File, Gateway, GatewayError, Task, connect, plain
from service.demo.verify import Finding, examine, size_text


@dataclass(frozen=True, slots=True)
class Job:
    kind: str
    picture: str
    """Name of a file in `pictures`, fit for the kind."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Form fields that go with the picture."""

    def read(self) -> bytes:
        return resources.files("service.demo").joinpath("pictures", self.picture).read_bytes()


JOBS = (
    Job("upscale", "photo.jpg", {"scale": "2"}),
    Job("vectorize", "logo.png", {"colors": "5"}),
    Job("face-enhance", "face.jpg"),
    Job("seamless", "texture.jpg", {"fit": "0.5"}),
)

_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "image/webp": "webp", "image/svg+xml": "svg"}


class Errand:
    """Runs one task; what it knows so far can be read at any time, also after it was cut short."""

    def __init__(
        self,
        job: Job,
        gateway: Gateway,
        folder: Path,
        *,
        timeout_seconds: float,
        note: Callable[[str, str], None],
    ) -> None:
        """`note` is told the kind and its state whenever the state was looked at."""
        self.kind = job.kind
        self.state = "waiting"
        self.seconds = 0.0
        """From the beginning to the last look."""
        self.task_id: str | None = None
        self.cost: Cost | None = None
        self.findings: tuple[Finding, ...] = ()
        self.files: Mapping[str, str] = {}
        """Names of the files written, by the names of the results."""
        self.complaints: tuple[str, ...] = ()
        self._job = job
        self._gateway = gateway
        self._folder = folder
        self._timeout_seconds = timeout_seconds
        self._note = note
        self._begin = time.monotonic()

    async def run(self) -> None:
        """Run to the end; whatever goes wrong on the way becomes a complaint."""
        self._begin = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout_seconds):
                await self._run()
        except TimeoutError:
            self._enter("timed out")
            goes_on = f"; the gateway goes on with {self.task_id}" if self.task_id else ""
            self.complaints = (f"not done after {self._timeout_seconds:g} s{goes_on}",)
        except GatewayError as error:
            if self.task_id is None:
                self._enter("no task")
            self.complaints = (str(error),)

    async def _run(self) -> None:
        self._enter("submitting")
        picture = self._job.read()
        sighting = await self._gateway.submit(self.kind, (self._job.picture, picture), self._job.options)
        self._see(sighting.task)
        while not sighting.task.ended:
            await asyncio.sleep(sighting.pause_seconds)
            sighting = await self._gateway.look(sighting.task.id)
            self._see(sighting.task)
        if sighting.task.state == "failed":
            self.complaints = (f"the task failed: {_why(sighting.task.error)}",)
            return
        fetched = await self._fetch(sighting.task.artifacts)
        self.files = await asyncio.to_thread(_store, self._folder, self.kind, fetched)
        contents = {name: file.content for name, file in fetched.items()}
        self.findings = await asyncio.to_thread(examine, self.kind, picture, contents)
        self.complaints = tuple(finding.text for finding in self.findings if not finding.real)

    async def _fetch(self, artifacts: tuple[Artifact, ...]) -> Mapping[str, File]:
        return {artifact.name: await self._gateway.fetch(artifact) for artifact in artifacts}

    def _see(self, task: Task) -> None:
        self.task_id = task.id
        self.cost = task.cost
        self._enter(task.state)

    def _enter(self, state: str) -> None:
        self.state = state
        self.seconds = time.monotonic() - self._begin
        self._note(self.kind, state)


def _store(folder: Path, kind: str, fetched: Mapping[str, File]) -> Mapping[str, str]:
    names = {name: f"{kind}-{name}.{_EXTENSIONS.get(file.content_type, 'bin')}" for name, file in fetched.items()}
    try:
        for name, file in fetched.items():
            (folder / names[name]).write_bytes(file.content)
    except OSError as error:
        raise GatewayError(f"the results cannot be written: {error}") from error
    return names


def _why(error: Any) -> str:
    """Say why a task failed, whichever shape the reason has."""
    if isinstance(error, dict):
        parts = [error[key] for key in ("title", "detail", "message") if isinstance(error.get(key), str)]
        error = ": ".join(parts)
    return plain(error) if isinstance(error, str) and error else "no reason is given"


ENDED = frozenset({"succeeded", "failed", "no task", "timed out"})


REDRAW_SECONDS = 0.2


_SPINNER = "|/-\\"


_UP_AND_CLEAR = "\x1b[{lines}F\x1b[J"


class Progress(Protocol):
    def note(self, kind: str, state: str) -> None:
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

    def note(self, kind: str, state: str) -> None:
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
        self._begin = clock()
        self._states = dict.fromkeys(kinds, "waiting")
        self._ends: dict[str, float] = {}
        self._turn = 0
        self._drawn = 0

    def note(self, kind: str, state: str) -> None:
        self._states[kind] = state
        if state in ENDED:
            self._ends.setdefault(kind, self._clock())
        self._draw()

    async def animate(self) -> None:
        while True:
            self._turn += 1
            self._draw()
            await asyncio.sleep(REDRAW_SECONDS)

    def clear(self) -> None:
        self._output.write(self._rewind())
        self._output.flush()
        self._drawn = 0

    def _draw(self) -> None:
        now = self._clock()
        width = max(map(len, self._states))
        lines = [
            f"{' ' if kind in self._ends else _SPINNER[self._turn % len(_SPINNER)]} {kind:<{width}}  {state:<10}"
            f" {self._ends.get(kind, now) - self._begin:6.1f} s\n"
            for kind, state in self._states.items()
        ]
        self._output.write(self._rewind() + "".join(lines))
        self._output.flush()
        self._drawn = len(lines)

    def _rewind(self) -> str:
        return _UP_AND_CLEAR.format(lines=self._drawn) if self._drawn else ""


_HEAD = ("kind", "state", "seconds", "cost", "file", "pixels", "check")


_RIGHT = frozenset({"seconds"})


def table(errands: Iterable[Errand]) -> str:
    """Draw one line for each result, and one for a task without any."""
    rows: list[Sequence[str]] = [_HEAD]
    for errand in errands:
        first = (errand.kind, errand.state, f"{errand.seconds:.1f}", cost_text(errand.cost))
        results = [
            (
                errand.files.get(finding.name, ""),
                size_text(finding.size),
                finding.text if finding.real else "wrong, see below",
            )
            for finding in errand.findings
        ] or [("", "", "")]
        rows.append((*first, *results[0]))
        rows.extend(("", "", "", "", *result) for result in results[1:])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "".join(_line(row, widths) for row in rows)


def complaints(errands: Iterable[Errand]) -> Sequence[str]:
    """Say each complaint once, after the kinds that have it."""
    kinds: dict[str, list[str]] = {}
    for errand in errands:
        for complaint in errand.complaints:
            kinds.setdefault(complaint, []).append(errand.kind)
    return [f"{', '.join(those)}: {complaint}" for complaint, those in kinds.items()]


def cost_text(cost: Cost | None) -> str:
    """Write a cost as uses, yuan or both: `~` marks an estimate, `?` a cost that nobody knows."""
    if cost is None or cost.basis == "unknown":
        return "?"
    parts = []
    if cost.count:
        parts.append(f"{cost.count} use{'' if cost.count == 1 else 's'}")
    if cost.money:
        parts.append(f"¥{cost.money:.2f}")
    return ("~" if cost.basis == "estimated" else "") + (" + ".join(parts) or "nothing")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (
        cell.rjust(width) if name in _RIGHT else cell.ljust(width)
        for name, cell, width in zip(_HEAD, row, widths, strict=True)
    )
    return "  ".join(cells).rstrip() + "\n"


async def run(options: DemoOptions) -> int:
    """Run the demo as `run_demo` promises."""
    try:
        _make(options.folder)
        async with connect(options.base_url, options.token, options.timeout_seconds) as gateway:
            await gateway.knock()
            errands = await _run_all(options, gateway)
    except GatewayError as error:
        options.output.write(f"{error}\n")
        return 1
    return _report(options, errands)


async def _run_all(options: DemoOptions, gateway: Gateway) -> Sequence[Errand]:
    progress = _progress(options)
    errands = [
        Errand(job, gateway, options.folder, timeout_seconds=options.timeout_seconds, note=progress.note)
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
        submitted = ", ".join(errand.task_id for errand in errands if errand.task_id and errand.state not in ENDED)
        options.output.write(f"Interrupted. The gateway goes on with: {submitted or 'nothing'}\n")
        raise
    progress.clear()
    return errands


def _make(folder: Path) -> None:
    """Make sure, before anything is paid for, that there is a place for the results."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GatewayError(f"The results cannot be put into {folder}: {error.strerror}") from error


def _progress(options: DemoOptions) -> Progress:
    if options.interactive:
        return LiveProgress(options.output, [job.kind for job in JOBS])
    return LineProgress(options.output)


def _report(options: DemoOptions, errands: Sequence[Errand]) -> int:
    options.output.write(f"{table(errands)}\n")
    wrong = complaints(errands)
    if wrong:
        options.output.writelines(f"{line}\n" for line in wrong)
        return 1
    options.output.write(f"All results are real. They are in {options.folder}\n")
    return 0
