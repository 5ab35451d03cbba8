"""The second half of the check, inside the namespaces: start the image, do the main job, stop it.

The image runs as an engine would run it: read-only, with its user, its environment, and its command as process 1.
"""

from __future__ import annotations

import base64
import fcntl
import os
import re
import secrets
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
from msgspec import Struct, json

from service import __version__
from tests.image.buildah import Config
from tests.image.report import Program, run_command, run_main_job, step
from tests.process.gateway import TIMEOUT_SECONDS
from tests.process.sandbox import run_sandbox
from tests.support.network import reserve_port
from tests.support.valkey import run_valkey

_TENANTS = "http://127.0.0.1:8080"
_OPERATORS = "http://127.0.0.1:8081"
_IDENTITY_PROGRAM = (
    "import os, pathlib; status = pathlib.Path('/proc/self/status').read_text();"
    "print(os.getuid(), os.getgid(), os.getgroups(), *(line.split()[1] for line in status.splitlines()"
    " if line.startswith(('CapEff', 'NoNewPrivs'))))"
)
_SECRETS = Path("/run/secrets")
"""The folder of a container's secrets."""
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


class SmokeTestInput(Struct):
    """The image's configuration, the folder with its files, and an empty folder that outlives the namespaces."""

    config: Config
    tree: str
    folder: str


