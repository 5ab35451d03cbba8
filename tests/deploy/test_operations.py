"""Runs the procedures of OPERATIONS.md as written, on a running gateway."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from service.storage.redis import DATA_VERSION
from tests.deploy.procedures import (
    FILE,
    OUTPUT,
    RUN,
    ProcedureShell,
    count_submits,
    open_shell,
    read_procedures,
    set_balance,
    shell_blocks,
)
from tests.process.sandbox import SandboxProcess, run_sandbox

UNTESTED_PROCEDURES = {
    "First install": "docker: compose needs an engine; test_compose.py judges the file",
    "Upgrade": "helm and kubectl: they need a cluster; kubernetes/ judges the chart",
    "Monitoring": "amtool: it needs an Alertmanager",
}
"""Procedures with blocks that cannot be run here, and the reason."""
LONG, SHORT = '{"seconds":3600,"faults":[]}', '{"seconds":0,"faults":[]}'
"""The durations of the upstream's tasks."""
ENCRYPTED_MESSAGE = "All secrets of the registry are encrypted with the first secret key."


@pytest.fixture(scope="module")
def upstream() -> Iterator[SandboxProcess]:
    """Yield an upstream whose tasks take no time."""
    with run_sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def here(tmp_path: Path, upstream: SandboxProcess) -> Iterator[ProcedureShell]:
    """Yield a shell for an installation."""
    with open_shell(tmp_path, upstream) as found:
        yield found


def test_first_install(here: ProcedureShell) -> None:
    """A first installation ends with a successful task."""
    settings, begin, trial = shell_blocks("First install")
    printed = here.run(settings, *shell_blocks("Setup"), begin, trial)
    assert "These settings are valid for production." in printed
    assert '"state":"succeeded"' in printed
    assert re.search(r"^main +open +9 ", printed, re.MULTILINE)
    assert (here.folder / "secrets" / "secret-keys").stat().st_mode & 0o077 == 0


def test_tenants_and_tokens(here: ProcedureShell) -> None:
    """A new tenant has its limits, a rotated token expires, and the exported file contains both."""
    moved = ("submit", "cp shop.second shop.token", "submit")
    printed = here.run(
        *here.installation_steps(), *shell_blocks("Add a tenant"), *shell_blocks("Rotate a token"), *moved
    )
    assert '"limit":1000' in printed
    assert "The token 0123456789ab of shop expires in 604800 seconds." in printed
    tenants = tomllib.loads((here.folder / "registry.toml").read_text())["tenants"]
    assert tenants.keys() == {"press", "shop"}
    assert [(token.get("label"), "expires_at" in token) for token in tenants["shop"]["tokens"].values()] == [
        (None, True),
        ("web shop, second", False),
    ]


def test_rotate_a_user_key(here: ProcedureShell, upstream: SandboxProcess) -> None:
    """A new key is used at once, and another account replaces the deleted one."""
    renewed, another = shell_blocks("Rotate a user_key")
    printed = here.run(*here.installation_steps(), "submit", renewed, "submit", another, "submit")
    assert "accounts.main.user_key: the secret is changed" in printed
    assert [count_submits(upstream, key) for key in here.keys.values()] == [1, 1, 1, 0]
    assert "[accounts.main]" not in (here.folder / "registry.toml").read_text()


def test_rotate_the_secret_keys(here: ProcedureShell) -> None:
    """After the old key is removed the account still works, and only older task ids are lost."""
    behind, front, alone = shell_blocks("Rotate the secret keys")
    printed = here.run(
        *here.installation_steps(),
        *("submit", "cp task.json old.json", behind, "read_task old.json", front, "read_task old.json"),
        *("submit", "cp task.json new.json", alone, "submit", "read_task new.json", "read_task old.json"),
    )
    assert "Encrypted with the first secret key: accounts.main.user_key" in printed
    assert printed.count(ENCRYPTED_MESSAGE) == 2
    assert re.findall(r"(200|404)", printed.replace(ENCRYPTED_MESSAGE, "")) == ["200", "200", "200", "404"]
    assert "task.decryption_failed" not in (here.folder / "one.log").read_text()


