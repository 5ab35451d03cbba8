"""How commands find a gateway, authenticate, and report errors."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.behaviour.gateway_fixture import ADMIN_TOKEN
from tests.cli.conftest import Shell
from tests.support.network import reserve_port


@asynccontextmanager
async def run_raw_server(answer: bytes) -> AsyncIterator[str]:
    """Answer every connection with these bytes and close it; yields the URL."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def http_response(status: str, body: bytes, media_type: str = "text/html") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\nLocation: /elsewhere\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


UNEXPECTED_RESPONSES = {
    "empty response": b"",
    "incomplete response": http_response("200 OK", b"{}")[:-1],
    "speaks another protocol": b"220 mail.example ESMTP\r\n",
    "has a page": http_response("200 OK", b"<html>"),
    "has other JSON": http_response("200 OK", b'{"items": 5}', "application/json"),
    "does not know the address": http_response("404 Not Found", b"<html>"),
    "sends elsewhere": http_response("307 Temporary Redirect", b""),
    "is a proxy": http_response("502 Bad Gateway", b"bad gateway\x1b[31m"),
    "has other errors": http_response("400 Bad Request", b'{"error": "no"}', "application/json"),
}


@pytest.mark.parametrize("kind", UNEXPECTED_RESPONSES)
@pytest.mark.parametrize("output", [(), ("--json",)])
async def test_unexpected_response(shell: Shell, kind: str, output: tuple[str, ...]) -> None:
    """A server that is no operators' port is reported in one line, with its URL."""
    if (kind, output) == ("has other JSON", ("--json",)):
        kind = "has a page"  # JSON is passed on as it is
    async with run_raw_server(UNEXPECTED_RESPONSES[kind]) as url:
        result = await shell.run("account", "list", "--url", url, *output, code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gateway: ")
    assert url in line
    assert line.isprintable()


async def test_unexpected_response_without_tables(shell: Shell) -> None:
    """JSON in response to a request for CSV comes from another version."""
    async with run_raw_server(http_response("200 OK", b"{}", "application/json")) as url:
        result = await shell.run("usage", "--csv", "--url", url, code=1)
    (line,) = result.stderr.splitlines()
    assert line.endswith("(no text/csv)")


async def test_no_gateway(shell: Shell) -> None:
    """One line reports that no gateway answers, and how to proceed."""
    url = f"http://127.0.0.1:{reserve_port()}"
    result = await shell.run("tenant", "show", "shop", "--url", url, code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gateway: can't connect to {url}: ")
    assert line.endswith("Start it, or use --url for its operators' port.")


@pytest.mark.parametrize("kind", ["empty response", "incomplete response"])
async def test_change_without_response(shell: Shell, kind: str) -> None:
    """A change without a response is reported as possibly made."""
    async with run_raw_server(UNEXPECTED_RESPONSES[kind]) as url:
        change = await shell.run("token", "create", "shop", "--url", url, code=1)
        question = await shell.run("account", "list", "--url", url, code=1)
    assert change.stderr.startswith(f"gateway: no response from {url}: ")
    assert change.stderr.endswith(" The change may have been made: check before you repeat it.\n")
    assert "may have been done" not in question.stderr


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host", "http://", "http://h:99999", "http://h\n", "http://ü"])
async def test_invalid_url(shell: Shell, url: str) -> None:
    """An invalid URL is an error; an empty one counts as absent."""
    result = await shell.run("account", "list", "--url", url, code=1 if url else 0)
    assert ("is no address such as" in result.stderr) == bool(url)


async def test_url_option_wins(shell: Shell) -> None:
    """The option wins over the environment, with or without a trailing slash."""
    shell.environ["GATEWAY_OPS_PORT"] = str(reserve_port())
    await shell.run("account", "list", code=1)
    await shell.run("account", "list", "--url", f"{shell.gateway.ops_url}/")


async def test_wildcard_address(shell: Shell) -> None:
    """A gateway that listens on all addresses is reached on localhost."""
    shell.environ["GATEWAY_OPS_HOST"] = "0.0.0.0"
    await shell.run("account", "list")


async def test_random_port(shell: Shell) -> None:
    """With port 0 the URL must be given."""
    shell.environ["GATEWAY_OPS_PORT"] = "0"
    assert "use --url" in (await shell.run("account", "list", code=1)).stderr
    await shell.run("account", "list", "--url", shell.gateway.ops_url)


async def test_no_proxy(shell: Shell) -> None:
    """The operators' token is not sent to a proxy from the environment."""
    proxy = f"http://127.0.0.1:{reserve_port()}"
    shell.environ |= {"HTTP_PROXY": proxy, "http_proxy": proxy, "ALL_PROXY": proxy}
    await shell.run("account", "list")


async def test_wrong_token(shell: Shell) -> None:
    shell.environ["GATEWAY_ADMIN_TOKEN"] = shell.gateway.token
    result = await shell.run("account", "list", code=1)
    assert result.stderr == "Authentication required: This is not the admin token.\n"


async def test_token_of_the_data_folder(shell: Shell, tmp_path: Path) -> None:
    """Without a token in the settings, the generated development token is used."""
    del shell.environ["GATEWAY_ADMIN_TOKEN"]
    shell.environ["GATEWAY_DATA_DIR"] = str(tmp_path)
    for damage in (None, b"", b"\xff", "ü".encode()):
        if damage is not None:
            (tmp_path / "admin.token").write_bytes(damage)
        result = await shell.run("account", "list", code=1)
        (line,) = result.stderr.splitlines()
        assert line.startswith("gateway: there is no operators' token: set GATEWAY_ADMIN_TOKEN")
    (tmp_path / "admin.token").write_text(f"{ADMIN_TOKEN}\n")
    await shell.run("account", "list")


async def test_token_from_a_file(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(f"{ADMIN_TOKEN}\n")
    shell.environ["GATEWAY_ADMIN_TOKEN_FILE"] = str(tmp_path / "token")
    del shell.environ["GATEWAY_ADMIN_TOKEN"]
    await shell.run("account", "list")


async def test_all_field_errors(shell: Shell) -> None:
    """Each error of a request has a line."""
    twice = ("--account", "main", "--account", "main", "--kind", "upscale", "--kind", "upscale")
    result = await shell.run("tenant", "create", "other", *twice, code=1)
    assert result.stderr == (
        "Invalid options:\n  accounts: must name each account at most once\n  kinds: must name each kind at most once\n"
    )


async def test_odd_names(shell: Shell) -> None:
    """Reserved characters in a name are escaped in the URL."""
    for name in ("main?x", "main#x", "%6Dain", "商店"):
        result = await shell.run("account", "show", name, code=1)
        assert result.stderr == f"Not found: There is no account {name}.\n"
    (token,) = (await shell.get_admin("/tenants/shop"))["tokens"]
    for name in ("", ".", "..", "../accounts/main", f"shop/tokens/{token['id']}"):
        result = await shell.run("tenant", "delete", name, code=1)
        assert result.stderr == f"gateway: there is no {name!r}\n"
    assert (await shell.get_admin("/tenants/shop"))["tokens"] == [token]


async def test_process(shell: Shell) -> None:
    """As a process, a failing command prints a line on standard error and exits with 1."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "token", "create", "shop", "--url", f"http://127.0.0.1:{reserve_port()}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=shell.environ,
    )
    printed, errors = await process.communicate()
    assert (process.returncode, printed, errors.count(b"\n")) == (1, b"", 1)


def test_help_is_fast() -> None:
    """Help imports no HTTP client, and a group's help only what its options need."""
    heavy = ["httpx2", "msgspec", "litestar", "service.settings"]
    script = (
        "import json, sys; from click.testing import CliRunner; from service.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:], catch_exceptions=False)\n"
        f"print(json.dumps([result.output, [each for each in {heavy} if each in sys.modules]]))"
    )
    for arguments, imported in (["--help"], []), (["account", "--help"], ["httpx2", "msgspec", "service.settings"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
        output, modules = json.loads(done.stdout)
        assert "account" in output
        assert modules == imported
