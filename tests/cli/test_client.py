"""How commands find a gateway, show that they may ask it, and say what went wrong."""

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
from tests.support.valkey import find_free_port


@asynccontextmanager
async def run_raw_server(answer: bytes) -> AsyncIterator[str]:
    """Something that answers every connection with these bytes and closes it; its address."""

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
    "says nothing": b"",
    "hangs up half-way": http_response("200 OK", b"{}")[:-1],
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
async def test_stranger(shell: Shell, kind: str, output: tuple[str, ...]) -> None:
    """What answers but is no operators' port is told in one line, with its address."""
    if (kind, output) == ("has other JSON", ("--json",)):
        kind = "has a page"  # JSON is passed on as it is
    async with run_raw_server(UNEXPECTED_RESPONSES[kind]) as url:
        result = await shell.run("account", "list", "--url", url, *output, code=1)
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gateway: ")
    assert url in line
    assert line.isprintable()


async def test_stranger_without_tables(shell: Shell) -> None:
    """What answers with JSON where CSV was asked for is no operators' port of this version."""
    async with run_raw_server(http_response("200 OK", b"{}", "application/json")) as url:
        result = await shell.run("usage", "--csv", "--url", url, code=1)
    (line,) = result.stderr.splitlines()
    assert line.endswith("(it has no text/csv)")


async def test_nobody_there(shell: Shell) -> None:
    """Without a gateway one line says so, and how to go on."""
    url = f"http://127.0.0.1:{find_free_port()}"
    result = await shell.run("tenant", "show", "shop", "--url", url, code=1)
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"gateway: no gateway answers at {url}: ")
    assert line.endswith("Start it, or name its operators' port with --url.")


@pytest.mark.parametrize("kind", ["says nothing", "hangs up half-way"])
async def test_may_have_been_done(shell: Shell, kind: str) -> None:
    """Of a change to which no answer came, nobody is told that there is no gateway, but that it may have been made."""
    async with run_raw_server(UNEXPECTED_RESPONSES[kind]) as url:
        change = await shell.run("token", "create", "shop", "--url", url, code=1)
        question = await shell.run("account", "list", "--url", url, code=1)
    assert change.stderr.startswith(f"gateway: no answer came from {url}: ")
    assert change.stderr.endswith(" It may have been done all the same: look before you repeat it.\n")
    assert "may have been done" not in question.stderr


@pytest.mark.parametrize("url", ["", "nonsense", "ftp://host", "http://", "http://h:99999", "http://h\n", "http://ü"])
async def test_no_address(shell: Shell, url: str) -> None:
    """What is no address is said to be none; an empty one counts as not given."""
    result = await shell.run("account", "list", "--url", url, code=1 if url else 0)
    assert ("is no address such as" in result.stderr) == bool(url)


async def test_url_wins(shell: Shell) -> None:
    """The address of the command line wins over that of the environment, with or without a slash at its end."""
    shell.environ["GATEWAY_OPS_PORT"] = str(find_free_port())
    await shell.run("account", "list", code=1)
    await shell.run("account", "list", "--url", f"{shell.gateway.ops_url}/")


async def test_listening_everywhere(shell: Shell) -> None:
    """A gateway that listens everywhere is reached on this machine."""
    shell.environ["GATEWAY_OPS_HOST"] = "0.0.0.0"
    await shell.run("account", "list")


async def test_any_port(shell: Shell) -> None:
    """Where the gateway takes any free port, its address has to be given."""
    shell.environ["GATEWAY_OPS_PORT"] = "0"
    assert "use --url" in (await shell.run("account", "list", code=1)).stderr
    await shell.run("account", "list", "--url", shell.gateway.ops_url)


async def test_no_proxy(shell: Shell) -> None:
    """A proxy out of the environment is not handed the operators' token."""
    proxy = f"http://127.0.0.1:{find_free_port()}"
    shell.environ |= {"HTTP_PROXY": proxy, "http_proxy": proxy, "ALL_PROXY": proxy}
    await shell.run("account", "list")


async def test_wrong_token(shell: Shell) -> None:
    """A token that is not the operators' is refused."""
    shell.environ["GATEWAY_ADMIN_TOKEN"] = shell.gateway.token
    result = await shell.run("account", "list", code=1)
    assert result.stderr == "Authentication required: This is not the admin token.\n"


async def test_token_of_the_data_folder(shell: Shell, tmp_path: Path) -> None:
    """Without a token in the settings, the one is taken that a gateway in development made for itself."""
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
    """The operators' token can be in a file that the environment names."""
    (tmp_path / "token").write_text(f"{ADMIN_TOKEN}\n")
    shell.environ["GATEWAY_ADMIN_TOKEN_FILE"] = str(tmp_path / "token")
    del shell.environ["GATEWAY_ADMIN_TOKEN"]
    await shell.run("account", "list")


async def test_every_fault(shell: Shell) -> None:
    """Of a request with several faults, each has a line."""
    twice = ("--account", "main", "--account", "main", "--kind", "upscale", "--kind", "upscale")
    result = await shell.run("tenant", "set", "shop", *twice, code=1)
    assert result.stderr == (
        "Invalid options:\n  accounts: must name each account at most once\n  kinds: must name each kind at most once\n"
    )


async def test_odd_names(shell: Shell) -> None:
    """A name with characters of an address's own does not lead elsewhere."""
    for name in ("main?x", "main#x", "%6Dain", "商店"):
        result = await shell.run("account", "show", name, code=1)
        assert result.stderr == f"Not found: There is no account {name}.\n"
    (token,) = (await shell.get_admin("/tenants/shop"))["tokens"]
    for name in ("", ".", "..", "../accounts/main", f"shop/tokens/{token['id']}"):
        result = await shell.run("tenant", "delete", name, code=1)
        assert result.stderr == f"gateway: nothing has the name {name!r}\n"
    assert (await shell.get_admin("/tenants/shop"))["tokens"] == [token]


async def test_nobody_there_for_real(shell: Shell) -> None:
    """As a process of its own, a command that fails prints a line on standard error and ends with 1."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "token", "create", "shop", "--url", f"http://127.0.0.1:{find_free_port()}"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=shell.environ,
    )
    printed, said = await process.communicate()
    assert (process.returncode, printed, said.count(b"\n")) == (1, b"", 1)


def test_help_is_fast() -> None:
    """The help imports nothing that asks a gateway, and a group's help what its commands need."""
    heavy = ["httpx2", "msgspec", "litestar", "service.settings"]
    script = (
        "import json, sys; from click.testing import CliRunner; from service.cli import main\n"
        "result = CliRunner().invoke(main, sys.argv[1:], catch_exceptions=False)\n"
        f"print(json.dumps([result.output, [each for each in {heavy} if each in sys.modules]]))"
    )
    for arguments, imported in (["--help"], []), (["account", "--help"], ["httpx2", "msgspec", "service.settings"]):
        done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True)
        output, found = json.loads(done.stdout)
        assert "account" in output
        assert found == imported