def test_top_up_an_account(here: ProcedureShell, upstream: SandboxProcess) -> None:
    """An exhausted account opens again."""
    key = here.keys["the-user-key"]
    set_balance(upstream, key, count=0, money=0)
    account = f"{upstream.url}/_control/accounts/the-user-key"
    ordered = f'curl -fsS -o /dev/null -X PUT -d \'{{"count":5,"money":0}}\' {account}'
    refused = "if submit; then exit 1; fi; gateway account show main"
    printed = here.run(*here.installation_steps(), refused, ordered, *shell_blocks("Top up an account"), "submit")
    assert re.findall(r"^state: +(\w+)$", printed, re.MULTILINE) == ["exhausted", "open", "open"]


def test_drain_and_start_with_another_token(here: ProcedureShell) -> None:
    """A replica drains cleanly, and the next start accepts only the operators' new token."""
    ask = "curl -sS -o /dev/null -w '%{http_code}' -H \"Authorization: Bearer $OLD\" $OPS/admin/v1/accounts"
    printed = here.run(
        *(*here.installation_steps(), *shell_blocks("Drain a replica"), 'wait "$(cat one.pid)"', "start one"),
        *("OLD=$(cat secrets/admin-token)", *shell_blocks("Rotate the operators' token"), ask),
    )
    assert "gateway_settlements_pending 0" in printed
    assert not re.search(r'"level":"(error|critical)"', (here.folder / "one.log").read_text())
    assert re.search(r"^main +open ", printed, re.MULTILINE)
    assert printed.endswith("401")


def test_scale_apart(here: ProcedureShell) -> None:
    """An api and a worker process do the work of one."""
    here.run(*here.installation_steps(), *shell_blocks("Scale api and worker apart"), "submit")
    assert "task.finished" in (here.folder / "worker.log").read_text()
    assert "task.finished" not in (here.folder / "api.log").read_text()


def test_upgrade(here: ProcedureShell) -> None:
    """The new process serves alone once the old one is drained."""
    here.run(
        *here.installation_steps(),
        "submit",
        *shell_blocks("Upgrade"),
        "TENANTS=http://127.0.0.1:8090",
        "read_task task.json",
        "submit",
    )


def test_upgrade_to_another_data_version(here: ProcedureShell, upstream: SandboxProcess) -> None:
    """A store of another version is refused; under a new prefix tenants read old tasks and spend."""
    old, new = shell_blocks("Upgrade to another data version")
    begin = (
        'curl -fsS -o running.json -H "Authorization: Bearer $(cat shop.token)" -F image=@photo.jpg '
        '"$TENANTS/v1/tasks/face-enhance"'
    )
    other = f"redis-cli -p {here.stores[0]} set {{gw}}:version 1"
    refused = "if gateway check-config --connect; then exit 1; fi; if start one; then exit 1; fi"
    control = f"{upstream.url}/_control/behaviour"
    printed = here.run(
        *(*here.installation_steps(), "submit", f"curl -fsS -X PUT -d '{LONG}' {control}", begin),
        *(old, other, refused, new, "used"),
        *("read_task task.json", "cp read.json finished.json", "read_task running.json", "used"),
        *(f"curl -fsS -X PUT -d '{SHORT}' {control}", "submit", "used"),
    )
    assert printed.count(f"has version 1, and this gateway uses version {DATA_VERSION}: run `gateway export`") == 2
    assert re.findall(r'"used":(\d+)', printed) == ["0", "2", "3"]
    assert '200200"used":2' in printed
    assert '"state":"succeeded"' in (here.folder / "finished.json").read_text()
    assert '"state":"running"' in (here.folder / "read.json").read_text()


def test_redis_requirements(here: ProcedureShell) -> None:
    """A store with the documented options passes without errors and warnings."""
    printed = here.run(shell_blocks("First install")[0], *shell_blocks("Setup"), *shell_blocks("What Redis needs"))
    assert "answers at" in printed
    assert "warning" not in printed


