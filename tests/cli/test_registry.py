from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from service.cli.client import AdminClient, AdminResponse
from tests.behaviour.upstream_control import USER_KEY
from tests.cli.conftest import Shell
from tests.cli.test_accounts import stored_user_key

UNCHANGED = "The registry matches the file: nothing to change.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.toml"


async def export_registry(shell: Shell, file: Path) -> dict[str, Any]:
    """Export into the file; returns the output."""
    file.write_text((await shell.run("export")).stdout)
    return tomllib.loads(file.read_text())


def append_text(file: Path, text: str) -> None:
    file.write_text(f"{file.read_text()}\n{text}\n")


async def test_export(shell: Shell, file: Path) -> None:
    """The output is the registry as TOML with an explanatory head and without secrets."""
    await shell.gateway.put_tenant(limits=[{"window": "day", "tasks": 5, "money": 1.5}], kinds=[])
    result = await export_registry(shell, file)
    assert file.read_text().startswith("# The registry of an Imaging Gateway.")
    assert result["tenants"]["shop"]["limits"] == [{"window": "day", "tasks": 5, "money": 1.5}]
    assert result["tenants"]["shop"]["kinds"] == []
    assert list(result["tenants"]["shop"]["tokens"]) == list(shell.gateway.services.registry.current.tokens)
    assert shell.gateway.token not in file.read_text()
    assert USER_KEY not in file.read_text()
    assert await shell.run_json("export") == await shell.get_admin("/registry")


async def test_export_and_apply(shell: Shell, file: Path) -> None:
    """Applying an export changes nothing, also with --prune, and a dry run exits with 0."""
    await export_registry(shell, file)
    for options in ((), ("--prune",), ("--dry-run",)):
        assert (await shell.run("apply", str(file), *options)).stdout == UNCHANGED


async def test_apply(shell: Shell, file: Path) -> None:
    """Differences are printed and applied; a second run finds none; an export returns what was applied."""
    shell.environ["PRESS_KEY"] = "key-of-press"
    file.write_text(
        """
        [accounts.press]
        user_key = { env = "PRESS_KEY" }
        max_price = { upscale = 1.5 }
        [tenants."press.de"]
        accounts = ["press"]
        max_active = 3
        """
    )
    shown = [
        'accounts.press.user_key.env = "PRESS_KEY"',
        "accounts.press.max_price.upscale = 1.5",
        'tenants."press.de".accounts = ["press"]',
        'tenants."press.de".max_active = 3',
    ]
    token = next(iter(shell.gateway.services.registry.current.tokens))
    kept = "Not in the file, and kept without --prune: accounts.main, tenants.shop"
    printed = (await shell.run("apply", str(file))).stdout.splitlines()
    assert printed == [*(f"+ {entry}" for entry in shown), kept, "Applied 2 differences."]
    assert stored_user_key(shell, "press") == "key-of-press"
    assert token in shell.gateway.services.registry.current.tokens
    assert (await shell.run("apply", str(file))).stdout.splitlines() == [kept, UNCHANGED.strip()]
    applied, result = tomllib.loads(file.read_text()), await export_registry(shell, file)
    for section in ("accounts", "tenants"):
        for name, item in applied[section].items():
            assert item.items() <= result[section][name].items()


async def test_dry_run(shell: Shell, file: Path) -> None:
    """A dry run prints the differences, changes nothing and exits with 2."""
    shell.environ |= {"MAIN_KEY": USER_KEY, "OTHER_KEY": "another-key"}
    await export_registry(shell, file)
    append_text(file, '[accounts.main.user_key]\nenv = "MAIN_KEY"')
    file.write_text(file.read_text().replace('accounts = [\n    "main",\n]', 'accounts = ["main"]\ndisabled = true'))
    version = shell.gateway.services.registry.current.version
    lines = (await shell.run("apply", str(file), "--dry-run", code=2)).stdout.splitlines()
    assert lines == ['+ accounts.main.user_key.env = "MAIN_KEY"', '+ tenants.shop.state = "read-only"']
    file.write_text(file.read_text().replace("MAIN_KEY", "OTHER_KEY"))
    lines = (await shell.run("apply", str(file), "--dry-run", code=2)).stdout.splitlines()
    assert lines[:2] == [
        '+ accounts.main.user_key.env = "OTHER_KEY"',
        "~ accounts.main.user_key: the secret is changed",
    ]
    assert shell.gateway.services.registry.current.version == version
    result = await shell.run("apply", str(file), "--dry-run", "--json", code=2)
    assert '"applied": false' in result.stdout
    assert "another-key" not in result.output


async def test_single_difference(shell: Shell, file: Path) -> None:
    """A single difference is counted in the singular."""
    file.write_text('tenants.shop = { accounts = ["main"], max_active = 3 }')
    assert (await shell.run("apply", str(file))).stdout.splitlines()[-1] == "Applied 1 difference."


