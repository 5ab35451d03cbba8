"""The commands in the documents exist, with their options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from service.cli import main
from service.cli.common import LazyCommand

_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def find_commands(text: str) -> Iterator[list[str]]:
    """Yield the words after `gateway`, which begin with a command, in blocks and in inline code."""
    blocks = "".join(_BLOCK.findall(text)).replace("\\\n", "")
    yield from map(str.split, re.findall(r"^ *gateway ([a-z][^#|>&;\n]+)", blocks, re.MULTILINE))
    yield from map(str.split, re.findall(r"`gateway ([a-z][^`]+)`", _BLOCK.sub("", text)))


def find_command(words: list[str]) -> click.Command:
    command: click.Command = main
    while isinstance(command, click.Group):
        assert words[0] in command.commands, words
        command = command.commands[words.pop(0)]
        if isinstance(command, LazyCommand):
            command = getattr(import_module(command._module), command._attribute)
        if not words:  # the document names a group
            break
    return command


@pytest.mark.parametrize("name", ["README.md", "deploy/OPERATIONS.md", "deploy/RUNBOOK.md"])
def test_commands(name: str) -> None:
    commands = list(find_commands((_ROOT / name).read_text()))
    assert commands
    for words in commands:
        command = find_command(words)
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert not command.hidden, words
        assert {word for word in words if word.startswith("--")} <= known | {"--help"}, words
