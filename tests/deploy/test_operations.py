"""Runs the procedures of OPERATIONS.md as written, on a running gateway, with the real curl, openssl and redis-cli."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from service.devstack import find_server_binary
from service.storage.redis import DATA_VERSION
from tests.process.sandbox import SandboxProcess, run_sandbox
from tests.support.images import make_png
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "OPERATIONS.md"
TIMEOUT_SECONDS = 300.0
UNTESTED_PROCEDURES = {
    "First install": "docker: compose needs an engine; test_compose.py checks the file",
    "Upgrade": "helm and kubectl: they need a cluster; kubernetes/ checks the chart",
    "Monitoring": "amtool: it needs an Alertmanager",
}
"""Procedures with `console` blocks, which cannot be run here, and the reason."""
ENCRYPTED_MESSAGE = "All secrets of the registry are encrypted with the first secret key."

_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_PORT = re.compile(r"(?<=[ :=])(8080|8081|8083|8090|8091|6390|6391)\b")
_KEYS = ("the-user-key", "the-second-key", "the-key-of-another", "the-real-key")
_STORE = ("--appendonly", "yes", "--repl-diskless-sync-delay", "0")
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


def read_procedures() -> Mapping[str, Sequence[tuple[str, str]]]:
    """Return the blocks of each procedure, as language and text, by heading."""
    parts = re.split(r"^## (.+)$", FILE.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {
        heading: [(found[2], found[3]) for found in _BLOCK.finditer(text)]
        for heading, text in zip(parts[::2], parts[1::2], strict=True)
    }


def shell_blocks(heading: str) -> Sequence[str]:
    """Return the blocks of a procedure that are run here."""
    return [text for language, text in read_procedures()[heading] if language == "sh"]


@dataclass
class ProcedureShell:
    """A folder of an installation, with a store, an upstream, and a second store."""

    folder: Path
    upstream: SandboxProcess
    stores: tuple[int, int]
    keys: Mapping[str, str]
    ports: dict[str, str] = field(default_factory=dict)

    def run(self, *parts: str) -> str:
        """Run scripts in one shell that stops at the first error; returns the output."""
        begin = ["set -euo pipefail", "trap 'kill $(jobs -p) 2>/dev/null || :; wait' EXIT"]
        script = "\n".join([*begin, *map(self._localize, parts)])
        foreign = re.compile(r"GATEWAY_|.*_proxy$", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not foreign.match(name)}
        environment["PATH"] = f"{self.folder / 'bin'}:{environment['PATH']}"
        environment |= {"PYTHONPATH": str(ROOT), "GATEWAY_POLL_SECONDS": "0.05"}
        process = subprocess.Popen(
            ["/bin/bash", "-c", script],
            cwd=self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        logs = "\n".join(f"{item.name}: {item.read_text()[-2_000:]}" for item in self.folder.glob("*.log"))
        assert process.returncode == 0, f"{script}\n\n{printed}\n\n{logs}"
        return printed

    def run_installed(self, *parts: str) -> str:
        """Run scripts after the first installation, with the id of its token in place of the document's."""
        settings, begin, _ = shell_blocks("First install")
        installed = f"{{\n{begin}\n}} >/dev/null"
        read_id = "TOKEN_ID=$(gateway token list shop | grep -o '^[0-9a-f]\\{12\\}')"
        named = [part.replace("0123456789ab", "$TOKEN_ID") for part in parts]
        return self.run(settings, *shell_blocks("Setup"), _HELPERS, installed, read_id, *named)

    def count_submits(self) -> list[int]:
        """Return how many submits had each key."""
        records = httpx2.get(f"{self.upstream.url}/_control/requests").json()
        used = [item["user_key"] for item in records if item["operation"] == "submit"]
        return [used.count(key) for key in self.keys.values()]

    def _localize(self, text: str) -> str:
        """Replace the document's addresses and keys with local ones."""
        first, second = self.stores
        for name, address in {
            "new-redis.example:6380": f"127.0.0.1:{second}",
            "redis.example:6379": f"127.0.0.1:{first}",
            "redis.example 6379": f"127.0.0.1 {first}",
            "https://upstream.example": self.upstream.url,
            "https://vendor.example": self.upstream.url.replace("127.0.0.1", "localhost"),
            **self.keys,
        }.items():
            text = text.replace(name, address)
        return _PORT.sub(lambda found: self.ports.setdefault(found[1], str(reserve_port())), text)


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    """Yield an upstream whose tasks take no time."""
    with run_sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def here(tmp_path: Path, upstream: SandboxProcess) -> Iterator[ProcedureShell]:
    """Yield a shell in a folder prepared for the procedures, with upstream accounts of its own."""
    (tmp_path / "bin").mkdir()
    for name, command in {"gateway": f"{sys.executable} -m service", "redis-server": find_server_binary()}.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "photo.jpg").write_bytes(make_png())
    (tmp_path / "deploy").symlink_to(ROOT / "deploy")
    keys = {name: f"{name}-{tmp_path.name}" for name in _KEYS}
    with run_valkey(*_STORE, port=reserve_port()) as first, run_valkey(*_STORE, port=reserve_port()) as second:
        shell = ProcedureShell(tmp_path, upstream, (first.port, second.port), keys)
        for key in keys.values():
            balance = {"count": 10, "money": 0}
            httpx2.put(f"{upstream.url}/_control/accounts/{key}", json=balance).raise_for_status()
        yield shell


