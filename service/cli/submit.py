"""The command `submit`, which has a subcommand for each kind with the options of that kind."""

from __future__ import annotations

import asyncio
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

import click
import msgspec
from msgspec import Meta

from service.cli.callers import (
    ENVIRONMENT_HELP,
    EXIT_CODES_HELP,
    ExitCode,
    find_gateway,
    report_errors,
    url_option,
)
from service.cli.common import print_errors
from service.cli.download import STREAM, check_output, is_folder
from service.cli.formatting import DURATION, OptionType, format_json, format_table
from service.cli.jobs import Job, Plan, is_url, stem_of, submit_all
from service.cli.reports import format_cost
from service.client import (
    GatewayError,
    QuotaExceeded,
    SubmissionUnknown,
    TaskFailed,
    TaskOptions,
    WaitTimeout,
    may_be_served,
)
from service.domain.tasks import OPTIONS, Kind

_SUMMARIES = {
    Kind.UPSCALE: "Redraw images in high definition.",
    Kind.VECTORIZE: "Turn images of few colours into vector images.",
    Kind.FACE_ENHANCE: "Restore the faces in images.",
    Kind.SEAMLESS: "Make images tile without seams.",
}
_HELP = """Submit images, one task for each: `gateway submit KIND FILE...`

A FILE may be the http(s) address of an image, if the operators have allowed you its host: the gateway fetches it.

\b
Examples:
  gateway submit upscale photo.jpg --scale 2 --wait -o out.png
  gateway submit vectorize logos/*.png -o vectors/
  gateway submit upscale https://images.example/photo.jpg -o out.png
  curl -s https://a.example/face.jpg | gateway submit face-enhance - -o - > out.png
  id=$(gateway submit seamless texture.jpg --quiet)
  gateway download "$id" -o tile.png

Running the same command again does not pay again: within 24 hours the same image with the same options is the same
submission (its Idempotency-Key is a digest of them), also after a broken connection or Ctrl-C. --new submits it anew.
"""


def _check_files(files: Sequence[str], output: str | None, key: str | None) -> None:
    """Refuse what would lose results, before anything is paid for. Raises UsageError."""
    if files.count(STREAM) > 1 or (STREAM in files and sys.stdin.isatty()):
        raise click.UsageError("FILE - reads standard input, once, and not from a terminal.")
    if key and len(files) > 1:
        raise click.UsageError("--idempotency-key is for one file.")
    if output is None:
        return
    if len(files) > 1 and not is_folder(output):
        raise click.UsageError(f"-o {output} must be a folder, since there are several files; a new one ends with /.")
    if is_folder(output):
        repeated = [stem for stem, count in Counter(map(stem_of, files)).items() if count > 1]
        if repeated:
            raise click.UsageError(f"Several files are named {', '.join(repeated)}: their results would be one file.")
    elif files[0] != STREAM and not is_url(files[0]) and Path(output).exists() and Path(output).samefile(files[0]):
        raise click.UsageError(f"-o {output} is the image itself.")
    check_output(output)


def _report(jobs: Sequence[Job], plan: Plan, *, as_json: bool, is_quiet: bool) -> None:
    for job in jobs:
        if job.error:
            print_errors([f"{job.label}: {job.error}{_hint(job, is_new=plan.is_new)}"])
        elif job.is_replayed and not is_quiet:
            note = "this is the task of an earlier request, which is paid for once; --new submits it anew"
            print_errors([f"{job.label}: {note}"])
    if plan.output == STREAM:
        return
    if as_json:
        click.echo(format_json([job.describe() for job in jobs]))
    elif is_quiet:
        for job in jobs:
            if job.task:
                click.echo(job.task.id)
    elif any(job.task for job in jobs):
        head = ("file", "state", "cost", "results", "task")
        rows = [
            (job.label, job.state, job.task and format_cost(job.task.cost), job.results, job.task and job.task.id)
            for job in jobs
        ]
        click.echo(format_table(head, rows))


def _hint(job: Job, *, is_new: bool) -> str:
    match job.error:
        case QuotaExceeded(problem=problem):
            refused = problem.violated_policies
            return "".join(f" {item.policy} resets at {item.resets_at}." for item in refused if item.resets_at)
        case SubmissionUnknown(problem=problem):
            return f" `gateway submission {problem.submission_id}` shows its outcome."
        case GatewayError(idempotency_key=str() as key) if is_new and may_be_served(job.error):
            return _advise(key)
        case WaitTimeout():
            return ". It continues: `gateway task ID --wait` waits for it."
        case TaskFailed() if job.is_replayed:
            return ". It was submitted before: --new submits it anew, and pays for it."
        case _:
            return ""


def _advise(key: str) -> str:
    return f" It may have been charged, and --new would pay again: use --idempotency-key {key} in its place."


