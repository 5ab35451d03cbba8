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
from typing import Any
from urllib.parse import unquote

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from service import devstack
from service.devstack import DevServiceError, EmbeddedValkey, find_server_binary
from tests.support.valkey import UNAVAILABLE_ERRORS

GATEWAY = """
import asyncio, sys
from pathlib import Path
from service.devstack import EmbeddedValkey
from redis.asyncio import Redis

async def main():
    async with EmbeddedValkey(Path(sys.argv[1])) as server:
        await Redis.from_url(server.url).set("k", "v")
        print(server.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
DAMAGED = b"*not what a server writes\r\n" * 3


async def execute(server: EmbeddedValkey, *command: str) -> Any:
    client: Any = Redis.from_url(server.url)
    async with client:
        return await client.execute_command(*command)


def has_exited(pid: int | None) -> bool:
    """Return whether a process has exited; a zombie counts as exited."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return True


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


async def wait_for_answer(server: EmbeddedValkey) -> None:
    async with asyncio.timeout(10):
        while True:
            with suppress(*UNAVAILABLE_ERRORS):
                await execute(server, "PING")
                return
            await asyncio.sleep(0.005)


async def expect_failure(server: EmbeddedValkey) -> None:
    """Start a server and require one line of error, and no process that is left."""
    with pytest.raises(DevServiceError) as caught:
        await server.__aenter__()
    assert "\n" not in str(caught.value)
    assert has_exited(server.pid)


async def test_killed_server(tmp_path: Path) -> None:
    """A killed server is restarted at once with all acknowledged writes, and that is logged once."""
    async with EmbeddedValkey(tmp_path) as server:
        for number in (b"1", b"2"):
            await execute(server, "SET", "k", number.decode())
            killed = server.pid or 0
            with capture_logs() as logs:
                os.kill(killed, signal.SIGKILL)
                await wait_until(lambda: server.pid != killed)  # noqa: B023 - within its round
                await wait_for_answer(server)
            assert [(log["event"], log.get("exit_code"), log.get("detail")) for log in logs] == [
                ("valkey.restarted", -signal.SIGKILL, None)
            ]
            assert await execute(server, "GET", "k") == number
    assert has_exited(server.pid)


async def test_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is ended after the timeout, and one whose start is cancelled at once."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 600\n")
    silent.chmod(0o755)
    server = EmbeddedValkey(tmp_path / "data")
    with monkeypatch.context() as patched:
        patched.setattr(devstack, "find_server_binary", lambda: silent)
        starting = asyncio.create_task(server.__aenter__())
        await wait_until(lambda: server.pid is not None)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert has_exited(server.pid)
        patched.setattr(devstack, "_VALKEY_START_SECONDS", 0.05)
        await expect_failure(EmbeddedValkey(tmp_path / "data"))
    async with EmbeddedValkey(tmp_path / "data") as other:
        assert await execute(other, "GET", "k") is None


async def test_damaged_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot read its data is an error at the start; a restart is retried until it succeeds."""
    monkeypatch.setattr(devstack, "_RESTART_SECONDS", 0.01)
    async with EmbeddedValkey(tmp_path) as server:
        await execute(server, "SET", "k", "v")
        (file,) = tmp_path.glob("appendonlydir/*.incr.aof")
        complete = file.read_bytes()
        file.write_bytes(DAMAGED)
        with capture_logs() as logs:
            os.kill(server.pid or 0, signal.SIGKILL)
            await wait_until(lambda: [log["event"] for log in logs].count("valkey.failed") > 1)
        file.write_bytes(complete)
        await wait_for_answer(server)
        assert await execute(server, "GET", "k") == b"v"
    file.write_bytes(DAMAGED)
    await expect_failure(EmbeddedValkey(tmp_path))


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
        assert await execute(server, "GET", "k") == b"v"
    await gateway.wait()


async def test_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It syncs each write, never evicts, is reached by its owner only and spared by Ctrl-C, and ends in any case."""
    monkeypatch.setattr(devstack, "_TERMINATE_SECONDS", 0.05)
    monkeypatch.setattr(devstack, "_LOCK_SECONDS", 0.05)
    tmp_path.chmod(0o755)
    async with EmbeddedValkey(tmp_path) as server:
        async with Redis.from_url(server.url, decode_responses=True) as client:
            settings = await client.config_get("appendfsync", "maxmemory-policy", "port")
        assert settings == {"appendfsync": "always", "maxmemory-policy": "noeviction", "port": "0"}
        assert [file for file in tmp_path.rglob("*") if stat.S_IMODE(file.stat().st_mode) & 0o077] == []
        assert os.getpgid(server.pid or 0) != os.getpgid(0)
        await expect_failure(EmbeddedValkey(tmp_path))  # a second gateway on the folder
        assert await execute(server, "GET", "k") is None
        os.kill(server.pid or 0, signal.SIGSTOP)  # so that it ignores SIGTERM
    assert has_exited(server.pid)


@pytest.mark.parametrize("name", ["new/a folder with \"quotes' and blanks", "数据 {x} %41 --port", "long" * 40])
async def test_folders(tmp_path: Path, name: str) -> None:
    """Data survives a restart in any folder: new, with blanks, quotes, other scripts, or too long for a Unix socket."""
    async with EmbeddedValkey(tmp_path / name) as server:
        await execute(server, "SET", "k", "v")
        socket_folder = Path(unquote(server.url.removeprefix("unix://"))).parent
        assert stat.S_IMODE(socket_folder.stat().st_mode) & 0o077 == 0
    assert socket_folder.is_relative_to(tmp_path) or not socket_folder.exists()
    async with EmbeddedValkey(tmp_path / name) as server:
        assert await execute(server, "GET", "k") == b"v"


async def test_unusable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    await expect_failure(EmbeddedValkey(tmp_path / "file"))
    monkeypatch.setattr(devstack, "find_spec", lambda _: None)
    with pytest.raises(DevServiceError):
        find_server_binary()
