"""Names of commands and options until 0.2.0, which the help does not list."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from service.cli import main
from tests.cli.conftest import Shell


def help_lines(*arguments: str) -> list[str]:
    return CliRunner().invoke(main, [*arguments, "--help"]).output.splitlines()


@pytest.mark.parametrize(
    ("group", "old_name", "new_name"), [((), "reseal", "rotate-keys"), (("webhook",), "rotate", "rotate-secret")]
)
def test_command(group: tuple[str, ...], old_name: str, new_name: str) -> None:
    assert help_lines(*group, old_name)[1:] == help_lines(*group, new_name)[1:]
    listed = {line.split()[0] for line in help_lines(*group) if line.startswith("  ")}
    assert new_name in listed
    assert old_name not in listed


async def test_purse(shell: Shell) -> None:
    await shell.run("tenant", "set", "shop", "--account", "main", "--purse", "count_only")
    assert (await shell.get_admin("/tenants/shop"))["spending_mode"] == "count_only"
    assert "--purse" not in "".join(help_lines("tenant", "set"))