async def test_prune(shell: Shell, file: Path) -> None:
    """--prune deletes what is not in the file, under running tasks only with --force."""
    await shell.gateway.upstream.keep_running()
    await shell.gateway.submit()
    file.write_text("")
    refused = await shell.run("apply", str(file), "--prune", code=1)
    assert refused.stderr.startswith("Conflict: 1 submissions of accounts.main have not ended")
    lines = (await shell.run("apply", str(file), "--prune", "--force")).stdout.splitlines()
    assert any(line.startswith("- tenants.shop.tokens.") for line in lines)
    assert '- tenants.shop.accounts = ["main"]' in lines
    assert (await shell.run("apply", str(file))).stdout == UNCHANGED
    assert shell.gateway.services.registry.current.accounts == {}


async def test_secret_of_a_webhook(shell: Shell, file: Path) -> None:
    """A webhook's secret comes from its source; without one it is generated and printed once."""
    (file.parent / "hook").write_text("whsec_" + "a" * 40 + "\n")
    file.write_text(
        'tenants.shop = { accounts = ["main"], webhook = { url = "https://h.example/", secret = { file = "hook" } } }'
    )
    printed = (await shell.run("apply", str(file))).stdout
    assert "whsec_" not in printed
    assert "https://h.example/" in printed
    file.write_text('tenants.press = { accounts = ["main"], webhook = { url = "https://h.example/" } }')
    planned = await shell.run("apply", str(file), "--dry-run", code=2)
    assert "+ tenants.press.webhook.secret: a secret is generated and shown once" in planned.stdout
    assert "whsec_" not in planned.stdout
    assert (await shell.run("apply", str(file))).stdout.count("of press, which is not shown again: whsec_") == 1
    assert "whsec_" not in (await shell.run("apply", str(file))).stdout


async def test_json(shell: Shell, file: Path) -> None:
    """The JSON is the response of the gateway that applied the file."""
    file.write_text('tenants.press = { accounts = ["main"] }')
    (difference,) = (await shell.run_json("apply", str(file)))["differences"]
    assert difference == {"path": "tenants.press", "action": "added", "after": {"accounts": ["main"]}}
    assert (await shell.run_json("apply", str(file)))["differences"] == []


async def test_standard_input(shell: Shell) -> None:
    text = (await shell.run("export")).stdout
    assert (await shell.run("apply", "-", stdin=text)).stdout == UNCHANGED


async def test_errors(shell: Shell, file: Path) -> None:
    """All errors are printed, also those found by the gateway; it exits with 1 and changes nothing."""
    version = shell.gateway.services.registry.current.version
    file.write_text("tenants.shop = { accounts = ['main'], max_activ = 3 }\naccounts.main = 7")
    assert (await shell.run("apply", str(file), code=1)).stderr.splitlines() == [
        f"gateway: {file} can't be applied:",
        "  tenants.shop.max_activ: is unknown: did you mean max_active?",
        "  accounts.main: must be a table",
    ]
    file.write_text("tenants.shop.accounts = ['mian']\naccounts.new = {}")
    assert (await shell.run("apply", str(file), code=1)).stderr.splitlines() == [
        "Invalid options:",
        "  accounts.new.user_key: is required for a new account, which has none to keep",
        "  tenants.shop.accounts[0]: there is no account mian: did you mean main?",
    ]
    assert shell.gateway.services.registry.current.version == version


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (("--dry-rnu", "-"), {}),
        (("no/such/file",), {}),
        ((), {}),
        (("-", "--dry-run"), {"GATEWAY_LOG_LEVEL": "loud"}),
        (("-", "--dry-run"), {"GATEWAY_ADMIN_TOKEN": "wrong"}),
        (("-", "--dry-run", "--url", "http://127.0.0.1:9"), {}),
    ],
)
async def test_exit_code_of_usage_errors(shell: Shell, arguments: tuple[str, ...], environ: dict[str, str]) -> None:
    """Usage errors exit with 1, since 2 means a difference."""
    shell.environ |= environ
    assert (await shell.run("apply", *arguments, code=1)).stderr


async def test_concurrent_change(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the registry changed after the differences were printed, nothing is applied."""
    file.write_text("tenants.shop = { accounts = ['main'], max_active = 3 }")
    ask = AdminClient.request

    def meanwhile(port: AdminClient, *arguments: Any, **more: Any) -> AdminResponse:
        if more.get("version"):
            ask(port, "PUT", "tenants", "press", body={"accounts": ["main"]})
        return ask(port, *arguments, **more)

    monkeypatch.setattr(AdminClient, "request", meanwhile)
    refused = await shell.run("apply", str(file), code=1)
    assert refused.stderr.startswith("Outdated: ")
    monkeypatch.undo()
    assert (await shell.get_admin("/tenants/shop"))["max_active"] is None
