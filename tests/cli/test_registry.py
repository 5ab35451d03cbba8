"""`gateway export`, `apply` and `rotate-keys`, and restoring from a file after the store has lost data."""

from __future__ import annotations

import base64
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from httpx2 import AsyncClient
from msgspec.structs import replace

from service.app import create_app, create_ops_app
from service.cli.client import AdminClient, AdminResponse
from service.container import USER_KEY_PURPOSE, WEBHOOK_SECRET_PURPOSE, open_container
from service.crypto import Keyring
from service.domain.tenants import WebhookSecrets
from service.sandbox.app import RunningSandbox, SandboxConfig, open_sandbox
from service.sandbox.store import AccountBalance
from service.settings import Settings
from service.storage.connections import connect
from service.storage.redis import Keys
from service.usecases.ports import RegistryChange
from tests.behaviour.gateway_fixture import ENVIRONMENT, SECRET_KEY, RunningGateway, run_real_gateway
from tests.behaviour.upstream_control import USER_KEY, SandboxUpstreamControl
from tests.cli.conftest import UNREACHABLE_URL, Shell, admin_environment, run_command
from tests.support.network import serve_app
from tests.support.valkey import Valkey

UNCHANGED = "The registry matches the file: nothing to change.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.toml"


async def test_export(shell: Shell, file: Path) -> None:
    """The output is the registry as TOML without secrets; applying it changes nothing."""
    await shell.gateway.put_tenant(limits=[{"window": "day", "tasks": 5, "money": 1.5}], kinds=[])
    text = (await shell.run("export")).stdout
    registry = tomllib.loads(text)
    assert registry["tenants"]["shop"]["limits"] == [{"window": "day", "tasks": 5, "money": 1.5}]
    assert registry["tenants"]["shop"]["kinds"] == []
    assert list(registry["tenants"]["shop"]["tokens"]) == list(shell.gateway.services.registry.current.tokens)
    assert shell.gateway.token not in text
    assert USER_KEY not in text
    assert await shell.run_json("export") == await shell.get_admin("/registry")
    file.write_text(text)
    for options in ((), ("--prune",), ("--dry-run",)):
        assert (await shell.run("apply", str(file), *options)).stdout == UNCHANGED
    assert (await shell.run("apply", "-", stdin=text)).stdout == UNCHANGED


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
    printed = (await shell.run("apply", str(file))).stdout.splitlines()
    assert printed[:4] == [f"+ {entry}" for entry in shown]
    assert ("accounts.main, tenants.shop" in printed[4], "2 differences" in printed[5]) == (True, True)
    assert shell.stored_user_key("press") == "key-of-press"
    assert await shell.is_accepted()
    assert UNCHANGED in (await shell.run("apply", str(file))).stdout
    applied, exported = tomllib.loads(file.read_text()), tomllib.loads((await shell.run("export")).stdout)
    for section in ("accounts", "tenants"):
        for name, item in applied[section].items():
            assert item.items() <= exported[section][name].items()
    file.write_text('tenants.press = { accounts = ["main"] }')
    (difference,) = (await shell.run_json("apply", str(file)))["differences"]
    assert difference == {"path": "tenants.press", "action": "added", "after": {"accounts": ["main"]}}
    assert (await shell.run_json("apply", str(file)))["differences"] == []


