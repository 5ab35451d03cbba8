"""The second half of the check, inside the namespaces: start the image, do the main job, stop it.

The image runs as an engine would run it: read-only, with its user, its environment, and its command as process 1.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import os
import re
import secrets
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from msgspec import Struct, json

from service import __version__
from service.demo.run import JOBS
from service.devstack import SANDBOX_USER_KEY
from tests.image.buildah import Config
from tests.image.report import TIMEOUT_SECONDS, CheckFailed, expect, run_command, step, wait_until
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
_DEVICES = {"null": (1, 3), "zero": (1, 5), "full": (1, 7), "random": (1, 8), "urandom": (1, 9)}


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
    _mount_scratch(root / "dev", "mode=755,noexec,nosuid,size=64k")
    for name, (major, minor) in _DEVICES.items():
        device = root / "dev" / name
        os.mknod(device, stat.S_IFCHR, os.makedev(major, minor))
        device.chmod(0o666)
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


@dataclass(frozen=True)
class RunningContainer:
    """A running container."""

    process: subprocess.Popen[bytes]
    log_path: Path

    def read_log(self) -> str:
        return self.log_path.read_text()

    def expect_alive(self) -> None:
        code = self.process.poll()
        expect(code is None, f"{self.read_log()}the container ended with exit code {code}")

    def stop(self, signal_number: signal.Signals) -> int:
        """Send a signal to process 1 of the container; returns the exit code."""
        (child,) = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        os.kill(int(child), signal_number)  # not its parent `unshare`, which does not forward signals
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{self.read_log()}it still runs {TIMEOUT_SECONDS:g} s after the signal") from None


class Container:
    """An image's configuration on a mounted root."""

    def __init__(self, root: Path, config: Config, settings: Mapping[str, str]) -> None:
        user, group = config.parse_user()
        isolation = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc=/proc")
        place = ("--root", str(root), "--wd", config.working_dir or "/")
        identity = ("--setgid", str(group), "--setuid", str(user))
        self._confined = ["setpriv", "--no-new-privs", *isolation, *place, *identity, "--"]
        self._command = [*config.entrypoint, *config.cmd]
        self._image_environ = dict(item.split("=", 1) for item in config.env)
        self._environ = {**self._image_environ, **settings}

    def execute(self, *words: str, stdin: str = "", without_settings: bool = False) -> tuple[int, str]:
        """Run another command in the container; returns its exit code and its output, stderr included."""
        done = subprocess.run(
            [*self._confined, *words],
            input=stdin,
            env=self._image_environ if without_settings else self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
        )
        return done.returncode, done.stdout

    def check_output(self, *words: str, stdin: str = "") -> str:
        """Run another command that must succeed; returns its output."""
        code, output = self.execute(*words, stdin=stdin)
        expect(code == 0, f"{output}`{' '.join(words)}` ended with exit code {code}")
        return output

    @contextmanager
    def start(self, log: Path) -> Iterator[RunningContainer]:
        """Start the image's command, which is killed at the end."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*self._confined, *self._command],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            yield RunningContainer(process, log)
        finally:
            process.kill()
            process.wait()


def main() -> None:
    """Read the input from standard input and run all checks; exits with 1 at the first failure."""
    inputs = json.decode(sys.stdin.buffer.read(), type=SmokeTestInput)
    config, folder = inputs.config, Path(inputs.folder)
    root = folder / "root"
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
        container = Container(root, config, _settings(store.port, upstream.url))
        with step("image: runs as its user on a read-only root"):
            _expect_confined(container, root, config)
        with step("image: loads bytecode only"):
            _expect_bytecode(container)
        with step("image: names missing settings and modules"):
            _expect_clear_errors(container)
        with step("image: starts, and its health check reports that"):
            words = config.healthcheck.test if config.healthcheck else []
            expect(words[:1] == ["CMD"], f"the health check must be in exec form, not {words}")
            expect(container.execute(*words[1:])[0] == 1, "the health check does not fail without a gateway")
            gateway = opened.enter_context(container.start(folder / "log"))
            wait_until(lambda: _is_ready(gateway), "readiness")
            expect(container.execute(*words[1:])[0] == 0, f"{gateway.read_log()}the health check fails")
        with step("image: does the main job") as figures:
            figures.append(f"{len(JOBS)} images")
            _run_main_job(container, gateway, folder / "results")
        with step("image: leaves nothing behind"):
            left = [path.name for path in (root / "tmp").iterdir()]
            expect(not left, f"left in the scratch folder: {', '.join(left)}")
        # With an idle connection, as clients and load balancers keep.
        with step("image: stops cleanly on its signal"), httpx2.Client(trust_env=False) as client:
            client.get(f"{_TENANTS}/healthz").raise_for_status()
            code = gateway.stop(signal.Signals[config.stop_signal])
            expect(code == 0, f"{gateway.read_log()}it ended with exit code {code}")
            levels = {json.decode(line, type=dict[str, Any])["level"] for line in gateway.read_log().splitlines()}
            expect(levels <= {"debug", "info"}, f"{gateway.read_log()}the log has a warning")


def _settings(store: int, upstream: str) -> Mapping[str, str]:
    return {
        "GATEWAY_REDIS_URL": f"redis://127.0.0.1:{store}",
        "GATEWAY_UPSTREAM_URL": upstream,
        "GATEWAY_SECRET_KEYS_FILE": str(_SECRETS / "secret-keys"),
        "GATEWAY_ADMIN_TOKEN_FILE": str(_SECRETS / "admin-token"),
        "GATEWAY_POLL_SECONDS": "0.1",
    }


def _expect_confined(container: Container, root: Path, config: Config) -> None:
    """Require the confinement itself, without which the other checks are meaningless."""
    user, group = config.parse_user()
    identity = container.check_output("python", "-c", _IDENTITY_PROGRAM).split()
    expected = [str(user), str(group), "[]", "0000000000000000", "1"]
    expect(identity == expected, f"user, group, groups, capabilities, no-new-privileges: {identity}, not {expected}")
    try:
        (root / "app" / "written").touch()
    except OSError as error:
        expect(error.errno == errno.EROFS, f"the root can't be written to, but for another reason: {error}")
    else:
        raise CheckFailed("the root can be written to")


def _expect_bytecode(container: Container) -> None:
    """With a read-only root, a module without valid bytecode would be compiled at every start."""
    output = container.check_output("python", "-v", "-c", "import service.cli.serve")
    loaded = re.findall(r"^# code object from '?(/app/.*?)'?$", output, re.MULTILINE)
    compiled = [path for path in loaded if path.endswith(".py")]
    expect(loaded, "Python reports no loaded module")
    expect(not compiled, f"{len(compiled)} modules are compiled at the start, such as {compiled[:1]}")


def _expect_clear_errors(container: Container) -> None:
    output = container.check_output("gateway", "--version").strip()
    expect(output.endswith(f" {__version__}"), f"its version is {output!r}, not {__version__}")
    for command, code, names in (
        ("serve", 2, ("GATEWAY_REDIS_URL", "GATEWAY_UPSTREAM_URL", "GATEWAY_SECRET_KEYS", "GATEWAY_ADMIN_TOKEN")),
        ("sandbox", 1, ("imaging-gateway[local]",)),
    ):
        result, output = container.execute("gateway", command, without_settings=True)
        is_clear = all(name in output for name in names) and "Traceback" not in output
        expect(result == code and is_clear, f"{output}`gateway {command}` ended with {result} or without the names")


def _run_main_job(container: Container, gateway: RunningContainer, results: Path) -> None:
    """Create an account, a tenant and a token with the image's command, and run the demo with them."""
    container.check_output("gateway", "account", "create", "main", "--user-key-file", "-", stdin=SANDBOX_USER_KEY)
    limit = f"total:tasks={len(JOBS)}"
    container.check_output("gateway", "tenant", "create", "shop", "--account", "main", "--limit", limit)
    token = json.decode(container.check_output("gateway", "token", "create", "shop", "--json"))["token"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    # The demo checks the images with a library that the image does not have.
    demo = [sys.executable, "-m", "service", "demo", "--url", _TENANTS, "--token", token, "--folder", str(results)]
    done = subprocess.run(demo, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    expect(done.returncode == 0, f"{gateway.read_log()}{done.stdout}the demo ended with exit code {done.returncode}")
    policies = json.decode(container.check_output("gateway", "quota", "shop", "--json"))["policies"]
    left = [policy["remaining"] for policy in policies if policy["unit"] == "tasks"]
    expect(left == [0], f"of a limit of {len(JOBS)} tasks, {left} are left")


def _is_ready(gateway: RunningContainer) -> bool:
    gateway.expect_alive()
    with suppress(httpx2.TransportError):
        return httpx2.get(f"{_OPERATORS}/readyz", trust_env=False).status_code == 200
    return False


if __name__ == "__main__":
    main()
