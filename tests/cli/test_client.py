"""How commands find a gateway, authenticate, and report errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from click.testing import Result

from tests.behaviour.gateway_fixture import ADMIN_TOKEN
from tests.cli.conftest import UNREACHABLE_URL, Shell, run_command

ENVIRONMENT = {"GATEWAY_ADMIN_TOKEN": ADMIN_TOKEN}


@asynccontextmanager
async def run_raw_server(answer: bytes) -> AsyncIterator[str]:
    """Answer every connection with these bytes and close it; yield the URL."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def run_against(answer: bytes, *arguments: str) -> Result:
    """Run a command that must fail against a server with this answer, and report it in one line with the URL."""
    async with run_raw_server(answer) as url:
        result = await asyncio.to_thread(run_command, *arguments, "--url", url, code=1, env=ENVIRONMENT)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gateway: ")
    assert url in line
    assert line.isprintable()
    return result


def http_response(status: str, body: bytes, media_type: str = "text/html") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\nLocation: /elsewhere\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


@pytest.mark.parametrize(
    ("answer", "may_be_made"),
    [
        (b"", True),
        (http_response("200 OK", b"{}")[:-1], True),
        (b"220 mail.example ESMTP\r\n", True),
        (http_response("200 OK", b"<html>"), False),
        (http_response("307 Temporary Redirect", b""), False),
        (http_response("502 Bad Gateway", b"bad gateway\x1b[31m"), False),
        (http_response("400 Bad Request", b'{"error": "no"}', "application/json"), False),
    ],
)
async def test_unexpected_responses(answer: bytes, may_be_made: bool) -> None:
    """A change without a response is reported as possibly made."""
    hint = "may have been made"
    for output in ((), ("--json",)):
        assert hint not in (await run_against(answer, "account", "list", *output)).stderr
    assert (hint in (await run_against(answer, "token", "create", "shop")).stderr) == may_be_made


async def test_responses_of_another_version() -> None:
    await run_against(http_response("200 OK", b'{"items": 5}', "application/json"), "account", "list")
    await run_against(http_response("200 OK", b"{}", "application/json"), "usage", "--csv")


def test_no_gateway() -> None:
    result = run_command("token", "create", "shop", "--url", UNREACHABLE_URL, code=1, env=ENVIRONMENT)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gateway: can't connect to {UNREACHABLE_URL}: ")


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://h:99999", "http://h\n", "http://ü"])
def test_invalid_url(url: str) -> None:
    assert "is no address" in run_command("account", "list", "--url", url, code=1, env=ENVIRONMENT).stderr


async def test_address(shell: Shell) -> None:
    """The option wins over the environment; proxies never receive the token."""
    proxies = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY"), UNREACHABLE_URL)
    shell.environ |= proxies | {"GATEWAY_OPS_HOST": "0.0.0.0"}  # all addresses: reached on localhost
    await shell.run("account", "list")
    await shell.run("account", "list", "--url", "")
    shell.environ["GATEWAY_OPS_PORT"] = "1"
    await shell.run("account", "list", code=1)
    await shell.run("account", "list", "--url", f"{shell.gateway.ops_url}/")
    shell.environ["GATEWAY_OPS_PORT"] = "0"
    assert "--url" in (await shell.run("account", "list", code=1)).stderr


async def test_token(shell: Shell, tmp_path: Path) -> None:
    """The token comes from the settings, a file, or what a gateway in development generated."""
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


async def test_all_field_errors(shell: Shell) -> None:
    twice = ("--account", "main", "--account", "main", "--kind", "upscale", "--kind", "upscale")
    refused = await shell.run("tenant", "create", "other", *twice, code=1)
    assert [line.split(":")[0] for line in refused.stderr.splitlines()] == ["Invalid options", "  accounts", "  kinds"]


async def test_odd_names(shell: Shell) -> None:
    """Reserved characters in a name are escaped in the URL, and no name leads to another resource."""
    for name in ("main?x", "main#x", "%6Dain", "商店"):
        assert name in (await shell.run("account", "show", name, code=1)).stderr
    before = await shell.get_admin("/registry")
    (token,) = before["tenants"]["shop"]["tokens"]
    for name in ("", ".", "..", "../accounts/main", f"shop/tokens/{token}"):
        refused = await shell.run("tenant", "delete", name, code=1)
        assert refused.stderr.startswith("gateway: ")  # no request: servers normalize such a path even if quoted
    assert await shell.get_admin("/registry") == before