async def test_dry_run(shell: Shell, file: Path) -> None:
    """A dry run prints the differences, changes nothing and exits with 2."""
    shell.environ |= {"MAIN_KEY": USER_KEY, "OTHER_KEY": "another-key"}
    text = (await shell.run("export")).stdout + '\n[accounts.main.user_key]\nenv = "MAIN_KEY"\n'
    file.write_text(text.replace('accounts = [\n    "main",\n]', 'accounts = ["main"]\ndisabled = true'))
    version = shell.gateway.services.registry.current.version
    lines = (await shell.run("apply", str(file), "--dry-run", code=2)).stdout.splitlines()
    assert lines == ['+ accounts.main.user_key.env = "MAIN_KEY"', '+ tenants.shop.state = "read-only"']
    file.write_text(file.read_text().replace("MAIN_KEY", "OTHER_KEY"))
    lines = (await shell.run("apply", str(file), "--dry-run", code=2)).stdout.splitlines()
    assert lines[0] == '+ accounts.main.user_key.env = "OTHER_KEY"'
    assert lines[1].startswith("~ accounts.main.user_key: ")
    result = await shell.run("apply", str(file), "--dry-run", "--json", code=2)
    assert '"applied": false' in result.stdout
    assert "another-key" not in result.output
    assert shell.gateway.services.registry.current.version == version


async def test_prune(shell: Shell, file: Path) -> None:
    """--prune deletes what is not in the file, under running tasks only with --force."""
    await shell.gateway.upstream.keep_running()
    await shell.gateway.submit()
    file.write_text("")
    assert (await shell.run("apply", str(file), "--prune", code=1)).stderr.startswith("Conflict: ")
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
    assert "https://h.example/" in printed
    assert "whsec_" not in printed
    file.write_text('tenants.press = { accounts = ["main"], webhook = { url = "https://h.example/" } }')
    planned = await shell.run("apply", str(file), "--dry-run", code=2)
    assert "tenants.press.webhook.secret" in planned.stdout
    assert "whsec_" not in planned.stdout
    assert [(await shell.run("apply", str(file))).stdout.count("whsec_") for _ in range(2)] == [1, 0]


