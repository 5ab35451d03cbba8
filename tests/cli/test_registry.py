"""`gateway export`, `apply` and `rotate-keys`."""

from __future__ import annotations

import base64
import tomllib
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from service.cli.client import AdminClient, AdminResponse
from service.container import WEBHOOK_SECRET_PURPOSE
from service.crypto import Keyring
from service.domain.tenants import WebhookSecrets
from service.usecases.ports import RegistryChange
from tests.behaviour.gateway_fixture import SECRET_KEY, USER_KEY
from tests.cli.conftest import Shell, run_shell
from tests.support.valkey import Valkey

UNCHANGED = "The registry matches the file: nothing to change.\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "registry.toml"


async def test_export_has_no_secrets_and_applies_without_a_change(shell: Shell, file: Path) -> None:
    await shell.gateway.put_tenant(limits=[{"window": "day", "tasks": 5, "money": 1.5}], kinds=[])
    text = (await shell.run("export")).stdout
    shop = tomllib.loads(text)["tenants"]["shop"]
    assert (shop["limits"], shop["kinds"]) == ([{"window": "day", "tasks": 5, "money": 1.5}], [])
    assert shell.gateway.token not in text
    assert USER_KEY not in text
    assert await shell.run_json("export") == await shell.get_admin("/registry")
    file.write_text(text)
    assert (await shell.run("apply", str(file), "--prune", "--dry-run")).stdout == UNCHANGED
    assert (await shell.run("apply", "-", stdin=text)).stdout == UNCHANGED


async def test_apply_prints_and_makes_differences_once_and_prunes_by_force(shell: Shell, file: Path) -> None:
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
    file.write_text('tenants.press = { accounts = ["main"] }')
    (difference,) = (await shell.run_json("apply", str(file)))["differences"]
    assert difference == {"path": "tenants.press", "action": "added", "after": {"accounts": ["main"]}}

    file.write_text("")  # deletes all
    assert (await shell.run("apply", str(file), "--prune", code=1)).stderr.startswith("Conflict: ")
    lines = (await shell.run("apply", str(file), "--prune", "--force")).stdout.splitlines()
    assert '- tenants.shop.accounts = ["main"]' in lines
    assert shell.gateway.services.registry.current.accounts == {}


async def test_limits_that_do_not_work_as_meant_are_warned_of(shell: Shell, file: Path) -> None:
    file.write_text('tenants."press.de" = { accounts = ["main"], limits = [{ window = "day", money = 5 }] }')
    warning = 'tenants."press.de".limits have money, but account main has no max_price of '
    for options, code in ((["--dry-run"], 2), ([], 0), ([], 0)):
        result = await shell.run("apply", str(file), *options, code=code)
        assert result.stderr.startswith(f"gateway: warning: {warning}"), options
        assert result.stderr.count("\n") == 1
    (reported,) = (await shell.run_json("apply", str(file)))["warnings"]
    assert reported.startswith(warning)


async def test_dry_run_changes_nothing_and_shows_no_secret(shell: Shell, file: Path) -> None:
    shell.environ["OTHER_KEY"] = "another-key"
    text = (await shell.run("export")).stdout + '\n[accounts.main.user_key]\nenv = "OTHER_KEY"\n'
    file.write_text(text.replace('accounts = [\n    "main",\n]', 'accounts = ["main"]\ndisabled = true'))
    version = shell.gateway.services.registry.current.version
    result = await shell.run("apply", str(file), "--dry-run", code=2)
    reference, secret, state = result.stdout.splitlines()
    assert reference == '+ accounts.main.user_key.env = "OTHER_KEY"'
    assert secret.startswith("~ accounts.main.user_key: ")
    assert state == '+ tenants.shop.state = "read-only"'
    as_json = await shell.run("apply", str(file), "--dry-run", "--json", code=2)
    assert '"applied": false' in as_json.stdout
    assert "another-key" not in result.output + as_json.output
    assert shell.gateway.services.registry.current.version == version


