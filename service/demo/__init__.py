"""The demo: a picture for each kind of task goes through a running gateway, and what comes back is checked.

It knows the gateway by its public HTTP contract alone and imports nothing else of the service. This module stays cheap
to import, so that a command line can name the demo without loading an image library.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TextIO


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """Where the gateway is, who asks, and where results and words go."""

    base_url: str
    """The gateway's address for tenants, such as `http://127.0.0.1:8080`."""
    token: str
    """A tenant's bearer token. The four tasks are charged to that tenant."""
    folder: Path
    """Receives the results; made if it is missing. Files of an earlier run are overwritten."""
    output: TextIO
    """Receives the progress and the table."""
    interactive: bool
    """Whether `output` is a terminal that can redraw lines; otherwise every change gets a line of its own."""
    timeout_seconds: float = 120.0
    """How long each task may take, from the upload to the last byte of its results."""


async def run_demo(options: DemoOptions) -> int:
    """Run one task of each kind at the same time and report on them; 0 if every result is real, 1 otherwise.

    Whatever goes wrong at the gateway or on the way to it is said on `output`. A cancelled run (Ctrl-C) first names
    the tasks that the gateway goes on with, then raises `CancelledError` like any coroutine.
    """
    try:
        from service.demo.run import run_tasks  # noqa: PLC0415 - the command line must not wait for an image library
    except ModuleNotFoundError as missing:
        if missing.name != "PIL":
            raise
        options.output.write("The demo needs Pillow: install the gateway with its `local` extra.\n")
        return 1
    return await run_tasks(options)
