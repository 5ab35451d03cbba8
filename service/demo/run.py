"""The course of the demo: knock, run the four tasks side by side, report."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from service.demo import DemoOptions
from service.demo.errand import Errand
from service.demo.gateway import Gateway, GatewayError, connect
from service.demo.jobs import JOBS
from service.demo.progress import ENDED, LineProgress, LiveProgress, Progress
from service.demo.table import complaints, table


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