async def test_webhook_secret_is_read_or_generated_and_printed_once(shell: Shell, file: Path) -> None:
    webhook = 'tenants.press = { accounts = ["main"], webhook = { url = "https://h.example/" %s } }'
    file.write_text(webhook % "")
    assert "whsec_" not in (await shell.run("apply", str(file), "--dry-run", code=2)).stdout
    assert [(await shell.run("apply", str(file))).stdout.count("whsec_") for _ in range(2)] == [1, 0]
    (file.parent / "hook").write_text("whsec_" + "a" * 40 + "\n")
    file.write_text(webhook % ', secret = { file = "hook" }')
    assert "whsec_" not in (await shell.run("apply", str(file))).stdout
    secrets = shell.gateway.services.registry.current.tenants["press"].webhook.secrets
    assert secrets
    key = Keyring([SECRET_KEY]).derive(WEBHOOK_SECRET_PURPOSE).decrypt(secrets.current)
    assert key == base64.b64decode("a" * 40)


async def test_errors_are_printed_and_nothing_is_changed(
    shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = await shell.get_admin("/registry")
    file.write_text("tenants.shop.accounts = ['mian']\naccounts.new = {}")
    _, *lines = (await shell.run("apply", str(file), code=1)).stderr.splitlines()
    fields = [line.partition(":")[0].strip() for line in lines]
    assert fields == ["accounts.new.user_key", "tenants.shop.accounts[0]"]
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


OLD_KEY, UNKNOWN_KEY = b"o" * 32, b"x" * 32


async def encrypt_secrets(shell: Shell, user_key: bytes, webhook_key: bytes = OLD_KEY) -> None:
    """Encrypt the user_key and the secrets of the webhook with these keys."""
    hooks, current = Keyring([webhook_key]).derive(WEBHOOK_SECRET_PURPOSE), shell.gateway.services.registry.current
    main, shop = current.accounts["main"], current.tenants["shop"]
    secrets = WebhookSecrets(hooks.encrypt(b"secret"), hooks.encrypt(b"former"), 4e9)
    change = RegistryChange(
        version=current.version,
        next_id=current.next_id,
        accounts=(replace(main, user_key=shell.user_key_cipher(user_key).encrypt(USER_KEY.encode(), main)),),
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


async def test_rotate_keys_encrypts_all_secrets_and_names_undecryptable_ones(valkey: Valkey) -> None:
    both = ",".join(base64.b64encode(key).decode() for key in (SECRET_KEY, OLD_KEY))
    async with run_shell(valkey, GATEWAY_SECRET_KEYS=both) as shell:
        await encrypt_secrets(shell, OLD_KEY)
        before = (await shell.run("export")).stdout
        assert decrypt_with_first_key(shell) == (None, None, None)
        await shell.run("rotate-keys")
        assert decrypt_with_first_key(shell) == (USER_KEY, b"secret", b"former")
        assert (await shell.run("export")).stdout == before
        version = shell.gateway.services.registry.current.version
        assert await shell.run_json("rotate-keys") == {"accounts": [], "tenants": [], "undecryptable": []}
        assert shell.gateway.services.registry.current.version == version

        await encrypt_secrets(shell, UNKNOWN_KEY)
        kept = shell.gateway.services.registry.current.accounts["main"].user_key
        failed = await shell.run("rotate-keys", code=1)
        assert ("main.user_key" in failed.stderr, "webhook.secret" in failed.stderr) == (True, False)
        assert shell.gateway.services.registry.current.accounts["main"].user_key == kept
        assert decrypt_with_first_key(shell) == (None, b"secret", b"former")

        await encrypt_secrets(shell, OLD_KEY, UNKNOWN_KEY)
        failed = await shell.run("rotate-keys", code=1)
        assert ("main.user_key" in failed.stderr, "webhook.secret" in failed.stderr) == (False, True)
        assert decrypt_with_first_key(shell) == (USER_KEY, None, None)
