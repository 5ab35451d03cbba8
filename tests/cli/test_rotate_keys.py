"""`gateway rotate-keys`, which makes an old secret key removable."""

from __future__ import annotations

import base64
from typing import Any

import pytest
import structlog
from msgspec.structs import replace

from service.container import USER_KEY_PURPOSE, WEBHOOK_SECRET_PURPOSE
from service.crypto import Keyring
from service.domain.tenants import WebhookSecrets
from service.usecases.ports import RegistryChange
from tests.behaviour.gateway_fixture import ENVIRONMENT, SECRET_KEY
from tests.behaviour.upstream_control import USER_KEY
from tests.cli.conftest import Shell

OLD_KEY, UNKNOWN_KEY = b"o" * 32, b"x" * 32
DONE_MESSAGE = "All secrets of the registry are encrypted with the first secret key.\n"
NEW_ONLY = Keyring([SECRET_KEY])
URL = "https://hooks.example/"


@pytest.fixture(autouse=True)
def old_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Add an old secret key behind the first one."""
    both = ",".join(base64.b64encode(item).decode() for item in (SECRET_KEY, OLD_KEY))
    monkeypatch.setitem(ENVIRONMENT, "GATEWAY_SECRET_KEYS", both)


def current_registry(shell: Shell) -> Any:
    return shell.gateway.services.registry.current


def decrypt_with_new_key(shell: Shell) -> tuple[bytes | None, ...]:
    """Decrypt with the first key alone: the user_key of main and the webhook secrets of shop."""
    signing: WebhookSecrets = current_registry(shell).tenants["shop"].webhook.secrets
    hooks = NEW_ONLY.derive(WEBHOOK_SECRET_PURPOSE)
    key = NEW_ONLY.derive(USER_KEY_PURPOSE).decrypt(current_registry(shell).accounts["main"].user_key)
    return (key, hooks.decrypt(signing.current), signing.previous and hooks.decrypt(signing.previous))


async def write_registry(shell: Shell, change: RegistryChange) -> None:
    """Write a change directly into the store."""
    store: Any = shell.gateway.services.registry
    assert await store.write(change)


async def encrypt_with(shell: Shell, key: bytes, *, expires_at: float = 4e9) -> None:
    """Encrypt all secrets of the registry with a key; the previous webhook secret expires at `expires_at`."""
    hooks, now = Keyring([key]).derive(WEBHOOK_SECRET_PURPOSE), current_registry(shell)
    main, shop = now.accounts["main"], now.tenants["shop"]
    signing = WebhookSecrets(hooks.encrypt(b"secret"), hooks.encrypt(b"former"), expires_at)
    change = RegistryChange(
        version=now.version,
        next_id=now.next_id,
        accounts=(replace(main, user_key=Keyring([key]).derive(USER_KEY_PURPOSE).encrypt(USER_KEY.encode())),),
        tenants=(replace(shop, webhook=replace(shop.webhook, url=URL, secrets=signing)),),
    )
    await write_registry(shell, change)


async def test_rotation(shell: Shell) -> None:
    """All secrets are encrypted with the first key afterwards, nothing else changes, and it is logged."""
    await encrypt_with(shell, OLD_KEY)
    before = (await shell.run("export")).stdout
    assert decrypt_with_new_key(shell) == (None, None, None)
    with structlog.testing.capture_logs() as logged:
        printed = (await shell.run("rotate-keys")).stdout
    assert printed == (
        f"Encrypted with the first secret key: accounts.main.user_key, tenants.shop.webhook.secret\n{DONE_MESSAGE}"
    )
    assert decrypt_with_new_key(shell) == (USER_KEY.encode(), b"secret", b"former")
    assert (await shell.run("export")).stdout == before
    assert [item["event"] for item in logged if item["event"].startswith("registry.")] == ["registry.reencrypted"]


async def test_second_run(shell: Shell) -> None:
    """A second run writes nothing."""
    await encrypt_with(shell, OLD_KEY)
    await shell.run("rotate-keys")
    version = current_registry(shell).version
    assert (await shell.run("rotate-keys")).stdout == DONE_MESSAGE
    assert await shell.run_json("rotate-keys") == {"accounts": [], "tenants": [], "undecryptable": []}
    assert current_registry(shell).version == version


async def test_expired_previous_secret(shell: Shell) -> None:
    """An expired previous webhook secret is dropped."""
    await encrypt_with(shell, OLD_KEY, expires_at=1)
    await shell.run("rotate-keys")
    assert decrypt_with_new_key(shell) == (USER_KEY.encode(), b"secret", None)


async def test_undecryptable(shell: Shell) -> None:
    """Secrets that no key decrypts are named and kept; the rest is rotated, and it exits with 1."""
    await encrypt_with(shell, OLD_KEY)
    stolen = Keyring([UNKNOWN_KEY]).derive(USER_KEY_PURPOSE).encrypt(b"key")
    now = current_registry(shell)
    main = replace(now.accounts["main"], user_key=stolen)
    await write_registry(shell, RegistryChange(version=now.version, next_id=now.next_id, accounts=(main,)))
    failed = await shell.run("rotate-keys", code=1)
    assert failed.stdout == "Encrypted with the first secret key: tenants.shop.webhook.secret\n"
    assert failed.stderr == "gateway: no secret key decrypts accounts.main.user_key: set them again\n"
    assert current_registry(shell).accounts["main"].user_key == stolen
    assert decrypt_with_new_key(shell) == (None, b"secret", b"former")


async def test_undecryptable_webhook_secret(shell: Shell) -> None:
    await encrypt_with(shell, UNKNOWN_KEY)
    failed = await shell.run("rotate-keys", "--json", code=1)
    assert '"tenants.shop.webhook.secret"' in failed.stdout
    assert "accounts.main.user_key, tenants.shop.webhook.secret" in failed.stderr
