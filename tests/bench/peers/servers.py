"""The vendor's stub, and what a team would run instead of the gateway, as processes on one CPU measured from outside.

The references implement the requests that the benchmark sends: `POST /v1/tasks/upscale` forwards the image to the
vendor, `GET /v1/tasks/{id}` reads the task. They check the bearer token, hold and settle a quota in Valkey, store the
task there, and respond with 201. No server outlives the benchmark.
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
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from service.devstack import with_parent_death_signal
from tests.bench.load import Request, upscale_request
from tests.support.network import reserve_port

SUBMIT_PATH = "/api/submit_task"
USER_KEY = "bench-user-key"
_DEBIAN_PACKAGES = {
    "usr/bin/wrk": "wrk",
    "usr/sbin/nginx": "nginx",
    "usr/bin/cc": "gcc libc6-dev",
    "usr/lib/nginx/modules/ngx_http_lua_module.so": "libnginx-mod-http-lua",
    "usr/lib/*/lua/5.1/cjson.so": "lua-cjson",
}
"""By pattern of a file."""
_HERE = Path(__file__).parent
_START_SECONDS = 30.0
_STOP_SECONDS = 10.0


def require_tools() -> None:
    """Exit with the missing Debian packages unless all programs are there."""
    missing = [package for pattern, package in _DEBIAN_PACKAGES.items() if not any(Path("/").glob(pattern))]
    if missing:
        command = f"apt-get install --no-install-recommends {' '.join(missing)}"
        raise SystemExit(f"error: the benchmark needs what Debian installs with: {command}")


@dataclass(frozen=True)
class Server:
    """A process that serves `url`; `token` is what its callers send as bearer token."""

    url: str
    pid: int
    start_seconds: float
    token: str = "none"
    ops_url: str = ""
    """The operators' port of a gateway."""

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of the process and its children, ended ones included."""
        # utime, stime, and both of the children that have ended
        fields = [file.rpartition(") ")[2].split()[11:15] for file in self._read_all("stat")]
        return sum(int(ticks) for found in fields for ticks in found) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        return self._memory_mb("VmRSS:")

    def peak_mb(self) -> float:
        """Return the peak resident memory since the last `reset_peak`, summed over the processes."""
        return self._memory_mb("VmHWM:")

    def reset_peak(self) -> None:
        for folder in self._list_processes():
            (folder / "clear_refs").write_text("5")

    def _memory_mb(self, field: str) -> float:
        lines = "".join(self._read_all("status")).splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6

    def _read_all(self, name: str) -> list[str]:
        return [(folder / name).read_text() for folder in self._list_processes()]

    def _list_processes(self) -> list[Path]:
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [Path(f"/proc/{pid}") for pid in (self.pid, *children)]

    @property
    def authorization(self) -> tuple[str, str]:
        return ("Authorization", f"Bearer {self.token}")

    def submit_request(self, image: bytes, *headers: tuple[str, str]) -> Request:
        """Return a submission of an image with typical options."""
        return upscale_request("/v1/tasks/upscale", image, self.authorization, *headers)

    def read_request(self, *task_ids: str) -> Request:
        """Return a request that reads these tasks in turn."""
        return Request("GET", tuple(f"/v1/tasks/{task_id}" for task_id in task_ids), (self.authorization,))

    def submit(self, image: bytes) -> str:
        """Submit an image; returns the task id."""
        request = self.submit_request(image)
        answer = httpx2.post(self.url + request.paths[0], headers=dict(request.headers), content=request.body)
        body = answer.raise_for_status().json()
        return str(body.get("id") or body["task_id"])


@contextmanager
def serving(
    name: str,
    command: Sequence[str],
    *,
    cpu: int,
    port: int,
    token: str = "none",
    ops_url: str = "",
    environ: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run a server on one CPU until the context ends.

    It has started once a gateway is ready, and any other server responds.
    Raises RuntimeError with the end of its output if it exits or does not respond in time.
    """
    url, started_at = f"http://127.0.0.1:{port}", time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            with_parent_death_signal(["/usr/bin/taskset", "--cpu-list", str(cpu), *command]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,  # the interrupt of a terminal ends the benchmark, which ends its servers in order
        )
        try:
            while not _is_ready(f"{ops_url}/readyz" if ops_url else url):
                if process.poll() is not None or time.monotonic() > started_at + _START_SECONDS:
                    output.seek(0)
                    raise RuntimeError(f"{name} did not start: {output.read().decode(errors='replace')[-4_000:]}")
                time.sleep(0.01)
            yield Server(url, process.pid, time.monotonic() - started_at, token, ops_url)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _is_ready(url: str) -> bool:
    with suppress(httpx2.TransportError):
        return httpx2.get(url, timeout=1, trust_env=False).status_code < 500
    return False


def vendor_stub(
    cpu: int, *, tasks: Literal["finished", "running"] = "running", delay_seconds: float = 0
) -> AbstractContextManager[Server]:
    """Run a stub of the vendor on one CPU; its checks find all tasks finished, or running for ever.

    Submits and checks are answered after the delay. It accepts any `user_key`.
    """
    port = reserve_port()
    return serving("stub", [_compile_stub(), str(port), tasks, str(round(delay_seconds * 1000))], cpu=cpu, port=port)


@cache
def _compile_stub() -> str:
    folder = tempfile.mkdtemp(prefix="gateway-bench-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    command = ["/usr/bin/cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", f"{folder}/stub"]
    subprocess.run([*command, str(_HERE / "stub.c")], check=True)
    return f"{folder}/stub"


@contextmanager
def nginx_lua(stub: Server, redis_url: str, cpu: int) -> Iterator[Server]:
    """Run nginx with Lua that does the whole job: the practical limit. `redis_url` is `unix://PATH`.

    It runs as the current user, with all its files in a temporary folder.
    """
    redis, vendor = f'"unix:{urlsplit(redis_url).path}"', urlsplit(stub.url).netloc
    port, token, config = reserve_port(), secrets.token_hex(16), (_HERE / "nginx_lua.conf").read_text()
    # nginx drops the privileges of root unless `user` keeps them.
    user = "user root;" if os.geteuid() == 0 else ""
    values = {"PORT": str(port), "USER": user, "USER_KEY": USER_KEY, "TOKEN": token}
    for key, value in (values | {"CODE": str(_HERE), "REDIS": redis, "VENDOR": vendor}).items():
        config = config.replace(f"@{key}@", value)
    with tempfile.TemporaryDirectory(prefix="gateway-bench-") as folder:
        path = Path(folder) / "nginx.conf"
        path.write_text(config)
        command = ["/usr/sbin/nginx", "-p", folder, "-c", str(path), "-e", "stderr"]
        with serving("nginx with Lua", command, cpu=cpu, port=port, token=token) as server:
            yield server


def fastapi_gateway(stub: Server, redis_url: str, cpu: int) -> AbstractContextManager[Server]:
    """Run a gateway of FastAPI and httpx, in one uvicorn with its defaults."""
    port, token = reserve_port(), secrets.token_hex(16)
    own = {"VENDOR_URL": stub.url, "VENDOR_USER_KEY": USER_KEY, "REDIS_URL": redis_url, "TOKEN": token}
    app = ["--app-dir", str(_HERE.parents[2]), "tests.bench.peers.fastapi_app:app"]
    command = [sys.executable, "-m", "uvicorn", "--port", str(port), *app]
    return serving("FastAPI + httpx", command, cpu=cpu, port=port, token=token, environ=os.environ | own)
