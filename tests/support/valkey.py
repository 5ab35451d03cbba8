"""Real Valkey servers, alone and in the topologies of Redis, and the plugin with the session's server `valkey`.

That server keeps its data between tests: call `FLUSHALL` first or use separate keys.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import ClusterDownError, ConnectionError, ReadOnlyError, TimeoutError  # noqa: A004

from service.devstack import find_server_binary
from tests.support.network import reserve_port

UNAVAILABLE_ERRORS: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, ReadOnlyError, ClusterDownError)
"""Raised by a client while the store can't be reached or can't be written to."""
_START_SECONDS = 10.0


@dataclass(frozen=True)
class Valkey:
    """A running server; `port` is 0 if it listens on its Unix socket only."""

    socket_path: Path
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"unix://{self.socket_path}"

    def suspend(self) -> None:
        """Stop the process; connections stay open without responses."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def run_valkey(*options: str, port: int = 0, config: str = "", preload: str = "") -> Iterator[Valkey]:
    """Run a server without persistence on a Unix socket, and on a TCP port of 127.0.0.1 if given.

    `options` are appended to the command line; `config` is the content of a file that it may rewrite, as Sentinel does;
    `preload` is a library that replaces functions of the system's.
    """
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))
    command = [str(find_server_binary())]
    if config:
        (folder / "valkey.conf").write_text(config)
        command.append(str(folder / "valkey.conf"))
    command += ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(folder / "s"), "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", *options]
    with (folder / "log").open("wb") as log:
        environ = os.environ | ({"LD_PRELOAD": preload} if preload else {})
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
    try:
        _wait_until_ready(process, folder)
        yield Valkey(folder / "s", port, process)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def _wait_until_ready(process: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_START_SECONDS)
            client.connect(str(folder / "s"))
            client.sendall(b"PING\r\n")
            if client.recv(16).startswith((b"+PONG", b"-NOAUTH")):
                return
        time.sleep(0.005)
    raise RuntimeError(f"Valkey did not start: {(folder / 'log').read_text()}")


@dataclass(frozen=True)
class RunningStore:
    """A topology: the URL for clients, and the server that stores the data."""

    url: str
    server: Valkey

    def execute(self, *command: str | bytes) -> Any:
        """Run a command on the server, bypassing the clients under test."""
        with Redis(unix_socket_path=str(self.server.socket_path)) as client:
            return client.execute_command(*command)


def pause_unless(condition: bool | None) -> bool:
    if not condition:
        time.sleep(0.01)
    return not condition


@contextmanager
def run_cluster(*options: str) -> Iterator[RunningStore]:
    own = ("--cluster-enabled", "yes", "--cluster-port", str(reserve_port()), "--cluster-node-timeout", "1000")
    with run_valkey(*own, *options, port=reserve_port()) as server:
        store = RunningStore(f"redis+cluster://127.0.0.1:{server.port},127.0.0.1:1", server)
        store.execute("CLUSTER", "ADDSLOTSRANGE", "0", "16383")
        while pause_unless(b"cluster_state:ok" in store.execute("CLUSTER", "INFO")):
            pass
        yield store


def run_sentinel(primary: int, *options: str) -> AbstractContextManager[Valkey]:
    monitor = f"sentinel monitor main 127.0.0.1 {primary} 1\n"
    return run_valkey("--sentinel", *options, port=reserve_port(), config=monitor)


@contextmanager
def run_with_sentinel() -> Iterator[RunningStore]:
    with run_valkey(port=reserve_port()) as server, run_sentinel(server.port) as watching:
        yield RunningStore(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{watching.port}/main", server)


@contextmanager
def run_single() -> Iterator[RunningStore]:
    with run_valkey(port=reserve_port()) as server:
        yield RunningStore(f"redis://127.0.0.1:{server.port}", server)


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server
