"""The list of commands, their help, and the form of their output."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from importlib import import_module
from pathlib import Path

import click
import pytest

from service.cli import main
from service.cli.common import LazyCommand
from service.cli.formatting import format_record, format_table, format_value
from tests.cli.conftest import run_command

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def test_help_is_fast() -> None:
    """As processes: help imports no HTTP client, and that of a group only what its options need."""
    heavy = ["cv2", "httpx2", "litestar", "msgspec", "numpy", "service.settings", "uvicorn"]
    script = (
        "import json, sys; from click.testing import CliRunner; from service.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:], catch_exceptions=False)\n"
        f"print(json.dumps([result.output, [each for each in {heavy} if each in sys.modules]]))"
    )
    for arguments, imported in (["--help"], []), (["account", "--help"], ["httpx2", "msgspec", "service.settings"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
        output, modules = json.loads(done.stdout)
        assert "account" in output
        assert modules == imported


def test_outdated_documents(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("stale")
    outdated = run_command("openapi", "--folder", str(tmp_path), "--check", code=1)
    assert all(name in outdated.stderr for name in ("gateway.yaml", "operators.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.yaml"]


def help_lines(*arguments: str) -> list[str]:
    return run_command(*arguments, "--help").output.splitlines()


@pytest.mark.parametrize(
    ("group", "old_name", "new_name"), [((), "reseal", "rotate-keys"), (("webhook",), "rotate", "rotate-secret")]
)
def test_former_names(group: tuple[str, ...], old_name: str, new_name: str) -> None:
    """They work, but are not listed."""
    assert help_lines(*group, old_name)[1:] == help_lines(*group, new_name)[1:]
    listed = {line.split()[0] for line in help_lines(*group) if line.startswith("  ")}
    assert new_name in listed
    assert old_name not in listed


@pytest.mark.parametrize("group", ["account", "tenant"])
def test_removed_set(group: str) -> None:
    """The former `set` names its replacements, whatever its options."""
    result = run_command(group, "set", "shop", "--account", "main", "--purse", "count_only", code=2)
    assert all(f"gateway {group} {command} NAME" in result.stderr for command in ("create", "update"))
    assert not any(line.startswith("  set ") for line in help_lines(group))


def find_commands(text: str) -> Iterator[list[str]]:
    """Yield the words after `gateway`, which begin with a command, in blocks and in inline code."""
    blocks = "".join(_BLOCK.findall(text)).replace("\\\n", "")
    yield from map(str.split, re.findall(r"^ *gateway ([a-z][^#|>&;\n]+)", blocks, re.MULTILINE))
    yield from map(str.split, re.findall(r"`gateway ([a-z][^`]+)`", _BLOCK.sub("", text)))


def find_command(words: list[str]) -> click.Command:
    command: click.Command = main
    while isinstance(command, click.Group) and words:  # without words the document names a group
        assert words[0] in command.commands, words
        command = command.commands[words.pop(0)]
        if isinstance(command, LazyCommand):
            command = getattr(import_module(command._module), command._attribute)
    return command


@pytest.mark.parametrize("name", ["README.md", "deploy/OPERATIONS.md", "deploy/RUNBOOK.md"])
def test_documented_commands(name: str) -> None:
    """The commands in the documents exist, with their options."""
    commands = list(find_commands((_ROOT / name).read_text()))
    assert commands
    for words in commands:
        command = find_command(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert not command.hidden, words
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words


def test_tables() -> None:
    """Text is left-aligned and numbers are right-aligned, also after Chinese characters."""
    rows = [("main", 5, "生产服务", "x"), ("a-longer-name", 1_000, "web", "y"), ("b", None, None, "z")]
    assert format_table(("name", "uses", "label", "end"), rows).splitlines() == [
        "NAME           USES  LABEL     END",
        "main              5  生产服务  x",
        "a-longer-name  1000  web       y",
        "b                 -  -         z",
    ]
    assert format_table(("name", "state"), []) == "NAME  STATE"
    assert format_record(("name", "main"), ("balance at", None)) == "name:        main\nbalance at:  -"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        ("", "-"),
        ([], "-"),
        (0, "0"),
        (0.5, "0.5"),
        (True, "yes"),
        (False, "no"),
        (["a", "b"], "a, b"),
        (datetime(2030, 1, 31, 12, tzinfo=UTC), "2030-01-31T12:00:00Z"),
        (datetime(2030, 1, 31, 12, 0, 0, 999_999, timezone(timedelta(hours=8))), "2030-01-31T04:00:00Z"),
        ("two\nlines\t\x1b[31m red\u202e", "two lines [31m red"),
    ],
)
def test_values(value: object, shown: str) -> None:
    """A value is printed on one line without control characters."""
    assert format_value(value) == shown
