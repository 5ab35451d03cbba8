"""One task, from its picture to its results on disk."""

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from service.demo.checks import Finding, examine
from service.demo.gateway import Artifact, Cost, File, Gateway, GatewayError, Task, plain
from service.demo.jobs import Job

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
