"""Generate the reference of settings: all in SETTINGS.md, the main ones in the README.

python -m deploy.reference
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import click

from service.settings import SETTINGS, Scope, Setting

ROOT = Path(__file__).parents[1]
_README_FILE, _REFERENCE_FILE = "README.md", "deploy/SETTINGS.md"
_BEGIN, _END = "<!-- settings: written by `make settings` -->\n", "<!-- settings: end -->\n"
_README_SETTINGS = (
    "GATEWAY_ENV",
    "GATEWAY_ROLE",
    "GATEWAY_HOST",
    "GATEWAY_PORT",
    "GATEWAY_OPS_HOST",
    "GATEWAY_OPS_PORT",
    "GATEWAY_REDIS_URL",
    "GATEWAY_UPSTREAM_URL",
    "GATEWAY_SECRET_KEYS",
    "GATEWAY_ADMIN_TOKEN",
    "GATEWAY_DATA_DIR",
    "GATEWAY_LOG_LEVEL",
)
"""The settings that every installation needs."""
_INTRODUCTION = """# Settings

<!-- written by `make settings` from service/settings.py -->

Environment variables, read once at the start. Each can also be given as `..._FILE`, the path of a file with its value,
which suits secrets; surrounding whitespace is ignored. An empty variable counts as absent, and an unknown one that
starts with `GATEWAY_` is an error, since it is most often a misspelling.

`gateway check-config` reports all errors of an environment at once without starting anything, and prints the effective
settings of a valid one; `--production` applies production's rules, and `--connect` checks the store with
its accounts and webhooks, and the upstream.
"""


class MarkersError(Exception):
    """The README lacks the markers of the settings table."""


def render_all(root: Path) -> Mapping[str, str]:
    """Return the text of each file by its path; the README keeps what surrounds its table."""
    before, begin, rest = (root / _README_FILE).read_text("utf-8").partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise MarkersError(f"{_README_FILE} must have the lines {_BEGIN.strip()} and {_END.strip()}")
    table = _format_table(setting for setting in SETTINGS if setting.name in _README_SETTINGS)
    return {
        _README_FILE: f"{before}{_BEGIN}{table}{_END}{after}",
        _REFERENCE_FILE: "\n".join([_INTRODUCTION, *(_format_entry(setting) for setting in SETTINGS)]),
    }


def find_drift(root: Path) -> Sequence[str]:
    """Return the files that are out of date."""
    return [name for name, text in render_all(root).items() if _read_text(root / name) != text]


def _format_entry(setting: Setting) -> str:
    lines = [f"- default: {_format_default(setting)}", f"- must be {setting.expected_format}"]
    if setting.scope is not Scope.ANYWHERE:
        lines.append(f"- matters only {setting.scope}")
    if setting.is_secret:
        lines.append("- a secret: shown nowhere")
    return "\n".join([f"## {setting.name}", "", setting.description, "", *lines, ""])


def _format_default(setting: Setting) -> str:
    return f"`{setting.default}`" if setting.default else setting.default_note


def _format_table(settings: Iterable[Setting]) -> str:
    rows = [(f"`{setting.name}`", _format_default(setting), setting.description) for setting in settings]
    lines = [("variable", "default", "meaning"), ("---",) * 3, *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _read_text(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


@click.command("python -m deploy.reference")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, help="The folder of the repository.")
@click.option("--check", is_flag=True, help="Write nothing; fail if anything would be written.")
def main(*, root: Path, check: bool) -> None:
    """Write the settings into SETTINGS.md and the README."""
    try:
        names = find_drift(root)
    except MarkersError as error:
        raise click.ClickException(str(error)) from None
    if check and names:
        raise click.ClickException(f"not up to date: {', '.join(names)}; `make settings` rewrites them")
    for name in names:
        (root / name).write_text(render_all(root)[name], "utf-8")


if __name__ == "__main__":
    main()
