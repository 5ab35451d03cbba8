"""The command `download`, and where results are written."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click

from service.cli.callers import ENVIRONMENT_HELP, EXIT_CODES_HELP, find_gateway, report_errors, url_option
from service.cli.common import json_option, print_errors
from service.cli.formatting import choice, format_json
from service.client import EXTENSIONS, AsyncGatewayClient, SavedFile, Task
from service.client.downloads import is_special
from service.domain.tasks import ArtifactName

STREAM = "-"
"""Standard input or output in place of a file."""


@dataclass(frozen=True)
class Target:
    """Where the results of one task go: `path` itself, or files in that folder whose names begin with `stem`."""

    path: Path
    stem: str = ""

    def resolve(self, task: Task, name: str, media_type: str) -> Path:
        """Return the path of a result; those beside the main one have their name in it."""
        main = task.find_artifact()
        suffix = "" if main and main.name == name else f"-{name}"
        if not self.stem and not suffix:
            return self.path
        folder, stem = (self.path, self.stem) if self.stem else (self.path.parent, self.path.stem)
        return folder / f"{stem}{suffix}.{EXTENSIONS[media_type]}"


def is_folder(output: str) -> bool:
    return output.endswith("/") or Path(output).is_dir()


def check_output(output: str) -> None:
    """Create a new folder, and check that files can be written, before anything is paid for. Raises UsageError."""
    if output == STREAM:
        if sys.stdout.isatty():
            raise click.UsageError("-o - writes an image, but standard output is a terminal.")
        return
    folder = Path(output) if is_folder(output) else Path(output).parent
    if is_special(Path(output)):
        if not os.access(output, os.W_OK):
            raise click.UsageError(f"-o {output} can't be written.")
        return
    try:
        if is_folder(output):
            folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise click.UsageError(f"-o {output} can't be written: {error.strerror}") from None


async def save_results(gateway: AsyncGatewayClient, task: Task, target: Target, names: Sequence[str]) -> list[Path]:
    """Write results of a task, by default all; into a device or a pipe only one. Raises GatewayError and OSError."""
    if is_special(target.path):
        await gateway.download(task, target.path, name=names[0] if names else None)
        return [target.path]
    folder = target.path if target.stem else target.path.parent
    paths = []
    for name in names or [artifact.name for artifact in task.artifacts]:
        # Its extension is that of its type, which is known when it has come.
        temporary = folder / f".{secrets.token_hex(8)}.part"
        saved = await gateway.download(task, temporary, name=name)
        path = target.resolve(task, name, saved.media_type)
        try:
            if path.is_symlink():
                shutil.copyfile(temporary, path)
            else:
                temporary.replace(path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
        _warn_of_extension(path, saved)
        paths.append(path)
    return paths


async def print_result(gateway: AsyncGatewayClient, task: Task, name: str | None) -> None:
    """Write a result to standard output, once all of it has come. Raises GatewayError and OSError."""
    with TemporaryDirectory(prefix="gateway-") as folder:
        saved = await gateway.download(task, Path(folder) / "result", name=name)
        with saved.path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()


def _warn_of_extension(path: Path, saved: SavedFile) -> None:
    suffix = path.suffix.lower().removeprefix(".").replace("jpeg", "jpg")
    if suffix in EXTENSIONS.values() and suffix != EXTENSIONS[saved.media_type]:
        print_errors([f"warning: {path} holds {saved.media_type}, whatever its name says"])


@click.command(epilog=f"{EXIT_CODES_HELP}\n{ENVIRONMENT_HELP}")
@click.argument("task_ids", metavar="ID...", nargs=-1, required=True)
@click.option("-o", "--output", default=".", show_default=True, help="A folder, of one task also a file or `-`.")
@click.option("--name", type=choice(ArtifactName), help="Only this result.  [default: all of them]")
@json_option
@url_option
def download(task_ids: Sequence[str], output: str, name: str | None, url: str | None, *, as_json: bool) -> None:
    """Fetch the results of your tasks ID, and print the paths of the files.

    Waits for tasks that have not ended. A file appears when all of it has come. Results of upscale --vector and of
    seamless are two files: with -o out.png these are out.png and out-vector.svg, or out-grid.png.
    """
    if len(task_ids) > 1 and not is_folder(output):
        raise click.UsageError(f"-o {output} must be a folder, since there are several tasks.")
    if output == STREAM and as_json:
        raise click.UsageError("-o - writes the result: --json needs another output.")
    check_output(output)
    saved: list[dict[str, Any]] = []

    def report(task_id: str, paths: Sequence[Path]) -> None:
        saved.append({"task": task_id, "files": list(map(str, paths))})
        if not as_json:
            for path in paths:
                click.echo(path)

    try:
        with report_errors():
            asyncio.run(_download(task_ids, output, name, find_gateway(url), report))
    finally:
        if as_json:
            click.echo(format_json(saved))


async def _download(
    task_ids: Sequence[str],
    output: str,
    name: str | None,
    place: tuple[str, str],
    report: Callable[[str, Sequence[Path]], None],
) -> None:
    async with AsyncGatewayClient(*place) as gateway:
        for task_id in task_ids:
            task = await gateway.wait(task_id)
            if output == STREAM:
                await print_result(gateway, task, name)
                continue
            stem = f"{task.kind}-{task.id.removeprefix('task_')[:12]}" if is_folder(output) else ""
            report(task_id, await save_results(gateway, task, Target(Path(output), stem), [name] if name else []))
