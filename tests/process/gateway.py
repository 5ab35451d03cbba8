"""The command `gateway` as a process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import httpx2

TIMEOUT_SECONDS = 120.0
HTTP = httpx2.Client(
    timeout=TIMEOUT_SECONDS, trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0), verify=False
)
"""For all requests: waiting with a new client for each would keep a CPU busy."""


def gateway_command(*words: str) -> list[str]:
    """Return a command line of `gateway` with a clock that tests can set."""
    return [sys.executable, "-m", "tests.support.server_time", *words]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} was not reached"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Return whether a process runs and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@dataclass
class GatewayProcess:
    """A running `gateway serve`; once it listens, `environ` has its ports."""

    process: subprocess.Popen[bytes]
    environ: dict[str, str]
    stdout_path: Path
    log_path: Path
    token: str = ""
    child_pids: list[int] = field(default_factory=list)

    @property
    def url(self) -> str:
        return self._address("tenants", "GATEWAY_PORT")

    @property
    def ops_url(self) -> str:
        return self._address("operators", "GATEWAY_OPS_PORT")

    def _address(self, port: str, setting: str) -> str:
        if self.environ[setting] == "0":  # it is in the log then
            match = re.search(rf'{port}(?:=|": ?")http://127\.0\.0\.1:(\d+)', self.log_path.read_text())
            assert match, "it does not listen"
            self.environ[setting] = match[1]
        return f"http://127.0.0.1:{self.environ[setting]}"

    def wait_ready(self) -> None:
        """Wait until it is ready, and in development until it has printed the token."""
        wait_until(self._is_ready, "readiness")
        if self.environ.get("GATEWAY_ROLE") != "worker":
            assert self.url  # which sets its port in `environ`
        match = re.search(r"token: (igw_\w+)", self.stdout_path.read_text())
        self.token = match[1] if match else ""
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.child_pids = [int(pid) for pid in listed.split()]

    def _is_ready(self) -> bool:
        log = self.log_path.read_text()
        assert self.process.poll() is None, log
        if self.environ["GATEWAY_OPS_PORT"] == "0" and "gateway.started" not in log:
            return False
        try:
            if HTTP.get(f"{self.ops_url}/readyz").status_code != 200:
                return False
        except httpx2.TransportError:
            return False
        introduces = "GATEWAY_ENV" not in self.environ and self.environ.get("GATEWAY_ROLE") != "worker"
        return not introduces or "Ctrl-C stops it." in self.stdout_path.read_text()

    def wait_for_log(self, event: str) -> None:
        wait_until(lambda: event in self.log_path.read_text(), event)

    def run_curl_example(self) -> httpx2.Response:
        """Send the request of the printed `curl` line, with the variables of the line before it."""
        ((exports, line),) = re.findall(r"^ +export (.*)\n +(curl .*)$", self.stdout_path.read_text(), re.MULTILINE)
        variables = dict(pair.split("=", 1) for pair in shlex.split(exports))
        words = shlex.split(Template(line).substitute(variables))
        header = words[words.index("-H") + 1].split(": ", 1)
        fields = dict(words[index + 1].split("=", 1) for index, word in enumerate(words) if word == "-F")
        with Path(fields.pop("image").removeprefix("@")).open("rb") as image:
            return HTTP.post(words[-1], headers=dict([header]), data=fields, files={"image": image})

    def call(self, method: str, path: str, **more: Any) -> httpx2.Response:
        """Send a request as the demo tenant."""
        headers = {"Authorization": f"Bearer {self.token}"} | more.pop("headers", {})
        return HTTP.request(method, self.url + path, headers=headers, **more)

    def wait_finished(self, path: str) -> dict[str, object]:
        """Wait until a task has ended; returns it."""
        results: dict[str, object] = {}

        def ended() -> bool:
            results.update(self.call("GET", path).json())
            return results.get("state") in {"succeeded", "failed"}

        wait_until(ended, "the end of the task")
        return results

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait for the exit code."""
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT_SECONDS)


@contextmanager
def run_gateway(folder: Path, words: Sequence[str] = (), **settings: str) -> Iterator[GatewayProcess]:
    """Run a gateway until the block ends."""
    with start_gateway(folder, words, **settings) as gateway:
        gateway.wait_ready()
        yield gateway


@contextmanager
def start_gateway(folder: Path, words: Sequence[str] = (), **settings: str) -> Iterator[GatewayProcess]:
    """Start a gateway without waiting for readiness, with the command line `words` if given, on any free ports."""
    folder.mkdir(exist_ok=True, parents=True)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    environ |= dict.fromkeys(("GATEWAY_PORT", "GATEWAY_OPS_PORT", "GATEWAY_SANDBOX_PORT"), "0")
    environ |= {"GATEWAY_DATA_DIR": str(folder)} | settings
    out, log = folder / "out.txt", folder / "log.txt"
    with out.open("wb") as output, log.open("wb") as errors:
        process = subprocess.Popen(
            words or gateway_command("serve"), env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=errors
        )
    gateway = GatewayProcess(process, environ, out, log)
    try:
        yield gateway
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(TIMEOUT_SECONDS)
        finally:
            process.kill()  # a gateway that does not stop fails its test, and must not be left running
            process.wait()
        wait_until(lambda: not any(is_alive(pid) for pid in gateway.child_pids), "the end of its children")