def _connect_loopback() -> None:
    """Bring up the loopback interface of a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", _IFF_UP))


def _mount_rootfs(tree: Path, root: Path, secrets: Mapping[str, str], user: int, group: int) -> None:
    """Mount a container's root at `root`, an empty folder: the read-only tree with devices, secrets and scratch folder.

    The mounts exist only in this namespace: the folder must not be deleted from within.
    """
    run_command(["mount", "--bind", str(tree), str(root)])
    run_command(["mount", "--options", "remount,bind,ro,nosuid,nodev", str(root)])
    _mount_scratch(root / "tmp", "mode=1777,noexec,nosuid,nodev,size=256m")
    run_command(["mount", "--bind", "/dev", str(root / "dev")])
    _mount_scratch(root / "run", "mode=755,noexec,nosuid,nodev,size=1m")
    folder = root / _SECRETS.relative_to("/")
    folder.mkdir()
    for name, secret in secrets.items():
        (folder / name).write_text(secret)
        (folder / name).chmod(0o400)
        os.chown(folder / name, user, group)
    run_command(["mount", "--options", "remount,bind,ro", str(root / "run")])


def _mount_scratch(place: Path, options: str) -> None:
    run_command(["mount", "--types", "tmpfs", "--options", options, "tmpfs", str(place)])


def _configure_program(root: Path, config: Config) -> Program:
    """Return how commands run in the image: as its user, without privileges, with its environment."""
    user, group = config.parse_user()
    isolation = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc=/proc")
    place = ("--root", str(root), "--wd", config.working_dir or "/")
    identity = ("--setgid", str(group), "--setuid", str(user))
    words = ["setpriv", "--no-new-privs", *isolation, *place, *identity, "--"]
    return Program(words, dict(item.split("=", 1) for item in config.env), Path("/"))


def _find_container(process: subprocess.Popen[bytes]) -> int:
    """Return process 1 of a container; its parent is `unshare`, which does not forward signals."""
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return int(child)


def _stop(process: subprocess.Popen[bytes], signal_number: signal.Signals) -> int:
    """Send a signal to process 1 of a container; returns the exit code."""
    os.kill(_find_container(process), signal_number)
    return process.wait(TIMEOUT_SECONDS)


def main() -> None:
    """Read the input from standard input and run all checks; exits with 1 at the first failure."""
    inputs = json.decode(sys.stdin.buffer.read(), type=SmokeTestInput)
    config, folder = inputs.config, Path(inputs.folder)
    root, log = folder / "root", folder / "log"
    root.mkdir()
    with ExitStack() as opened:
        with step("image: isolated namespaces, with a store and an upstream"):
            _connect_loopback()
            keys = {
                "secret-keys": base64.b64encode(secrets.token_bytes(32)).decode(),
                "admin-token": secrets.token_urlsafe(32),
            }
            _mount_rootfs(Path(inputs.tree), root, keys, *config.parse_user())
            store = opened.enter_context(run_valkey(port=reserve_port()))
            upstream = opened.enter_context(run_sandbox())
        bare = _configure_program(root, config)
        settings = {
            "GATEWAY_REDIS_URL": f"redis://127.0.0.1:{store.port}",
            "GATEWAY_UPSTREAM_URL": upstream.url,
            "GATEWAY_SECRET_KEYS_FILE": str(_SECRETS / "secret-keys"),
            "GATEWAY_ADMIN_TOKEN_FILE": str(_SECRETS / "admin-token"),
            "GATEWAY_POLL_SECONDS": "0.1",
        }
        container = replace(bare, environ={**bare.environ, **settings})
        with step("image: runs as its user on a read-only root"):
            _expect_confined(container, root, config)
        with step("image: loads bytecode only"):
            _expect_bytecode(container)
        with step("image: names missing settings and modules"):
            assert container.check_output("gateway", "--version").split()[-1] == __version__, "its version is another"
            bare.expect_failure("gateway", "serve", code=2, names=("GATEWAY_REDIS_URL", "GATEWAY_SECRET_KEYS"))
            bare.expect_failure("gateway", "sandbox", code=1, names=("extra [local]",))
        with step("image: starts, and its health check reports that"):
            words = config.healthcheck.get("Test", [])
            assert words[:1] == ["CMD"], f"the health check must be in exec form, not {words}"
            assert container.execute(*words[1:])[0] == 1, "the health check does not fail without a gateway"
            command = (*config.entrypoint, *config.cmd)
            gateway = opened.enter_context(container.start(*command, log=log, ops_url=_OPERATORS))
            assert container.execute(*words[1:])[0] == 0, f"{log.read_text()}the health check fails"
        with step("image: leaves no core dump"):
            # The files of a process that is not dumpable belong to root (proc(5)).
            owner = Path(f"/proc/{_find_container(gateway)}/environ").stat().st_uid
            assert owner == 0, f"its memory can be read by user {owner}"
        with step("image: does the main job"):
            run_main_job(replace(container, words=[*container.words, "gateway"]), _TENANTS, folder / "results")
        with step("image: leaves nothing behind"):
            left = [path.name for path in (root / "tmp").iterdir()]
            assert not left, f"left in the scratch folder: {', '.join(left)}"
        # With an idle connection, as clients and load balancers keep.
        with step("image: stops cleanly on its signal"), httpx2.Client(trust_env=False) as client:
            client.get(f"{_TENANTS}/healthz").raise_for_status()
            code = _stop(gateway, signal.Signals[config.stop_signal])
            assert code == 0, f"{log.read_text()}it ended with exit code {code}"
            levels = {json.decode(line, type=dict[str, Any])["level"] for line in log.read_text().splitlines()}
            assert levels <= {"debug", "info"}, f"{log.read_text()}the log has a warning"


def _expect_confined(container: Program, root: Path, config: Config) -> None:
    """Require the confinement itself, without which the other checks are meaningless."""
    user, group = config.parse_user()
    identity = container.check_output("python", "-c", _IDENTITY_PROGRAM).split()
    expected = [str(user), str(group), "[]", "0000000000000000", "1"]
    assert identity == expected, f"user, group, groups, capabilities, no-new-privileges: {identity}, not {expected}"
    assert not os.access(root / "app", os.W_OK), "the root can be written to"


def _expect_bytecode(container: Program) -> None:
    """With a read-only root, a module without valid bytecode would be compiled at every start."""
    output = container.check_output("python", "-v", "-c", "import service.cli.serve")
    loaded = re.findall(r"^# code object from '?(/app/.*?)'?$", output, re.MULTILINE)
    compiled = [path for path in loaded if path.endswith(".py")]
    assert loaded, "Python reports no loaded module"
    assert not compiled, f"{len(compiled)} modules are compiled at the start, such as {compiled[:1]}"


if __name__ == "__main__":
    main()
