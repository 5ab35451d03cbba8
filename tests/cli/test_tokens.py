from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from tests.cli.conftest import Shell


async def is_accepted(shell: Shell, token: str) -> bool:
    return (await shell.gateway.call("GET", "/v1/quota", token=token)).status_code == 200


async def test_create(shell: Shell) -> None:
    """Standard output is the token alone, for scripts; the rest goes to standard error."""
    result = await shell.run("token", "create", "shop", "--label", "生产")
    token = result.stdout.removesuffix("\n")
    assert await is_accepted(shell, token)
    (created,) = [item for item in (await shell.get_admin("/tenants/shop"))["tokens"] if item["label"] == "生产"]
    assert result.stderr == f"Token {created['id']} of shop, valid until it is revoked. It is not shown again.\n"


async def test_create_with_expiry(shell: Shell) -> None:
    """The expiry is a duration or a time in any time zone."""
    created = await shell.run_json("token", "create", "shop", "--expires-in", "90d")
    left = datetime.fromisoformat(created["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=90) - timedelta(minutes=1) < left <= timedelta(days=90)
    result = await shell.run("token", "create", "shop", "--expires-at", "2999-12-31T23:30:00+08:00")
    assert "valid until 2999-12-31T15:30:00Z." in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--expires-in", "soon"), "must be a duration"),
        (("--expires-in", "1.5d"), "must be a duration"),
        (("--expires-in", "0"), "The expiry time is in the past"),
        (("--expires-in", "99999999w"), "--expires-in is too long"),
        (("--expires-at", "2020-01-01T00:00:00Z"), "The expiry time is in the past"),
        (("--expires-at", "2999-01-01T00:00:00"), "must be a timestamp with a time zone"),
        (("--expires-at", "tomorrow"), "must be a timestamp with a time zone"),
        (("--expires-at", "2999-01-01T00:00:00Z", "--expires-in", "1d"), "Use --expires-at or --expires-in"),
    ],
)
async def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Usage errors are reported without a request."""
    before = shell.gateway.services.registry.current.version
    assert message in (await shell.run("token", "create", "shop", *arguments, code=2)).stderr
    assert shell.gateway.services.registry.current.version == before


async def test_list(shell: Shell) -> None:
    """Tokens are listed one per line, whatever their label."""
    await shell.run("token", "create", "shop", "--label", "two\nlines \x1b[31mred", "--expires-at", "2999-01-01T00:00Z")
    stored = (await shell.get_admin("/tenants/shop"))["tokens"]
    lines = {line[0]: line for line in await shell.run_table("token", "list", "shop")}
    assert lines.keys() == {"TOKEN", *(item["id"] for item in stored)}
    (labelled,) = (item for item in stored if item["label"])
    line = lines[labelled["id"]]
    assert (line[1], line[3]) == ("two lines [31mred", "2999-01-01T00:00:00Z")
    assert await shell.run_json("token", "list", "shop") == {"items": stored}


async def test_revoke(shell: Shell) -> None:
    """A token is revoked at once, or after a grace period."""
    first, second = [await shell.run_json("token", "create", "shop") for _ in range(2)]
    result = await shell.run("token", "revoke", "shop", first["id"])
    assert result.stdout == f"The token {first['id']} of shop is revoked.\n"
    assert not await is_accepted(shell, first["token"])
    result = await shell.run("token", "revoke", "shop", second["id"], "--grace", "1h")
    assert result.stdout == f"The token {second['id']} of shop expires in 3600 seconds.\n"
    assert await is_accepted(shell, second["token"])
    refused = await shell.run("token", "revoke", "shop", first["id"], code=1)
    assert refused.stderr == f"Not found: There is no token {first['id']}.\n"


async def test_no_tokens(shell: Shell) -> None:
    (token,) = (await shell.get_admin("/tenants/shop"))["tokens"]
    await shell.run("token", "revoke", "shop", token["id"])
    assert (await shell.run("token", "list", "shop")).stdout == "It has no tokens.\n"
