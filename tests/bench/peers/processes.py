"""Servers as processes pinned to one CPU and measured from outside; they never outlive the benchmark."""

from __future__ import annotations

import http.client
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from service.devstack import with_parent_death_signal

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01
_SHOWN_LINES = 40
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Server:
    """One or several processes that serve `url`; `token` is what its callers send as bearer token."""

    name: str
    url: str
    pids: tuple[int, ...]
    token: str

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of the processes and their children, ended ones included."""
        return sum(_cpu_ticks(pid) for pid in self._processes()) / _TICKS

    def resident_mib(self) -> float:
        """Return the resident memory of the processes and their children."""
        return self._memory_mib("VmRSS")

    def peak_mib(self) -> float:
        """Return the peak resident memory since the last `reset_peak`, summed over the processes."""
        return self._memory_mib("VmHWM")

    def reset_peak(self) -> None:
        """Reset the peak of the resident memory."""
        for pid in self._processes():
            with suppress(FileNotFoundError, ProcessLookupError):
                Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _memory_mib(self, field: str) -> float:
        return sum(_status_kib(pid, field) for pid in self._processes()) / 1024

    def _processes(self) -> list[int]:
        return [item for pid in self.pids for item in process_tree(pid)]


@contextmanager
def serving(
    name: str,
    command: Sequence[str],
    *,
    cpu: int,
    url: str,
    token: str = "",
    ready_path: str = "",
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server on one CPU from when it responds at `url` until the context ends.

    With `ready_path` it must respond to `GET` of that path (or URL) with 2xx, otherwise only accept connections.
    Raises RuntimeError with the end of its output if it exits or does not respond in time.
    """
    taskset = shutil.which("taskset") or "/usr/bin/taskset"
    program = shutil.which(command[0]) or command[0]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            with_parent_death_signal([taskset, "--cpu-list", str(cpu), program, *command[1:]]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # the interrupt of a terminal ends the benchmark, which ends its servers in order
        )
        try:
            _wait_until_ready(process, url, ready_path)
            yield Server(name, url, (process.pid,), token)
        except _NotReady as reason:
            output.seek(0)
            text = output.read().decode(errors="replace").splitlines()[-_SHOWN_LINES:]
            raise RuntimeError("\n".join([f"{name} did not start: {reason}", *text])) from None
        finally:
            _end(process)


def process_tree(pid: int) -> list[int]:
    """Return a running process and its running children at any depth."""
    children: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(item for child in children for item in process_tree(child))]


class _NotReady(Exception):
    """The reason why a server cannot be used."""


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, ready_path: str) -> None:
    target = urlsplit(ready_path if ready_path.startswith("http") else url + ready_path)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _NotReady(f"exit code {process.returncode}")
        with suppress(OSError, http.client.HTTPException):
            if _answers(target.hostname or "", target.port or 80, target.path if ready_path else ""):
                return
        time.sleep(_POLL_SECONDS)
    raise _NotReady(f"no answer within {_START_SECONDS:g} s")


def _answers(host: str, port: int, path: str) -> bool:
    if not path:
        socket.create_connection((host, port), timeout=1).close()
        return True
    connection = http.client.HTTPConnection(host, port, timeout=1)
    try:
        connection.request("GET", path)
        return 200 <= connection.getresponse().status < 300
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    pids = process_tree(process.pid)
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _cpu_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, fields[11:15]))  # utime, stime, and both of the children that have ended


def _status_kib(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
