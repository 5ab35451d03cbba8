"""Real Valkey servers.

The plugin `tests.support.valkey` gives every test the session's server as `valkey`. It keeps its data between tests:
call `FLUSHALL` first or use separate keys.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.exceptions import ClusterDownError, ConnectionError, ReadOnlyError, TimeoutError  # noqa: A004

from service.devstack import find_server_binary

UNAVAILABLE_ERRORS: tuple[type[Exception], ...] = (ConnectionError, TimeoutError, ReadOnlyError, ClusterDownError)
"""Raised by a client while the store can't be reached or can't be written to."""
_START_SECONDS = 10.0
_RESERVATIONS: deque[int] = deque()
"""Descriptors of the sockets that reserve ports."""
_MAX_RESERVATIONS = 200


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
def run_valkey(*options: str, port: int = 0, config: str = "") -> Iterator[Valkey]:
    """Run a server without persistence on a Unix socket, and on a TCP port of 127.0.0.1 if given.

    `options` are appended to the command line; `config` is the content of a file that it may rewrite, as Sentinel does.
    """
    folder = Path(tempfile.mkdtemp(prefix="valkey-"))
    command = [str(find_server_binary())]
    if config:
        (folder / "valkey.conf").write_text(config)
        command.append(str(folder / "valkey.conf"))
    command += ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(folder / "s"), "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no", *options]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, folder)
        yield Valkey(folder / "s", port, process)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)


def reserve_port() -> int:
    """Reserve a TCP port of 127.0.0.1 for this process: nothing listens there until it starts a server.

    The kernel gives a port to no other process while a socket is bound to it. A server may bind it too, any number of
    times, if both have SO_REUSEADDR and this one does not listen.
    """
    reserving = socket.socket()
    reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserving.bind(("127.0.0.1", 0))
    port = int(reserving.getsockname()[1])
    _RESERVATIONS.append(reserving.detach())
    if len(_RESERVATIONS) > _MAX_RESERVATIONS:
        os.close(_RESERVATIONS.popleft())
    return port


def find_free_port() -> int:
    return reserve_port()


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey]:
    with run_valkey() as server:
        yield server


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