async def test_errors(shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All errors are printed, also the gateway's and a change by another meanwhile; nothing is changed."""
    before = await shell.get_admin("/registry")
    for text, fields in (
        (
            "tenants.shop = { accounts = ['main'], max_activ = 3 }\naccounts.main = 7",
            ["tenants.shop.max_activ", "accounts.main"],
        ),
        ("tenants.shop.accounts = ['mian']\naccounts.new = {}", ["accounts.new.user_key", "tenants.shop.accounts[0]"]),
    ):
        file.write_text(text)
        _, *lines = (await shell.run("apply", str(file), code=1)).stderr.splitlines()
        assert [line.partition(":")[0].strip() for line in lines] == fields
    assert await shell.get_admin("/registry") == before

    send = AdminClient.request

    def change_before_apply(client: AdminClient, *arguments: Any, **more: Any) -> AdminResponse:
        if more.get("version"):
            send(client, "PUT", "tenants", "press", body={"accounts": ["main"]})
        return send(client, *arguments, **more)

    monkeypatch.setattr(AdminClient, "request", change_before_apply)
    file.write_text("tenants.shop = { accounts = ['main'], max_active = 3 }")
    assert (await shell.run("apply", str(file), code=1)).stderr.startswith("Outdated: ")
    assert (await shell.get_admin("/tenants/shop"))["max_active"] is None


@pytest.mark.parametrize(
    ("arguments", "environ"),
    [
        (("--dry-rnu", "-"), {}),
        (("no/such/file",), {}),
        ((), {}),
        (("-", "--dry-run"), {"GATEWAY_LOG_LEVEL": "loud"}),
        (("-", "--dry-run"), {}),
    ],
)
def test_exit_code_of_usage_errors(arguments: tuple[str, ...], environ: dict[str, str]) -> None:
    """Usage errors exit with 1, since 2 means a difference."""
    environ = {"GATEWAY_ADMIN_TOKEN": "t"} | environ
    assert run_command("apply", *arguments, "--url", UNREACHABLE_URL, code=1, env=environ).stderr


RESTORED_FILE = """
[accounts.main]
user_key = { env = "MAIN_USER_KEY" }

[tenants.shop]
accounts = ["main"]
limits = [{ window = "total", tasks = 10 }]
webhook = { url = "https://hooks.example/", secret = { file = "hook.secret" } }

[tenants.press]
accounts = ["main"]
"""


@asynccontextmanager
async def run_process(valkey: Valkey, sandbox: RunningSandbox) -> AsyncIterator[Shell]:
    """Run a gateway that has no state but that of the store."""
    places = {"GATEWAY_REDIS_URL": valkey.url, "GATEWAY_UPSTREAM_URL": sandbox.url}

    async def pass_time(_: float) -> None:
        raise AssertionError("time only passes by itself here")

    async with (
        open_container(Settings.load(ENVIRONMENT | places)) as services,
        serve_app(create_app(services)) as url,
        serve_app(create_ops_app(services)) as ops_url,
        AsyncClient(timeout=30, trust_env=False) as http,
    ):
        control = SandboxUpstreamControl(sandbox.control)
        gateway = RunningGateway(url, ops_url, http, services, control, pass_time)
        yield Shell(gateway, admin_environment(ops_url) | {"MAIN_USER_KEY": USER_KEY})


@pytest.mark.parametrize("is_everything_lost", [True, False])
async def test_restored_registry(valkey: Valkey, file: Path, is_everything_lost: bool) -> None:
    """The file restores tokens and the owners of tasks; usage and limits continue as far as the store has them."""
    (file.parent / "hook.secret").write_text("whsec_" + "c" * 40)
    file.write_text(RESTORED_FILE)
    connections = connect(valkey.url, timeout=5)
    client: Any = connections.commands
    await client.flushall()
    config = SandboxConfig(accounts={USER_KEY: AccountBalance(count=10, money=0)}, seconds=0)
    with structlog.testing.capture_logs():
        async with open_sandbox(config) as sandbox:
            async with run_process(valkey, sandbox) as shell:
                await shell.run("apply", str(file))
                tokens = {name: (await shell.run("token", "create", name)).stdout.strip() for name in ("shop", "press")}
                file.write_text((await shell.run("export")).stdout)
                task = (await shell.gateway.submit(token=tokens["shop"])).json()
                quota = (await shell.gateway.call("GET", "/v1/quota", token=tokens["shop"])).json()
                await shell.gateway.upstream.wait_until_idle()
            await (client.flushall() if is_everything_lost else client.delete(Keys("gw").registry))
            async with run_process(valkey, sandbox) as shell:
                assert not await shell.is_accepted(tokens["shop"])
                await shell.run("apply", str(file))
                assert (await shell.run("export")).stdout == file.read_text()
                if not is_everything_lost:
                    assert (await shell.gateway.call("GET", "/v1/quota", token=tokens["shop"])).json() == quota
                read = await shell.gateway.call("GET", task["links"]["self"], token=tokens["shop"])
                assert read.status_code == 200
                if is_everything_lost:
                    assert read.json()["state"] == "succeeded"  # read from the upstream
                foreign = await shell.gateway.call("GET", task["links"]["self"], token=tokens["press"])
                assert foreign.status_code == 404
                for name in ("press", "press", "shop"):
                    assert (await shell.gateway.submit(token=tokens[name])).status_code == 201
                spent = await shell.run_json("usage", "--interval", "total", "--group-by", "tenant")
                # Of shop the task that was read and the one since.
                assert {item["tenant"]: item["charged"]["tasks"] for item in spent["items"]} == {"shop": 2, "press": 2}
                await shell.run("tenant", "create", "late", "--account", "main")
                tenants = shell.gateway.services.registry.current.tenants
                assert tenants["late"].id > max(tenants["shop"].id, tenants["press"].id)
    await connections.aclose()


OLD_KEY, UNKNOWN_KEY = b"o" * 32, b"x" * 32


@pytest.fixture
async def two_keys(valkey: Valkey) -> AsyncIterator[Shell]:
    """Yield a shell whose gateway has an old secret key behind the first one."""
    both = ",".join(base64.b64encode(item).decode() for item in (SECRET_KEY, OLD_KEY))
    with structlog.testing.capture_logs():
        async with run_real_gateway(valkey, GATEWAY_SECRET_KEYS=both) as gateway:
            yield Shell(gateway, admin_environment(gateway.ops_url))


async def encrypt_secrets(shell: Shell, user_key: bytes, hook_key: bytes, expires_at: float = 4e9) -> None:
    """Encrypt all secrets of the registry with these keys; the previous webhook secret expires at `expires_at`."""
    hooks, current = Keyring([hook_key]).derive(WEBHOOK_SECRET_PURPOSE), shell.gateway.services.registry.current
    main, shop = current.accounts["main"], current.tenants["shop"]
    secrets = WebhookSecrets(hooks.encrypt(b"secret"), hooks.encrypt(b"former"), expires_at)
    change = RegistryChange(
        version=current.version,
        next_id=current.next_id,
        accounts=(replace(main, user_key=Keyring([user_key]).derive(USER_KEY_PURPOSE).encrypt(USER_KEY.encode())),),
        tenants=(replace(shop, webhook=replace(shop.webhook, url="https://hooks.example/", secrets=secrets)),),
    )
    assert await shell.gateway.services.registry.store.write(change)
    await shell.gateway.services.registry.refresh()


def decrypt_with_first_key(shell: Shell) -> tuple[str | None, bytes | None, bytes | None]:
    """Decrypt with the first key alone: the user_key of main and the webhook secrets of shop."""
    secrets = shell.gateway.services.registry.current.tenants["shop"].webhook.secrets
    assert secrets
    hooks = Keyring([SECRET_KEY]).derive(WEBHOOK_SECRET_PURPOSE)
    previous = secrets.previous and hooks.decrypt(secrets.previous)
    return shell.stored_user_key("main"), hooks.decrypt(secrets.current), previous


async def test_rotate_keys(two_keys: Shell) -> None:
    """All secrets are encrypted with the first key, and nothing else changes; a second run writes nothing."""
    await encrypt_secrets(two_keys, OLD_KEY, OLD_KEY)
    before = (await two_keys.run("export")).stdout
    assert decrypt_with_first_key(two_keys) == (None, None, None)
    printed = (await two_keys.run("rotate-keys")).stdout
    assert "accounts.main.user_key, tenants.shop.webhook.secret\n" in printed
    assert decrypt_with_first_key(two_keys) == (USER_KEY, b"secret", b"former")
    assert (await two_keys.run("export")).stdout == before
    version = two_keys.gateway.services.registry.current.version
    assert await two_keys.run_json("rotate-keys") == {"accounts": [], "tenants": [], "undecryptable": []}
    assert two_keys.gateway.services.registry.current.version == version
    await encrypt_secrets(two_keys, OLD_KEY, OLD_KEY, expires_at=1)
    await two_keys.run("rotate-keys")
    assert decrypt_with_first_key(two_keys) == (USER_KEY, b"secret", None)


async def test_undecryptable_secrets(two_keys: Shell) -> None:
    """Secrets that no key decrypts are named and kept; the rest is rotated, and it exits with 1."""
    await encrypt_secrets(two_keys, UNKNOWN_KEY, OLD_KEY)
    kept = two_keys.gateway.services.registry.current.accounts["main"].user_key
    failed = await two_keys.run("rotate-keys", code=1)
    assert "accounts.main.user_key" in failed.stderr
    assert "tenants.shop.webhook.secret" not in failed.stderr
    assert two_keys.gateway.services.registry.current.accounts["main"].user_key == kept
    assert decrypt_with_first_key(two_keys) == (None, b"secret", b"former")
    await encrypt_secrets(two_keys, UNKNOWN_KEY, UNKNOWN_KEY)
    failed = await two_keys.run("rotate-keys", "--json", code=1)
    assert '"tenants.shop.webhook.secret"' in failed.stdout
