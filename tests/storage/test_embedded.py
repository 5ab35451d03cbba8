"""The embedded server loses no acknowledged write and never outlives its gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest
from structlog.testing import capture_logs

from service import devstack
from service.devstack import DevServiceError, EmbeddedValkey, find_server_binary
from service.storage.connections import connect
from tests.support.valkey import UNAVAILABLE_ERRORS

GATEWAY = """
import asyncio, sys, uvloop
from pathlib import Path
from service.storage.connections import connect
from service.devstack import EmbeddedValkey

async def main():
    async with EmbeddedValkey(Path(sys.argv[1])) as server:
        store = connect(server.url, timeout=5)
        await store.commands.set("k", "v")
        print(server.pid, flush=True)
        await asyncio.Event().wait()

uvloop.run(main())
"""


async def read_value(server: EmbeddedValkey, key: str) -> bytes | None:
    store = connect(server.url, timeout=5)
    try:
        result = await store.commands.get(key)
    finally:
        await store.aclose()
    assert result is None or isinstance(result, bytes)
    return result


async def write_value(server: EmbeddedValkey, key: str, text: str) -> None:
    store = connect(server.url, timeout=5)
    await store.commands.set(key, text)
    await store.aclose()


def has_exited(pid: int) -> bool:
    """Return whether a process has exited; a zombie counts as exited."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def test_killed_server(tmp_path: Path) -> None:
    """A killed server is restarted at once with all acknowledged writes, and that is logged once."""
    async with EmbeddedValkey(tmp_path) as server:
        for number in (b"1", b"2"):
            await write_value(server, "k", number.decode())
            killed = server.pid or 0
            with capture_logs() as logs:
                os.kill(killed, signal.SIGKILL)
                await wait_until(lambda: server.pid != killed)  # noqa: B023 - within its round
                await wait_for_answer(server)
            assert [(log["event"], log["exit_code"]) for log in logs] == [("valkey.restarted", -signal.SIGKILL)]
            assert has_exited(killed)
            assert await read_value(server, "k") == number
    assert has_exited(server.pid or 0)
    async with EmbeddedValkey(tmp_path) as server:
        assert await read_value(server, "k") == b"2"


async def test_restart_is_retried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restart is retried until it succeeds, and the gateway can close meanwhile."""
    monkeypatch.setattr(devstack, "_RESTART_SECONDS", 0.01)
    async with EmbeddedValkey(tmp_path) as server:
        await write_value(server, "k", "v")
        (file,) = tmp_path.glob("appendonlydir/*.incr.aof")
        complete = file.read_bytes()
        file.write_bytes(b"*not what a server writes\r\n" * 3)
        with capture_logs() as logs:
            os.kill(server.pid or 0, signal.SIGKILL)
            await wait_until(lambda: [log["event"] for log in logs].count("valkey.failed") > 1)
        file.write_bytes(complete)
        await wait_for_answer(server)
        assert await read_value(server, "k") == b"v"


async def wait_for_answer(server: EmbeddedValkey) -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(*UNAVAILABLE_ERRORS):
                await read_value(server, "k")
                return
            await asyncio.sleep(0.005)


async def test_killed_gateway(tmp_path: Path) -> None:
    """The server ends with a killed gateway, and the next one takes over folder and data at once."""
    gateway = await asyncio.create_subprocess_exec(
        sys.executable, "-c", GATEWAY, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert gateway.stdout
    pid = int(await gateway.stdout.readline())
    assert not has_exited(pid)
    gateway.kill()
    async with EmbeddedValkey(tmp_path) as server:
        assert has_exited(pid)
        assert await read_value(server, "k") == b"v"
    await gateway.wait()


async def test_server(tmp_path: Path) -> None:
    """The server never evicts, syncs before it answers, is reached by its owner only and spared by Ctrl-C."""
    tmp_path.chmod(0o755)
    async with EmbeddedValkey(tmp_path) as server:
        store = connect(server.url, timeout=5)
        settings = await store.commands.config_get("maxmemory-policy", "appendonly", "appendfsync", "save", "port")
        await store.commands.set("k", "v")
        await store.aclose()
        modes = {file: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.rglob("*")}
        assert server.pid
        assert os.getpgid(server.pid) != os.getpgid(0)
    assert settings == {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "port": "0",
    }
    assert [file for file, mode in modes.items() if mode & 0o077] == []
    assert has_exited(server.pid)


async def test_stubborn_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores SIGTERM is killed."""
    monkeypatch.setattr(devstack, "_TERMINATE_SECONDS", 0.05)
    async with EmbeddedValkey(tmp_path) as server:
        os.kill(server.pid or 0, signal.SIGSTOP)
    assert has_exited(server.pid or 0)


async def test_one_gateway_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second gateway on the same folder fails without affecting the first."""
    monkeypatch.setattr(devstack, "_LOCK_SECONDS", 0.05)
    async with EmbeddedValkey(tmp_path) as first:
        await expect_failure(EmbeddedValkey(tmp_path))
        assert await read_value(first, "k") is None


@pytest.mark.parametrize("name", ["new/a folder with \"quotes' and blanks", "数据 {x} %41 --port", "long" * 40])
async def test_folders(tmp_path: Path, name: str) -> None:
    """Data survives a restart in any folder: new, with blanks, quotes, other scripts, or too long for a Unix socket."""
    async with EmbeddedValkey(tmp_path / name) as server:
        await write_value(server, "k", "v")
        socket_folder = Path(unquote(server.url.removeprefix("unix://"))).parent
        assert stat.S_IMODE(socket_folder.stat().st_mode) & 0o077 == 0
    assert socket_folder.is_relative_to(tmp_path) or not socket_folder.exists()
    async with EmbeddedValkey(tmp_path / name) as server:
        assert await read_value(server, "k") == b"v"


async def expect_failure(server: EmbeddedValkey) -> None:
    """Start a server and require one line of error, and no process that is left."""
    with pytest.raises(DevServiceError) as caught:
        await server.__aenter__()
    assert "\n" not in str(caught.value)
    assert server.pid is None or has_exited(server.pid)


async def test_unusable_folders(tmp_path: Path) -> None:
    """A folder that is a file, and data that cannot be read, are errors."""
    (tmp_path / "file").write_text("")
    await expect_failure(EmbeddedValkey(tmp_path / "file"))
    async with EmbeddedValkey(tmp_path / "data") as server:
        await write_value(server, "k", "v")
    (damaged,) = tmp_path.glob("data/appendonlydir/*.incr.aof")
    damaged.write_bytes(b"*not what a server writes\r\n" * 3)
    await expect_failure(EmbeddedValkey(tmp_path / "data"))


async def test_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is ended after the timeout, or when its start is cancelled."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    server = EmbeddedValkey(tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(devstack, "find_server_binary", lambda: silent)
        starting = asyncio.create_task(server.__aenter__())
        await wait_until(lambda: server.pid is not None)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert has_exited(server.pid or 0)
        patched.setattr(devstack, "_VALKEY_START_SECONDS", 0.05)
        await expect_failure(EmbeddedValkey(tmp_path / "data"))
    async with EmbeddedValkey(tmp_path / "data") as other:
        assert await read_value(other, "k") is None


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devstack, "find_spec", lambda _: None)
    with pytest.raises(DevServiceError):
        find_server_binary()
