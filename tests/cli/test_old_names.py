"""Names of commands and options until 0.2.0, which the help does not list."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from service.cli import main


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


@pytest.mark.parametrize("group", ["account", "tenant"])
def test_set(group: str) -> None:
    """The former `set` names its replacements, whatever its options."""
    result = CliRunner().invoke(main, [group, "set", "shop", "--account", "main", "--purse", "count_only"])
    assert result.exit_code == 2
    assert all(f"gateway {group} {command} NAME" in result.stderr for command in ("create", "update"))
    assert not any(line.startswith("  set ") for line in help_lines(group))