def test_back_up_and_restore(here: ProcedureShell) -> None:
    """A restored backup has all data, and its secrets decrypt."""
    printed = here.run(
        *here.installation_steps(), "submit", *shell_blocks("Back up"), *shell_blocks("Test a restore"), "submit"
    )
    assert ENCRYPTED_MESSAGE in printed
    assert re.search(r"^main +open +9 ", printed, re.MULTILINE)
    assert re.search(r"shop +face-enhance .*\b1\b", printed)
    assert "task.finished" not in (here.folder / "restored.log").read_text()


def test_restore_redis(here: ProcedureShell) -> None:
    """A restored store has the data of the copy; what was revoked since stays revoked."""
    printed = here.run(
        *(*here.installation_steps(), "submit", "gateway token create shop >second.token", *shell_blocks("Back up")),
        *("gateway token revoke shop 0123456789ab", "keep", *shell_blocks("Restore Redis from a back-up")),
        *("read_task task.json", "cp second.token shop.token", "submit"),
        *(
            "stop one; redis-cli -p 6391 shutdown; wait",
            "redis-server --port 6391 --dir data --appendonly yes >data/log &",
        ),
        *("start one", "used"),
    )
    assert printed.endswith('401"used":2\n')


def test_move_redis(here: ProcedureShell) -> None:
    """The new store has all tasks and usage, and the old one is off."""
    first, second = here.stores
    printed = here.run(
        *(
            *here.installation_steps(),
            "submit",
            "cp task.json old.json",
            *shell_blocks("Move Redis"),
            "submit",
            "read_task old.json",
        ),
        *("used", f"! redis-cli -p {first} ping 2>/dev/null", f"redis-cli -p {second} info replication"),
    )
    assert '200"used":2' in printed
    assert "role:master" in printed


def test_registry_file_alone(here: ProcedureShell) -> None:
    """From the file alone a tenant reads its task, and its limits start from zero."""
    lost = ("submit", "keep", "stop one", f"redis-cli -p {here.stores[0]} flushall")
    printed = here.run(
        *(*here.installation_steps(), *lost, *shell_blocks("Restore from the registry file alone")),
        *("used", "read_task task.json", "used"),
    )
    assert printed.endswith('"used":0\n200"used":1\n')


def test_real_upstream(here: ProcedureShell, upstream: SandboxProcess) -> None:
    """The tenant continues with its token and spends with the real key."""
    here.run(*here.installation_steps(), "submit", *shell_blocks("From the sandbox to the real upstream"), "submit")
    assert [count_submits(upstream, here.keys[name]) for name in ("the-user-key", "the-real-key")] == [1, 1]


def test_monitoring(here: ProcedureShell) -> None:
    """The metrics show that the store is readable, and no alert links to an example address."""
    printed = here.run(*here.installation_steps(), *shell_blocks("Monitoring"))
    assert "gateway_redis_up 1" in printed
    alerts = "".join(item.read_text() for item in (here.folder / "prometheus").glob("alerts-*.yaml"))
    assert "https://wiki.example/RUNBOOK.md#" in alerts
    assert not re.search(r"https://(imaging-gateway|grafana)\.example/(?!RUNBOOK.md<)", re.sub(r"^#.*", "", alerts))


def test_every_procedure_is_tested() -> None:
    """Every block is run by a test of this module, or has a reason why not."""
    source = Path(__file__).read_text()
    for heading, blocks in read_procedures().items():
        marks = {block.language for block in blocks}
        assert marks <= {RUN, OUTPUT}, heading
        assert (OUTPUT in marks) == (heading in UNTESTED_PROCEDURES), heading
        assert RUN not in marks or f'shell_blocks("{heading}")' in source or heading == "Setup", heading


def test_links() -> None:
    """Every link leads to an existing file and heading."""
    for target in re.findall(r"\]\(([^)]+)\)", FILE.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        path = (FILE.parent / name) if name else FILE
        assert path.exists(), target
        headings = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        }, target
