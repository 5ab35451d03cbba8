from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from service.crypto import Keyring
from tests.behaviour.gateway_fixture import SECRET_KEY
from tests.behaviour.upstream_control import USER_KEY
from tests.cli.conftest import Shell


def stored_user_key(shell: Shell, name: str) -> str:
    """Return the decrypted user_key of an account."""
    opened = (
        Keyring([SECRET_KEY])
        .derive("user-key")
        .decrypt(shell.gateway.services.registry.current.accounts[name].user_key)
    )
    assert opened is not None
    return opened.decode()


async def test_key_from_the_environment(shell: Shell) -> None:
    shell.environ["OUR_KEY"] = "key-in-a-variable"
    await shell.run("account", "create", "new", "--user-key-env", "OUR_KEY")
    assert stored_user_key(shell, "new") == "key-in-a-variable"


async def test_key_from_a_file(shell: Shell, tmp_path: Path) -> None:
    """The key is read from a file or standard input, without the trailing newline."""
    file = tmp_path / "key"
    file.write_text("key-in-a-file\n")
    await shell.run("account", "create", "new", "--user-key-file", str(file))
    assert stored_user_key(shell, "new") == "key-in-a-file"
    await shell.run("account", "update", "new", "--user-key-file", "-", stdin="key-on-standard-input\r\n")
    assert stored_user_key(shell, "new") == "key-on-standard-input"


async def test_no_key(shell: Shell) -> None:
    """A new account without a key is refused."""
    refused = await shell.run("account", "create", "new", code=1)
    assert refused.stderr == "Invalid options:\n  user_key: is required for a new account\n"


async def test_key_from_a_terminal(shell: Shell) -> None:
    """The key of a new account is prompted for, without echo."""
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", "account", "create", "new"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, **shell.environ},
        start_new_session=True,
    )
    os.close(theirs)
    try:
        output = await asyncio.to_thread(_read_until, ours, b"The user_key of new: ")
        os.write(ours, b"key-of-a-person\n")
        printed, _ = await process.communicate()
        output += await asyncio.to_thread(_read_rest, ours)
    finally:
        os.close(ours)
    assert process.returncode == 0
    assert stored_user_key(shell, "new") == "key-of-a-person"
    assert b"key-of-a-person" not in output + printed


