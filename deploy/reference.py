"""Generate the reference of settings, SETTINGS.md.

python -m deploy.reference
"""

from __future__ import annotations

from pathlib import Path

import click

from service.settings import SETTINGS, Scope, Setting

ROOT = Path(__file__).parents[1]
_REFERENCE_FILE = "deploy/SETTINGS.md"
_MAIN_SETTINGS = (
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
"""The settings that every installation has to decide on."""
_INTRODUCTION = """# Settings

<!-- written by `make settings` from service/settings.py -->

Environment variables, read once at the start. Each can also be given as `..._FILE`, the path of a file with its value,
which suits secrets; surrounding whitespace is ignored. An empty variable counts as absent, and an unknown one that
starts with `GATEWAY_` is an error, since it is most often a misspelling.

`gateway check-config` reports all errors of an environment at once without starting anything, and prints the effective
settings of a valid one; `--production` applies production's rules, and `--connect` checks the store with
its accounts and webhooks, and the upstream.

The main ones are {main}.
"""


def render_reference() -> str:
    main = ", ".join(f"[`{name}`](#{name.lower()})" for name in _MAIN_SETTINGS)
    return "\n".join([_INTRODUCTION.format(main=main), *(_format_entry(setting) for setting in SETTINGS)])


def _format_entry(setting: Setting) -> str:
    lines = [f"- default: {_format_default(setting)}", f"- must be {setting.expected_format}"]
    if setting.scope is not Scope.ANYWHERE:
        lines.append(f"- matters only {setting.scope}")
    if setting.is_secret:
        lines.append("- a secret: shown nowhere")
    return "\n".join([f"## {setting.name}", "", setting.description, "", *lines, ""])


def _format_default(setting: Setting) -> str:
    return f"`{setting.default}`" if setting.default else setting.default_note


@click.command("python -m deploy.reference")
@click.option("--root", type=click.Path(path_type=Path), default=ROOT, help="The folder of the repository.")
@click.option("--check", is_flag=True, help="Write nothing; fail if anything would be written.")
def main(*, root: Path, check: bool) -> None:
    """Write the settings into SETTINGS.md."""
    path, text = root / _REFERENCE_FILE, render_reference()
    if path.exists() and path.read_text("utf-8") == text:
        return
    if check:
        raise click.ClickException(f"{_REFERENCE_FILE} is not up to date; `make settings` rewrites it")
    path.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