def _submit(
    kind: Kind,
    files: Sequence[str],
    metadata: Sequence[tuple[str, str]],
    *,
    output: str | None,
    url: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    own = ("webhook_url", "idempotency_key", "new", "wait", "timeout", "jobs")
    webhook_url, key, is_new, can_wait, timeout, max_jobs = (options.pop(name) for name in own)
    if as_json and quiet:
        raise click.UsageError("Use --json or --quiet, not both.")
    if key and is_new:
        raise click.UsageError("Use --idempotency-key or --new, not both.")
    with report_errors():
        place = find_gateway(url)
    _check_files(files, output, key)
    given = {name: value for name, value in options.items() if value is not None}
    plan = Plan(
        kind=kind.value,
        options=cast("TaskOptions", given),
        metadata=dict(metadata),
        webhook_url=webhook_url,
        idempotency_key=key,
        is_new=is_new,
        can_wait=can_wait or output is not None,
        timeout_seconds=timeout,
        max_jobs=max_jobs,
        output=output,
    )
    jobs = [Job(source) for source in files]
    try:
        with report_errors():
            for job in jobs:
                job.content = sys.stdin.buffer.read() if job.source == STREAM else None
            asyncio.run(submit_all(jobs, plan, place, is_quiet=quiet))
    except KeyboardInterrupt:
        continued = ", ".join(job.task.id for job in jobs if job.task and not job.task.has_ended)
        hint = "" if is_new else " The same command resumes, and does not pay again."
        print_errors([f"Interrupted. The gateway continues {continued or 'nothing'}.{hint}"])
        if is_new:
            sent = [job for job in jobs if job.key and not job.task and not job.error]
            print_errors(f"{job.label}: no response yet.{_advise(job.key)}" for job in sent)
        raise click.exceptions.Exit(ExitCode.INTERRUPTED) from None
    _report(jobs, plan, as_json=as_json, is_quiet=quiet)
    raise click.exceptions.Exit(max(job.exit_code for job in jobs))


def _parse_label(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not name or not separator:
        raise click.BadParameter("must be a label such as order=4711")
    return name, value


def _parse_key(text: str) -> str:
    if not re.fullmatch(r"[ -~]{1,255}", text):
        raise click.BadParameter("must be 1 to 255 characters of ASCII")
    return text


class _SourceType(click.Path):
    """A file, standard input, or the address of an image."""

    def __init__(self) -> None:
        super().__init__(exists=True, dir_okay=False, readable=True, allow_dash=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value if is_url(value) else super().convert(value, param, ctx)


def _make_option(item: msgspec.structs.FieldInfo) -> click.Option:
    """Return the option of a field, with its range and description."""
    base, *metas = get_args(item.type) or (item.type,)
    found: dict[str, Any] = {}
    for meta in metas:
        found |= {name: getattr(meta, name) for name in ("ge", "le", "description") if isinstance(meta, Meta)}
    text = found.get("description") or ""
    name = f"--{item.name.replace('_', '-')}"
    if base is bool:
        return click.Option([name], is_flag=True, default=None, help=text)
    ranges: dict[Any, Any] = {float: click.FloatRange, int: click.IntRange}
    kind = ranges[base](found.get("ge"), found.get("le")) if base in ranges else click.STRING
    default = f"  [default: {item.default:g}]" if base in ranges else f"  [default: {item.default}]"
    return click.Option([name], type=kind, help=text + (default if item.default != "" else ""))


_COMMON_OPTIONS = (
    click.option("--wait", is_flag=True, help="Wait for the end of the tasks."),
    click.option(
        "-o",
        "--output",
        metavar="PATH",
        help="Wait, and write the results: to a file, a folder (which a new one shows by its last /), or `-`.",
    ),
    click.option("--timeout", type=DURATION, default="10m", show_default=True, help="Time to wait: 90, 10m, 1h."),
    click.option("-j", "--jobs", type=click.IntRange(1, 64), default=4, show_default=True, help="Files at a time."),
    click.option("--new", is_flag=True, help="Submit again, and pay again, what was submitted in the last 24 hours."),
    click.option(
        "--idempotency-key",
        type=OptionType("key", _parse_key),
        help="A key of your own, instead of a digest of the content.",
    ),
    click.option(
        "--metadata",
        type=OptionType("name=value", _parse_label),
        multiple=True,
        help="A label, which the task keeps; repeatable.",
    ),
    click.option("--webhook-url", metavar="URL", help="Receives the end of each task, if its host is allowed to you."),
    click.option("-q", "--quiet", is_flag=True, help="Print the ids of the tasks only."),
    click.option("--json", "as_json", is_flag=True, help="Print for each file its task, results and error, as JSON."),
    url_option,
)


@click.group(help=_HELP, subcommand_metavar="KIND FILE...", epilog=f"{EXIT_CODES_HELP}\n{ENVIRONMENT_HELP}")
def submit() -> None:
    pass


def _make_command(kind: Kind) -> click.Command:
    def callback(files: Sequence[str], metadata: Sequence[tuple[str, str]], **options: Any) -> None:
        _submit(kind, files, metadata, **options)

    for option in reversed(_COMMON_OPTIONS):
        callback = option(callback)
    files = click.Argument(["files"], metavar="FILE...", nargs=-1, required=True, type=_SourceType())
    command = click.command(
        kind.value,
        help=f"{_SUMMARIES[kind]} Images are PNG, JPEG or WebP; `-` is standard input.",
        epilog=f"{EXIT_CODES_HELP}\n{ENVIRONMENT_HELP}",
    )(callback)
    own = [_make_option(item) for item in msgspec.structs.fields(OPTIONS[kind])]
    command.params = [files, *own, *command.params]
    return command


for _kind in Kind:
    submit.add_command(_make_command(_kind))