async def test_declined_prompt(shell: Shell) -> None:
    """Declining the prompt changes nothing."""
    result = await shell.run("account", "create", "new", "--user-key-prompt", code=1)
    assert "Aborted" in result.stderr
    assert "new" not in shell.gateway.services.registry.current.accounts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--user-key-env", "NOBODY_SET_IT"), "there is no environment variable NOBODY_SET_IT"),
        (("--user-key-file", "/dev/null"), "must be a file with a key"),
        (("--user-key-file", "no/such/file"), "No such file"),
        (("--user-key-file", "-", "--user-key-prompt"), "Use one of --user-key-env"),
        (("--user-key", "sk-0123456789"), "No such option"),
        (("--floor-count", "-1"), "must be a whole number of at least 0"),
        (("--floor-money", "nan"), "must be an amount in yuan"),
        (("--floor-money", "0.001"), "must be an amount in yuan"),
        (("--max-price", "upscale"), "must end with an amount in yuan"),
        (("--max-price", "enlarge=1"), "must begin with a kind of task"),
        (("--max-price", "upscale=1", "--no-max-price", "upscale"), "--max-price names upscale more than once"),
    ],
)
async def test_usage_errors(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    """Usage errors are reported without a request."""
    before = shell.gateway.services.registry.current.version
    result = await shell.run("account", "update", "main", *arguments, code=2)
    assert message in result.stderr
    assert shell.gateway.services.registry.current.version == before


async def test_binary_key_file(shell: Shell) -> None:
    result = await shell.run("account", "update", "main", "--user-key-file", "-", code=2, stdin=b"\xff\xfe\x00")
    assert "must be a file with a key" in result.stderr


async def test_all_properties(shell: Shell) -> None:
    """Every property of an account can be set, money in yuan, and is shown."""
    address = "http://127.0.0.1:9/api"
    await shell.run(
        *("account", "update", "main", "--base-url", address, "--floor-count", "3", "--floor-money", "0.50"),
        *("--max-price", "upscale=1.25", "--max-price", "vectorize=2"),
    )
    stored = await shell.get_admin("/accounts/main")
    assert stored["base_url"] == address
    assert (stored["floor_count"], stored["floor_money"]) == (3, 0.5)
    assert stored["max_price"] == {"upscale": 1.25, "vectorize": 2}
    shown = dict(await shell.run_table("account", "show", "main"))
    assert shown["maximum price:"] == "upscale 1.25 yuan, vectorize 2 yuan"
    assert (shown["minimum uses:"], shown["minimum yuan:"], shown["base URL:"]) == ("3", "0.5", address)
    assert (shown["uses left:"], shown["last price:"], shown["unexplained yuan:"]) == ("-", "-", "0")
    assert await shell.run_json("account", "show", "main") == stored


@pytest.mark.parametrize(
    ("options", "changes", "printed"),
    [
        (("--floor-count", "0"), {"floor_count": None}, "minimum uses:  3 -> 0"),
        (("--floor-money", "0"), {"floor_money": None}, "minimum yuan:  0.5 -> 0"),
        (("--base-url", "http://b.test"), {"base_url": "http://b.test"}, "base URL:  http://a.test -> http://b.test"),
        (("--no-base-url",), {"base_url": None}, "base URL:  http://a.test -> -"),
        (
            ("--max-price", "upscale=3", "--max-price", "seamless=1"),
            {"max_price": {"upscale": 3, "vectorize": 2, "seamless": 1}},
            "maximum price:  upscale 1.25 yuan, vectorize 2 yuan -> upscale 3 yuan, vectorize 2 yuan, seamless 1 yuan",
        ),
        (
            ("--no-max-price", "vectorize", "--no-max-price", "seamless"),
            {"max_price": {"upscale": 1.25}},
            "maximum price:  upscale 1.25 yuan, vectorize 2 yuan -> upscale 1.25 yuan",
        ),
        (("--floor-count", "3"), {}, "Nothing changed."),
        (("--user-key-file", "-"), {}, "user key:  changed"),
    ],
)
async def test_update(shell: Shell, options: tuple[str, ...], changes: dict[str, Any], printed: str) -> None:
    """An update changes what its options name, and nothing else in the registry, which omits defaults."""
    await shell.run(
        *("account", "update", "main", "--base-url", "http://a.test", "--floor-count", "3", "--floor-money", "0.5"),
        *("--max-price", "upscale=1.25", "--max-price", "vectorize=2"),
    )
    expected = await shell.get_admin("/registry")
    entry = expected["accounts"]["main"] | changes
    expected["accounts"]["main"] = {name: value for name, value in entry.items() if value is not None}
    assert (await shell.run("account", "update", "main", *options, stdin="new-key")).stdout == f"{printed}\n"
    assert await shell.get_admin("/registry") == expected
    assert stored_user_key(shell, "main") == ("new-key" if "--user-key-file" in options else USER_KEY)


async def test_create_existing(shell: Shell) -> None:
    """An existing account is not replaced."""
    refused = await shell.run("account", "create", "main", "--user-key-file", "-", stdin="new-key", code=1)
    assert refused.stderr == "gateway: the account main exists already: use `gateway account update`\n"
    assert stored_user_key(shell, "main") == USER_KEY


async def test_list(shell: Shell) -> None:
    """Accounts are listed with their balances, numbers aligned to the right."""
    assert (await shell.run_table("account", "list"))[1] == ["main", "open", "-", "-", "-", "0", "0", "-"]
    await shell.gateway.upstream.set_balance(count=1_000, money=7)
    await shell.gateway.submit()
    head, line = (await shell.run("account", "list")).stdout.splitlines()
    for name, value in (("USES", "999"), ("YUAN", "7"), ("IN FLIGHT", "1")):
        assert line[: head.index(name) + len(name)].split()[-1] == value
    assert await shell.run_json("account", "list") == await shell.get_admin("/accounts")


async def test_reopen(shell: Shell) -> None:
    await shell.gateway.upstream.set_balance(count=1, money=0)
    await shell.gateway.submit()
    assert dict(await shell.run_table("account", "show", "main"))["state:"] == "exhausted"
    assert dict(await shell.run_table("account", "reopen", "main"))["state:"] == "open"


async def test_delete(shell: Shell) -> None:
    """An account in use is deleted with --force only, and the error names its users."""
    refused = await shell.run("account", "delete", "main", code=1)
    assert refused.stderr == "Conflict: Account main is used by tenants: shop. Change them first, or force it.\n"
    assert (await shell.run("account", "delete", "main", "--force")).stdout == "The account main is deleted.\n"
    assert (await shell.run("account", "show", "main", code=1)).stderr == "Not found: There is no account main.\n"


def _read_until(terminal: int, words: bytes) -> bytes:
    """Read a terminal until these words appear."""
    output = b""
    while words not in output:
        output += os.read(terminal, 1_000)
    return output


def _read_rest(terminal: int) -> bytes:
    """Read a terminal to its end."""
    output = b""
    try:
        while part := os.read(terminal, 1_000):
            output += part
    except OSError:  # on Linux: the other end was closed
        pass
    return output