def test_first_install(here: ProcedureShell) -> None:
    """A first installation ends with a successful task, a valid store, and metrics for alerts with the own links."""
    settings, begin, trial = shell_blocks("First install")
    redis, monitoring = shell_blocks("What Redis needs"), shell_blocks("Monitoring")
    printed = here.run(settings, *shell_blocks("Setup"), begin, trial, *redis, *monitoring)
    assert printed.count("These settings are valid for production.") == 2
    assert "warning" not in printed
    assert '"state":"succeeded"' in printed
    assert re.search(r"^main +open +9 ", printed, re.MULTILINE)
    assert (here.folder / "secrets" / "secret-keys").stat().st_mode & 0o077 == 0
    assert "gateway_redis_up 1" in printed
    alerts = "".join(item.read_text() for item in (here.folder / "prometheus").glob("alerts-*.yaml"))
    assert "https://wiki.example/RUNBOOK.md#" in alerts
    assert not re.search(r"https://(imaging-gateway|grafana)\.example/(?!RUNBOOK.md<)", re.sub(r"^#.*", "", alerts))


def test_tenants_and_tokens(here: ProcedureShell) -> None:
    """A new tenant has its limits, a rotated token expires, the file has both, and an exhausted account opens again."""
    account = f"{here.upstream.url}/_control/accounts/the-user-key"
    set_balance = 'curl -fsS -o /dev/null -X PUT -d \'{"count":%d,"money":0}\' ' + account
    printed = here.run_installed(
        *(
            *shell_blocks("Add a tenant"),
            *shell_blocks("Warn before a limit"),
            *shell_blocks("Report a month's spending"),
            *shell_blocks("Rotate a token"),
            "submit",
            "cp shop.second shop.token",
            "submit",
        ),
        *(set_balance % 0, "if submit; then exit 1; fi; gateway account show main"),
        *(set_balance % 5, *shell_blocks("Top up an account"), "submit"),
    )
    assert '"limit":1000' in printed
    tenants = tomllib.loads((here.folder / "registry.toml").read_text())["tenants"]
    assert tenants.keys() == {"press", "shop"}
    limit = {"window": "month", "tasks": 1000, "money": 500, "warn_at": [50, 80, 95]}
    assert tenants["press"]["limits"] == [limit]
    assert (here.folder / "spending.csv").read_text().startswith("period,tenant,tenant_id,kind,")
    tokens = [(token.get("label"), "expires_at" in token) for token in tenants["shop"]["tokens"].values()]
    assert tokens == [("web shop", True), ("web shop, second", False)]
    assert re.findall(r"^state: +(\w+)$", printed, re.MULTILINE)[-3:] == ["exhausted", "open", "open"]


def test_rotate_a_user_key(here: ProcedureShell) -> None:
    """A new key is used at once, and another account replaces the deleted one."""
    renewed, another = shell_blocks("Rotate a user_key")
    printed = here.run_installed("submit", renewed, "submit", another, "submit")
    assert "accounts.main.user_key: the secret is changed" in printed
    assert here.count_submits() == [1, 1, 1, 0]
    assert "[accounts.main]" not in (here.folder / "registry.toml").read_text()


def test_change_the_upstreams_address(here: ProcedureShell) -> None:
    """The account sends to the new address before and after the restart, and to no other without its key."""
    redirect = "if gateway account update main --base-url http://127.0.0.1:9; then exit 1; fi"
    here.run_installed("submit", redirect, *shell_blocks("Change the upstream's address"), "submit")
    assert here.count_submits() == [2, 0, 0, 0]
    assert "base_url" not in (here.folder / "registry.toml").read_text()


def test_rotate_the_secret_keys(here: ProcedureShell) -> None:
    """After the old key is removed the account still works, and only older task ids are lost."""
    behind, front, alone = shell_blocks("Rotate the secret keys")
    printed = here.run_installed(
        *("submit", "cp task.json old.json", behind, "read_task old.json", front, "read_task old.json"),
        *("submit", "cp task.json new.json", alone, "submit", "read_task new.json", "read_task old.json"),
    )
    assert "Encrypted with the first secret key: accounts.main.user_key" in printed
    assert printed.count(ENCRYPTED_MESSAGE) == 2
    assert re.findall(r"(200|404)", printed.replace(ENCRYPTED_MESSAGE, "")) == ["200", "200", "200", "404"]
    assert "task.decryption_failed" not in (here.folder / "one.log").read_text()


