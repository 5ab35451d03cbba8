"""`gateway webhook`, and the webhook of `gateway tenant set`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.behaviour.receiver import Receiver, a_secret, receiving
from tests.cli.conftest import Shell

SET = ("tenant", "set", "shop", "--account", "main")


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as found:
        yield found


async def tell(shell: Shell) -> None:
    """Let a task end, and its tenant be told."""
    await shell.house.finished((await shell.house.submit()).json()["id"])
    while await shell.house.services.deliver.tick():
        await shell.house.services.deliver.settled()


async def test_webhook_of_a_tenant(shell: Shell, receiver: Receiver, tmp_path: Path) -> None:
    """An address, hosts and a secret out of a file can be given, and all but the secret are shown."""
    file = tmp_path / "secret"
    file.write_text(a_secret() + "\n")
    hook = ("--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8", "--webhook-allow", "hooks.test")
    printed = (await shell.run(*SET, *hook, "--webhook-secret-file", str(file))).stdout
    assert f"webhook:        {receiver.url}\n" in printed
    assert "webhook hosts:  127.0.0.0/8, hooks.test\n" in printed
    assert "whsec_" not in printed
    await tell(shell)
    assert receiver.told[0].signed_by(a_secret())


async def test_secret_that_is_made(shell: Shell, receiver: Receiver) -> None:
    """A secret that is made is printed that once."""
    hook = ("--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    printed = (await shell.run(*SET, *hook)).stdout
    made = re.search(r"whsec_\S+", printed)
    assert made
    assert "whsec_" not in (await shell.run(*SET, *hook)).stdout + (await shell.run("tenant", "show", "shop")).stdout
    await tell(shell)
    assert receiver.told[0].signed_by(made[0])


async def test_rotation(shell: Shell, receiver: Receiver) -> None:
    """A new secret is printed alone, and says beside it how long the one before signs too."""
    await shell.run(*SET, "--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    rotated = await shell.run("webhook", "rotate", "shop", "--grace", "7d")
    assert "signs too until" in rotated.stderr
    assert "signs too" not in (await shell.run("webhook", "rotate", "shop")).stderr
    newest = await shell.json("webhook", "rotate", "shop")
    await tell(shell)
    assert receiver.told[0].signed_by(newest["secret"])
    assert not receiver.told[0].signed_by(rotated.stdout.strip())


async def test_failed(shell: Shell, receiver: Receiver) -> None:
    """What could not be delivered is listed, and sent again by its id."""
    await shell.run(*SET, "--webhook-url", receiver.url, "--webhook-allow", "127.0.0.0/8")
    receiver.statuses = [410]
    await tell(shell)
    _, line = await shell.lines("webhook", "failed", "--limit", "1")
    assert line[1:7] == ["shop", "off", "1", "410", "It answered 410.", receiver.url]
    assert await shell.json("webhook", "failed") == await shell.stored("/webhooks/failed")
    _, again = await shell.lines("webhook", "redeliver", line[0])
    assert again[:4] == [line[0], "shop", "pending", "0"]
    assert (await shell.json("webhook", "redeliver", line[0]))["state"] == "pending"
    assert await shell.json("webhook", "failed") == {"items": []}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--webhook-allow", "hooks.test"), "need a --webhook-url"),
        (("--webhook-secret-file", "-"), "need a --webhook-url"),
        (("--webhook-url", "https://hooks.test/", "--webhook-secret-file", "-"), "must be a file that holds a key"),
    ],
)
async def test_misuse(shell: Shell, arguments: tuple[str, ...], says: str) -> None:
    """What can't be meant is said before the gateway is asked."""
    assert says in (await shell.run(*SET, *arguments, code=2)).stderr
