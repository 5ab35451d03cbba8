"""All commands: names, help, usage errors, how they find a gateway and authenticate, and the form of their output."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result

from service.cli.formatting import format_table, format_value
from tests.behaviour.gateway_fixture import ADMIN_TOKEN
from tests.cli.conftest import UNREACHABLE_URL, Shell, run_command
from tests.contract.scripted_server import http_response, reply_and_close, run_server

ENVIRONMENT = {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN}
_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def test_help_imports_nothing_heavy() -> None:
    heavy = {"cv2", "httpx2", "litestar", "msgspec", "numpy", "service.settings", "uvicorn"}
    script = (
        "import sys; from click.testing import CliRunner; from service.cli import main\n"
        f"assert 'account' in CliRunner().invoke(main, ['--help']).output; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_outdated_documents(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("stale")
    outdated = run_command("openapi", "--folder", str(tmp_path), "--check", code=1)
    assert all(name in outdated.stderr for name in ("gateway.yaml", "operators.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.yaml"]


def test_former_names_work_unlisted_and_set_names_its_replacements() -> None:
    for group, old_name, new_name in (((), "reseal", "rotate-keys"), (("webhook",), "rotate", "rotate-secret")):
        old, new = (run_command(*group, name, "--help").output.splitlines() for name in (old_name, new_name))
        assert old[1:] == new[1:]
        assert f"  {old_name} " not in run_command(*group, "--help").output
    removed = run_command("tenant", "set", "shop", "--account", "main", "--purse", "count_only", code=2).stderr
    assert all(f"gateway tenant {command} NAME" in removed for command in ("create", "update"))


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ("account update main --user-key-env NOBODY_SET_IT", "--user-key-env"),
        ("account update main --user-key-file /dev/null", "--user-key-file"),
        ("account update main --user-key-file - --user-key-prompt", "--user-key-prompt"),
        ("account update main --user-key sk-0123456789", "--user-key"),
        ("account update main --floor-money 0.001", "--floor-money"),
        ("account update main --max-price enlarge=1", "--max-price"),
        ("tenant update shop --limit week:tasks=1", "--limit"),
        ("tenant update shop --limit day", "--limit"),
        ("tenant update shop --limit day:tasks=1,tasks=2", "--limit"),
        ("tenant update shop --limit day:money=lots", "--limit"),
        ("tenant update shop --limit day:tasks=1 --no-limit day", "--limit"),
        ("tenant update shop --max-active 1 --no-max-active", "max active"),
        ("tenant update shop --webhook-url https://hooks.test/ --webhook-secret-file -", "--webhook-secret-file"),
        ("token create shop --expires-in 0", "past"),
        ("token create shop --expires-in 99999999w", "--expires-in"),
        ("token create shop --expires-at 2999-01-01T00:00:00", "--expires-at"),
        ("token create shop --expires-at 2999-01-01T00:00:00Z --expires-in 1d", "--expires-in"),
        ("usage --csv --json", "--csv"),
        ("refund --reason x", "ID"),
        ("refund a --submission b --reason x", "ID"),
        ("refund a", "--reason"),
        ("check-config --conect", "--conect"),
    ],
)
def test_usage_errors(arguments: str, option: str) -> None:
    """Without a request: the exit code of an unreachable gateway would be 1."""
    result = run_command(*arguments.split(), code=2, env=ENVIRONMENT | {"GATEWAY_OPS_PORT": "1"})
    assert option in result.stderr


@pytest.mark.parametrize("arguments", ["--dry-rnu -", "no/such/file", "", "- --dry-run"])
def test_usage_errors_of_apply(arguments: str) -> None:
    """They exit with 1, and so do an unreachable gateway and an invalid setting, since 2 means a difference."""
    for setting in ({"GATEWAY_OPS_PORT": "1"}, {"GATEWAY_LOG_LEVEL": "loud"}):
        assert run_command("apply", *arguments.split(), code=1, env=ENVIRONMENT | setting).stderr


@pytest.mark.parametrize("name", ["README.md", "deploy/OPERATIONS.md", "deploy/RUNBOOK.md"])
def test_documented_commands_exist_with_their_options(name: str) -> None:
    text = (_ROOT / name).read_text()
    blocks = re.sub(r"\$\([^)]*\)", "VALUE", "".join(_BLOCK.findall(text)).replace("\\\n", ""))
    commands = re.findall(r"^ *gateway ([a-z][^#|>&;\n]+)", blocks, re.MULTILINE)
    commands += re.findall(r"`gateway ([a-z][^`]+)`", _BLOCK.sub("", text))
    assert commands
    for command in commands:
        run_command(*command.split(), "--help")


def test_columns_are_aligned_and_values_fill_one_line() -> None:
    rows = [("main", 5, "生产服务", "x"), ("a-longer-name", 1_000, "web", "y"), ("b", None, None, "z")]
    assert format_table(("name", "uses", "label", "end"), rows).splitlines() == [
        "NAME           USES  LABEL     END",
        "main              5  生产服务  x",
        "a-longer-name  1000  web       y",
        "b                 -  -         z",
    ]
    assert format_value("two\nlines\t\x1b[31m red\u202e") == "two lines [31m red"


async def run_against(answer: bytes, *arguments: str) -> Result:
    """Run a command that must fail against a server with this answer, and report it in one line with the URL."""
    async with run_server(reply_and_close(answer)) as peer:
        result = await asyncio.to_thread(run_command, *arguments, "--url", peer.url, code=1, env=ENVIRONMENT)
    (line,) = result.stderr.splitlines()
    assert (result.stdout, line.startswith("gateway: "), line.isprintable()) == ("", True, True)
    assert peer.url in line
    return result


@pytest.mark.parametrize(
    ("answer", "may_be_made"),
    [
        (b"", True),
        (http_response(b"{}")[:-1], True),
        (b"220 mail.example ESMTP\r\n", True),
        (http_response(b"<html>"), False),
        (http_response(b"", 307, Location="/elsewhere"), False),
        (http_response(b"bad gateway\x1b[31m", 502), False),
        (http_response(b'{"error": "no"}', 400, Content_Type="application/json"), False),
    ],
)
async def test_change_without_a_response_may_have_been_made(answer: bytes, may_be_made: bool) -> None:
    hint = "may have been made"
    for output in ((), ("--json",)):
        assert hint not in (await run_against(answer, "account", "list", *output)).stderr
    assert (hint in (await run_against(answer, "token", "create", "shop")).stderr) == may_be_made


async def test_response_of_another_version() -> None:
    await run_against(http_response(b'{"items": 5}', Content_Type="application/json"), "account", "list")


def test_unusable_address_is_named_in_one_line() -> None:
    for url, reason in (
        (UNREACHABLE_URL, "can't connect to"),
        ("ftp://host", "is no address"),
        ("http://h\n", "is no"),
    ):
        (line,) = run_command("token", "create", "shop", "--url", url, code=1, env=ENVIRONMENT).stderr.splitlines()
        assert reason in line


async def test_url_option_wins_and_proxies_get_no_token(shell: Shell) -> None:
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), UNREACHABLE_URL)
    shell.environ |= proxies | {"GATEWAY_OPS_HOST": "0.0.0.0"}  # all addresses: reached on localhost
    await shell.run("account", "list")
    await shell.run("account", "list", "--url", "")
    shell.environ["GATEWAY_OPS_PORT"] = "1"
    await shell.run("account", "list", code=1)
    await shell.run("account", "list", "--url", f"{shell.gateway.ops_url}/")
    shell.environ["GATEWAY_OPS_PORT"] = "0"
    assert "--url" in (await shell.run("account", "list", code=1)).stderr


async def test_token_comes_from_settings_a_file_or_the_data_folder(shell: Shell, tmp_path: Path) -> None:
    shell.environ["GATEWAY_ADMIN_TOKEN"] = shell.gateway.token
    assert (await shell.run("account", "list", code=1)).stderr.startswith("Authentication required: ")
    del shell.environ["GATEWAY_ADMIN_TOKEN"]
    shell.environ["GATEWAY_DATA_DIR"] = str(tmp_path)
    file = tmp_path / "admin.token"
    for damage in (None, b"", b"\xff", "ü".encode()):
        if damage is not None:
            file.write_bytes(damage)
        (line,) = (await shell.run("account", "list", code=1)).stderr.splitlines()
        assert "GATEWAY_ADMIN_TOKEN" in line
    file.write_text(f"{ADMIN_TOKEN}\n")
    await shell.run("account", "list")
    shell.environ |= {"GATEWAY_ADMIN_TOKEN_FILE": str(file), "GATEWAY_DATA_DIR": str(tmp_path / "none")}
    await shell.run("account", "list")


async def test_no_name_leads_to_another_resource(shell: Shell) -> None:
    for name in ("main?x", "main#x", "%6Dain", "商店"):
        assert name in (await shell.run("account", "show", name, code=1)).stderr
    before = await shell.get_admin("/registry")
    (token,) = before["tenants"]["shop"]["tokens"]
    for name in ("", ".", "..", "../accounts/main", f"shop/tokens/{token}"):
        refused = await shell.run("tenant", "delete", name, code=1)
        assert refused.stderr.startswith("gateway: ")  # no request: servers normalize such a path even if quoted
    assert await shell.get_admin("/registry") == before