def test_drain_and_scale(here: ProcedureShell) -> None:
    """A replica drains cleanly, operators are named and get another token, and api and worker do the work of one."""
    ask = (
        "curl -sS -o /dev/null -w 'old token: %{http_code}\n' -H \"Authorization: Bearer $OLD\" $OPS/admin/v1/accounts"
    )
    drained = "cp one.log drained.log; start one; OLD=$(cat secrets/admin-token)"
    printed = here.run_installed(
        *(*shell_blocks("Drain a replica"), 'wait "$(cat one.pid)"', drained),
        *(*shell_blocks("Name the operators"), *shell_blocks("Rotate an operator's token"), ask),
        *(*shell_blocks("Scale api and worker apart"), "submit"),
    )
    assert "gateway_settlements_pending 0" in printed
    assert not re.search(r'"level":"(error|critical)"', (here.folder / "drained.log").read_text())
    assert re.search(r"^main +open ", printed, re.MULTILINE)
    assert "old token: 401" in printed
    assert "task.finished" in (here.folder / "worker.log").read_text()
    assert "task.finished" not in (here.folder / "api.log").read_text()


def test_upgrade(here: ProcedureShell) -> None:
    """The new process serves alone once the old one is drained."""
    moved = ("TENANTS=http://127.0.0.1:8090", "read_task task.json", "submit")
    assert here.run_installed("submit", *shell_blocks("Upgrade"), *moved).endswith("200")


def test_upgrade_to_another_data_version(here: ProcedureShell) -> None:
    """A store of another version is refused; under a new prefix tenants read old tasks and spend."""
    old, new = shell_blocks("Upgrade to another data version")
    begin = (
        'curl -fsS -o running.json -H "Authorization: Bearer $(cat shop.token)" -F image=@photo.jpg '
        '"$TENANTS/v1/tasks/face-enhance"'
    )
    other = f"redis-cli -p {here.stores[0]} set {{gw}}:version 1"
    refused = "if gateway check-config --connect; then exit 1; fi; if start one; then exit 1; fi"
    last, end = (
        f'curl -fsS -X PUT -d \'{{"seconds":{seconds},"faults":[]}}\' {here.upstream.url}/_control/behaviour'
        for seconds in (3600, 0)
    )
    printed = here.run_installed(
        *("submit", last, begin, old, other, refused, new, "used"),
        *("read_task task.json", "cp read.json finished.json", "read_task running.json", "used", end, "submit", "used"),
    )
    assert printed.count(f"has version 1, and this gateway uses version {DATA_VERSION}") == 2
    assert re.findall(r'"used":(\d+)', printed) == ["0", "2", "3"]
    assert '200200"used":2' in printed
    assert '"state":"succeeded"' in (here.folder / "finished.json").read_text()
    assert '"state":"running"' in (here.folder / "read.json").read_text()


def test_back_up_and_restore(here: ProcedureShell) -> None:
    """A backup that is tested has all data, and its secrets decrypt; restored, what was revoked since stays revoked."""
    printed = here.run_installed(
        *("submit", "gateway token create shop >second.token", *shell_blocks("Back up")),
        *shell_blocks("Test a restore"),
        *("gateway token revoke shop 0123456789ab", "keep", *shell_blocks("Restore Redis from a back-up")),
        *("read_task task.json", "cp second.token shop.token", "submit"),
        "stop one; redis-cli -p 6391 shutdown; wait",
        *("redis-server --port 6391 --dir data --appendonly yes >data/log &", "start one", "used"),
    )
    assert ENCRYPTED_MESSAGE in printed
    assert re.search(r"^main +open +9 ", printed, re.MULTILINE)
    assert re.search(r"shop +face-enhance .*\b1\b", printed)
    assert "task.finished" not in (here.folder / "restored.log").read_text()
    assert printed.endswith('401"used":2\n')


def test_move_redis(here: ProcedureShell) -> None:
    """The new store has all tasks and usage, and the old one is off."""
    first, second = here.stores
    printed = here.run_installed(
        *("submit", "cp task.json old.json", *shell_blocks("Move Redis"), "submit", "read_task old.json", "used"),
        *(f"! redis-cli -p {first} ping 2>/dev/null", f"redis-cli -p {second} info replication"),
    )
    assert '200"used":2' in printed
    assert "role:master" in printed


def test_registry_file_alone(here: ProcedureShell) -> None:
    """From the file alone a tenant reads its task, its limits start from zero, and it continues with the real key."""
    lost = ("submit", "keep", "stop one", f"redis-cli -p {here.stores[0]} flushall")
    restored = shell_blocks("Restore from the registry file alone")
    printed = here.run_installed(
        *(*lost, *restored, "used", "read_task task.json", "used"),
        *(*shell_blocks("From the sandbox to the real upstream"), "submit"),
    )
    assert '"used":0\n200"used":1\n' in printed
    assert here.count_submits() == [1, 0, 0, 1]


def test_every_procedure_is_tested() -> None:
    """Every block is run by a test of this module, or has a reason why not."""
    source = Path(__file__).read_text()
    for heading, blocks in read_procedures().items():
        languages = {language for language, _ in blocks}
        assert languages - {"sh"} == ({"console"} if heading in UNTESTED_PROCEDURES else set()), heading
        assert "sh" not in languages or f'shell_blocks("{heading}")' in source, heading
