"""`gateway webhook`, and the webhook options of `gateway tenant update`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.behaviour.webhook_receiver import WebhookReceiver, make_secret, run_receiver
from tests.cli.conftest import Shell

UPDATE_TENANT = ("tenant", "update", "shop")


@pytest.fixture
async def receiver() -> AsyncIterator[WebhookReceiver]:
    async with run_receiver() as running:
        yield running


async def finish_task(shell: Shell) -> None:
    """Finish a task, which sends its webhook."""
    await shell.gateway.wait_for_task((await shell.gateway.submit()).json()["id"])
    while await shell.gateway.services.webhook_dispatcher.start_due():
        await shell.gateway.services.webhook_dispatcher.wait_idle()


async def test_webhook_of_a_tenant(shell: Shell, receiver: WebhookReceiver, tmp_path: Path) -> None:
    """URL, hosts and a secret from a file can be set, and all but the secret are shown."""
    file = tmp_path / "secret"
    file.write_text(make_secret() + "\n")
    hook = ("--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8", "--webhook-allow", "hooks.test")
    printed = (await shell.run(*UPDATE_TENANT, *hook, "--webhook-secret-file", str(file))).stdout
    assert f"webhook:         - -> {receiver.url}\n" in printed
    assert "webhook hosts:   - -> 127.0.0.0/8, hooks.test\nwebhook secret:  changed\n" in printed
    assert "whsec_" not in printed
    await finish_task(shell)
    assert receiver.requests[0].is_signed_with(make_secret())


async def test_generated_secret(shell: Shell, receiver: WebhookReceiver) -> None:
    """A generated secret is printed once."""
    hook = ("--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    printed = (await shell.run(*UPDATE_TENANT, *hook)).stdout
    match = re.search(r"whsec_\S+", printed)
    assert match
    assert (
        "whsec_"
        not in (await shell.run(*UPDATE_TENANT, *hook)).stdout + (await shell.run("tenant", "show", "shop")).stdout
    )
    await finish_task(shell)
    assert receiver.requests[0].is_signed_with(match[0])


async def test_rotation(shell: Shell, receiver: WebhookReceiver) -> None:
    """Standard output is the new secret alone; standard error says until when the previous one signs too."""
    await shell.run(*UPDATE_TENANT, "--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    rotated = await shell.run("webhook", "rotate-secret", "shop", "--grace", "7d")
    assert "signs too until" in rotated.stderr
    assert "signs too" not in (await shell.run("webhook", "rotate-secret", "shop")).stderr
    newest = await shell.run_json("webhook", "rotate-secret", "shop")
    await finish_task(shell)
    assert receiver.requests[0].is_signed_with(newest["secret"])
    assert not receiver.requests[0].is_signed_with(rotated.stdout.strip())


async def test_failed(shell: Shell, receiver: WebhookReceiver) -> None:
    """Failed deliveries are listed, and redelivered by id; a disabled URL is enabled by an update."""
    await shell.run(*UPDATE_TENANT, "--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    receiver.statuses = [410]
    await finish_task(shell)
    _, line = await shell.run_table("webhook", "failed", "--limit", "1")
    assert line[1:7] == ["shop", "off", "1", "410", "It answered 410.", receiver.url]
    assert await shell.run_json("webhook", "failed") == await shell.get_admin("/webhooks/failed")
    _, again = await shell.run_table("webhook", "redeliver", line[0])
    assert again[:4] == [line[0], "shop", "pending", "0"]
    assert (await shell.run_json("webhook", "redeliver", line[0]))["state"] == "pending"
    assert await shell.run_json("webhook", "failed") == {"items": []}
    enabled = await shell.run(*UPDATE_TENANT, "--webhook-url", receiver.url)
    assert enabled.stdout == f"disabled URLs:  {receiver.url} -> -\n"
