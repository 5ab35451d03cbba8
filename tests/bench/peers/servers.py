"""The vendor's stub, and what a team would run instead of the gateway, as processes on one CPU measured from outside.

The references implement the requests that the benchmark sends: `POST /v1/tasks/upscale` forwards the image to the
vendor, `GET /v1/tasks/{id}` reads the task. Two of them check the bearer token, hold and settle a quota in Valkey,
store the task there, and respond with 201. The proxy only forwards: a read is a check at the vendor, and responses are
the vendor's. No server outlives the benchmark.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import httpx2

from service.devstack import with_parent_death_signal
from tests.bench.peers.tools import find_program
from tests.support.network import reserve_port

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
    ready_url: str = "",
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server on one CPU from when it responds at `url` until the context ends.

    It must respond to `GET` of `ready_url` with 2xx, without one of `url` in any way.
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
            _wait_until_ready(process, url, ready_url)
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


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, ready_url: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise _NotReady(f"exit code {process.returncode}")
        with suppress(httpx2.TransportError):
            if httpx2.get(ready_url or url, timeout=1, trust_env=False).is_success or not ready_url:
                return
        time.sleep(_POLL_SECONDS)
    raise _NotReady(f"no answer within {_START_SECONDS:g} s")


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


SUBMIT_PATH = "/api/submit_task"
USER_KEY = "bench-user-key"


@contextmanager
def vendor_stub(
    cpu: int, *, tasks: Literal["finished", "running"] = "running", delay_seconds: float = 0
) -> Iterator[Server]:
    """Run a stub of the vendor on one CPU; its checks find all tasks finished, or running for ever.

    Submits and checks are answered after the delay. It accepts any `user_key`.
    """
    port = reserve_port()
    command = [str(_program()), str(port), tasks, str(round(delay_seconds * 1000))]
    url = f"http://127.0.0.1:{port}"
    with serving("stub", command, cpu=cpu, url=url, ready_url=f"{url}/stats") as server:
        yield server


def stub_stats(stub: Server, *, reset: bool = False) -> dict[str, Any]:
    """Return the stub's counters since its start, and its peak and intervals since the last reset.

    `submits`, `checks`, `files`, `bytes` received, current `connections`, `in_flight` and `peak_in_flight` (submits and
    checks within the delay), `check_intervals` and `check_interval_ms` (p50, p99, max of the time between two checks of
    one task; to 10 ms).
    """
    path = "/stats?reset" if reset else "/stats"
    stats: dict[str, Any] = httpx2.get(stub.url + path, timeout=10, trust_env=False).json()
    return stats


@cache
def _program() -> Path:
    """Compile the stub, once per process."""
    folder = Path(tempfile.mkdtemp(prefix="gateway-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "stub"
    source = Path(__file__).with_name("stub.c")
    flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror")
    subprocess.run([shutil.which("cc") or "cc", *flags, "-o", str(program), str(source)], check=True)
    return program


_HERE = Path(__file__).parent
_ROOT = _HERE.parents[2]


@contextmanager
def nginx_proxy(stub: Server, cpu: int) -> Iterator[Server]:
    """Run nginx as a plain proxy: the minimal cost of any server in front of the vendor."""
    with _nginx("nginx", "nginx_proxy.conf", {"VENDOR": urlsplit(stub.url).netloc}, cpu, token="") as server:
        yield server


@contextmanager
def nginx_lua(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run nginx with Lua that does the whole job: the practical limit.

    `redis_url` is `unix://PATH` or `redis://HOST:PORT`, HOST an address.
    """
    redis = urlsplit(redis_url)
    token = secrets.token_hex(16)
    values = {
        "CODE": str(_HERE),
        "REDIS": f'"unix:{redis.path}"' if redis.scheme == "unix" else f'"{redis.hostname}", {redis.port or 6379}',
        "VENDOR": urlsplit(stub.url).netloc,
        "TOKEN": token,
    }
    with _nginx("nginx + Lua", "nginx_lua.conf", values, cpu, token=token) as server:
        yield server


@contextmanager
def fastapi_gateway(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run a gateway of FastAPI and httpx, in one uvicorn with its defaults."""
    port = reserve_port()
    token = secrets.token_hex(16)
    app = "tests.bench.peers.fastapi_app:app"
    environ = os.environ | {
        "VENDOR_URL": stub.url,
        "VENDOR_USER_KEY": USER_KEY,
        "REDIS_URL": redis_url,
        "TOKEN": token,
    }
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(_ROOT), "--port", str(port), app]
    url = f"http://127.0.0.1:{port}"
    with serving("FastAPI + httpx", command, cpu=cpu, url=url, token=token, environ=environ) as server:
        yield server


@contextmanager
def _nginx(name: str, template: str, values: Mapping[str, str], cpu: int, *, token: str) -> Iterator[Server]:
    """Run nginx as the current user, with all its files in a temporary folder."""
    port = reserve_port()
    # nginx drops the privileges of root unless `user` keeps them.
    user = "user root;" if os.geteuid() == 0 else ""
    config = (_HERE / template).read_text()
    for key, value in {"PORT": str(port), "USER": user, "USER_KEY": USER_KEY, **values}.items():
        config = config.replace(f"@{key}@", value)
    program = find_program("nginx") or "nginx"
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        path = Path(folder) / "nginx.conf"
        path.write_text(config)
        command = [program, "-p", folder, "-c", str(path), "-e", "stderr"]
        with serving(name, command, cpu=cpu, url=f"http://127.0.0.1:{port}", token=token) as server:
            yield server
