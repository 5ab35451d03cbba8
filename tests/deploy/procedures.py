"""The procedures of OPERATIONS.md, and a shell to run them in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from service.devstack import find_server_binary
from service.domain.tenants import generate_token
from tests.process.sandbox import SandboxProcess
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "OPERATIONS.md"
RUN, OUTPUT = "sh", "console"
TIMEOUT_SECONDS = 60.0

_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"(?<=[ :=])(8080|8081|8083|8090|8091|6390|6391)\b")
_KEYS = ("the-user-key", "the-second-key", "the-key-of-another", "the-real-key")
_TOKEN_ID = "0123456789ab"
"""The token id used in the document."""
_STORE = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")

_COMMANDS = Path(__file__).with_name("commands")
_REPLACEMENTS = {"curl": "curl", "openssl": "openssl", "redis-cli": "redis_cli"}
"""Commands that may be missing, and the modules that replace them."""

_HELPERS = """
used() {
    curl -fsS -H "Authorization: Bearer $(cat shop.token)" "$TENANTS/v1/quota" | grep -o '"used":[0-9]*' | head -n 1
}
submit() {
    curl -fsS -H "Authorization: Bearer $(cat shop.token)" -H "Prefer: wait=60" -F image=@photo.jpg \\
        "$TENANTS/v1/tasks/face-enhance" >task.json && grep -q '"state":"succeeded"' task.json
}
read_task() {
    curl -sS -o read.json -w '%{http_code}' -H "Authorization: Bearer $(cat shop.token)" \\
        "$TENANTS/v1/tasks/$(sed 's/.*"id":"\\(task_[^"]*\\)".*/\\1/' "$1")"
}
"""


@dataclass(frozen=True)
class Block:
    """A code block and its language."""

    language: str
    text: str


def read_procedures() -> Mapping[str, Sequence[Block]]:
    """Return the blocks of each procedure by heading."""
    parts = _HEADING.split(FILE.read_text("utf-8"))[1:]
    return {
        heading: [Block(found[2], found[3]) for found in _BLOCK.finditer(text)]
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def shell_blocks(heading: str) -> Sequence[str]:
    """Return the blocks of a procedure that are run here."""
    return [item.text for item in read_procedures()[heading] if item.language == RUN]


@dataclass
class ProcedureShell:
    """A folder of an installation, with a store, an upstream, and a second store."""

    folder: Path
    upstream: SandboxProcess
    stores: tuple[int, int]
    keys: Mapping[str, str]
    token: str = field(default_factory=generate_token)
    ports: dict[str, str] = field(default_factory=dict)

    def run(self, *parts: str) -> str:
        """Run scripts in one shell that stops at the first error; returns the output."""
        begin = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || :; wait' EXIT"]
        script = "\n".join([*begin, *map(self._localize, parts)])
        process = subprocess.Popen(
            ["/bin/bash", "-c", script],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            self._kill_session(process.pid)
            process.wait()
        logs = "\n".join(f"{item.name}: {item.read_text()[-2_000:]}" for item in self.folder.glob("*.log"))
        assert process.returncode == 0, f"{script}\n\n{printed}\n\n{logs}"
        return printed

    def installation_steps(self) -> Sequence[str]:
        """Return the steps of an installation up to its first process, with an account and a tenant."""
        return [
            shell_blocks("First install")[0],
            *shell_blocks("Setup"),
            _HELPERS,
            "start one",
            f"curl {self._registry_request()}",
        ]

    def _registry_request(self) -> str:
        """Return `curl` arguments that write the registry of a first installation."""
        digest = hashlib.sha256(self.token.encode()).hexdigest()
        (self.folder / "shop.token").write_text(self.token)
        main = {"user_key": {"file": "secrets/main.key", "value": _KEYS[0]}}
        shop = {
            "accounts": ["main"],
            "limits": [{"window": "day", "tasks": 200, "money": 150}],
            "max_active": 10,
            "tokens": {_TOKEN_ID: {"sha256": digest}},
        }
        body = json.dumps({"accounts": {"main": main}, "tenants": {"shop": shop}})
        return (
            "-fsS -o /dev/null -X PUT -H 'Content-Type: application/json' "
            f"""-H "Authorization: Bearer $(cat secrets/admin-token)" -d '{body}' "$OPS/admin/v1/registry" """
        )

    def _localize(self, text: str) -> str:
        """Replace the document's addresses and keys with local ones."""
        first, second = self.stores
        for name, address in {
            "new-redis.example:6380": f"127.0.0.1:{second}",
            "redis.example:6379": f"127.0.0.1:{first}",
            "redis.example 6379": f"127.0.0.1 {first}",
            "https://upstream.example": self.upstream.url,
            "https://vendor.example": self.upstream.url,
            **self.keys,
        }.items():
            text = text.replace(name, address)
        return _PORT.sub(lambda found: self.ports.setdefault(found[1], str(reserve_port())), text)

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
        path = f"{self.folder / 'bin'}:{own['PATH']}"
        return own | {"PATH": path, "PYTHONPATH": str(ROOT), "GATEWAY_POLL_SECONDS": "0.05"}

    @staticmethod
    def _kill_session(session: int) -> None:
        """Kill every process that the shell has left."""
        try:
            os.killpg(session, signal.SIGKILL)
        except ProcessLookupError:
            return


@contextmanager
def open_shell(folder: Path, upstream: SandboxProcess) -> Iterator[ProcedureShell]:
    """Open a shell in a folder prepared for the procedures, with upstream accounts of its own."""
    commands = {
        "gateway": f"{sys.executable} -m service",
        **{name: f"{sys.executable} -S {_COMMANDS / file}.py" for name, file in _REPLACEMENTS.items()},
        "redis-server": str(find_server_binary()),
    }
    (folder / "bin").mkdir()
    for name, command in commands.items():
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    (folder / "photo.jpg").write_bytes(make_png())
    (folder / "deploy").symlink_to(ROOT / "deploy")
    keys = {name: f"{name}-{folder.name}" for name in _KEYS}
    for key in keys.values():
        set_balance(upstream, key, count=10, money=0)
    with run_valkey(*_STORE, port=reserve_port()) as first, run_valkey(*_STORE, port=reserve_port()) as second:
        yield ProcedureShell(folder, upstream, (first.port, second.port), keys)


def set_balance(upstream: SandboxProcess, key: str, **held: int) -> None:
    httpx2.put(f"{upstream.url}/_control/accounts/{key}", json=held).raise_for_status()


def count_submits(upstream: SandboxProcess, key: str) -> int:
    """Return how many submits had this key."""
    records: list[dict[str, Any]] = httpx2.get(f"{upstream.url}/_control/requests").json()
    return sum(item["operation"] == "submit" and item["user_key"] == key for item in records)
